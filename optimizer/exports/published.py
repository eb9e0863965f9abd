"""From a published plan in the database to its export: where its model is, what describes it, what belongs to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optimizer.exports.document import describe
from optimizer.exports.writing import Written, export_plan
from storage.database import Database
from storage.queue import jobs
from storage.records import identities
from storage.records.plans import Plan
from workers.messages import Artifact, ModelSource


def export_published(
    db: Database,
    plan: Plan,
    format_name: str,
    output: Path,
    *,
    model_path: str | None = None,
    force: bool = False,
    force_model: bool = False,
) -> Written:
    """Write a published plan with its fitted maps, if it has any. Raises UsageFault as ``export_plan`` does."""
    document = describe(plan, identities.model(db, plan.model_id), identities.task(db, plan.task_id))
    artifact = None
    if plan.artefact is not None and plan.artefact_checksum is not None:
        artifact = Artifact(plan.artefact, plan.artefact_checksum)
    source = model_source(db, plan, model_path)
    return export_plan(document, source, format_name, output, force=force, force_model=force_model, artifact=artifact)


def model_source(db: Database, plan: Plan, model_path: str | None = None) -> ModelSource:
    """The model as the plan's job loaded it, or the one at ``model_path``."""
    # Of the specification the model alone: whatever else a job of another version says must not stand in the way.
    stored = {"path": plan.model} if plan.job_id is None else dict(jobs.get(db, plan.job_id).spec["model"])
    source = ModelSource(**stored | {"allow_pickle": tuple(stored.get("allow_pickle", ()))})
    return source if model_path is None else moved(source, model_path)


def moved(source: ModelSource, model_path: str) -> ModelSource:
    """The same source at another place: a local path or a hub id."""
    local = Path(model_path).expanduser()
    return replace(source, path=str(local.resolve()) if local.exists() else model_path, revision=None)
