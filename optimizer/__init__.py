"""What decides: job specification, search, verification, service, exports, reports, the command line, the Python API.

The functions listed in ``__all__`` are for programs; see ``optimizer.api``. Importing this package loads nothing heavy:
they are found when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizer.api import best, evaluations, export, plans, redundancy, report, run, submit

__all__ = ["best", "evaluations", "export", "plans", "redundancy", "report", "run", "submit"]


def __getattr__(name: str) -> Any:
    """The Python API's functions, imported when first asked for (PEP 562)."""
    if name in __all__:
        return getattr(import_module("optimizer.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
