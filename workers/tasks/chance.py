"""Find what a model scores on a task without looking: by guessing an option, or by always giving the same answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from workers.tasks.metrics import normalise_vqa
from workers.tasks.samples import Sample
from workers.tasks.scoring import score_answer
from workers.tasks.spec import TaskSpec

MOST_SAMPLES = 2000
"""Samples that are looked at, the first ones."""
MOST_ANSWERS = 5
"""Most frequent answers that are tried as the one that is always given."""


@dataclass(frozen=True)
class Chance:
    """The score of the best blind answer, and which one that is."""

    score: float
    means: str


def chance(spec: TaskSpec, samples: Sequence[Sample]) -> Chance:
    """Score blind answers by the task's metric, and return the best of them."""
    samples = samples[:MOST_SAMPLES]
    blind = _blind_choices(spec, samples) if spec.is_choice else _blind_answers(spec, samples)
    return max(blind, key=lambda each: each.score, default=Chance(0.0, "no answer"))


def _blind_answers(spec: TaskSpec, samples: Sequence[Sample]) -> list[Chance]:
    spelled: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for sample in samples:
        own = {normalise_vqa(answer): answer for answer in reversed(sample.answers)}
        counts.update(own.keys())
        spelled = own | spelled
    return [
        Chance(
            fsum(score_answer(spec, sample, spelled[each])[0] for sample in samples) / len(samples),
            f"always answering {spelled[each]!r}",
        )
        for each, _ in counts.most_common(MOST_ANSWERS)
    ]


def _blind_choices(spec: TaskSpec, samples: Sequence[Sample]) -> list[Chance]:
    n = len(samples)
    guessed = fsum(1 / len(sample.choices) for sample in samples) / n
    texts = Counter(answer for sample in samples for answer in set(sample.answers))
    constant = [Chance(count / n, f"always choosing {text!r}") for text, count in texts.most_common(1)]
    return [Chance(guessed, "guessing an option"), *constant]
