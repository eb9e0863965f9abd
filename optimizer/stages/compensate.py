"""Between search and verification: the finalists' maps are fitted for keeping, and named by checksum from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from optimizer.search.space import Candidate
from optimizer.stages.context import JobContext
from workers.compensation import store
from workers.messages import NO_COMPENSATION, Artifact, Failure, FitCompensation, FittedCompensation, GapShare


@dataclass(frozen=True)
class KeptMaps:
    """Where a finalist's maps lie, and how well they fit on the calibration split."""

    artifact: Artifact
    gaps: tuple[GapShare, ...]
    tokens: int
    samples: int
    seconds: float


def run(context: JobContext, finalists: Sequence[Candidate]) -> dict[Candidate, KeptMaps]:
    """The maps of the compensated finalists, each kept as it comes, or read back; one that cannot be fitted is told.

    Raises :class:`~workers.compensation.recipe.CompensationError` when the artifact store cannot be written.
    """
    kept: dict[Candidate, KeptMaps] = {}
    for candidate in finalists:
        if candidate.compensation == NO_COMPENSATION:
            continue
        own = context.once(f"compensate {candidate}", KeptMaps | None, partial(_fit, context, candidate))
        if own is not None:
            kept[candidate] = own
    return kept


def artifacts(kept: Mapping[Candidate, KeptMaps], compensation: str) -> dict[str, Artifact]:
    """By plan, where the maps of one recipe lie."""
    return {each.plan.text: own.artifact for each, own in kept.items() if each.compensation == compensation}


def _fit(context: JobContext, candidate: Candidate) -> KeptMaps | None:
    ((_, result),) = context.pool.run([FitCompensation(candidate.plan.text, candidate.compensation)])
    if isinstance(result, Failure):
        context.progress.note(f"the maps of plan {candidate} could not be fitted: {result.reason}")
        return None
    assert isinstance(result, FittedCompensation)
    artifact = store.put(context.spec.artifacts, result.content)
    return KeptMaps(artifact, result.gaps, result.tokens, result.samples, result.seconds)
