"""The score of blind answers, against counts made by hand and a brute force over all answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.tasks.chance import chance
from workers.tasks.images import SceneImage
from workers.tasks.metrics import METRICS
from workers.tasks.samples import Sample
from workers.tasks.spec import TaskSpec, parse_spec


def spec(metric: str, kind: str = "short") -> TaskSpec:
    columns = {"choices": "options"} if kind == "choice" else {}
    return parse_spec(
        {
            "name": "t",
            "source": {"kind": "file", "path": "x.csv", "columns": columns},
            "prompt": "{question}",
            "answer": {"kind": kind, "max_new_tokens": 4},
            "metric": metric,
            "splits": {"calibration": 1, "search": 1, "held_out": 1},
        }
    )


def sample(number: int, *answers: str, choices: tuple[str, ...] = ()) -> Sample:
    return Sample(str(number), SceneImage(number, 0), str(number), "?", answers, choices)


def test_always_the_most_frequent_answer() -> None:
    samples = [sample(n, answer) for n, answer in enumerate(["no", "Yes", "yes.", "red", "yes"])]
    found = chance(spec("exact_match"), samples)
    assert found.score == pytest.approx(3 / 5) and found.means == "always answering 'Yes'"


def test_annotators_count_by_the_metric() -> None:
    samples = [sample(0, *["red"] * 10), sample(1, *["blue"] * 8, "red", "red"), sample(2, *["blue"] * 9, "red")]
    blue = (0 + 1 + 1) / 3
    assert chance(spec("vqa_accuracy"), samples).score == pytest.approx(blue)


@pytest.mark.parametrize(
    ("right", "options", "score", "means"),
    [
        ("ABCA", "ABCD", 1 / 2, "always choosing 'A'"),
        ("ABCD", "ABCD", 1 / 4, "guessing an option"),
        ("ABAB", "AB", 1 / 2, "guessing an option"),
    ],
)
def test_choices(right: str, options: str, score: float, means: str) -> None:
    samples = [sample(n, each, choices=tuple(options)) for n, each in enumerate(right)]
    found = chance(spec("multiple_choice", "choice"), samples)
    assert found.score == pytest.approx(score) and found.means == means


@given(st.lists(st.lists(st.sampled_from(["red", "a red", "two", "2", "blue", "no"]), min_size=1), min_size=1))
def test_no_blind_answer_of_few_scores_more(accepted: list[list[str]]) -> None:
    samples = [sample(n, *each) for n, each in enumerate(accepted)]
    score = METRICS["exact_match"]
    every = {answer for each in accepted for answer in each}
    best = max(sum(score(answer, each) for each in accepted) / len(accepted) for answer in every)
    assert chance(spec("exact_match"), samples).score == pytest.approx(best)
