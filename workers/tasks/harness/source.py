"""Read a task of lmms-eval as samples, and score answers to them as lmms-eval does."""

from __future__ import annotations

from typing import Any

from workers.cache_directory import cache_directory
from workers.errors import TaskError
from workers.tasks.images import ImageFile
from workers.tasks.samples import Document, Sample
from workers.tasks.spec import HARNESS, Answer, LmmsEvalSource, SettledLmmsEvalSource, TaskSpec
from workers.text import did_you_mean

from .process import open_task

LONGEST_SHORT_ANSWER = 16
"""Tokens up to which answers count as short: they are compared with those that are accepted, not written out."""
MOST_REMEMBERED = 100_000


def settle(spec: TaskSpec, source: LmmsEvalSource) -> TaskSpec:
    """Let the harness say a task's answers and metrics, and what identifies it.

    Raises:
        TaskError: the harness has no such task, or it cannot be taken over; the message says why.
    """
    found = open_task(source.task, source.include).description
    metrics: list[str] = found["metrics"]
    first = source.metric or metrics[0]
    if first not in metrics:
        raise TaskError(
            f"task {spec.name}: source.metric: {first!r} is not scored per sample by lmms-eval's {source.task}; "
            f"choose one of {', '.join(metrics)}{did_you_mean(first, metrics)}"
        )
    tokens = source.max_new_tokens or int(found["max_new_tokens"])
    return spec.changed(
        source=SettledLmmsEvalSource(**source.model_dump(), version=found["version"], identity=found["identity"]),
        answer=Answer(kind="short" if tokens <= LONGEST_SHORT_ANSWER else "free", max_new_tokens=tokens),
        metric=f"{HARNESS}:{first}",
        secondary=tuple(f"{HARNESS}:{name}" for name in metrics if name != first),
    )


def read_samples(source: LmmsEvalSource) -> list[Sample]:
    """Read a task's documents; their images go to the cache directory, to files named by their pixels.

    Raises:
        TaskError: a document shows other than one image, or the harness ended.
    """
    harness = open_task(source.task, source.include)
    return [_sample(each) for each in harness.read(cache_directory() / HARNESS, source.limit)]


def _sample(found: dict[str, Any]) -> Sample:
    return Sample(
        id=f"document-{found['document']}",
        image=ImageFile(found["image"], found["content"]),
        image_key=found["pixels"],
        question=found["prompt"],
        answers=tuple(found["answers"]),
        document=Document(found["document"], found["hash"]),
    )


_scores: dict[tuple[str, str | None, Document, str], dict[str, float]] = {}


def score_answer(spec: TaskSpec, source: LmmsEvalSource, sample: Sample, text: str) -> tuple[float, ...]:
    """Return the task's metrics of an answer, by the harness's own ``process_results``.

    Raises:
        TaskError: the harness ended, or is not the one, with the task, by which the task was read.
    """
    assert sample.document is not None
    key = (source.task, source.include, sample.document, text)
    if key not in _scores:
        if len(_scores) >= MOST_REMEMBERED:
            _scores.clear()
        harness = open_task(source.task, source.include)
        if isinstance(source, SettledLmmsEvalSource) and harness.description["identity"] != source.identity:
            raise TaskError(
                f"lmms-eval task {source.task}: the YAML, the code or lmms-eval itself (here version "
                f"{harness.description['version']}) is another than when the task was read (version {source.version}); "
                "let every node have the same, and start again"
            )
        _scores[key] = harness.score(sample.document.number, sample.document.hash, text)
    found = _scores[key]
    return tuple(found[name.removeprefix(f"{HARNESS}:")] for name in spec.metrics)
