"""What a forced answer shows, on made-up logits; the words are numbers and letters of a small table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from workers.evaluation.divergence import DenseDistributions
from workers.evaluation.shared.answers import AnswerScorer, GreedyTokens, grade_answer
from workers.evaluation.shared.draft import Draft
from workers.tasks import Sample, load_spec
from workers.tasks.images import SceneImage

END, RED, GREEN, AND, DARK, THE = range(6)
WORDS = {RED: "red", GREEN: "green", AND: " and", DARK: " dark", THE: "the "}
ENDS = frozenset((END,))
SAMPLE = Sample("one", SceneImage(0, 0), "key", "which colour?", ("red",))


def scorer() -> AnswerScorer:
    def decode(tokens: Sequence[int]) -> str:
        return "".join(WORDS[token] for token in tokens if token != END)

    return AnswerScorer(load_spec("easy-vqa"), decode)


def logits(*best: int, ties: dict[int, int] | None = None) -> torch.Tensor:
    """One row a position: ten for the best token, zero for the others; a tied one gets just less."""
    rows = torch.zeros(len(best), len(WORDS) + 1)
    for position, token in enumerate(best):
        rows[position, token] = 10.0
        if ties and position in ties:
            rows[position, ties[position]] = 9.99
    return rows


@pytest.mark.parametrize(
    ("best", "ties", "expected"),
    [
        ((RED, END), {}, (1.0,)),
        ((GREEN, END), {}, (0.0,)),  # cannot become "red" any more
        ((END, END), {}, (0.0,)),  # no answer at all
        ((THE, END), {}, None),  # "the red" would be right
        ((RED, AND), {}, (0.0,)),  # goes on, and "red and" is no beginning of "red"
        ((RED, END), {0: GREEN}, None),  # right, but by a hair
        ((RED, END), {1: AND}, None),
        ((GREEN, END), {0: RED}, None),  # wrong by a hair
        ((GREEN, END), {0: DARK}, (0.0,)),  # wrong either way
        ((GREEN, END), {1: AND}, (0.0,)),  # the second position is not reached
    ],
)
def test_what_is_certain(best: tuple[int, ...], ties: dict[int, int], expected: tuple[float, ...] | None) -> None:
    draft = Draft((RED,), limit=4)
    greedy = grade_answer(GreedyTokens.of(logits(*best, ties=ties), torch.bfloat16), (0, 2), draft, ENDS)
    assert scorer().settled(SAMPLE, greedy, draft.limit, ENDS) == expected


def test_the_length_limit_ends_an_answer() -> None:
    draft = Draft((RED,), limit=1)
    assert draft.fed == ()
    greedy = grade_answer(GreedyTokens.of(logits(RED), torch.float32), (0, 1), draft, ENDS)
    assert greedy.ended and scorer().settled(SAMPLE, greedy, 1, ENDS) == (1.0,)


def test_nan_is_no_answer() -> None:
    rows = logits(RED, END)
    rows[1, 3] = float("nan")
    assert grade_answer(GreedyTokens.of(rows, torch.float32), (0, 2), Draft((RED,), 4), ENDS).not_a_number


def test_divergence_with_the_rest_as_one_outcome() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, plan = (3 * torch.randn(5, 3000, generator=generator) for _ in range(2))
    p, q = dense.double().softmax(-1), plan.double().softmax(-1)
    top = p.topk(512, dim=-1).indices
    p_top, q_top = p.gather(1, top), q.gather(1, top)
    p_rest, q_rest = 1 - p_top.sum(-1), 1 - q_top.sum(-1)
    expected = (p_top * (p_top / q_top).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
    whole = (p * (p / q).log()).sum(-1)
    found = DenseDistributions.of(dense).divergence(plan)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert bool((found <= whole + 1e-6).all()) and bool((found > 0.5 * whole).all())
    assert DenseDistributions.of(dense).divergence(dense).tolist() == pytest.approx([0.0] * 5, abs=1e-6)
