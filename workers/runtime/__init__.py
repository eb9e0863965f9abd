"""Running a skip plan on a live model, and removing its skipped layers from a checkpoint.

This package needs torch and transformers only, and imports nothing from the rest of the project, so that it can be
shipped inside other deployments as it is. Names are loaded on first use: the plan value alone needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .applied import AppliedPlan, apply, apply_permanently
    from .descriptor import FamilyDescriptor, UnsupportedFamilyError, validate
    from .exported import speculate_from
    from .families import describe
    from .folding import GapMap
    from .guard import Guard
    from .plan import Action, PlanError, SkipPlan
    from .speculation import Speculation, SpeculationStatistics, speculate
    from .surgery import save_pruned

_HOMES = {
    "Action": "plan",
    "AppliedPlan": "applied",
    "FamilyDescriptor": "descriptor",
    "GapMap": "folding",
    "Guard": "guard",
    "PlanError": "plan",
    "SkipPlan": "plan",
    "Speculation": "speculation",
    "SpeculationStatistics": "speculation",
    "UnsupportedFamilyError": "descriptor",
    "apply": "applied",
    "apply_permanently": "applied",
    "describe": "families",
    "save_pruned": "surgery",
    "speculate": "speculation",
    "speculate_from": "exported",
    "validate": "descriptor",
}

__all__ = [
    "Action",
    "AppliedPlan",
    "FamilyDescriptor",
    "GapMap",
    "Guard",
    "PlanError",
    "SkipPlan",
    "Speculation",
    "SpeculationStatistics",
    "UnsupportedFamilyError",
    "apply",
    "apply_permanently",
    "describe",
    "save_pruned",
    "speculate",
    "speculate_from",
    "validate",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when the name is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
