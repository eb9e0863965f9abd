"""Fit the maps of compensated finalists and keep them; from then on a checksum names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from optimizer.errors import UsageFault
from optimizer.job.inputs import load_general_text, load_job_task, model_source
from optimizer.job.spec import JobSpec
from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext, JobFailed
from storage.records.plans import Plan
from workers.compensation import store
from workers.messages import (
    NO_COMPENSATION,
    Artifact,
    CompareText,
    Failure,
    FitCompensation,
    FittedCompensation,
    GapShare,
    ModelSource,
)
from workers.runtime import SkipPlan


@dataclass(frozen=True)
class KeptMaps:
    """A finalist's maps: their artifact, and how well they fit on the calibration split."""

    artifact: Artifact
    gaps: tuple[GapShare, ...]
    tokens: int
    samples: int
    seconds: float
    text_tokens: int = 0
    """Of the tokens, those of general text."""


def require_text(context: JobContext) -> None:
    """Let the dense model read text without an image where maps are to be fitted on some, before anything else.

    Raises JobFailed where it does not.
    """
    if context.spec.compensation.kind != "none" and context.spec.compensation.text_share:
        context.load_or_compute("takes text", bool, lambda: _takes_text(context))


def _takes_text(context: JobContext) -> bool:
    dense = SkipPlan.dense(context.worker.num_layers)
    ((_, found),) = context.run([CompareText(dense.text, "A few words of text without an image.")])
    if isinstance(found, Failure):
        raise JobFailed(
            f"the model does not take text without an image ({found.reason}); set compensation.text_share: 0"
        )
    return True


def run(context: JobContext, finalists: Sequence[Candidate]) -> dict[Candidate, KeptMaps]:
    """Fit the maps of the compensated finalists, or read them back; a finalist that cannot be fitted is left out.

    Raises :class:`~workers.compensation.recipe.CompensationError` when the artifact store cannot be written.
    """
    compensated = [each for each in finalists if each.compensation != NO_COMPENSATION]
    if compensated:
        context.progress.begin("fit maps", len(compensated))
    fitted = context.turns.together(*(partial(_load_or_fit, context, candidate) for candidate in compensated))
    return {candidate: own for candidate, own in zip(compensated, fitted, strict=True) if own is not None}


def _load_or_fit(context: JobContext, candidate: Candidate) -> KeptMaps | None:
    found = context.load_or_compute(f"compensate {candidate}", KeptMaps | None, partial(_fit, context, candidate))
    context.progress.advance()
    return found


def _fit(context: JobContext, candidate: Candidate) -> KeptMaps | None:
    ((_, result),) = context.run(
        [FitCompensation(candidate.plan.text, candidate.compensation, context.inputs.general_text)]
    )
    if isinstance(result, Failure):
        context.progress.note(f"the maps of plan {candidate} could not be fitted: {result.reason}")
        return None
    assert isinstance(result, FittedCompensation)
    context.failed_samples.add("calibration", result.failed_samples)
    artifact = store.put(context.spec.artifacts, result.content)
    return KeptMaps(artifact, result.gaps, result.tokens, result.samples, result.seconds, result.text_tokens)


@dataclass(frozen=True)
class Refitted:
    """Maps that were fitted again, and whether they equal those that the plan was verified with, bit by bit."""

    artifact: Artifact
    same: bool


def refit(plan: Plan, spec: JobSpec, source: ModelSource | None = None) -> Refitted:
    """Fit the maps of ``plan`` once more as its job's worker did, and keep them in the job's artifact store.

    ``source`` says where the model is now, if it moved. The same bits come only on the same kind of machine, with the
    same versions, and with as many threads as the worker had. Raises UsageFault when the plan has no maps, or the model
    is another one.
    """
    if plan.compensation == NO_COMPENSATION:
        raise UsageFault(f"plan {plan.id} is not compensated, so there are no maps to fit")
    import torch

    from workers.compensation.compensator import Compensator
    from workers.models.loading import load_model

    torch.set_num_threads(max(1, int(spec.cluster.cpus_per_worker)))
    task = load_job_task(spec)
    loaded = load_model(source or model_source(spec), measuring=True)
    if loaded.fingerprint != plan.fingerprint:
        raise UsageFault(
            f"model {loaded.name} has fingerprint {loaded.fingerprint[:12]}, plan {plan.id} was fitted on "
            f"{plan.fingerprint[:12]}; name the right one with --model-path"
        )
    fitted = Compensator(loaded, task).fit(FitCompensation(plan.plan, plan.compensation, load_general_text(spec)))
    artifact = store.put(spec.artifacts, fitted.content)
    return Refitted(artifact, artifact.checksum == plan.artifact_checksum)
