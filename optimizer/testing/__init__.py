"""Contract tests of strategies, criteria, export formats and engines: of the project's own and of plug-ins.

Each function takes one object as it is registered (see ``optimizer.registries`` and ``workers.engines.interface``) and
raises AssertionError, with a message that names the broken promise. Call them from a test of your package::

    from optimizer.testing import check_criterion
    from my_package import MyCriterion

    def test_my_criterion():
        check_criterion(MyCriterion)
"""

from __future__ import annotations

from .criterion import check_criterion
from .engine import check_engine
from .export_format import check_export_format
from .strategy import check_strategy

__all__ = ["check_criterion", "check_engine", "check_export_format", "check_strategy"]
