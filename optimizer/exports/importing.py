"""``skipplan import``: a plan from another database, its figures marked as imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from optimizer.exports import guards, maps
from optimizer.exports.document import PlanDocument
from storage.database import Database
from storage.pareto import Group
from storage.records import lookup, plans
from storage.records.plans import Plan


def import_plan(db: Database, imported: PlanDocument, path: Path) -> Plan:
    """Store the plan of the document at ``path`` as imported, with model, task and device where they are not known yet.

    The same plan imported again takes the new figures.

    The maps of a compensated plan and its guard stay where they are, in the directory of the document.
    """
    directory = path if path.is_dir() else path.parent
    guard = guards.of_directory(imported, directory)
    held = maps.of_directory(imported, directory) is not None
    figures = replace(
        imported.plan_figures(),
        artifact=str((directory / maps.FILE_NAME).resolve()) if held else None,
        artifact_checksum=imported.artifact_checksum if held else None,
    )
    if guard is not None:
        known = figures.secondary["guard"] | {"artifact": str(guard.resolve())}
        figures = replace(figures, secondary=figures.secondary | {"guard": known})
    with db.transaction() as session:
        model_id = lookup.ensure_model(session, imported.model)
        task_id = lookup.ensure_task(session, imported.task, used=False)
        device_id = lookup.ensure_device(session, imported.device)
        (stored,) = plans.import_plans(
            session,
            Group(model_id, task_id, device_id, imported.workload, imported.mode),
            figures=[figures],
        )
    return stored
