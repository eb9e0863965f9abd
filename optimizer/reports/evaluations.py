"""Write all that a job scored as a table: CSV, or Parquet."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import UsageFault
from storage.database import Database
from storage.queue import jobs
from storage.records import evaluations, lookup
from storage.records.evaluations import EvaluationKey, EvaluationRecord

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "id",
    "task",
    "plan",
    "compensation",
    "split",
    "n_samples",
    "accuracy",
    "divergence",
    "seconds",
    "layer_executions",
    "layer_executions_saved",
    "failure",
    "reused_from",
    "recorded_at",
    "settings",
    "secondary",
)


def names_of_tasks(db: Database, scored: Iterable[EvaluationKey]) -> dict[int, str]:
    """Return the names of the tasks that evaluations are of, by id."""
    return {number: lookup.task(db, number).name for number in {each.task_id for each in scored}}


def evaluations_frame(db: Database, job_id: int) -> pd.DataFrame:
    """List a job's evaluations, one row each, in the order in which they were recorded. Raises NotFound.

    Columns: ``COLUMNS``. ``task`` is the name of what was scored, a task or text; ``accuracy`` is a share,
    ``divergence`` the mean over the samples in nats, both missing where there is none; ``seconds`` are of a worker's
    time; ``secondary`` is a JSON text.
    """
    import pandas

    jobs.get(db, job_id)
    scored = evaluations.for_job(db, job_id)
    names = names_of_tasks(db, scored)
    rows = [
        {name: getattr(each, name, None) for name in COLUMNS}
        | {"task": names[each.task_id], "divergence": _mean(each.kl)}
        | {"secondary": json.dumps(each.secondary, sort_keys=True)}
        for each in scored
    ]
    frame = pandas.DataFrame(rows, columns=list(COLUMNS))
    floats = ("accuracy", "divergence", "seconds")
    return frame.astype(dict.fromkeys(floats, "float64") | {"reused_from": "Int64"})


def samples_frame(db: Database, job_id: int) -> pd.DataFrame:
    """List what every sample of every evaluation scored, one row each. Raises NotFound.

    Columns: ``evaluation`` (an id of :func:`evaluations_frame`), ``task``, ``plan``, ``compensation``, ``split``,
    ``sample`` (its place in the split, from 0), ``score`` in [0, 1] and ``divergence`` in nats, missing where the
    sample failed. Evaluations that failed as a whole have no row.
    """
    import numpy as np
    import pandas

    jobs.get(db, job_id)
    scored = [each for each in evaluations.for_job(db, job_id) if each.failure is None]
    sizes = [each.n_samples for each in scored]
    names = names_of_tasks(db, scored)

    def per_sample(values: Callable[[EvaluationRecord], Sequence[float]]) -> Any:
        return np.concatenate([np.asarray(values(each), dtype=np.float64) for each in scored] or [np.empty(0)])

    def repeated(name: str) -> Any:  # categories: a plan's text is kept once, however many samples it has
        return pandas.Categorical([getattr(each, name) for each in scored]).repeat(sizes)

    return pandas.DataFrame(
        {
            "evaluation": np.repeat(np.asarray([each.id for each in scored], dtype=np.int64), sizes),
            "task": pandas.Categorical([names[each.task_id] for each in scored]).repeat(sizes),
            "plan": repeated("plan"),
            "compensation": repeated("compensation"),
            "split": repeated("split"),
            "sample": np.concatenate([np.arange(size, dtype=np.int64) for size in sizes] or [np.empty(0, np.int64)]),
            "score": per_sample(lambda each: each.scores),
            "divergence": per_sample(lambda each: [math.nan] * each.n_samples if each.kl is None else each.kl),
        }
    )


def _mean(values: Sequence[float] | None) -> float:
    known = [value for value in values or () if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def table_bytes(frame: pd.DataFrame, path: Path) -> bytes:
    """Encode a frame by the ending of ``path``: ``.csv`` (UTF-8, missing values empty) or ``.parquet``.

    Raises UsageFault for another ending, or where Parquet needs a package that is not there.
    """
    if path.suffix == ".csv":
        return bytes(frame.to_csv(index=False).encode())
    if path.suffix != ".parquet":
        raise UsageFault(f"{path}: a table is written as .csv or .parquet")
    try:
        import pyarrow  # noqa: F401  (what pandas writes Parquet with)
    except ImportError:
        raise UsageFault(f"{path}: Parquet needs pyarrow (pip install 'skipplan[parquet]'); or write .csv") from None
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    return content.getvalue()
