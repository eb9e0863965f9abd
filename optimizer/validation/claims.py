"""Answer the paper's claims on one model: yes, no or not decided, each by a rule that is stated with the answer.

The claims are those of Hartman et al., arXiv 2509.25584: early and late vision tokens are redundant; skipping a
modality's tokens needs redundancy and little attention both; popular methods skip the layers that the theory calls
redundant. The rules are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from scipy.stats import ttest_ind

from optimizer.criteria.published import group_values
from optimizer.criteria.skip_it import vision_attention
from optimizer.statistics.intervals import Interval
from optimizer.validation.harm import Measured, PlanHarm
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

Floats = NDArray[np.float64]

YES, NO, OPEN = "yes", "no", "not decided"
NEEDS = ("distance", "attention")
"""Kinds of measurement that the conditions are read from."""
BANDS = ("early", "late")
BYPASS = Action.BYPASS.letter
BAND_ACTIONS = (Action.FREEZE.letter, BYPASS)
RESAMPLES = 4000
MARGIN = 0.02
"""Loss of accuracy that counts as none where the job sets no ``constraint.max_accuracy_drop``."""
FEWEST_LAYERS = 5
"""Of a cell, for it to have an interval and the claim about both conditions an answer."""
LEAST_KL = 1e-9
"""Divergences below this are taken as this, so that they have a logarithm."""


@dataclass(frozen=True)
class Claim:
    """A claim, the answer that this model gives, what it rests on, and the rule."""

    claim: str
    answer: str
    evidence: str
    rule: str


@dataclass(frozen=True)
class Cell:
    """Layers that meet or miss each condition of bypass, and the harm that bypassing one of them does.

    ``kl`` is the geometric mean over the layers, None without any, with its interval for other layers, None for few.
    """

    redundant: bool
    little_attention: bool
    layers: tuple[int, ...]
    kl: float | None
    low: float | None
    high: float | None


def band(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the first or the last quarter of the layers that may take an action, at least one."""
    size = max(1, round(len(layers) / 4))
    return tuple(layers[:size] if name == "early" else layers[-size:])


def band_claims(harms: Mapping[tuple[str, str], PlanHarm | None], margin: float | None) -> list[Claim]:
    """Answer whether vision tokens are redundant in the early and in the late layers.

    ``harms`` are by band and letter those of the plan that takes the action at all layers of the band; ``margin`` is
    the loss of accuracy that still counts as none, ``MARGIN`` if None.
    """
    claims: list[Claim] = []
    margin = MARGIN if margin is None else margin
    for (name, letter), harm in harms.items():
        action = Action.of(letter).label
        if harm is None:
            answer, evidence = OPEN, "the model cannot take the plan"
        else:
            answer = YES if harm.difference_low >= -margin else NO if harm.difference_high < -margin else OPEN
            points = [100 * each for each in (harm.difference, harm.difference_low, harm.difference_high)]
            evidence = f"{harm.plan}: {points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}] points"
        rule = (
            f"{action} in the {'first' if name == 'early' else 'last'} quarter of the layers: yes where the interval "
            f"of the difference to dense is at or above {-100 * margin:g} points, no where it is below"
        )
        claims.append(Claim(f"{name} vision tokens are redundant ({action})", answer, evidence, rule))
    return claims


def condition_cells(
    table: LayerTable, divergences: Mapping[int, Floats], confidence: float
) -> tuple[tuple[Cell, ...], Claim]:
    """Sort layers by the two conditions of bypass, each split at its median, and answer whether both are needed.

    ``divergences`` are by layer those of bypassing it, ``[samples]``. Layers are taken as independent.
    """
    layers = sorted(divergences)
    distance, attention = group_values(table, "cosine_distance")[0], vision_attention(table)
    halves = [np.median([values[layer] for layer in layers]) if layers else 0.0 for values in (distance, attention)]
    cells, logs = [], {}
    for redundant in (True, False):
        for little in (True, False):
            own = tuple(
                layer
                for layer in layers
                if (distance[layer] <= halves[0], attention[layer] <= halves[1]) == (redundant, little)
            )
            values = np.log([max(LEAST_KL, float(divergences[layer].mean())) for layer in own])
            logs[redundant, little] = values
            kl = math.exp(values.mean()) if own else None
            interval = mean_interval(values, confidence)
            ends = (None, None) if interval is None else (math.exp(interval.low), math.exp(interval.high))
            cells.append(Cell(redundant, little, own, kl, *ends))
    return tuple(cells), _conditions_claim(logs, confidence)


