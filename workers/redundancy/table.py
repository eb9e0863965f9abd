"""Hold the measurements that criteria read: one row per layer, token group and name. Needs nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from workers.errors import MeasurementError


@dataclass(frozen=True)
class LayerMeasurement:
    """One measurement of one layer (from 0) over one token group, with its standard error where it has one.

    ``n`` counts what was averaged: tokens for token statistics, samples for those of a whole answer.
    """

    name: str
    token_group: str
    layer: int
    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class LayerTable:
    """All measurements of one model on one calibration split."""

    num_layers: int
    rows: tuple[LayerMeasurement, ...]

    @cached_property
    def _index(self) -> dict[tuple[str, str], dict[int, LayerMeasurement]]:
        index: dict[tuple[str, str], dict[int, LayerMeasurement]] = {}
        for row in self.rows:
            index.setdefault((row.name, row.token_group), {})[row.layer] = row
        return index

    def has(self, name: str, group: str) -> bool:
        """Whether any layer has this measurement."""
        return (name, group) in self._index

    def row(self, name: str, group: str, layer: int) -> LayerMeasurement | None:
        """One measurement, or ``None`` where the layer has none."""
        return self._index.get((name, group), {}).get(layer)

    def values(self, name: str, group: str, *, default: float | None = None) -> tuple[float, ...]:
        """Return a measurement of all layers; ``default`` stands for a layer that has none.

        Raises MeasurementError when nothing of that name was measured, or a layer lacks it and there is no default.
        """
        found = self._index.get((name, group))
        if found is None and default is None:
            raise MeasurementError(f"{name} of {group} tokens was not measured, or the model has none to measure")
        values = []
        for layer in range(self.num_layers):
            row = (found or {}).get(layer)
            if row is None and default is None:
                raise MeasurementError(f"{name} of {group} tokens could not be measured at layer {layer}")
            values.append(default if row is None else row.value)
        return tuple(value for value in values if value is not None)

    def joined(self, rows: Iterable[LayerMeasurement]) -> LayerTable:
        """Return this table with further rows; a row measured anew takes the old one's place."""
        merged = {(row.name, row.token_group, row.layer): row for row in self.rows}
        merged.update({(row.name, row.token_group, row.layer): row for row in rows})
        return LayerTable(self.num_layers, tuple(merged.values()))
