"""``skipplan import``: a plan from another database, its figures marked as imported."""

from __future__ import annotations

from pathlib import Path

from optimizer.exports import document
from optimizer.exports.document import PlanDocument
from storage import measurements, plans
from storage.database import Database
from storage.plans import Plan


def import_plan(db: Database, path: Path) -> Plan:
    """Read the document at ``path`` (a file or an export's directory) and store its plan as imported.

    The same plan imported again takes the new figures. Raises UsageFault when the file is no valid plan.
    """
    return store(db, document.read(path))


def store(db: Database, imported: PlanDocument) -> Plan:
    """Store a document's plan as imported, with its model, task and device where they are not known yet."""
    model, task = imported.model, imported.task
    with db.transaction() as session:
        model_id = measurements.ensure_model(
            session,
            name=model.name,
            fingerprint=model.fingerprint,
            family=model.family,
            num_layers=model.num_layers,
            parameters=model.parameters,
        )
        task_id = measurements.ensure_task(
            session,
            name=task.name,
            data_hash=task.data_hash,
            split_seed=task.split_seed,
            calibration_size=task.calibration_size,
            search_size=task.search_size,
            held_out_size=task.held_out_size,
        )
        device_id = measurements.ensure_device(session, name=imported.device)
        (stored,) = plans.import_plans(
            session,
            model_id=model_id,
            task_id=task_id,
            device_id=device_id,
            workload=imported.workload,
            figures=[imported.plan_figures()],
        )
    return stored
