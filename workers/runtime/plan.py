"""The skip plan: one action per decoder layer, an immutable value with a canonical text. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering
from typing import Any, overload

SCHEMA_VERSION = 1


class PlanError(ValueError):
    """A plan that cannot be read, or that a model cannot take; the message names the layer."""


class Action(Enum):
    """What happens at one decoder layer; the value is the letter in the plan's text."""

    RUN = "R"
    """Nothing is skipped."""
    FREEZE = "F"
    """Vision tokens keep their state; they still give keys and values to text."""
    BYPASS = "B"
    """Vision tokens keep their state and text does not attend to them: no keys, values or cache for them."""
    SKIP = "S"
    """The whole layer is the identity for every token: no work, no cache entry."""

    @classmethod
    def from_letter(cls, letter: str, layer: int) -> Action:
        """The action of ``letter``. Raises :class:`PlanError` naming ``layer`` when there is none."""
        try:
            return cls(letter)
        except ValueError:
            raise PlanError(f"layer {layer}: unknown action {letter!r}, expected one of {', '.join(LETTERS)}") from None


LETTERS = tuple(action.value for action in Action)
_BY_LETTER = {action.value: action for action in Action}


@total_ordering
@dataclass(frozen=True, slots=True)
class SkipPlan:
    """One :class:`Action` per decoder layer, ordered by its text (``"RRFBS"``).

    Raises :class:`PlanError` when it is empty or holds anything but actions.
    """

    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))
        if not self.actions:
            raise PlanError("a plan needs at least one layer")
        for layer, action in enumerate(self.actions):
            if not isinstance(action, Action):
                raise PlanError(f"layer {layer}: {action!r} is not an Action")

    # Text and JSON ------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> SkipPlan:
        """Read the canonical text, one letter per layer. Raises :class:`PlanError` naming the layer."""
        if not isinstance(text, str):
            raise PlanError(f"a plan's text must be a string, got {type(text).__name__}")
        try:
            return cls(tuple(map(_BY_LETTER.__getitem__, text)))
        except KeyError:  # say which layer's
            return cls(tuple(Action.from_letter(letter, layer) for layer, letter in enumerate(text)))

    @property
    def text(self) -> str:
        """The canonical text, one letter per layer."""
        return "".join(action.value for action in self.actions)

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> str:
        """A JSON object with the schema version and the plan's text."""
        return json.dumps({"schema_version": SCHEMA_VERSION, "plan": self.text})

    @classmethod
    def from_json(cls, document: str | Mapping[str, Any]) -> SkipPlan:
        """Read what :meth:`to_json` wrote (the text, or the object already decoded).

        Raises :class:`PlanError` on anything else, unknown keys and other schema versions included.
        """
        if isinstance(document, str):
            try:
                document = json.loads(document)
            except json.JSONDecodeError as error:
                raise PlanError(f"not a plan's JSON: {error}") from None
        if not isinstance(document, Mapping):
            raise PlanError(f"a plan's JSON must be an object, got {type(document).__name__}")
        version = document.get("schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise PlanError(f"plan schema version {version!r} is not readable, expected {SCHEMA_VERSION}")
        unknown = sorted(str(key) for key in document if key not in ("schema_version", "plan"))
        if unknown:
            raise PlanError(f"unknown keys in a plan's JSON: {', '.join(unknown)}")
        return cls.parse(document.get("plan", ""))

    # A sequence, ordered by text ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.actions)

    def __iter__(self) -> Iterator[Action]:
        return iter(self.actions)

    @overload
    def __getitem__(self, layer: int) -> Action: ...

    @overload
    def __getitem__(self, layer: slice) -> tuple[Action, ...]: ...

    def __getitem__(self, layer: int | slice) -> Action | tuple[Action, ...]:
        return self.actions[layer]

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, SkipPlan):
            return NotImplemented
        return self.text < other.text

    # Questions ----------------------------------------------------------------------------------------------------

    def layers(self, action: Action) -> tuple[int, ...]:
        """The layers that take ``action``, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if own is action)

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that are not skipped, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if own is not Action.SKIP)

    @property
    def is_dense(self) -> bool:
        """Whether every layer runs."""
        return all(action is Action.RUN for action in self.actions)

    @property
    def needs_vision_tokens(self) -> bool:
        """Whether some layer treats vision tokens apart (freeze or bypass)."""
        return any(action in (Action.FREEZE, Action.BYPASS) for action in self.actions)

    # Building -----------------------------------------------------------------------------------------------------

    def with_action(self, layer: int, action: Action) -> SkipPlan:
        """This plan with ``action`` at ``layer``. Raises :class:`PlanError` when there is no such layer."""
        return self._with_layers((layer,), action)

    def _with_layers(self, layers: Iterable[int], action: Action) -> SkipPlan:
        actions = list(self.actions)
        for layer in layers:
            if not 0 <= layer < len(actions):
                raise PlanError(f"layer {layer}: outside the model's layers 0..{len(actions) - 1}")
            actions[layer] = action
        return SkipPlan(tuple(actions))

    @classmethod
    def dense(cls, num_layers: int) -> SkipPlan:
        """Every layer runs."""
        return cls((Action.RUN,) * num_layers)

    @classmethod
    def skipping(cls, num_layers: int, layers: Iterable[int]) -> SkipPlan:
        """The given layers are skipped for every token (ShortGPT, SLEB), the others run."""
        return cls.dense(num_layers)._with_layers(layers, Action.SKIP)

    @classmethod
    def frozen_set(cls, num_layers: int, layers: Iterable[int]) -> SkipPlan:
        """Vision tokens are frozen at the given layers (ShortV's replaced layers), the others run."""
        return cls.dense(num_layers)._with_layers(layers, Action.FREEZE)

    @classmethod
    def late_entry(cls, num_layers: int, first: int) -> SkipPlan:
        """Vision tokens enter at layer ``first``: layers before it are bypassed (Skip-It, DeepInsert)."""
        _require_range("first", first, num_layers)
        return cls.dense(num_layers)._with_layers(range(first), Action.BYPASS)

    @classmethod
    def early_exit(cls, num_layers: int, last: int) -> SkipPlan:
        """Vision tokens leave before layer ``last``: that layer and all later ones are bypassed (VTW)."""
        _require_range("last", last, num_layers)
        return cls.dense(num_layers)._with_layers(range(last, num_layers), Action.BYPASS)

    @classmethod
    def contiguous_block(cls, num_layers: int, start: int, length: int) -> SkipPlan:
        """``length`` layers from ``start`` on are skipped for every token (Gromov et al.)."""
        _require_range("length", length, num_layers)
        return cls.dense(num_layers)._with_layers(range(start, start + length), Action.SKIP)


def _require_range(name: str, value: int, num_layers: int) -> None:
    if not 0 <= value <= num_layers:
        raise PlanError(f"{name} must lie in 0..{num_layers}, got {value}")
