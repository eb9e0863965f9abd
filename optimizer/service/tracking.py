"""Follow a job in MLflow: a run with its parameters, search, result and files, and its plan in the registry.

Everything is read from the database, so that a run can be written at any time and a resumed job goes on in its own.
Nothing here fails a job: what cannot be written is said in a note.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.service import logs
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs
from storage.queue.jobs import Job
from workers.text import hide_passwords, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from optimizer.reports.data import JobReport
    from storage.records.plans import Plan

URI = "MLFLOW_TRACKING_URI"
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""For a server that does not answer; MLflow's own settings wait for many minutes."""

FINISH_SECONDS = 180.0
"""A job waits so long for its run to be written, and then ends without."""

JOB_TAG, DATABASE_TAG, SUBMITTED_TAG = "skipplan.job", "skipplan.database", "skipplan.submitted"
MOST_IN_BATCH = 500
LONGEST_PARAMETER = 500
STATUS = {"succeeded": "FINISHED", "infeasible": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
FIGURES = (
    "accuracy",
    "dense_accuracy",
    "difference",
    "speedup",
    "latency_seconds",
    "dense_latency_seconds",
    "kv_cache_bytes",
    "n_samples",
)


@contextmanager
def tracked(db: Database, job: Job, progress: Progress) -> Iterator[None]:
    """Write the job's run as the block begins, and its results as it ends, where the job file asks for that."""
    if job.spec.get("tracking") != "mlflow":
        yield
        return

    said: set[str] = set()

    def quietly(write: Callable[[Database, int], None]) -> None:
        try:
            write(db, job.id)
        except Exception as error:
            reason = f"tracking: {hide_passwords(one_line(error))[:300] or type(error).__name__}"
            if reason not in said:
                progress.note(reason)
                logs.log("tracking_failed", job=job.id, reason=reason)
            said.add(reason)

    begun = threading.Thread(target=quietly, args=[begin], daemon=True)
    begun.start()
    try:
        yield
    finally:
        deadline = time.monotonic() + FINISH_SECONDS
        begun.join(FINISH_SECONDS)
        ended = threading.Thread(target=quietly, args=[finish], daemon=True)
        if not begun.is_alive():  # else both would write the run at the same time
            ended.start()
            ended.join(max(0.0, deadline - time.monotonic()))
        if begun.is_alive() or ended.is_alive():
            progress.note(f"tracking: the run of job {job.id} was not written within {FINISH_SECONDS:g} s")


def begin(db: Database, job_id: int) -> None:
    """Make or find the job's run and give it the job's parameters. Raises what MLflow raises."""
    from optimizer.job.loading import read_spec

    client = _client()
    from mlflow.entities import Param

    run = _run(client, db, jobs.get(db, job_id))
    known = run.data.params
    fields = _flat(read_spec(jobs.get(db, job_id)).canonical())
    new = [Param(name, value) for name, value in fields.items() if name not in known]
    for start in range(0, len(new), 100):
        client.log_batch(run.info.run_id, params=new[start : start + 100])


def finish(db: Database, job_id: int) -> None:
    """Write what the job has found, and how it ended. Raises what MLflow raises."""
    from optimizer.reports.data import collect

    client = _client()
    job = jobs.get(db, job_id)
    run = _run(client, db, job)
    number = run.info.run_id
    report = collect(db, job_id)
    _log_search(client, number, db, report)
    _log_plans(client, number, report)
    with tempfile.TemporaryDirectory() as directory:
        _write_files(db, report, Path(directory))
        client.log_artifacts(number, directory)
    client.set_tag(number, "skipplan.state", job.state)
    if job.error:
        client.set_tag(number, "mlflow.note.content", job.error)
    if report.best is not None and job.state == "succeeded":
        _register(client, run, report.best)
    client.set_terminated(number, STATUS.get(job.state, "SCHEDULED"))


def _client() -> MlflowClient:
    """Connect to the server that the environment names. Raises RuntimeError with one line where it cannot."""
    uri = os.environ.get(URI)
    if not uri:
        raise RuntimeError(f"{URI} is not set where the job runs; nothing is tracked")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise RuntimeError("MLflow is not installed; pip install 'skipplan[mlflow]'") from None
    return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def _run(client: MlflowClient, db: Database, job: Job) -> Run:
    """Return the job's run, which its tags name; a job that goes on has one already."""
    from mlflow.exceptions import MlflowException

    name = os.environ.get(EXPERIMENT) or "skipplan"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            number = client.create_experiment(name)
        except MlflowException:  # another process made it at the same time
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            number = found.experiment_id
    else:
        number = experiment.experiment_id
    tags = _tags(db, job)
    wanted = " and ".join(f"tags.`{tag}` = '{_quoted(value)}'" for tag, value in tags.items())
    found_runs = client.search_runs([number], wanted, max_results=1)
    if found_runs:
        client.set_tag(found_runs[0].info.run_id, "skipplan.attempt", str(job.attempt))
        return found_runs[0]
    model = str(job.spec["model"]["path"]).rstrip("/").rsplit("/", 1)[-1]
    return client.create_run(number, tags=tags, run_name=f"job {job.id}: {model}")


def _tags(db: Database, job: Job) -> dict[str, str]:
    """Name a job among those of all databases: the URL of one may be relative, and its moment is the job's own."""
    submitted = job.created_at.isoformat(timespec="microseconds")
    return {JOB_TAG: str(job.id), DATABASE_TAG: db.safe_url, SUBMITTED_TAG: submitted}


def _quoted(text: str) -> str:
    return text.replace("'", "")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Name every field of a specification by its dotted path, as the job file's errors do."""
    if isinstance(value, Mapping) and value:
        inner = (_flat(each, f"{prefix}.{name}" if prefix else str(name)) for name, each in value.items())
        return {name: text for part in inner for name, text in part.items()}
    text = value if isinstance(value, str) else json.dumps(value)
    return {re.sub(r"[^\w. /:-]", "_", prefix)[:250]: text[:LONGEST_PARAMETER]}


def _log_search(client: MlflowClient, run: str, db: Database, report: JobReport) -> None:
    """Write the search: accuracy and divergence of every evaluation, and the covered share after every plan."""
    from optimizer.reports.evaluations import evaluations_frame
    from optimizer.reports.progress import reference, steps

    frame = evaluations_frame(db, report.job.id)
    searched = frame[frame.split == "search"]
    points: list[tuple[str, float, datetime, int]] = [
        (f"search.{name}", float(value), at, step)
        for name in ("accuracy", "divergence")
        for step, (value, at) in enumerate(zip(searched[name], searched.recorded_at, strict=True))
    ]
    ended = report.job.finished_at or report.job.created_at
    points += [
        ("search.covered_share", each.covered, ended, each.plans) for each in steps(report.trials, reference(report))
    ]
    _log(client, run, points)


def _log_plans(client: MlflowClient, run: str, report: JobReport) -> None:
    """Write the published plans, fastest first, one a step, and the job's answer by itself."""
    at = report.job.finished_at or report.job.created_at
    points = [
        (f"plans.{name}", value, at, step)
        for step, plan in enumerate(report.plans)
        for name, value in _figures(plan).items()
    ]
    if report.best is not None:
        points += [(f"best.{name}", value, at, 0) for name, value in _figures(report.best).items()]
        client.set_tag(run, "skipplan.best_plan", report.best.plan)
    _log(client, run, points)


def _figures(plan: Plan) -> dict[str, float]:
    found = {name: float(getattr(plan, name)) for name in FIGURES}
    for name in ("accuracy", "difference", "speedup"):
        found |= {f"{name}_{end}": float(getattr(plan, f"{name}_{end}")) for end in ("low", "high")}
    return found


def _log(client: MlflowClient, run: str, points: Iterable[tuple[str, float, datetime, int]]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(name, value, int(at.timestamp() * 1000), step)
        for name, value, at, step in points
        if math.isfinite(value)
    ]
    for start in range(0, len(metrics), MOST_IN_BATCH):
        client.log_batch(run, metrics=metrics[start : start + MOST_IN_BATCH])


def _write_files(db: Database, report: JobReport, directory: Path) -> None:
    """Write the run's files: report, evaluations, plans, and the job's answer as an export with its card."""
    from optimizer.exports.writing import export_published
    from optimizer.job.result import plan_json
    from optimizer.reports.evaluations import evaluations_frame
    from optimizer.reports.html import write_report

    (directory / "report.html").write_text(write_report(db, report.job.id), encoding="utf-8")
    evaluations_frame(db, report.job.id).to_csv(directory / "evaluations.csv", index=False)
    plans = json.dumps([plan_json(plan) for plan in report.plans], indent=2, default=str)
    (directory / "plans.json").write_text(plans, encoding="utf-8")
    if report.best is not None:
        export_published(db, report.best, "plan", directory / "plan")


def _register(client: MlflowClient, run: Run, plan: Plan) -> None:
    """Register the job's answer as a version of a model named after model and task, once."""
    from mlflow.exceptions import MlflowException

    model = plan.model.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.-]", "-", f"skipplan-{model}-{plan.task}")[:250]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if any(each.run_id == run.info.run_id for each in client.search_model_versions(f"name = '{name}'")):
        return
    tags = {"skipplan.plan": plan.plan, "skipplan.speedup": f"{plan.speedup:.4f}"}
    source = f"{run.info.artifact_uri}/plan"
    client.create_model_version(name, source, run_id=run.info.run_id, tags=tags)
