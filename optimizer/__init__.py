"""Jobs, search, verification, service, exports, reports, the command line and the Python API of skipplan.

The functions listed in ``__all__`` are for programs; see ``optimizer.api``. They are imported on first use, so that
importing this package loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizer.api import best, engine_latencies, evaluations, export, plans, redundancy, report, run, submit

__all__ = ["best", "engine_latencies", "evaluations", "export", "plans", "redundancy", "report", "run", "submit"]


def __getattr__(name: str) -> Any:
    """Import a function of the Python API on first use (PEP 562)."""
    if name in __all__:
        return getattr(import_module("optimizer.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
