"""Find and load what lmms-eval is to evaluate: a published plan on its model, or what an export wrote."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from optimizer.errors import UsageFault
from optimizer.exports import document, maps
from optimizer.exports.document import PlanDocument
from optimizer.exports.verification import check_files
from optimizer.exports.writing import check_model, model_source, moved
from optimizer.job.spec import DEFAULT_DATABASE
from storage.database import Database
from storage.records import lookup
from storage.records import plans as published
from storage.records.plans import LOSSLESS
from workers.messages import Artifact, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan
from workers.runtime.folding import Maps

CHECKPOINT, REMOTE_CODE = "transformers", "transformers-remote-code"
"""Loaders of exports that transformers loads by itself, and with the code beside them."""


@dataclass(frozen=True)
class Evaluated:
    """A loaded model, and the plan with its maps under which it answers."""

    loaded: LoadedModel
    plan: SkipPlan | None
    """None where the model holds it already."""
    maps: Maps | None


def of_database(plan_id: int, database: str | None, model_path: str | None, device: str | None) -> Evaluated:
    """Load a published plan's model and maps. ``model_path`` says where the model is now.

    Raises UsageFault for a lossless plan or another model, and as the database does.
    """
    with Database.open(database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE, create=False) as db:
        plan = published.get(db, plan_id)
        described = document.describe(plan, lookup.model(db, plan.model_id), lookup.task(db, plan.task_id))
        source = model_source(db, plan, model_path)
    artifact = None
    if plan.artifact is not None and plan.artifact_checksum is not None:
        artifact = Artifact(plan.artifact, plan.artifact_checksum)
    _require_standalone(described)
    return _under_plan(described, source, maps.fetch(described, artifact), device)


def of_export(directory: Path, model_path: str | None, device: str | None) -> Evaluated:
    """Load what an export wrote; of format ``plan`` the dense model, under the plan.

    Raises UsageFault where files are damaged, or transformers does not load the format.
    """
    described = document.read(directory)
    chosen = check_files(described, directory)
    _require_standalone(described)
    if not chosen.needs_model:
        source = ModelSource(described.model.name)
        source = source if model_path is None else moved(source, model_path)
        return _under_plan(described, source, maps.of_directory(described, directory), device)
    loader = "" if chosen.loadable is None else chosen.loadable(directory, directory, "").loader
    if loader not in (CHECKPOINT, REMOTE_CODE):
        raise UsageFault(f"export: format {chosen.name} is not loaded by transformers; export as checkpoint or runtime")
    source = ModelSource(str(directory.resolve()), trust_remote_code=loader == REMOTE_CODE)
    loaded = load_model(source, device=device, measuring=True)
    if loader == REMOTE_CODE:
        loaded.model.guard = None  # the plan itself is evaluated, whichever prompts it is asked
    return Evaluated(loaded, None, None)


def _under_plan(described: PlanDocument, source: ModelSource, content: bytes | None, device: str | None) -> Evaluated:
    own_maps = maps.read(described, content)
    check_model(described, source, force_model=False)
    loaded = load_model(replace(source, device=device or source.device), measuring=True)
    return Evaluated(loaded, SkipPlan.parse(described.plan), own_maps)


def _require_standalone(described: PlanDocument) -> None:
    if described.mode == LOSSLESS:
        raise UsageFault(
            f"plan {described.plan} is lossless: it drafts for the dense model, whose answers and scores are its own; "
            "evaluate the dense model"
        )
