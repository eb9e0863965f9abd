"""The same answers as pandas frames, one column a field; pandas is imported when the first one is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from storage.database import Database
from storage.records import evaluations, measurements, plans

if TYPE_CHECKING:
    import pandas as pd


def plans_frame(db: Database, model: str | None = None, task: str | None = None, **constraints: Any) -> pd.DataFrame:
    """Published plans; arguments as of ``storage.records.plans.list_plans``."""
    return _frame(plans.list_plans(db, model, task, **constraints), plans.Plan)


def evaluations_frame(db: Database, job_id: int, split: str | None = None) -> pd.DataFrame:
    """Every evaluation of a job, with the tuple of per-sample scores in ``scores``."""
    return _frame(evaluations.for_job(db, job_id, split), evaluations.Evaluation)


def redundancy_frame(
    db: Database, *, model_id: int, task_id: int, calibration_hash: str, names: Sequence[str] = ()
) -> pd.DataFrame:
    """Redundancy statistics in long form: a row for each layer, token group and name."""
    found = measurements.redundancy(
        db, model_id=model_id, task_id=task_id, calibration_hash=calibration_hash, names=names
    )
    return _frame(found, measurements.Redundancy)


def _frame(records: Iterable[Any], kind: type[Any]) -> pd.DataFrame:
    import pandas as pd

    # The columns are named even where there is no row, so that code which reads them need not look.
    return pd.DataFrame([asdict(record) for record in records], columns=[field.name for field in fields(kind)])
