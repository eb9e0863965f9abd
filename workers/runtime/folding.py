"""Folding a linear map into the end of a decoder layer's MLP, so that the layer's own weights apply it.

Where a layer runs without its MLP, the end of its attention takes its place, here and in all that follows. With M what
a layer's MLP adds to the residual stream, a map T changes that to M T. Where M is made by linear projections alone,
their weights can hold T (W' = T^T W where the weight is [hidden, width]), at no cost at run time. Where it is one
projection of A [width], a change D of that projection adds A D (W' = W + D^T): every T is such a D, and most D are no
T.

Shapes: ``hidden`` is the width of the residual stream, ``width`` that of A, ``rows`` are the tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .edits import Edits
from .gaps import Gap, Part, Scope, gaps
from .hooked import replace_parameter, stored_parameter
from .locate import DecoderStack
from .plan import PlanError, SkipPlan
from .quantised import is_quantised

PROJECTIONS = frozenset(
    ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h", "fc_out", "wo", "output_linear", "dense_2", "linear_2")
)
"""Names of an MLP's last projection; of experts' too, whose weights may be parameters [experts, ...]."""
ATTENTION_PROJECTIONS = frozenset(("o_proj", "out_proj", "dense", "c_proj", "wo"))
"""Names of attention's last projection, and of what stands in its place in some layers."""
TOKEN_MIXERS = ("attn", "attention", "mamba", "mixer", "conv")
"""Parts of names of what mixes tokens in a layer: the projections in there are not the MLP's."""
EXACT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FoldingError(PlanError):
    """A map that a layer cannot hold; the message names the layer and the reason."""


@dataclass(frozen=True)
class GapMap:
    """The map that compensates one gap: what the MLP, or another ``part``, of layer ``layer`` adds instead of M.

    With scope ``output`` that is M ``matrix``, ``matrix`` being ``[hidden, hidden]``; with ``projection`` it is M + A
    ``matrix``, A being the input of the MLP's last projection and ``matrix`` ``[width, hidden]``. ``end`` is the last
    layer of the run of skipped layers behind ``layer``. ``share`` is the factor with which M enters the residual stream
    (1 in most families); folding does not need it, applying the map to states does.
    """

    layer: int
    end: int
    matrix: Tensor
    share: float = 1.0
    scope: Scope = "output"
    part: Part = "mlp"

    @property
    def change(self) -> Tensor:
        """The change of M, by what the map acts on: ``[hidden or width, hidden]``, float64."""
        matrix = self.matrix.double()
        return matrix if self.scope == "projection" else _minus_identity(matrix, matrix.device)


Maps = Mapping[int, GapMap]
"""By the layer that holds them, in the numbers of the dense model."""


@dataclass(frozen=True)
class Projection:
    """A weight that makes MLP outputs, and the dimension of it that is the hidden one."""

    module: nn.Module
    weight: str
    bias: str | None
    hidden_dim: int
    experts: bool


@dataclass(frozen=True)
class FoldSite:
    """The end of one decoder layer's MLP: the modules whose outputs add up to M, and the projections that make it."""

    outputs: tuple[nn.Module, ...]
    projections: tuple[Projection, ...]
    part: Part = "mlp"


NAMES: dict[Part, str] = {"attention": "attention", "mlp": "MLP"}
"""Of parts, in messages."""


def fold_site(stack: DecoderStack, index: int, part: Part = "mlp") -> FoldSite:
    """Find the end of the MLP, or of the attention, of the layer at ``index`` of the dense model.

    What is found is a reading of names and shapes; :func:`added_share` proves it on real states. Raises
    :class:`FoldingError` when there is none, or it is quantised.
    """
    layer = stack.layers[index]
    hidden = int(stack.text_config.hidden_size)
    outputs: list[nn.Module] = []
    projections: list[Projection] = []
    for name, child in layer.named_children():
        if any(own in name for own in TOKEN_MIXERS) != (part == "attention"):
            continue
        own = list(_projections(name, child, hidden, index, PROJECTIONS if part == "mlp" else ATTENTION_PROJECTIONS))
        if own:
            outputs.append(child)
            projections += own
    if not projections:
        raise FoldingError(f"layer {index} cannot hold a map: no last projection of its {NAMES[part]} was found")
    return FoldSite(tuple(outputs), tuple(projections), part)


def folded_bytes(stack: DecoderStack) -> tuple[int, ...]:
    """Return per layer the bytes of the weights that a map is folded into; 0 where the layer can hold none."""
    found = []
    for index in range(len(stack.layers)):
        try:
            site = fold_site(stack, index)
        except FoldingError:
            found.append(0)
            continue
        found.append(sum(getattr(each.module, each.weight).nbytes for each in site.projections))
    return tuple(found)


