"""The Python API: what the commands do, as functions. ``from optimizer import submit, best, plans, report, export``.

``database`` is an SQLAlchemy URL everywhere; without it ``SKIPPLAN_DATABASE`` counts, else ``sqlite:///skipplan.db``.
Accuracies are shares in [0, 1], differences shares (a loss is negative), times seconds, speed-ups dense / plan time.
Intervals have the confidence that stands beside them: Wilson's for accuracies (Wilson 1927), the bootstrap's over whole
images for differences (Efron 1979, with Holm's correction 1979 over a job's finalists), and over alternating pairs for
speed-ups.

Every function raises ``storage.errors.DatabaseError`` when the database cannot be used and ``storage.errors.NotFound``
for a name or number that it does not know.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import UsageFault

if TYPE_CHECKING:
    import pandas as pd

    from optimizer.job.spec import JobSpec
    from storage.database import Database
    from storage.queue.jobs import Job
    from storage.records.plans import Plan, Sort

JobFile = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a job file, or its fields as nested mappings (relative paths are then relative to here)."""


def submit(job: JobFile, *, database: str | None = None, force: bool = False) -> Job:
    """Queue a job for ``skipplan serve``; the job that there is already where one of the same specification exists.

    Task data, images and model files are checked first. ``force`` queues it in any case. Raises UsageFault naming the
    field, file, row or image that is wrong.
    """
    from optimizer.job.inputs import prepare
    from optimizer.service import runner
    from storage.database import Database

    spec = _spec(job, database)
    inputs = prepare(spec)
    with Database.open(spec.database) as db:
        return runner.submit(db, inputs, anew=force)[0]


def run(job: JobFile, *, database: str | None = None, force: bool = False) -> Job:
    """Do a job now and return it as it ended; one that has a result already is not run again.

    It runs in a process of its own, with a Ray of its own where ``cluster.address`` is local, because Ray's core may
    end the process that uses it. An interrupted job goes on where it was. The state is ``succeeded``, or ``infeasible``
    when no plan met the constraint. Raises UsageFault for wrong input, ``workers.errors.ClusterError`` when the cluster
    cannot be used, ``ClusterLost`` (one of these) when it or the process ended under the job, which is then back in the
    queue, and ``optimizer.stages.context.JobFailed`` when the job cannot be done.
    """
    from optimizer.service.apart import run_apart
    from storage.database import Database
    from storage.queue import jobs

    spec = _spec(job, database)
    number = run_apart(spec, force=force)
    with Database.open(spec.database) as db:
        return jobs.get(db, number)


def best(
    model: str,
    task: str,
    *,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    min_speedup: float | None = None,
    max_latency_seconds: float | None = None,
    device: str | None = None,
    engine: str | None = None,
    concurrency: int | None = None,
    lossless: bool = False,
    all_versions: bool = False,
    database: str | None = None,
) -> Plan | None:
    """Find the fastest published plan of a model on a task within limits; None where the dense model is the answer.

    ``model`` is a name, path, hub id or fingerprint. ``max_accuracy_drop`` (a share; 0.01 is one point) is held against
    the upper end of the loss's interval, the other limits against what was measured.
    With an ``engine`` (vllm, llama.cpp, ...) speed and latency are what it took with ``concurrency`` requests in
    flight (1 when absent), and plans that it did not serve are left out.
    With ``lossless`` plans are meant that draft for the dense model (``Plan.mode``), without it those that stand alone.
    Without a limit on loss or accuracy, plans that miss their own job's constraint are left out.
    Plans of former model files, data, prompts or metrics are left out unless ``all_versions``.
    """
    from optimizer.errors import NoFeasiblePlan
    from optimizer.job.best import find_best
    from storage.records.plans import PlanQuery, mode_of

    with _open(database) as db:
        query = PlanQuery(
            model,
            task,
            device=device,
            engine=engine,
            concurrency=concurrency,
            mode=mode_of(lossless=lossless),
            max_accuracy_drop=max_accuracy_drop,
            min_accuracy=min_accuracy,
            min_speedup=min_speedup,
            max_latency_seconds=max_latency_seconds,
        )
        try:
            return find_best(db, query, all_versions=all_versions)[0]
        except NoFeasiblePlan:
            return None


def plans(
    *,
    model: str | None = None,
    task: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    concurrency: int | None = None,
    max_accuracy_drop: float | None = None,
    min_speedup: float | None = None,
    on_front: bool = False,
    sort: Sort = "speedup",
    limit: int | None = None,
    lossless: bool = False,
    all_versions: bool = False,
    database: str | None = None,
) -> pd.DataFrame:
    """List published plans, best first by ``sort``: one row a plan within the limits, indexed by its id.

    With an ``engine`` the limit and the order are by what it took at ``concurrency``, as in :func:`best`;
    :func:`engine_latencies` has those figures. ``lossless`` lists plans that draft, as in :func:`best`.
    Columns: what was verified and measured (``accuracy``, ``difference``, ``speedup``, each with ``_low`` and
    ``_high``; ``latency_seconds``, ``kv_cache_bytes``, ...), and ``plan``, ``compensation``, ``model``, ``task``,
    ``device``, ``workload``, ``job_id``, ``on_front``, ``meets_constraint`` (of its own job; None where not known),
    ``changed`` (what changed since, of plans that only ``all_versions`` lists: model files, data, ...).
    """
    from optimizer.job.present import PresentVersions
    from optimizer.job.result import PlanAnswer
    from storage.records import overview
    from storage.records import plans as published
    from storage.records.plans import PlanQuery, mode_of

    query = PlanQuery(
        model,
        task,
        device=device,
        engine=engine,
        concurrency=concurrency,
        mode=mode_of(lossless=lossless),
        max_accuracy_drop=max_accuracy_drop,
        min_speedup=min_speedup,
        on_front=on_front,
        sort=sort,
        limit=limit,
    )
    with _open(database) as db:
        present = PresentVersions(db)
        found = published.list_plans(db, present.resolve(query, all_versions=all_versions))
        answers = [PlanAnswer.of(plan, present.changes(plan)) for plan in found]
    return overview.frame(answers, PlanAnswer).drop(columns=["secondary", "layers", "engine_latencies"]).set_index("id")


