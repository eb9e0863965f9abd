"""Judge candidates as drafters for the dense model by expected time per token and by extra memory.

A round of speculation drafts k tokens with the candidate, and lets the dense model verify them in one pass. Times are
shares of one decoding step of the dense model, so that plain decoding takes 1 for each token. A trial's time comes from
the rounds that its agreement with the dense model's answers takes; what a plan would take that was not evaluated, from
the expected length of independent rounds (Leviathan et al., arXiv 2211.17192, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.search.space import RUN, Candidate
from optimizer.search.trial import OPTIMISM, DraftValue, Scores, Trial, trial_of
from workers.compensation.recipe import Recipe
from workers.evaluation.acceptance import DRAFT_LENGTHS, LONGEST_SCORED_DRAFT, rounds_by_length
from workers.messages import NO_COMPENSATION
from workers.runtime import Action, SkipPlan
from workers.runtime.gaps import gaps

Floats = NDArray[np.float64]


class DecodingTimes(Protocol):
    """A latency profile with the seconds of a decoding step, of its layers, and of passes over several new tokens."""

    @property
    def dense_decode_seconds(self) -> float:
        """Seconds of a decoding step of the dense model."""
        ...

    @property
    def decode_seconds(self) -> Mapping[str, tuple[float, ...]]:
        """By letter, each layer's part in a decoding step."""
        ...

    @property
    def verify_seconds(self) -> tuple[float, ...]:
        """Seconds of the dense model over 1, 2, ... new tokens behind a cache."""
        ...


@dataclass(frozen=True)
class StepCosts:
    """Costs of drafting and verifying, as shares of one decoding step of the dense model."""

    verify: tuple[float, ...]
    """Of the dense model over 1 to ``LONGEST_SCORED_DRAFT + 1`` new tokens."""
    outside: float
    """What a step takes outside the decoder layers."""
    layers: Mapping[str, tuple[float, ...]]
    """By letter, each layer's part in a step."""

    @classmethod
    def of(cls, times: DecodingTimes) -> StepCosts:
        """Take measured times."""
        whole = times.dense_decode_seconds
        layers = {letter: tuple(s / whole for s in each) for letter, each in times.decode_seconds.items()}
        verify = tuple(seconds / whole for seconds in times.verify_seconds)
        return cls(verify, max(0.0, 1.0 - sum(layers[RUN])), layers)

    @classmethod
    def counted(cls, num_layers: int, letters: str) -> StepCosts:
        """Count layers, the same on any machine: a verification takes one step, whatever it verifies."""
        layers = {letter: (Action.of(letter).row.work / num_layers,) * num_layers for letter in letters}
        return cls((1.0,) * (LONGEST_SCORED_DRAFT + 1), 0.0, layers)

    def step(self, plan: SkipPlan) -> float:
        """Time of drafting one token."""
        return max(0.01, self.outside + sum(self.layers[action.letter][layer] for layer, action in enumerate(plan)))

    def time(self, step: float, means: Mapping[str, float]) -> tuple[float, int]:
        """Return the time per token and the draft length at which it is least, from means of ``STATISTICS``.

        ``step`` is the time of drafting one token. The answers' first token, which comes with the prompt, is no part.
        """
        counted = rounds_by_length(means)
        if not counted:  # nothing is left to draft behind the first token
            return 1.0, 1
        return min(
            (rounds * self.verify[length] + drafted * step, length)
            for length, (rounds, drafted) in zip(DRAFT_LENGTHS, counted, strict=True)
        )

    def expected(self, steps: Floats, acceptance: Floats) -> Floats:
        """Return the least time per token over draft lengths if positions agree independently.

        ``steps`` is ``[plans]``, ``acceptance`` ``[..., plans]``, and so is the result.
        """
        times = []
        for length in DRAFT_LENGTHS:
            tokens = sum(acceptance**power for power in range(length + 1))  # (1 - a^(k+1)) / (1 - a), also where a = 1
            times.append((self.verify[length] + length * steps) / tokens)
        least: Floats = np.minimum.reduce(times)
        return least


@dataclass(frozen=True)
class Memory:
    """Bytes that the dense model takes, and that its layers take in a drafter."""

    dense_bytes: float
    """Weights, and the cache of one request."""
    cache_bytes: float
    """Keys and values of one layer at the end of one request."""
    folded_bytes: tuple[int, ...]
    """Per layer, the projection that a map is folded into, of which the drafter has its own."""

    def share(self, candidate: Candidate) -> float:
        """Return a drafter's cache and maps as a share of what the dense model takes."""
        cache = len(candidate.plan.kept) * self.cache_bytes
        folded = 0
        if candidate.compensation != NO_COMPENSATION:
            drift = Recipe.parse(candidate.compensation).drift
            folded = sum(self.folded_bytes[gap.layer] for gap in gaps(candidate.plan, drift=drift))
        return (cache + folded) / self.dense_bytes


@dataclass(frozen=True)
class DraftJudge:
    """Judge candidates as drafters."""

    costs: StepCosts
    memory: Memory

    def trial_of(self, candidate: Candidate, scores: Scores, dense: Scores, ratio: float, n_samples: int) -> Trial:
        """Compute a candidate's figures, with what it is worth as a drafter, from the acceptance of its samples.

        Parameters are those of ``trial.trial_of``. Without a drafter, which is dense, decoding takes 1 for each token.
        """
        means = scores.secondary
        trial = trial_of(candidate, scores, dense, ratio, n_samples)
        if candidate.is_dense:
            return replace(trial, drafter=DraftValue(1.0, 1.0, 1.0, 0.0, 0))
        trial = replace(trial, difference_error=acceptance_error(scores.values, 1.0 / (1.0 + means["tokens"])))
        step = self.costs.step(candidate.plan)
        time, length = self.costs.time(step, means)
        error = OPTIMISM * trial.difference_error
        optimistic, here, pessimistic = self.costs.expected(
            np.array([step] * 3), np.clip(1.0 + trial.difference + np.array([error, 0.0, -error]), 0.0, 1.0)
        ).tolist()
        own = DraftValue(
            time, time * optimistic / here, time * pessimistic / here, self.memory.share(candidate), length
        )
        return replace(trial, drafter=own)


def acceptance_error(shares: Sequence[float], unit: float) -> float:
    """Return the standard error of a mean acceptance; NaN stands for a sample that failed.

    One sample more than seen counts that is a ``unit`` above the mean, and one that is as far below, so that it is
    never zero: a share is a mean over an answer's positions, of which one is the least that can be lost.
    """
    known = [share for share in shares if not math.isnan(share)]
    n, mean = len(known), math.fsum(known) / len(known)
    squares = math.fsum((share - mean) ** 2 for share in known) + 2.0 * unit**2
    return math.sqrt(squares / (n + 2) / (n + 2))
