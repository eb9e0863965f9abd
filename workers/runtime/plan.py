"""The skip plan: one action per decoder layer, an immutable value with a canonical text. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering
from typing import Literal, overload


class PlanError(ValueError):
    """A plan that cannot be read, or that a model cannot take; the message names the layer."""


@dataclass(frozen=True)
class ActionRow:
    """Facts about an action. A new action is one more row of :class:`Action`, and its code in ``applied``."""

    letter: str
    """In the text of plans."""
    past: str
    """In reports: ``"3 of 12 layers skipped"``."""
    summary: str
    """In legends, behind the action's name."""
    meaning: str
    """In model cards, of the layers that take it: ``"2 are skipped for every token"``."""
    work: float
    """Share of a layer's work that is left, where a search counts work instead of measured seconds."""
    removes_layer: bool = False
    """Whether the layer does nothing for any token, so that a checkpoint can do without it."""
    vision_only: bool = False
    """Whether vision tokens are treated apart."""
    hides_vision: bool = False
    """Whether text does not attend to vision tokens at the layer: no keys, values or cache entries for them."""
    leaves_out: Literal["", "attention", "mlp"] = ""
    """The part of the layer that adds nothing, where it is not the whole layer: to any token, or to vision tokens."""

    @property
    def removes_part(self) -> bool:
        """Whether attention or the MLP does nothing for any token."""
        return bool(self.leaves_out) and not self.vision_only

    @property
    def executions(self) -> float:
        """Layer executions that a layer counts as: its part of the work where a part of it is left out for all tokens.

        A layer that text tokens alone pass counts in full.
        """
        if self.removes_layer:
            return 0.0
        return self.work if self.removes_part else 1.0

    @property
    def keeps_keys(self) -> bool:
        """Whether the layer has keys and values in the KV cache."""
        return not self.removes_layer and not (self.removes_part and self.leaves_out == "attention")

    @property
    def splits_attention(self) -> bool:
        """Whether attention is asked by text tokens alone."""
        return self.vision_only and self.leaves_out != "mlp"


class Action(Enum):
    """A decoder layer runs, or saves work in one of these ways; the value is the letter in the plan's text."""

    RUN = ActionRow(
        letter="R",
        past="run",
        summary="nothing is skipped",
        meaning="run as they are",
        work=1.0,
    )
    FREEZE = ActionRow(
        letter="F",
        past="frozen",
        summary="vision tokens keep their state",
        meaning="leave vision tokens as they are (text still attends to them)",
        work=0.5,
        vision_only=True,
    )
    BYPASS = ActionRow(
        letter="B",
        past="bypassed",
        summary="vision tokens pass by, text does not see them",
        meaning="leave vision tokens as they are and out of text's attention",
        work=0.5,
        vision_only=True,
        hides_vision=True,
    )
    SKIP = ActionRow(
        letter="S",
        past="skipped",
        summary="the whole layer is left out",
        meaning="are skipped for every token",
        work=0.0,
        removes_layer=True,
    )
    SKIP_ATTENTION = ActionRow(
        letter="A",
        past="without attention",
        summary="the MLP alone runs, no KV cache",
        meaning="run without attention, for every token",
        work=2 / 3,
        leaves_out="attention",
    )
    SKIP_MLP = ActionRow(
        letter="M",
        past="without MLP",
        summary="attention alone runs",
        meaning="run without their MLP, for every token",
        work=1 / 3,
        leaves_out="mlp",
    )
    FREEZE_ATTENTION = ActionRow(
        letter="Q",
        past="with vision attention frozen",
        summary="attention adds nothing to vision tokens, which ask no queries",
        meaning="run without vision tokens' queries (text still attends to them), and with their MLP",
        work=5 / 6,
        vision_only=True,
        leaves_out="attention",
    )
    FREEZE_MLP = ActionRow(
        letter="P",
        past="with vision MLP frozen",
        summary="vision tokens do not go through the MLP (a perceptron)",
        meaning="run without the MLP of vision tokens, and with their attention",
        work=2 / 3,
        vision_only=True,
        leaves_out="mlp",
    )

    row: ActionRow
    letter: str

    def __new__(cls, row: ActionRow) -> Action:
        """Make the letter the value, so that actions are found and pickled by it."""
        action = object.__new__(cls)
        action._value_ = row.letter
        action.row, action.letter = row, row.letter
        return action

    @property
    def label(self) -> str:
        """The action's name in job files: ``"skip"``."""
        return self.name.lower()

    @classmethod
    def of(cls, letter: str) -> Action:
        """Find the action of a letter. Raises ``KeyError`` when there is none."""
        return _BY_LETTER[letter]


