"""Score the text of an answer by its task's metrics: those of a task file, or of the harness that the task is of."""

from __future__ import annotations

from workers.tasks.metrics import METRICS
from workers.tasks.samples import Sample
from workers.tasks.spec import LmmsEvalSource, TaskSpec


def score_answer(spec: TaskSpec, sample: Sample, text: str) -> tuple[float, ...]:
    """Return the metric and the secondary metrics of an answer.

    Raises:
        TaskError: the harness that scores it ended, or gives no score in [0, 1].
    """
    if isinstance(spec.source, LmmsEvalSource):
        from workers.tasks.harness.source import score_answer

        return score_answer(spec, spec.source, sample, text)
    return tuple(METRICS[name](text, sample.answers) for name in spec.metrics)
