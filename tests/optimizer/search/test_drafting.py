"""Candidates as drafters: expected time per token, extra memory, and what a search makes of both."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from optimizer.criteria import Risk
from optimizer.job.sections import ConstraintSpec
from optimizer.registries import STRATEGIES
from optimizer.search.constraints import Limits
from optimizer.search.drafting import DraftJudge, Memory, StepCosts
from optimizer.search.problem import Problem, better_first
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.strategies.samplers import surrogate_sampler
from optimizer.search.trial import Scores, SearchOutcome, Trial, front_of
from optimizer.verification.finalists import choose_finalists, why_none
from workers.compensation.recipe import Recipe
from workers.evaluation.acceptance import DRAFT_LENGTHS, STATISTICS, count_rounds, scores_of_agreement
from workers.messages import LatencyProfile, Workload
from workers.redundancy.table import LayerTable
from workers.runtime import SkipPlan

LAYERS = 6
COSTS = StepCosts(
    verify=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8),
    outside=0.1,
    layers={"R": (0.15,) * LAYERS, "S": (0.0,) * LAYERS},
)
MEMORY = Memory(dense_bytes=1000.0, cache_bytes=10.0, folded_bytes=(5,) * LAYERS)
DRAFTING = DraftJudge(COSTS, MEMORY)
NO_LIMIT = Limits(ConstraintSpec(max_accuracy_drop=None))
RECIPE = Recipe.parse("linear").text


def candidate(plan: str, compensation: str = "none") -> Candidate:
    return Candidate(SkipPlan.parse(plan), compensation)


def scores(agreements: list[list[bool]], limit: int = 40) -> Scores:
    rows = [scores_of_agreement(each, limit) for each in agreements]
    means = {name: math.fsum(row[1 + at] for row in rows) / len(rows) for at, name in enumerate(STATISTICS)}
    return Scores(tuple(row[0] for row in rows), secondary=means)


def drawn(acceptance: float, samples: int = 40, length: int = 30, seed: int = 0) -> list[list[bool]]:
    generator = random.Random(seed)
    return [[generator.random() < acceptance for _ in range(length)] for _ in range(samples)]


def trial(plan: str, agreements: list[list[bool]], compensation: str = "none") -> Trial:
    found = scores(agreements)
    return DRAFTING.trial_of(
        candidate(plan, compensation), found, Scores((1.0,) * len(agreements)), 0.5, len(agreements)
    )


def test_time_is_that_of_the_best_length_over_all_tokens() -> None:
    agreements = drawn(0.85)
    own = trial("RSSRSR", agreements)
    step = 0.1 + 3 * 0.15
    times = {}
    for length in DRAFT_LENGTHS:
        counted = [count_rounds(each[1:], length, 40) for each in agreements]
        seconds = sum(each.rounds * COSTS.verify[length] + each.drafted * step for each in counted)
        times[length] = seconds / sum(len(each) - 1 for each in agreements)
    best = min(times, key=lambda length: times[length])
    assert own.drafter is not None
    assert (own.drafter.draft_length, own.drafter.time) == (best, pytest.approx(times[best]))
    assert own.drafter.optimistic_time < own.drafter.time < own.drafter.pessimistic_time


def test_expected_time_is_that_of_independent_agreement() -> None:
    for acceptance in (0.0, 0.6, 0.9, 1.0):
        own = trial("RSSRSR", drawn(acceptance, samples=400, length=39))
        expected = COSTS.expected(np.array([0.55]), np.array([acceptance]))
        assert own.drafter is not None
        assert own.drafter.time == pytest.approx(float(expected[0]), rel=0.06), acceptance


def test_expected_time_falls_with_acceptance_and_rises_with_the_drafts_cost() -> None:
    acceptance = np.linspace(0.0, 1.0, 101)
    for step in (0.1, 0.4, 0.9):
        times = COSTS.expected(np.full(101, step), acceptance)
        assert (np.diff(times) <= 1e-12).all()
        assert (COSTS.expected(np.full(101, step + 0.05), acceptance) > times).all()
    assert COSTS.expected(np.array([0.1]), np.array([1.0]))[0] == pytest.approx((1.8 + 0.8) / 9)


def test_costs_come_from_a_profile_or_from_counted_layers() -> None:
    profile = LatencyProfile(
        "device", Workload(), 10, 2.0, 1.0, 0.5, {}, {"R": (0.1, 0.2, 0.1), "S": (0.0,) * 3}, 0.0,
        verify_seconds=(0.5, 0.6, 1.0),
    )  # fmt: skip
    costs = StepCosts.of(profile)
    assert costs.verify == pytest.approx((1.0, 1.2, 2.0))
    assert costs.step(SkipPlan.parse("RRR")) == pytest.approx(1.0)
    assert costs.step(SkipPlan.parse("RSR")) == pytest.approx(0.6)
    counted = StepCosts.counted(4, "RS")
    assert counted.step(SkipPlan.parse("RSSR")) == pytest.approx(0.5)
    assert counted.verify == (1.0,) * 9


def test_memory_is_the_kept_layers_cache_and_the_folded_projections() -> None:
    assert MEMORY.share(candidate("RRSRSR")) == pytest.approx(40 / 1000)
    assert MEMORY.share(candidate("RRSRSR", RECIPE)) == pytest.approx((40 + 2 * 5) / 1000)  # two gaps
    drift = Recipe.parse("linear drift=yes").text
    assert MEMORY.share(candidate("RRSRSR", drift)) == pytest.approx((40 + 3 * 5) / 1000)  # and the layer behind them


def test_dense_takes_no_memory_and_all_the_time() -> None:
    dense = trial("RRRRRR", drawn(1.0))
    assert dense.costs == (0.0, 1.0)
    useless = trial("RRRSRR", drawn(0.1))
    good = trial("RSSSSR", drawn(0.95))
    assert front_of([useless, dense, good]) == (dense, good)


def test_a_plan_is_given_up_where_even_its_optimistic_time_is_no_better() -> None:
    dense, good = trial("RRRRRR", drawn(1.0)), trial("RSSSSR", drawn(0.95))
    assert NO_LIMIT.promising(good, [dense], 1.0)
    assert not NO_LIMIT.promising(trial("RRRRSR", drawn(0.3)), [dense], 1.0)  # no better than plain decoding
    few = replace(trial("RSSSSR", drawn(0.94, samples=6)), plan="RSSSRS")
    assert NO_LIMIT.promising(few, [dense, good], 1.0)  # six samples may be unlucky
    many = replace(trial("RSSSSR", drawn(0.6, samples=400)), plan="RSSSRS")
    assert not NO_LIMIT.promising(many, [dense, good], 1.0)


def test_the_sampler_sees_time_where_it_models_acceptance() -> None:
    """Of plans that lose as much, the cheaper draft is expected to take less time; memory is known beforehand."""
    letters = "RS"
    space = PlanSpace((letters,) * LAYERS, LAYERS)
    risk = Risk("test", {"S": (0.1,) * LAYERS})
    problem = Problem(space, NO_LIMIT, COSTS.step, (40,), risk, LayerTable(LAYERS, ()), drafting=DRAFTING)
    sampler = surrogate_sampler(problem)
    losses = np.array([[0.1, 0.1, 0.1], [0.0, 0.05, 0.2]])
    found = sampler._second_costs([], ["RRRRRS", "RRRSSS", "RSSSSS"], losses)
    assert found.shape == (2, 3) and (np.diff(found[0]) < 0).all()
    expected = COSTS.expected(np.array([0.85, 0.55, 0.25]), 1.0 - losses)
    assert found == pytest.approx(expected)
    assert problem.foresee(candidate("RRRRRS")) == (pytest.approx(0.05), True)
    assert better_first(trial("RRRRRS", drawn(0.9))) < better_first(trial("RRRRRS", drawn(0.8)))


def test_swift_evaluates_fully_the_sets_that_drafted_better_than_their_sizes_others() -> None:
    risk = Risk("test", {"S": (0.1,) * LAYERS})
    space = PlanSpace(("RS",) * LAYERS, LAYERS)
    problem = Problem(space, NO_LIMIT, COSTS.step, (10, 40), risk, LayerTable(LAYERS, ()), drafting=DRAFTING)
    strategy = STRATEGIES["swift"](problem)
    asked = strategy.ask(6)
    assert {each.n_samples for each in asked} == {10}
    sizes = [each.candidate.plan.text.count("S") for each in asked]
    assert sorted(sizes) == [1, 1, 1, 2, 2, 2] and sizes[:2] == sizes[2:4] == sizes[4:]
    chances = [0.7, 0.6, 0.9, 0.5, 0.8, 0.95]  # of one size, then of the other, in turns
    told = zip(asked, chances, strict=True)
    strategy.tell([(each.candidate, trial(each.candidate.plan.text, drawn(chance))) for each, chance in told])
    better = strategy.ask(6)
    assert [each.n_samples for each in better] == [None] * 4
    assert [each.candidate for each in better] == [asked[at].candidate for at in (0, 1, 2, 5)]
    strategy.tell([(each.candidate, None) for each in better])
    assert {each.n_samples for each in strategy.ask(2)} == {10}


def test_finalists_save_time_and_are_spread_over_the_front() -> None:
    dense = trial("RRRRRR", drawn(1.0))
    fast, middle = trial("RSSSSR", drawn(0.95)), trial("SSSSSR", drawn(0.8))
    little, slow = trial("RRRRRS", drawn(0.97)), trial("RRRRSR", drawn(0.2))
    outcome = SearchOutcome(1.0, 40, (dense, fast, middle, little, slow))
    assert choose_finalists(outcome, NO_LIMIT, 1) == (min((fast, middle), key=lambda t: t.costs[1]).candidate,)
    chosen = choose_finalists(outcome, NO_LIMIT, 6)
    assert slow.candidate not in chosen and dense.candidate not in chosen
    assert set(chosen) >= {fast.candidate, middle.candidate}
    only_slow = SearchOutcome(1.0, 40, (dense, slow))
    assert choose_finalists(only_slow, NO_LIMIT, 2) == ()
    assert "save no time as drafters" in why_none(only_slow, NO_LIMIT)
