"""Every family: a folded map does what an explicit one does, or the layer is refused by name and reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workers.runtime import Action, SkipPlan, apply
from workers.runtime.descriptor import UnsupportedFamilyError
from workers.runtime.families import describe
from workers.runtime.folding import FoldingError, added_share, fold_site
from workers.runtime.gaps import Part
from workers.runtime.locate import locate

from .catalogue import every_family, model_of, prompts_of
from .tiny import Family, batch_inputs, forget_positions, since

NO_LINEAR_END = {
    "gemma3", "glm4v", "gemma3n", "gemma4", "gemma3n_text", "llava over gemma2", "gemma3 of another pattern",
    "glm_ocr", "exaone4_5", "lfm3_vl", "hyperclovax_vision_v2", "muse_glimmer", "gemma4_unified", "qwen4_exp",
    "glm5_next", "llava over exaone4", "llava over glm4", "llava over olmo2", "llava over olmo3",
    *(() if since("5.18") else ("aria",)),
}  # fmt: skip
"""Families whose blocks normalise, gate or mix what the MLP gives before it enters the residual stream."""
SHARES = {"llava over granite": 0.7}
"""Families that multiply the MLP's output by a constant."""


@every_family
def test_maps_are_exact_or_refused(family: Family) -> None:
    model = model_of(family.name)
    try:
        stack = locate(model)
    except UnsupportedFamilyError:
        assert family.may_be_unsupported
        return
    found = _proven(family, model, "mlp")
    shares = {index: share for index, share in found.items() if isinstance(share, float)}
    if family.name in NO_LINEAR_END:
        assert not shares and all("cannot hold a map" in str(reason) for reason in found.values())
    elif family.name == "mllama":
        assert {index for index in found if index not in shares} == set(stack.text_config.cross_attention_layers)
    else:
        assert len(shares) == family.layers, found
    if family.name in SHARES:
        assert all(abs(share - SHARES[family.name]) < 1e-3 for share in shares.values())


@every_family
def test_maps_behind_attention_are_exact_or_refused_where_a_layer_runs_without_its_mlp(family: Family) -> None:
    model = model_of(family.name)
    try:
        allowed = describe(model).allowed
    except UnsupportedFamilyError:
        assert family.may_be_unsupported
        return
    without = {layer for layer, actions in enumerate(allowed) if Action.SKIP_MLP in actions}
    plan = SkipPlan(tuple(Action.SKIP_MLP if layer in without else Action.RUN for layer in range(len(allowed))))
    with apply(model, plan):
        found = _proven(family, model, "attention")
    shares = {layer: found[layer] for layer in without if isinstance(found[layer], float)}
    if family.name in NO_LINEAR_END:
        assert not shares and all("cannot hold a map" in str(found[layer]) for layer in without)
    else:
        assert shares.keys() == without, found
        assert all(abs(share - SHARES.get(family.name, 1.0)) < 1e-3 for share in shares.values())


def _proven(family: Family, model: Any, part: Part) -> dict[int, float | str]:
    """By layer, the share with which a part's output enters the stream, or why it holds no map."""
    stack = locate(model)
    found: dict[int, float | str] = {}
    handles = [
        layer.register_forward_hook(_Prover(stack, index, part, found), with_kwargs=True)
        for index, layer in enumerate(stack.layers)
    ]
    forget_positions(model)
    try:
        with torch.no_grad():
            model(**batch_inputs(family, prompts_of(family)[:1]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        forget_positions(model)
    return found


class _Prover:
    """A forward hook that runs its layer twice more, with and without a folded map."""

    def __init__(self, stack: Any, index: int, part: Part, found: dict[int, float | str]) -> None:
        self._stack, self._index, self._part, self._found, self._busy = stack, index, part, found, False

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._busy:
            return

        def run() -> Tensor:
            result = layer(*args, **kwargs)
            return result[0] if isinstance(result, tuple) else result

        self._busy = True
        try:
            self._found[self._index] = added_share(self._index, fold_site(self._stack, self._index, self._part), run)
        except FoldingError as error:
            self._found[self._index] = str(error)
        finally:
            self._busy = False