def _projections(name: str, child: nn.Module, hidden: int, index: int, names: Collection[str]) -> Iterator[Projection]:
    for path, module in child.named_modules():
        own_name = (path or name).rsplit(".", 1)[-1]
        if own_name in names:
            yield _linear(module, hidden, index, own_name)
        for parameter, value in module.named_parameters(recurse=False):
            if parameter in names and value.dim() == 3:
                yield _experts(module, parameter, value, hidden, index)


def _linear(module: nn.Module, hidden: int, index: int, name: str) -> Projection:
    weight = getattr(module, "weight", None)
    plain = type(module) in (nn.Linear, Conv1D) and not is_quantised(module)
    if not plain or weight is None or weight.dtype not in EXACT_DTYPES:
        kind = f"quantised {type(module).__name__}" if is_quantised(module) else type(module).__name__
        raise FoldingError(
            f"layer {index} cannot hold a map: its projection {name} is a {kind}, not a plain linear one; load the "
            "model without quantisation or adapters"
        )
    hidden_dim = 1 if isinstance(module, Conv1D) else 0
    if weight.shape[hidden_dim] != hidden:
        raise FoldingError(f"layer {index} cannot hold a map: {name} is {list(weight.shape)}, not {hidden} wide")
    bias = "bias" if getattr(module, "bias", None) is not None else None
    return Projection(module, "weight", bias, hidden_dim, experts=False)


def _experts(module: nn.Module, name: str, value: Tensor, hidden: int, index: int) -> Projection:
    if value.dtype not in EXACT_DTYPES:
        raise FoldingError(f"layer {index} cannot hold a map: its experts' weights are {value.dtype}")
    dims = [dim for dim in (1, 2) if value.shape[dim] == hidden]
    if len(dims) == 2:
        dims = [2 if getattr(module, "is_transposed", False) else 1]
    if not dims:
        raise FoldingError(f"layer {index} cannot hold a map: {name} is {list(value.shape)}, not {hidden} wide")
    bias = f"{name}_bias" if isinstance(getattr(module, f"{name}_bias", None), nn.Parameter) else None
    return Projection(module, name, bias, dims[0], experts=True)


# Folding ------------------------------------------------------------------------------------------------------------


def fold(edits: Edits, stack: DecoderStack, plan: SkipPlan, maps: Maps) -> None:
    """Put ``maps`` into the weights of the layers before the plan's gaps; ``edits`` puts the old weights back.

    A plan of skips alone may be what a checkpoint holds of one whose other actions its code runs: there may be maps for
    what these leave out. Raises :class:`FoldingError` when the maps are not those of the plan's gaps, or a layer cannot
    hold its map.
    """
    given = {Gap(each.layer, each.end, each.part) for each in maps.values()}
    if not (
        given in (set(gaps(plan)), set(gaps(plan, drift=True))) or (plan == plan.removal and _of_more(plan, given))
    ):
        raise FoldingError(f"the maps given are not those of the gaps of plan {plan.text}")
    for index in sorted(maps):
        fold_site_map(edits, fold_site(stack, index, maps[index].part), maps[index])


def _of_more(plan: SkipPlan, given: set[Gap]) -> bool:
    """Whether gaps may be those of a plan that has the skips of ``plan`` and leaves out parts of further layers."""
    places, needed = ({(gap.layer, gap.end) for gap in each} for each in (given, gaps(plan)))
    return needed <= places <= needed | {(layer, layer) for layer in plan.kept}


@contextmanager
def folded(stack: DecoderStack, plan: SkipPlan, maps: Maps) -> Iterator[None]:
    """Hold the maps in the weights of a model whose layers are all there."""
    edits = Edits()
    try:
        fold(edits, stack, plan, maps)
        yield
    finally:
        edits.undo()


def fold_site_map(edits: Edits, site: FoldSite, own: GapMap) -> None:
    """Put one map into the weights of a site. Raises :class:`FoldingError` when they cannot hold it."""
    if own.scope == "projection":
        require_projection(site, own.layer)
    for projection in site.projections:
        replace_parameter(edits, projection.module, projection.weight, folded_weight(projection, own))
        if projection.bias is not None:
            replace_parameter(edits, projection.module, projection.bias, _folded_bias(projection, own))


def require_projection(site: FoldSite, index: int) -> Projection:
    """Return the one projection that makes M. Raises :class:`FoldingError` where M is the sum of several ones'."""
    if len(site.projections) != 1 or site.projections[0].experts:
        raise FoldingError(
            f"layer {index} cannot hold a map of scope projection: several projections end its {NAMES[site.part]}; use "
            "output"
        )
    return site.projections[0]


