"""Hold what a report's page is made of: sections of paragraphs, strips, charts and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from optimizer.reports import formatting
from optimizer.reports.chart import Chart

Row = TypeVar("Row")


@dataclass(frozen=True)
class StripRow:
    """A plan drawn as one cell a layer."""

    label: str
    plan: str
    text: str

    @property
    def spoken(self) -> str:
        """The plan for a screen reader."""
        return formatting.layers(self.plan)


@dataclass(frozen=True)
class Strips:
    """A group of plans drawn under each other."""

    title: str
    rows: tuple[StripRow, ...]


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A table's column: its heading, the cell of a row, and whether it is aligned to the right as numbers are."""

    heading: str
    cell: Callable[[Row], str]
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table behind a fold; ``numbers`` are the columns aligned to the right, ``chosen`` the rows to stress."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()
    open: bool = False

    @classmethod
    def of(cls, title: str, rows: Iterable[Row], columns: Sequence[Column[Row]]) -> Table:
        """Fill a table column by column."""
        return cls(
            title,
            tuple(column.heading for column in columns),
            tuple(tuple(column.cell(row) for column in columns) for row in rows),
            tuple(index for index, column in enumerate(columns) if column.number),
        )


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    name: str
    short: str
    title: str
    paragraphs: tuple[str, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()
    strips: tuple[Strips, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
