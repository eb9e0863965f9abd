"""Late entry and early exit: no measurement at all, only a layer's place in the stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

from .interface import Risk, everywhere


class _ByPosition:
    """Criteria that need nothing measured."""

    needs: tuple[str, ...] = ()
    published_for = Action.BYPASS.letter

    @property
    def thresholds(self) -> Mapping[str, float]:
        """None."""
        return {}


@dataclass(frozen=True)
class LateEntry(_ByPosition):
    """Vision tokens enter late: the first layers are the least risky (a prefix is bypassed)."""

    name = "late-entry"
    source = "Skip-It, arXiv 2509.25584; DeepInsert, arXiv 2504.19327"

    def risk(self, table: LayerTable) -> Risk:
        """Growing with the layer's number."""
        return everywhere(self.name, tuple((layer + 1) / table.num_layers for layer in range(table.num_layers)))


@dataclass(frozen=True)
class EarlyExit(_ByPosition):
    """Vision tokens leave early: the last layers are the least risky (a suffix is bypassed)."""

    name = "early-exit"
    source = "Skip-It, arXiv 2509.25584; VTW, arXiv 2405.05803"

    def risk(self, table: LayerTable) -> Risk:
        """Falling with the layer's number."""
        layers = table.num_layers
        return everywhere(self.name, tuple((layers - layer) / layers for layer in range(layers)))
