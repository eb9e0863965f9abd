"""Criteria: functions from measurements to a predicted risk for every layer and action.

``load("skip-it")`` gives one by name; a class of one's own is found through the entry point group
``skipplan.criteria``. Search seeds come from the risk; what is published is always measured.
"""

from __future__ import annotations

from .interface import Criterion, Risk
from .registry import load

__all__ = ["Criterion", "Risk", "load"]