_BY_LETTER = {action.letter: action for action in Action}
LETTERS = "".join(_BY_LETTER)
SAVING_LETTERS = LETTERS.replace(Action.RUN.letter, "")
"""Letters of the actions that save work: all but run."""
REMOVING_LETTERS = "".join(action.letter for action in Action if action.row.removes_layer)
PART_LETTERS = "".join(action.letter for action in Action if action.row.removes_part)
"""Letters of the actions that leave out attention or the MLP for every token."""
LEGEND = ", ".join(f"{action.letter} {action.label}" for action in Action)
"""``"R run, F freeze, ..."``, to explain the text of plans."""


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

    # Text ---------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> SkipPlan:
        """Read the canonical text, one letter per layer. Raises :class:`PlanError` naming the layer."""
        if not isinstance(text, str):
            raise PlanError(f"a plan's text must be a string, got {type(text).__name__}")
        try:
            return cls(tuple(map(_BY_LETTER.__getitem__, text)))
        except KeyError as unknown:
            layer = text.index(unknown.args[0])
            raise PlanError(
                f"layer {layer}: unknown action {text[layer]!r}, expected one of {', '.join(LETTERS)}"
            ) from None

    @property
    def text(self) -> str:
        """The canonical text, one letter per layer."""
        return "".join(action.letter for action in self.actions)

    def __str__(self) -> str:
        return self.text

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
        """Return the layers that take ``action``, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if own is action)

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that are not removed, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if not own.row.removes_layer)

    @property
    def removed(self) -> tuple[int, ...]:
        """The layers that do nothing for any token, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if own.row.removes_layer)

    @property
    def removal(self) -> SkipPlan:
        """The plan with nothing but its removed layers."""
        return SkipPlan(tuple(action if action.row.removes_layer else Action.RUN for action in self.actions))

    @property
    def remainder(self) -> SkipPlan:
        """The plan over the layers that stay."""
        return SkipPlan(tuple(self.actions[layer] for layer in self.kept))

    @property
    def partial(self) -> tuple[int, ...]:
        """The layers that run without their attention or without their MLP for every token, in order."""
        return tuple(layer for layer, own in enumerate(self.actions) if own.row.removes_part)

    @property
    def executions(self) -> float:
        """Layer executions of one sample under the plan: layers that run, of those that run in part their share."""
        return math.fsum(action.row.executions for action in self.actions)

    @property
    def joins(self) -> tuple[tuple[int, int], ...]:
        """Pairs of layers that make one: the first runs its attention, the second its MLP, and nothing between runs."""
        found: list[tuple[int, int]] = []
        attention: int | None = None
        for layer, action in enumerate(self.actions):
            if action is Action.SKIP_ATTENTION and attention is not None:
                found.append((attention, layer))
            if not action.row.removes_layer:
                attention = layer if action is Action.SKIP_MLP else None
        return tuple(found)

    @property
    def needs_code(self) -> tuple[int, ...]:
        """The layers that no plain checkpoint can say, in order: neither run, nor skipped, nor joined."""
        joined = {layer for pair in self.joins for layer in pair}
        return tuple(
            layer
            for layer, action in enumerate(self.actions)
            if not (action is Action.RUN or action.row.removes_layer or layer in joined)
        )

    @property
    def is_dense(self) -> bool:
        """Whether every layer runs."""
        return all(action is Action.RUN for action in self.actions)

    @property
    def needs_vision_tokens(self) -> bool:
        """Whether some layer treats vision tokens apart."""
        return any(action.row.vision_only for action in self.actions)

    # Building -----------------------------------------------------------------------------------------------------

    def with_action(self, layer: int, action: Action) -> SkipPlan:
        """Return this plan with ``action`` at ``layer``. Raises :class:`PlanError` when there is no such layer."""
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
        """Skip the given layers for every token (ShortGPT, SLEB), and run the others."""
        return cls.dense(num_layers)._with_layers(layers, Action.SKIP)
