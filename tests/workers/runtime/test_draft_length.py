"""Draft lengths follow what drafting costs and how often drafts are kept; time is simulated, so nothing here waits."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from workers.runtime.draft_length import LONGEST_DRAFT, DraftLengths, Round, expected_tokens


@dataclass
class Decoder:
    """A model whose plain step takes a second, and whose clock is read with some noise."""

    draft: float
    width: float = 0.05
    noise: float = 0.1
    sure: bool = False
    """Whether drafts are looked at: a draft that is kept is drafted with more confidence."""
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def noisy(self, seconds: float) -> float:
        return seconds * self.random.lognormvariate(0, self.noise)

    def answer(self, shared: DraftLengths, tokens: int, acceptance: float, unused: int = 0) -> float:
        """Generate ``tokens`` tokens behind the first one, ``unused`` more being allowed; returns the seconds taken."""
        seconds, lengths = 0.0, shared.request()
        whole = tokens
        while tokens > 0:
            length = lengths.choose(tokens + unused)
            assert 0 <= length < tokens + unused or tokens == 1
            if not length:
                taken = self.noisy(1.0)
                lengths.observe_plain(taken)
                tokens -= 1
                seconds += taken
                continue
            kept, confidences = [], []
            for _ in range(length):
                kept.append(self.random.random() < acceptance)
                confidences.append(self.random.uniform(0.95, 1.0) if kept[-1] else self.random.uniform(0.3, 0.8))
                if self.sure and not lengths.worth_going_on(confidences):
                    break
            accepted = min(kept.index(False) if False in kept else len(kept), tokens)
            taken_tokens = min(accepted + 1, tokens)
            drafting = self.noisy(self.draft * len(kept))
            verifying = self.noisy(1 + self.width * len(kept))
            tested = min(accepted + 1, len(kept), tokens)
            sure = tuple(confidences) if self.sure else ()
            lengths.observe_round(Round(len(kept), tested, accepted, taken_tokens, drafting, verifying, sure))
            tokens -= taken_tokens
            seconds += drafting + verifying
        lengths.observe_answer(1 + whole)
        return seconds


def best_rate(decoder: Decoder, acceptance: float) -> float:
    """Tokens a second of the best constant length, from the formula."""
    return max(
        expected_tokens(acceptance, length) / (length * decoder.draft + 1 + decoder.width * length)
        for length in range(LONGEST_DRAFT + 1)
    )


def test_expected_tokens_is_the_sum_of_chances() -> None:
    for acceptance in (0.0, 0.3, 0.9, 1.0):
        assert expected_tokens(acceptance, 4) == pytest.approx(sum(acceptance**place for place in range(5)))


@pytest.mark.parametrize("acceptance", [0.7, 0.9, 0.98])
@pytest.mark.parametrize("draft", [0.15, 0.35])
def test_long_answers_come_near_the_best_constant_length(draft: float, acceptance: float) -> None:
    decoder, lengths = Decoder(draft), DraftLengths()
    decoder.answer(lengths, 200, acceptance)
    rate = 3000 / decoder.answer(lengths, 3000, acceptance)
    assert rate > 0.93 * best_rate(decoder, acceptance)


def test_confidence_does_better_than_any_constant_length() -> None:
    decoder, lengths = Decoder(0.3, sure=True), DraftLengths()
    decoder.answer(lengths, 300, 0.85)
    rate = 3000 / decoder.answer(lengths, 3000, 0.85)
    assert rate > 1.05 * best_rate(decoder, 0.85)


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize(("draft", "acceptance"), [(0.1, 0.0), (0.3, 0.15), (0.6, 0.5), (0.95, 0.99), (1.2, 1.0)])
def test_drafting_that_does_not_pay_costs_at_most_three_per_cent(draft: float, acceptance: float, sure: bool) -> None:
    decoder, lengths = Decoder(draft, sure=sure), DraftLengths()
    seconds = sum(decoder.answer(lengths, 64, acceptance) for _ in range(40))
    assert seconds < 1.03 * 40 * 64


@pytest.mark.parametrize("sure", [False, True])
def test_answers_that_end_before_a_draft_pays_cost_at_most_three_per_cent(sure: bool) -> None:
    """One word and the end token: a draft of the latter is always kept, and saves nothing."""
    decoder, lengths = Decoder(0.2, sure=sure), DraftLengths()
    seconds = sum(decoder.answer(lengths, 1, 1.0, unused=20) for _ in range(300))
    assert seconds < 1.03 * 300


def test_drafting_comes_back_when_it_pays_again() -> None:
    decoder, lengths = Decoder(0.3), DraftLengths()
    decoder.answer(lengths, 1000, 0.02)
    decoder.answer(lengths, 700, 0.97)
    rate = 500 / decoder.answer(lengths, 500, 0.97)
    assert rate > 0.9 * best_rate(decoder, 0.97)


@pytest.mark.parametrize("sure", [False, True])
def test_prompts_on_and_off_the_task_in_turn(sure: bool) -> None:
    """Off the task little is lost, and on it most is gained, though either is a surprise after the other."""
    shares = []
    for seed in range(4):
        decoder, lengths = Decoder(0.3, sure=sure, random=random.Random(seed)), DraftLengths()
        on = off = 0.0
        for _ in range(20):
            on += decoder.answer(lengths, 100, 0.97)
            off += decoder.answer(lengths, 300, 0.05)
        assert off < 1.03 * 20 * 300
        shares.append(20 * 100 / on / best_rate(decoder, 0.97))
    assert sum(shares) / len(shares) > 0.88
