"""Read tables of layer measurements."""

from __future__ import annotations

from workers.redundancy.table import LayerTable


def columns(table: LayerTable) -> list[tuple[str, str]]:
    """The (name, token group) pairs there are, in order of first appearance."""
    return list(dict.fromkeys((row.name, row.token_group) for row in table.rows))
