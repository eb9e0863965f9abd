"""The strategies, criteria and export formats that a job or a command can name.

One row adds one. Other packages add theirs through the entry point group, and can check them with the functions of
``optimizer.testing``. Metrics of tasks are registered in ``workers.tasks.metrics``, engines in
``workers.engines.interface``.
"""

from __future__ import annotations

from typing import Any, TypeVar

from optimizer.errors import UsageFault
from workers.errors import UnknownNameError
from workers.registry import Registry

T = TypeVar("T")

_SEARCH = "optimizer.search.strategies"
SAMPLERS = {
    "surrogate": f"{_SEARCH}.samplers:surrogate",
    "tpe": f"{_SEARCH}.samplers:tpe",
    "nsga2": f"{_SEARCH}.samplers:nsga2",
    "gp": f"{_SEARCH}.samplers:gp",
    "random": f"{_SEARCH}.samplers:random",
}
METHODS = {
    "skip-it": f"{_SEARCH}.published:skip_it",
    "shortgpt": f"{_SEARCH}.published:shortgpt",
    "angular": f"{_SEARCH}.published:angular",
    "replaceme": f"{_SEARCH}.published:replaceme",
    "sleb": f"{_SEARCH}.greedy:sleb",
    "llm-drop": f"{_SEARCH}.published:llm_drop",
    "finercut": f"{_SEARCH}.greedy:finercut",
    "gsop": f"{_SEARCH}.greedy:gsop",
    "evopress": f"{_SEARCH}.evopress:EvoPress",
    "swift": f"{_SEARCH}.swift:Swift",
    "knapspec": f"{_SEARCH}.knapspec:knapspec",
    "shortv": f"{_SEARCH}.published:shortv",
    "vtw": f"{_SEARCH}.published:vtw",
    "exhaustive": f"{_SEARCH}.published:exhaustive",
}
"""Published methods: they take neither seeds nor given plans, nor what earlier jobs found out."""

STRATEGIES: Registry[Any] = Registry("skipplan.strategies", SAMPLERS | METHODS)
"""Functions from an ``optimizer.search.problem.Problem`` to a ``Strategy`` on it."""

CRITERIA: Registry[Any] = Registry(
    "skipplan.criteria",
    {
        "skip-it": "optimizer.criteria.skip_it:SkipIt",
        "skip-it-static": "optimizer.criteria.skip_it:SkipItStatic",
        "calibrated": "optimizer.criteria.calibrated:Calibrated",
        "skip-it-causal": "optimizer.criteria.skip_it:SkipItCausal",
        "cosine": "optimizer.criteria.published:Cosine",
        "block-influence": "optimizer.criteria.published:BlockInfluence",
        "linear-redundancy": "optimizer.criteria.published:LinearRedundancy",
        "angular": "optimizer.criteria.published:Angular",
        "layer-contribution": "optimizer.criteria.published:LayerContribution",
        "vtw": "optimizer.criteria.published:VisualTokenWithdrawal",
        "late-entry": "optimizer.criteria.published:LateEntry",
        "early-exit": "optimizer.criteria.published:EarlyExit",
    },
)
"""Classes of ``optimizer.criteria.Criterion``, made with their thresholds as keywords."""

EXPORT_FORMATS: Registry[Any] = Registry(
    "skipplan.export_formats",
    {
        "plan": "optimizer.exports.formats.plan:FORMAT",
        "checkpoint": "optimizer.exports.formats.checkpoint:FORMAT",
        "runtime": "optimizer.exports.formats.runtime:FORMAT",
        "llama-cpp": "optimizer.exports.formats.llama_cpp:FORMAT",
        "openvino": "optimizer.exports.formats.openvino:FORMAT",
        "vllm": "optimizer.exports.formats.vllm:FORMAT",
        "drafter": "optimizer.exports.formats.drafter:FORMAT",
    },
)
"""Values of ``optimizer.exports.interface.ExportFormat``."""


def find(registry: Registry[T], name: str, field: str) -> T:
    """Look a name up that a user wrote in ``field``. Raises UsageFault where it is not there or cannot be imported."""
    try:
        return registry[name]
    except UnknownNameError as error:
        raise UsageFault(f"{field}: {error}") from None