def _conditions_claim(logs: Mapping[tuple[bool, bool], Floats], confidence: float) -> Claim:
    """Answer from the logarithms of the layers' divergences, by cell; "no" is two tests, so each has half the error."""
    rule = (
        f"bypass at single layers, each condition split at its median, cells of at least {FEWEST_LAYERS} layers: yes "
        "where missing either condition multiplies the harm of layers that meet both (both intervals of the ratio "
        "above 1), no where one of them, with half the error, is below 1"
    )
    needed = "bypass needs redundancy and little attention both"
    missing = {"attention": logs[True, False], "redundancy": logs[False, True]}
    both = logs[True, True]
    if min(len(both), *(len(values) for values in missing.values())) < FEWEST_LAYERS:
        counts = ", ".join(f"{len(values)} without {name}" for name, values in missing.items())
        return Claim(needed, OPEN, f"too few layers: {len(both)} meet both conditions, {counts}", rule)
    ratios = {name: welch_interval(values, both, confidence) for name, values in missing.items()}
    stricter = [welch_interval(values, both, (1 + confidence) / 2) for values in missing.values()]
    above = all(each.low > 0 for each in ratios.values())
    below = any(each.high < 0 for each in stricter)
    evidence = "; ".join(
        f"without {name}: harm times [{math.exp(each.low):.2g}, {math.exp(each.high):.2g}]"
        for name, each in ratios.items()
    )
    return Claim(needed, YES if above else NO if below else OPEN, evidence, rule)


def mean_interval(values: Floats, confidence: float) -> Interval | None:
    """Student's t interval of the mean of ``[layers]``; None for fewer than ``FEWEST_LAYERS``."""
    if len(values) < FEWEST_LAYERS:
        return None
    half = student.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Interval(float(values.mean() - half), float(values.mean() + half))


def welch_interval(first: Floats, second: Floats, confidence: float) -> Interval:
    """Interval of the difference of two means (Welch 1947), each of at least two values."""
    found = ttest_ind(first, second, equal_var=False).confidence_interval(confidence)
    return Interval(float(found.low), float(found.high))


def overlap_claim(
    choices: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    allowed: Mapping[str, Sequence[int]],
    confidence: float,
    seed: int,
) -> Claim:
    """Answer whether published methods choose the predicted layers more often than chance would.

    ``choices`` are by method its action's letter, its layers, and the equally many that are predicted safest. By
    chance equally many layers of each action are drawn, the same ones for all of its methods.
    """
    rule = (
        "layers shared by all methods together, against as many layers drawn at random for each action: yes where at "
        f"most {(1 - confidence) / 2:.3g} of the draws share as many, no where as few do"
    )
    claim = "popular methods choose the layers that are predicted redundant"
    if not choices:
        return Claim(claim, OPEN, "no published method applies", rule)
    shared = sum(len(set(theirs) & set(ours)) for _, theirs, ours in choices)
    generator = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for letter in dict.fromkeys(letter for letter, _, _ in choices):
        order = generator.permuted(np.tile(np.asarray(allowed[letter]), (RESAMPLES, 1)), axis=1)
        for _, theirs, ours in (each for each in choices if each[0] == letter):
            drawn += np.isin(order[:, : len(ours)], list(theirs)).sum(1)
    tail = (1 - confidence) / 2
    as_many, as_few = float((drawn >= shared).mean()), float((drawn <= shared).mean())
    answer = YES if as_many <= tail else NO if as_few <= tail else OPEN
    evidence = f"{shared} shared, {drawn.mean():.1f} by chance; as many in {as_many:.1%} of the draws"
    return Claim(claim, answer, evidence, rule)


def divergences_of(measured: Measured, plans: Mapping[int, str]) -> dict[int, Floats]:
    """Return by layer the divergences of its plan, where they were measured."""
    return {layer: measured.kl[plan] for layer, plan in plans.items() if plan in measured.kl}
