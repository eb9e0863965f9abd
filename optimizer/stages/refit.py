"""Fitting a published plan's maps again from its record, and telling whether they are the same bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

from optimizer.errors import UsageFault
from optimizer.job.inputs import load_job_task, model_source
from optimizer.job.spec import JobSpec
from storage.records.plans import Plan
from workers.compensation import store
from workers.messages import NO_COMPENSATION, Artifact, FitCompensation, ModelSource


@dataclass(frozen=True)
class Refitted:
    """Where the maps lie now, and whether they are those that the plan was verified with."""

    artifact: Artifact
    same: bool


def refit(plan: Plan, spec: JobSpec, source: ModelSource | None = None) -> Refitted:
    """Fit the maps of ``plan`` as its job's worker did, and keep them in the job's artifact store.

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
    loaded = load_model(source or model_source(spec))
    if loaded.fingerprint != plan.fingerprint:
        raise UsageFault(
            f"model {loaded.name} has fingerprint {loaded.fingerprint[:12]}, plan {plan.id} was fitted on "
            f"{plan.fingerprint[:12]}; name the right one with --model-path"
        )
    fitted = Compensator(loaded, task).answer(FitCompensation(plan.plan, plan.compensation))
    artifact = store.put(spec.artifacts, fitted.content)
    return Refitted(artifact, artifact.checksum == plan.artefact_checksum)