def folded_weight(projection: Projection, own: GapMap) -> Tensor:
    """Return the projection's weight with the map in it: computed in float64 and rounded once, to the weight's dtype.

    Only the map's difference to doing nothing is added, so that doing nothing leaves every bit as it was.
    """
    weight = stored_parameter(projection.module, projection.weight).detach()
    change = own.change.to(weight.device)
    moved = weight.movedim(projection.hidden_dim, -1).double()  # [..., width, hidden]
    added = change if own.scope == "projection" else moved @ change
    return (moved + added).movedim(-1, projection.hidden_dim).to(weight.dtype).contiguous()


def _folded_bias(projection: Projection, own: GapMap) -> Tensor:
    assert projection.bias is not None
    bias = stored_parameter(projection.module, projection.bias).detach()
    result = bias.double()
    if own.scope == "output":
        result = result + result @ own.change.to(bias.device)
    return result.to(bias.dtype)


def _minus_identity(matrix: Tensor, device: torch.device) -> Tensor:
    change = matrix.to(device).double()
    return change - torch.eye(change.shape[0], dtype=change.dtype, device=device)


# Proof that a layer is residual + linear projection ------------------------------------------------------------------


class ActedOn:
    """Collects what a map acts on while a layer runs: M, the sum of some modules' outputs, or A, one module's input."""

    def __init__(self, modules: Sequence[nn.Module], *, inputs: bool = False) -> None:
        self._modules, self._inputs = tuple(modules), inputs
        self._found: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ActedOn:
        for module in self._modules:
            if self._inputs:
                handle = module.register_forward_pre_hook(lambda module, args: self._note(args))
            else:
                handle = module.register_forward_hook(lambda module, args, output: self._note(output))
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note(self, seen: Any) -> None:
        self._found.append(seen[0] if isinstance(seen, tuple) else seen)

    def take(self) -> Tensor:
        """M ``[rows, hidden]`` or A ``[rows, width]`` of the run that just ended.

        Raises RuntimeError when a module did not run exactly once.
        """
        found = self.take_runs()
        if len(found) != 1:
            raise RuntimeError(f"{len(found)} runs of the modules that hold a map were seen")
        return found[0]

    def take_runs(self) -> tuple[Tensor, ...]:
        """Return the same for every run: where attention is frozen for vision tokens, theirs comes behind text's.

        Raises RuntimeError when the modules did not run equally often.
        """
        found, self._found = self._found, []
        every = len(self._modules)
        if not found or len(found) % every:
            raise RuntimeError(f"{len(found)} runs of the {every} modules that hold a map were seen")
        parts = [part.reshape(-1, part.shape[-1]) for part in found]
        return tuple(sum(parts[at + 1 : at + every], parts[at]) for at in range(0, len(parts), every))


def acted_on(site: FoldSite, scope: Scope, index: int) -> ActedOn:
    """Collect what a map of this scope acts on. Raises :class:`FoldingError` where the layer cannot hold one."""
    if scope == "output":
        return ActedOn(site.outputs)
    return ActedOn([require_projection(site, index).module], inputs=True)


def added_share(index: int, site: FoldSite, run: Callable[[], Tensor], *, seed: int = 0) -> float:
    """Return the factor s with which M enters the layer's output (1 in most families), proven on real states.

    ``run`` executes the layer and returns its output ``[batch, tokens, hidden]``. A random map is folded in, and the
    output must change by s M (T - I), the same s for all tokens and dimensions. Raises :class:`FoldingError` when it
    does not: the block normalises or gates M, or other weights make it too.
    """
    with ActedOn(site.outputs) as watched:
        plain = run()
        output = watched.take().float()
    if plain.dim() != 3 or output.numel() != plain.numel():
        raise FoldingError(
            f"layer {index} cannot hold a map: its {NAMES[site.part]} gives {list(output.shape)} where its states are "
            f"{list(plain.shape)}"
        )
    output = output.view(plain.shape)
    hidden = plain.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    # As large as the stream itself, so that rounding of a low precision does not hide the change.
    size = float(plain.float().norm() / output.norm().clamp(min=1e-30))
    change = (torch.randn(hidden, hidden, generator=generator) * size / hidden**0.5).to(plain.device)
    edits = Edits()
    try:
        fold_site_map(edits, site, GapMap(index, index, torch.eye(hidden, device=plain.device) + change))
        changed = run()
    finally:
        edits.undo()
    expected = output @ change
    found = changed.float() - plain.float()
    share = float((found * expected).sum() / (expected * expected).sum().clamp(min=1e-30))
    error = float((found - share * expected).norm() / found.norm().clamp(min=1e-30))
    if not abs(share) > 1e-4 or not error < (1e-3 if plain.dtype in (torch.float32, torch.float64) else 5e-2):
        raise FoldingError(
            f"layer {index} cannot hold a map: its block does not end in residual + linear projection (the output of "
            f"its {NAMES[site.part]} is normalised, gated or transformed before it is added)"
        )
    return 1.0 if abs(share - 1.0) < 1e-2 else share
