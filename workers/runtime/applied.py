"""Running a plan on a live model, and giving the model back as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor, nn

from .calls import RunningCalls
from .descriptor import FamilyDescriptor, validate
from .edits import Edits, NotCopied, refuse_copy
from .families import APPLIED, describe_stack
from .folding import Maps, fold
from .layer_config import Kept
from .layer_removal import remove_layers
from .locate import DecoderStack, locate
from .plan import Action, PlanError, SkipPlan
from .reload_check import require_faithful_reload
from .sublayers import block_of, leave_out
from .token_layers import TokenLayer
from .vision_tokens import VisionTokens

MASKED_ATTENTION = ("sdpa", "eager")
INCOMPLETE = (
    "the plan {0} left parts of layers out of this model for good, and a checkpoint of what is left could be loaded by "
    "nothing: export the plan in format runtime, and copy its directory to hand it on"
)
CHANGING = threading.RLock()
"""Held while a plan is put on a model or taken off, so that two threads cannot do so at a time."""


class AppliedPlan(NotCopied):
    """A plan on a model: a context manager that installs the plan and removes it again, bitwise.

    One plan at a time: while a plan other than the all-run plan is installed, installing another raises
    :class:`PlanError`. The all-run plan installs nothing. ``compensation`` holds the maps of the plan's gaps; while
    the plan is installed they are folded into the weights before the gaps.

    Any number of threads may call the model meanwhile. Removing the plan waits for calls that run in other threads.
    While it is installed, the model's configuration is that of the kept layers, for whoever else reads or copies it.
    """

    def __init__(self, model: nn.Module, plan: SkipPlan, compensation: Maps | None = None) -> None:
        self.plan = plan
        self.compensation = compensation
        self._model = model
        self._edits = Edits()
        self._calls = RunningCalls()
        with CHANGING:
            self._stack: DecoderStack = locate(model)
            self._refuse_second_plan()
            self.descriptor: FamilyDescriptor = describe_stack(self._stack)
        validate(plan, self.descriptor)
        _require_known(plan)
        self._tokens = VisionTokens(self.descriptor.vision_token_ids)

    @property
    def vision_mask(self) -> Tensor | None:
        """Vision tokens given by hand, bool ``[batch, tokens]``: for calls with ``inputs_embeds`` or of inner modules.

        It holds for every call of the thread that sets it until it is set anew; calls of threads that have set none
        are refused meanwhile.
        """
        return self._tokens.mask

    @vision_mask.setter
    def vision_mask(self, mask: Tensor | None) -> None:
        self._tokens.mask = mask

    def __enter__(self) -> AppliedPlan:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def install(self, *, permanent: bool = False) -> None:
        """Put the plan on the model. Raises :class:`PlanError` when one is on it already."""
        if self.plan.is_dense:
            return
        with CHANGING:
            self._refuse_second_plan()
            if len(self._stack.layers) != self.descriptor.num_layers:
                raise PlanError("the model has lost layers since apply() was called: call it again")
            try:
                self._install(permanent)
            except BaseException:
                self._edits.undo()
                raise

    def remove(self) -> None:
        """Give the model back as it was, once no other thread calls it; a plan already removed stays removed."""
        with self._calls.none_elsewhere(), CHANGING:
            self._edits.undo()

    def _refuse_second_plan(self) -> None:
        applied = self._stack.layers.__dict__.get(APPLIED)
        if applied is not None:
            raise PlanError(f"the plan {applied.plan.text} is applied to this model: remove it before applying another")

    def _install(self, permanent: bool) -> None:
        stack, plan = self._stack, self.plan
        if not permanent or plan.partial or plan.needs_vision_tokens:
            self._edits.set_instance_attribute(stack.layers, APPLIED, self)
        if not permanent:
            self._refuse_what_would_go_wrong()
        elif plan.partial and hasattr(stack.model, "save_pretrained"):
            self._edits.set_instance_attribute(stack.model, "save_pretrained", _refusal(INCOMPLETE.format(plan.text)))
        if any(action.row.splits_attention for action in plan):
            self._require_masked_attention()
        layers = list(stack.layers)
        if self.compensation is not None:
            fold(self._edits, stack, plan, self.compensation)
        if plan.removed:
            remove_layers(self._edits, stack, Kept(plan.kept, plan.kept), permanent=permanent)
            if permanent:
                require_faithful_reload(stack)
        blocks = {
            layer: block_of(layers[layer], int(stack.text_config.hidden_size))
            for layer, action in enumerate(plan)
            if action.row.leaves_out
        }
        for new, old in enumerate(plan.kept):
            if plan[old].row.removes_part:
                leave_out(self._edits, layers[old], blocks[old], new, plan[old], permanent=permanent)
        if any(action.row.vision_only or action.row.leaves_out == "mlp" for action in plan):
            self._refuse_router_logits()
        if not plan.needs_vision_tokens:
            if not permanent:
                for method in ("forward", "generate"):
                    if hasattr(stack.model, method):
                        self._calls.watch(self._edits, stack.model, method)
            return
        self._tokens.watch(self._edits, self._calls, stack)
        mask_may_be_none = stack.text_config._attn_implementation == "sdpa"
        for new, old in enumerate(plan.kept):
            if plan[old].row.vision_only:
                special = TokenLayer(
                    layers[old],
                    new,
                    plan[old],
                    self._tokens,
                    mask_may_be_none=mask_may_be_none,
                    block=blocks.get(old),
                )
                self._edits.set_instance_attribute(layers[old], "forward", special)

    def _refuse_what_would_go_wrong(self) -> None:
        model, text = self._stack.model, self.plan.text
        self._edits.set_instance_attribute(model, "__reduce_ex__", refuse_copy)  # before its other parts are copied
        saving = f"the plan {text} is on this model and would not be saved with it: leave apply() first; save_pruned() "
        if hasattr(model, "save_pretrained"):
            self._edits.set_instance_attribute(
                model, "save_pretrained", _refusal(saving + "writes a model without its skipped layers")
            )
        if self.plan.removed or self.compensation is not None:
            moving = f"the plan {text} is on this model: layers and weights that it put aside would not be moved or "
            self._edits.set_instance_attribute(model, "_apply", _refusal(moving + "converted; leave apply() first"))

    def _refuse_router_logits(self) -> None:
        """Have calls refused that ask for what transformers makes of the routers' scores of every token and layer."""
        model = self._stack.model
        configs = [each for each in (model.config, self._stack.text_config) if hasattr(each, "output_router_logits")]

        def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
            asked = kwargs.get("output_router_logits")
            if asked or (asked is None and any(each.output_router_logits for each in configs)):
                raise PlanError(
                    f"under the plan {self.plan.text} not every token goes through every layer's experts, so how they "
                    "are balanced is not told: leave output_router_logits at False"
                )
            return lambda: None

        if configs:
            self._calls.watch(self._edits, model, "forward", refuse)

    def _require_masked_attention(self) -> None:
        implementation = self._stack.text_config._attn_implementation
        if implementation not in MASKED_ATTENTION:
            raise PlanError(
                f"frozen and bypassed layers need attention masks, which {implementation!r} attention does not take: "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )


def _refusal(reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise PlanError(reason)

    return refuse


def _require_known(plan: SkipPlan) -> None:
    for layer, action in enumerate(plan):
        row = action.row
        if not (action is Action.RUN or row.removes_layer or row.vision_only or row.leaves_out):
            raise PlanError(f"layer {layer}: nothing here runs {action.letter} ({action.label})")


def apply(model: nn.Module, plan: SkipPlan, compensation: Maps | None = None) -> AppliedPlan:
    """Return a context manager under which the model runs the plan.

    Use it as ``with apply(model, plan): model.generate(...)``.

    ``compensation`` gives the maps of all the plan's gaps (:mod:`workers.runtime.folding`); without it skips are plain.
    Raises :class:`PlanError` when the model cannot take the plan, and
    :class:`~workers.runtime.descriptor.UnsupportedFamilyError` when the model is not understood.
    """
    return AppliedPlan(model, plan, compensation)


def apply_permanently(model: nn.Module, plan: SkipPlan, compensation: Maps | None = None) -> AppliedPlan:
    """Put ``plan`` on ``model`` for good: skipped layers leave the model, its configuration and memory.

    Maps given as ``compensation`` stay in the weights.
    Layers without attention or without an MLP lose those modules. After a plan of R and S what is left is an ordinary
    model: it can be saved, described and given further plans.
    Raises :class:`PlanError`, the model as it was, when transformers would load such a model differently once saved.
    """
    applied = AppliedPlan(model, plan, compensation)
    applied.install(permanent=True)
    applied._edits.forget()
    return applied
