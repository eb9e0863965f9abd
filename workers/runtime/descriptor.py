"""Describe what a model's decoder layers may do, and check plans against it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .plan import Action, PlanError, SkipPlan


class UnsupportedFamilyError(ValueError):
    """A model the runtime cannot run plans on; the message says what was not found, or not understood."""


@dataclass(frozen=True)
class KeepOne:
    """A set of layers of which at least one must not be skipped, whatever else the plan does.

    With ``before`` the rule binds only while one of those layers is kept: then a kept member of ``layers`` must come
    before the first kept one of ``before``.
    """

    layers: tuple[int, ...]
    reason: str
    before: tuple[int, ...] = ()

    def violated_by(self, plan: SkipPlan) -> bool:
        """Whether ``plan`` skips all layers of which one must stay."""
        kept = set(plan.kept)
        if not self.before:
            return not kept.intersection(self.layers)
        bound = [layer for layer in self.before if layer in kept]
        return bool(bound) and not any(layer < min(bound) for layer in kept.intersection(self.layers))


@dataclass(frozen=True)
class FamilyDescriptor:
    """Where a model's decoder layers are, which tokens are vision, and what every layer may do.

    ``refusals[layer]`` maps the actions that the layer may not take to the reason, in words for the user.
    """

    family: str
    """The configuration's ``model_type``."""
    num_layers: int
    stack_path: str
    """Dotted name of the decoder's module list, for example ``"model.language_model.layers"``."""
    vision_token_ids: tuple[int, ...]
    """Placeholder ids that image and video features replace; empty for text-only models."""
    refusals: tuple[Mapping[Action, str], ...]
    keep_one: tuple[KeepOne, ...] = field(default=())

    @property
    def allowed(self) -> tuple[frozenset[Action], ...]:
        """Per layer the actions it may take."""
        return tuple(frozenset(action for action in Action if action not in refused) for refused in self.refusals)

    def reason(self, layer: int, action: Action) -> str:
        """Why ``layer`` may not take ``action``; empty when it may."""
        return self.refusals[layer].get(action, "")


def validate(plan: SkipPlan, descriptor: FamilyDescriptor) -> None:
    """Check that the described model can take ``plan``.

    Raises :class:`PlanError` naming the layer and the reason when it cannot.
    """
    if len(plan) != descriptor.num_layers:
        raise PlanError(
            f"the plan has {len(plan)} layers, the {descriptor.family} model has {descriptor.num_layers} decoder layers"
        )
    for layer, action in enumerate(plan):
        reason = descriptor.reason(layer, action)
        if reason:
            raise PlanError(f"layer {layer} cannot take {action.letter} ({action.label}): {reason}")
    if not plan.kept:
        raise PlanError("the plan skips every layer: at least one must stay")
    for rule in descriptor.keep_one:
        if rule.violated_by(plan):
            named = ", ".join(map(str, rule.layers))
            raise PlanError(f"layers {named} cannot all be skipped: {rule.reason}")
