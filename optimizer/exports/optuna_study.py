"""A job's search as an Optuna study in an Optuna storage, for optuna-dashboard and the like."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import fsum
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from optimizer.errors import ClusterOrDatabaseFault, UsageFault
from optimizer.job.loading import read_spec
from optimizer.job.result import tasks_of_job
from optimizer.job.spec import JobSpec
from optimizer.search.latency import LayerCounts, LayerTimes, latency_ratio
from optimizer.search.trial import answered_by_both
from storage.database import Database
from storage.queue import jobs
from storage.records import evaluations, measurements
from storage.records.evaluations import EvaluationRecord
from storage.records.plans import LOSSLESS
from workers.runtime.plan import LETTERS, SkipPlan
from workers.text import hide_passwords, one_line

METRICS = ("predicted latency as a share of dense", "loss of accuracy on the search split")


@dataclass(frozen=True)
class ExportedStudy:
    """A written study: its name and how many trials it has."""

    name: str
    trials: int
    complete: int


def export_study(db: Database, job_id: int, storage: str, name: str | None = None) -> ExportedStudy:
    """Write every plan that a job evaluated on its search split as a trial; later rungs replace earlier ones.

    A plan that ended on an early rung is a pruned trial with the difference seen there, one that failed a failed trial.
    Raises NotFound for an unknown job, UsageFault when it is lossless, nothing was evaluated yet or the study's name
    is taken,
    ClusterOrDatabaseFault when the storage cannot be written.
    """
    job = jobs.get(db, job_id)
    if job.spec.get("mode") == LOSSLESS:
        raise UsageFault(
            f"job {job_id} is lossless: its costs follow from rounds of drafts, which a study has no place for; "
            "`skipplan report` shows its search"
        )
    if read_spec(job).judges_several:
        raise UsageFault(
            f"job {job_id} judges by several losses, which a study with one has no place for; `skipplan report` shows "
            "its search"
        )
    trials = list(_trials(db, job.id, read_spec(job)))
    name = name or f"skipplan job {job_id}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(METRICS))
        study.set_user_attr("job", job_id)
        study.set_user_attr("model", job.spec["model"]["path"])
        study.set_user_attr("task", tasks_of_job(job.spec))
        study.add_trials(trials)
    except optuna.exceptions.DuplicatedStudyError:
        raise UsageFault(f"the storage has a study {name!r} already; give another name with --name") from None
    except (UsageFault, MemoryError):
        raise
    except Exception as error:  # Optuna, SQLAlchemy and each driver raise their own kinds for a storage of any sort
        reason = hide_passwords(one_line(error))[:200]
        raise ClusterOrDatabaseFault(f"--storage: the study cannot be written: {reason}") from None
    return ExportedStudy(name, len(trials), sum(trial.state == TrialState.COMPLETE for trial in trials))


def _trials(db: Database, job_id: int, spec: JobSpec) -> Iterator[FrozenTrial]:
    found = evaluations.for_job(db, job_id, "search")
    if not found:
        raise UsageFault(f"job {job_id} has no evaluation on its search split yet; wait until its search has begun")
    last: dict[tuple[str, str], EvaluationRecord] = {}
    for each in found:
        key = (each.plan, each.compensation)
        if key not in last or each.n_samples >= last[key].n_samples:
            last[key] = each
    dense = next((each for each in found if SkipPlan.parse(each.plan).is_dense and each.failure is None), None)
    if dense is None:
        raise UsageFault(f"job {job_id} has not evaluated the dense model yet; wait until its search has begun")
    times = _layer_times(db, dense, spec)
    for each in sorted(last.values(), key=lambda each: each.id):
        yield _trial(each, dense, times, spec)


def _layer_times(db: Database, dense: EvaluationRecord, spec: JobSpec) -> LayerTimes:
    """Read the profile that predicted latency in the job's search."""
    profile = measurements.profile_of_job(db, dense.job_id) if spec.search.latency_model == "profile" else None
    return profile if profile is not None else LayerCounts.of(len(dense.plan), LETTERS)


def _trial(each: EvaluationRecord, dense: EvaluationRecord, times: LayerTimes, spec: JobSpec) -> FrozenTrial:
    letters = tuple(spec.letters)
    params = {f"layer {layer:03d}": letter for layer, letter in enumerate(each.plan)}
    attributes: dict[str, Any] = {
        "plan": each.plan,
        "compensation": each.compensation,
        "n_samples": each.n_samples,
        "recorded_at": each.recorded_at.isoformat(),
    }
    state, values = TrialState.COMPLETE, None
    if each.failure is not None:
        state = TrialState.FAIL
        attributes["failure"] = each.failure
    else:
        its_dense, own = answered_by_both(dense.scores[: each.n_samples], each.scores)
        difference = (fsum(own) - fsum(its_dense)) / len(own)
        ratio = latency_ratio(times, SkipPlan.parse(each.plan))
        attributes |= {"accuracy": each.accuracy, "difference": difference, "latency_ratio": ratio}
        if each.n_samples < dense.n_samples:
            state = TrialState.PRUNED
        else:
            values = [ratio, 0.0 - difference]
    return create_trial(
        state=state,
        values=values,
        params=params,
        distributions={name: CategoricalDistribution(letters) for name in params},
        user_attrs=attributes,
    )
