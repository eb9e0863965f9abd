"""Finding a criterion by name: the ones that come with the project, and users' own by entry point."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points

from optimizer.errors import UsageFault

from .interface import Criterion

GROUP = "skipplan.criteria"

BUILT_IN = {
    "skip-it": "skip_it:SkipIt",
    "skip-it-static": "skip_it:SkipItStatic",
    "skip-it-causal": "skip_it:SkipItCausal",
    "cosine": "cosine:Cosine",
    "block-influence": "block_influence:BlockInfluence",
    "linear-redundancy": "linear_redundancy:LinearRedundancy",
    "angular": "angular:Angular",
    "layer-contribution": "layer_contribution:LayerContribution",
    "vtw": "withdrawal:VisualTokenWithdrawal",
    "late-entry": "position:LateEntry",
    "early-exit": "position:EarlyExit",
}
"""Name: module of this package and class."""


def names() -> tuple[str, ...]:
    """Every criterion's name: the project's, then those of entry points."""
    others = sorted({point.name for point in entry_points(group=GROUP)} - BUILT_IN.keys())
    return (*BUILT_IN, *others)


def load(name: str, thresholds: Mapping[str, float] | None = None) -> Criterion:
    """The criterion of that name with those thresholds, its own where none are given.

    Raises UsageFault when there is none, its class cannot be imported, or it has no such threshold.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        kind = getattr(import_module(f".{module}", __package__), attribute)
    else:
        kind = _from_entry_point(name)
    try:
        criterion: Criterion = kind(**dict(thresholds or {}))
    except TypeError:
        known, given = ", ".join(kind().thresholds) or "none", ", ".join(thresholds or {})
        raise UsageFault(f"thresholds: criterion {name} takes {known}, not {given}") from None
    except ValueError as error:
        raise UsageFault(f"thresholds: criterion {name}: {error}") from None
    return criterion


def _from_entry_point(name: str) -> type[Criterion]:
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise UsageFault(f"criterion: {name!r} is not known; known are {', '.join(names())}")
    if len(found) > 1:
        packages = ", ".join(sorted(point.dist.name if point.dist else point.value for point in found))
        raise UsageFault(f"criterion: {name!r} is offered by several packages ({packages}); uninstall all but one")
    try:
        kind: type[Criterion] = found[0].load()
    except (ImportError, AttributeError) as error:
        raise UsageFault(f"criterion: {name!r} cannot be imported from {found[0].value}: {error}") from None
    return kind
