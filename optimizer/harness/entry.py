"""Tell lmms-eval of the model, without importing what it takes to run one."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the ``ModelManifest`` that the entry point group ``lmms_eval.models`` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("skipplan", simple_class_path="optimizer.harness.model.SkipPlanModel")