def engine_latencies(job_id: int, *, database: str | None = None) -> pd.DataFrame:
    """List what engines took to serve a job's plans: one row a plan, engine, version and concurrency.

    Columns: ``plan_id``, ``plan``, ``engine``, ``version``, ``dtype``, ``concurrency``, ``rounds``, ``speedup`` with
    ``_low`` and ``_high``, and for the plan and (``dense_``) the dense model ``first_token_seconds``,
    ``seconds_per_token``, ``latency_seconds``, ``requests_per_second`` and ``kv_cache_tokens``.
    """
    from dataclasses import asdict, fields

    import pandas

    from storage.queue import jobs
    from storage.records import plans as published
    from storage.records.engine_latencies import EngineLatency

    with _open(database) as db:
        jobs.get(db, job_id)
        found = published.for_job(db, job_id)
    rows = [{"plan_id": each.id, "plan": each.plan} | asdict(own) for each in found for own in each.engine_latencies]
    return pandas.DataFrame(rows, columns=["plan_id", "plan", *(each.name for each in fields(EngineLatency))])


def evaluations(job_id: int, *, database: str | None = None) -> pd.DataFrame:
    """List what a job scored, in the order of its evaluations: one row a plan and size, indexed by the evaluation's id.

    Columns: ``task`` (name of what was scored, a task or text), ``plan``, ``compensation``, ``split``, ``n_samples``,
    ``accuracy`` (NaN for a failure), ``seconds`` of worker time, ``failure``, ``reused_from``, ``layer_executions``.
    Search accuracies steer; they are no result.
    """
    from optimizer.reports.evaluations import names_of_tasks
    from storage.queue import jobs
    from storage.records import evaluations, overview
    from storage.records.evaluations import EvaluationSummary

    with _open(database) as db:
        jobs.get(db, job_id)
        rows = evaluations.summaries(db, job_id)
        names = names_of_tasks(db, rows)
    columns = ["id", "task", "plan", "compensation", "split", "n_samples", "accuracy", "seconds", "failure"]
    columns += ["reused_from", "recorded_at", "layer_executions", "layer_executions_saved"]
    frame = overview.frame(rows, EvaluationSummary)
    return frame.assign(task=frame["task_id"].map(names))[columns].set_index("id")


def redundancy(job_id: int, *, database: str | None = None) -> pd.DataFrame:
    """List the redundancy of every layer on the calibration split: one row a measure, token group and layer.

    Columns: ``name``, ``token_group`` (vision, text, all, last), ``layer`` (from 0), ``value``, ``standard_error`` (NaN
    where there is none), ``n`` (tokens or samples). No rows where nothing was measured. Definitions and sources stand
    in the documentation of the theory.
    """
    from optimizer.reports.data import collect
    from storage.records import overview
    from storage.records.measurements import Redundancy

    with _open(database) as db:
        rows = collect(db, job_id).redundancy
    return overview.frame(rows, Redundancy)[["name", "token_group", "layer", "value", "standard_error", "n"]]


def report(job_id: int, path: str | os.PathLike[str], *, figure: str = "front", database: str | None = None) -> Path:
    """Write a job's report and return its path: a self-contained page for ``.html``, one ``figure`` for ``.png``.

    Figures are ``front``, ``plans``, ``redundancy``, ``theory``, ``progress`` and ``latency``. An existing file is
    replaced. Raises UsageFault for another ending, or when a figure was not measured.
    """
    target = Path(path)
    with _open(database) as db:
        if target.suffix == ".html":
            from optimizer.reports.html import write_report

            content = write_report(db, job_id).encode()
        elif target.suffix == ".png":
            from optimizer.reports.picture import write_picture

            content = write_picture(db, job_id, figure)
        else:
            raise UsageFault(f"{target}: a report is written as .html or .png")
    target.write_bytes(content)
    return target


def export(
    plan_id: int,
    directory: str | os.PathLike[str],
    *,
    format: str = "checkpoint",
    model_path: str | None = None,
    force: bool = False,
    database: str | None = None,
) -> tuple[str, ...]:
    """Write a published plan for another deployment and return notes about what was written.

    Formats: plan, checkpoint, runtime, llama-cpp, openvino, vllm. ``model_path`` says where the model is now;
    ``force`` replaces an existing directory. Raises UsageFault for an unknown format or a plan that it cannot take.
    """
    from optimizer.exports.writing import export_published
    from storage.records import plans as published

    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is first imported
    with _open(database) as db:
        plan = published.get(db, plan_id)
        written = export_published(db, plan, format, Path(directory), model_path=model_path, force=force)
    return tuple(written.notes)


def _spec(job: JobFile, database: str | None) -> JobSpec:
    from optimizer.job.loading import load_job, override, resolve_paths, validate_job

    if not isinstance(job, Mapping):
        return load_job(Path(job), database=database)
    document = {key: dict(value) if isinstance(value, Mapping) else value for key, value in job.items()}
    override(document, os.environ)
    if database is not None:
        document["database"] = database
    return resolve_paths(validate_job(document, "job"), Path.cwd())


@contextmanager
def _open(database: str | None) -> Iterator[Database]:
    """Open the database, which must be there."""
    from optimizer.job.spec import DEFAULT_DATABASE
    from storage.database import Database

    with Database.open(database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE, create=False) as db:
        yield db
