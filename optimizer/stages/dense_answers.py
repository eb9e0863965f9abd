"""In lossless jobs: let the dense model answer, greedily. Plans are held against its answers, which stay with the job.

A split is answered in parts, shared by the workers; each part is stored when it is there.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from math import fsum

from pydantic import TypeAdapter

from optimizer.stages.context import JobContext
from storage.queue import stages
from workers.messages import AnswerDense, DenseAnswers

PART = 64
"""Samples of a part."""


@dataclass(frozen=True)
class AnsweredPart:
    """Dense's answers to some consecutive samples, and what they score under the task's metrics."""

    tokens: tuple[tuple[int, ...] | None, ...]
    """Up to the one that ends an answer; None where a sample failed."""
    scores: tuple[float | None, ...]
    secondary: dict[str, float]

    @property
    def answered(self) -> int:
        """Number of samples that did not fail."""
        return sum(score is not None for score in self.scores)


@dataclass(frozen=True)
class SplitAnswers:
    """Dense's answers to a split; scores are NaN where a sample failed, ``secondary`` are means over the others."""

    tokens: tuple[tuple[int, ...] | None, ...]
    scores: tuple[float, ...]
    secondary: dict[str, float]


_STORED = TypeAdapter(AnsweredPart)


def run(context: JobContext, split: str) -> SplitAnswers:
    """Let the dense model answer a split, or read its answers back. Raises JobFailed where a part fails."""
    samples = context.task.split(split)
    starts = range(0, len(samples), PART)
    parts: dict[int, AnsweredPart] = {}
    for start in starts:
        recorded = stages.get(context.db, context.job.id, _stage(split, start))
        if recorded is not None:
            parts[start] = _STORED.validate_python(recorded.payload["value"])
    missing = [start for start in starts if start not in parts]
    if missing:
        context.progress.note(f"the dense model answers {len(samples)} {split.replace('_', '-')} samples")
    requests = [AnswerDense(split, start, min(start + PART, len(samples))) for start in missing]
    for number, reply in context.ask(requests):
        assert isinstance(reply, DenseAnswers)
        start, found = missing[number], reply.evaluation
        failed = [math.isnan(score) for score in found.scores]
        marked = {s: found.failed_samples[s] for s, bad in zip(found.sample_ids, failed, strict=True) if bad}
        context.failed_samples.add(split, marked)
        scores = tuple(None if bad else score for score, bad in zip(found.scores, failed, strict=True))
        parts[start] = AnsweredPart(reply.tokens, scores, {} if all(failed) else found.secondary)
        value = _STORED.dump_python(parts[start], mode="json")
        stages.record_stage(context.db, context.job, _stage(split, start), {"value": value})
    ordered = [parts[start] for start in starts]
    total = max(1, sum(part.answered for part in ordered))
    names = next((part.secondary for part in ordered if part.secondary), {})
    return SplitAnswers(
        tokens=tuple(answer for part in ordered for answer in part.tokens),
        scores=tuple(math.nan if score is None else score for part in ordered for score in part.scores),
        secondary={
            name: fsum(part.answered * part.secondary[name] for part in ordered if part.answered) / total
            for name in names
        },
    )


def evaluation_settings(context: JobContext, split: str) -> str:
    """Return what scores on a split depend on: in a lossless job, dense's answers too, which rounding may decide."""
    if not context.spec.is_lossless:
        return context.settings
    digest = hashlib.sha256(json.dumps(run(context, split).tokens).encode()).hexdigest()
    return f"{context.settings} mode={context.spec.mode} targets={digest[:16]}"


def _stage(split: str, start: int) -> str:
    return f"dense answers {split} {start}"
