"""Interface of a criterion, the risk it predicts, and what criteria have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from workers.redundancy.kinds import INTERVENTIONS, OPERATORS
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

MEASURED_LETTERS = "".join(action.letter for action in INTERVENTIONS)
"""Letters of the actions on whole layers, that every criterion gives a risk."""


@dataclass(frozen=True)
class Risk:
    """Predicted harm, at least 0, of every action at every layer: ``risk[letter][layer]``; running (R) has none.

    Leaving out a part of a layer, where a criterion gives that no risk of its own, is held as harmful as skipping it,
    and leaving out a part for vision tokens alone as freezing them.
    """

    criterion: str
    risk: dict[str, tuple[float, ...]]
    spread: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Standard error of the risk's logarithm, as ``risk``; empty where a criterion knows none."""

    def __post_init__(self) -> None:
        for letter, values in self.risk.items():
            if not all(value >= 0.0 for value in values):  # NaN fails this too
                raise ValueError(f"criterion {self.criterion}: a risk of {letter} is negative or no number")

    def of(self, layer: int, letter: str) -> float:
        """Return the risk of one action at one layer."""
        return 0.0 if letter == Action.RUN.letter else self.values(letter)[layer]

    def weighed(self, weight: float) -> Risk:
        """Return the risk as far as it is to be trusted: one standard error up, and drawn to each action's mean.

        With a ``weight`` of 1 nothing is drawn, with 0 all layers are alike.
        """

        def of(letter: str, values: tuple[float, ...]) -> tuple[float, ...]:
            spread = self.spread.get(letter, (0.0,) * len(values))
            careful = [value * math.exp(error) for value, error in zip(values, spread, strict=True)]
            finite = [value for value in careful if math.isfinite(value)]
            mean = sum(finite) / len(finite) if finite else 0.0
            return tuple(weight * value + (1 - weight) * mean if math.isfinite(value) else value for value in careful)

        return replace(self, risk={letter: of(letter, values) for letter, values in self.risk.items()})

    def order(self, letter: str) -> tuple[int, ...]:
        """Layers from the least to the most risky for an action; ties go to the lower layer."""
        values = self.values(letter)
        return tuple(sorted(range(len(values)), key=lambda layer: (values[layer], layer)))

    def values(self, letter: str) -> tuple[float, ...]:
        """Return the risk of an action at every layer. Raises ValueError for one that there is none of."""
        if letter not in self.risk and (row := Action.of(letter).row).leaves_out:
            letter = (Action.FREEZE if row.vision_only else Action.SKIP).letter
        if letter not in self.risk:
            raise ValueError(f"criterion {self.criterion} predicts no risk of {letter}")
        return self.risk[letter]


class Criterion(Protocol):
    """Predicts the risk of every action but run at each layer.

    Constructed with its thresholds as keywords, all of them optional.
    """

    @property
    def name(self) -> str:
        """The name in job files."""
        ...

    @property
    def source(self) -> str:
        """The paper or the project it is from."""
        ...

    @property
    def needs(self) -> tuple[str, ...]:
        """The kinds of measurement it reads (names of ``workers.redundancy.kinds.KINDS``)."""
        ...

    @property
    def published_for(self) -> str:
        """Letters of the actions that its publication defines it for; on the others it is tried as it stands.

        Empty for what is no published method, as this project's own criteria: they are never counted as one.
        """
        ...

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Its thresholds by name; recorded with a job's result."""
        ...

    def risk(self, table: LayerTable) -> Risk:
        """Return the predicted risk; larger means more harm expected, infinite where a layer could not be measured.

        Raises MeasurementError when a measurement it needs is not in the table.
        """
        ...


class Thresholds:
    """Report the fields of a criterion, which is a dataclass, as its thresholds."""

    @property
    def thresholds(self) -> Mapping[str, float]:
        return dict(vars(self))


def everywhere(criterion: str, values: tuple[float, ...]) -> Risk:
    """Predict the same risk whatever the action: for criteria that rank layers and know no actions."""
    return Risk(criterion, dict.fromkeys(MEASURED_LETTERS, values))


def per_operator(table: LayerTable, values: Callable[[str, bool], tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Return the risks of leaving out a part, by letter; empty where the kind ``operators`` was not measured.

    ``values`` gives them for the part ("attention" or "mlp"), and for whether vision tokens alone go without it.
    """
    if not table.has("operator_distance@mlp", "text"):
        return {}
    return {each.letter: values(each.row.leaves_out, each.row.vision_only) for each in OPERATORS}


def known_values(table: LayerTable, name: str, group: str) -> tuple[float, ...]:
    """Return a measurement of all layers, infinity where a layer could not be measured.

    Raises MeasurementError when no layer has it.
    """
    return table.values(name, group, default=math.inf if table.has(name, group) else None)
