"""Plans within the constraints that need no evaluation, against going through every plan of a small space."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted import problem_of, search, small

from optimizer.criteria import Risk
from optimizer.job.sections import ConstraintSpec
from optimizer.registries import STRATEGIES
from optimizer.search.constraints import Limits
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.space import Candidate, PlanSpace, touched
from optimizer.search.trial import trial_of
from workers.runtime import SkipPlan

SAMPLERS = ("surrogate", "tpe", "nsga2", "random")


def random_case(seed: int) -> FeasiblePlans:
    random = np.random.default_rng(seed)
    letters = tuple("R" + "".join(letter for letter in "FBS" if random.random() < 0.7) for _ in range(5))
    if all(own == "R" for own in letters):
        letters = ("RS", *letters[1:])
    compensations = (("none",), ("none", "linear x"), ("linear x",))[int(random.integers(3))]
    saved = {(layer, letter): float(random.uniform(-0.02, 0.25)) for layer in range(5) for letter in "FBS"}
    kept = {(layer, letter): float(random.uniform(0, 9)) for layer in range(5) for letter in "RFBS"}

    def ratio(plan: SkipPlan) -> float:
        return max(0.01, 1 - sum(saved[step] for step in enumerate(plan.text) if step[1] != "R"))

    constraint = ConstraintSpec(
        min_speedup=float(random.uniform(1.01, 4)) if random.random() < 0.6 else None,
        max_latency_ms=float(random.uniform(20, 110)) if random.random() < 0.4 else None,
        max_kv_cache_bytes=int(random.integers(5, 40)) if random.random() < 0.4 else None,
    )
    limits = Limits(constraint, 0.1, lambda plan: sum(kept[step] for step in enumerate(plan.text)))
    return FeasiblePlans(PlanSpace(letters, int(random.integers(1, 6)), compensations), limits, ratio)


def distance(first: Candidate, second: Candidate) -> int:
    return sum(a != b for a, b in zip(first.plan.text, second.plan.text, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(1130597055)
def test_agrees_with_going_through_every_plan(seed: int) -> None:
    plans = random_case(seed)
    every = [each for each in plans.space.enumerate() if each in plans]
    assert (plans.out_of_reach() is None) == bool(every)
    random = np.random.default_rng(seed)
    risk = Risk("r", {letter: tuple(random.random(5)) for letter in "FBS"})
    unbound = list(PlanSpace(plans.space.letters, 5, plans.space.compensations).enumerate())
    asked = unbound[int(random.integers(len(unbound)))]
    found, drawn = plans.nearest(asked, risk), plans.draw(random)
    own = asked.compensation if asked.compensation in plans.space.compensations else plans.space.compensations[0]
    near = [
        each for each in PlanSpace(plans.space.letters, plans.space.max_touched, (own,)).enumerate() if each in plans
    ]
    assert (found is None) == (not near)
    if found is not None:
        assert found in near and distance(found, asked) == min(distance(each, asked) for each in near)
    assert drawn in every if every else drawn is None


def test_the_nearest_plan_gives_up_the_riskiest_steps() -> None:
    space = PlanSpace(("RFS",) * 5, 2)
    plans = FeasiblePlans(space, Limits(ConstraintSpec()), lambda plan: 1.0)
    risk = Risk("r", {"F": (0.1, 0.5, 0.2, 0.9, 0.3), "S": (0.6, 0.1, 0.4, 0.2, 0.8)})
    assert str(plans.nearest(Candidate(SkipPlan.parse("FSSSR")), risk)) == "FSRRR"
    assert str(plans.nearest(Candidate(SkipPlan.parse("RSRRR")), risk)) == "RSRRR"


def test_says_what_cannot_be_had_and_what_could() -> None:
    space = PlanSpace(("RS",) * 4, 3)

    def said(**limits: float) -> str | None:
        found = Limits(ConstraintSpec(**limits), 0.1, lambda plan: 100.0 * plan.text.count("R"))
        return FeasiblePlans(space, found, lambda plan: 1 - 0.2 * plan.text.count("S")).out_of_reach()

    assert said(min_speedup=2.5) is None and said(max_latency_ms=40) is None and said(max_kv_cache_bytes=100) is None
    assert said(min_speedup=3) == "no plan can meet min_speedup 3: the fastest is predicted to run 2.50x"
    assert said(max_latency_ms=30) == "no plan can meet max_latency_ms 30: the fastest is predicted to take 40 ms"
    assert said(max_kv_cache_bytes=99) == "no plan can meet max_kv_cache_bytes 99: the smallest possible is 100"


@pytest.mark.parametrize("compensations", [("none", "linear x"), ("linear x",)])
def test_says_the_same_where_skips_may_be_compensated(compensations: tuple[str, ...]) -> None:
    limits = Limits(ConstraintSpec(min_speedup=3))
    plans = FeasiblePlans(PlanSpace(("RS",) * 4, 3, compensations), limits, lambda plan: 1 - 0.2 * plan.text.count("S"))
    assert plans.out_of_reach() == "no plan can meet min_speedup 3: the fastest is predicted to run 2.50x"


def test_a_space_of_dense_alone_is_as_fast_as_dense() -> None:
    space = PlanSpace(("RS", "R", "R"), 3, ("linear x",))  # layer 0 is never skipped with compensation
    plans = FeasiblePlans(space, Limits(ConstraintSpec(min_speedup=1.5)), lambda plan: 1.0)
    assert plans.out_of_reach() == "no plan can meet min_speedup 1.5: the fastest is predicted to run 1.00x"


def test_what_is_no_plan_of_the_space_becomes_the_nearest_one() -> None:
    plans = FeasiblePlans(PlanSpace(("RS",) * 3, 3, ("linear x",)), Limits(ConstraintSpec()), lambda plan: 1.0)
    risk = Risk("r", {"S": (0.1, 0.2, 0.3)})
    assert str(plans.nearest(Candidate(SkipPlan.parse("SSR"), "linear x"), risk)) == "RSR (linear x)"


def test_repaired_proposals_are_parents_of_later_generations() -> None:
    constraint = ConstraintSpec(max_accuracy_drop=0.5, min_speedup=2.5)
    problem = problem_of(small(), "RFBS", constraint=constraint, seeded=False)
    strategy = STRATEGIES["nsga2"](problem)
    study = strategy._study
    dense = small().scores(Candidate(SkipPlan.dense(8)), 200)
    strategy.start(trial_of(Candidate(SkipPlan.dense(8)), dense, dense, 1.0, 200))
    for _ in range(10):
        asked = [ask.candidate for ask in strategy.ask(8)]
        answers = [(each, small().scores(each, 200)) for each in asked]
        strategy.tell([(c, trial_of(c, s, dense, problem.ratio(c.plan), 200)) for c, s in answers])
    key = study.sampler._get_generation_key()
    assert max(trial.system_attrs.get(key, -1) for trial in study.get_trials(deepcopy=False)) >= 3


def test_limits_that_no_plan_meets_together_are_named() -> None:
    limits = Limits(ConstraintSpec(min_speedup=1.5, max_kv_cache_bytes=3), None, lambda plan: 4 - plan.text.count("B"))
    space = PlanSpace(("RS", "RB"), 1)
    plans = FeasiblePlans(space, limits, lambda plan: 0.5 if "S" in plan.text else 0.9)
    assert plans.out_of_reach() == "no plan meets min_speedup and max_kv_cache_bytes at once"


@pytest.mark.parametrize("strategy", SAMPLERS)
@pytest.mark.parametrize("seeds", ["theory", "random", "none"])
def test_no_sampler_evaluates_what_cannot_meet_the_limits(strategy: str, seeds: str) -> None:
    # Half of the layers must go and at most five of eight may: few of the 6,561 plans, none of them near dense.
    constraint = ConstraintSpec(max_accuracy_drop=0.5, min_speedup=1.66)
    planted = small()
    outcome = search(planted, "RFS", strategy=strategy, seeds=seeds, constraint=constraint, max_touched=5, trials=24)
    tried = [each for each in outcome.trials if not SkipPlan.parse(each.plan).is_dense]
    assert len(tried) == 24
    assert all(each.latency_ratio * 1.66 <= 1 and touched(SkipPlan.parse(each.plan)) <= 5 for each in tried)


@pytest.mark.parametrize("strategy", ["skip-it", "shortgpt", "vtw"])
def test_published_lists_keep_to_the_limits(strategy: str) -> None:
    problem = problem_of(small(), "RFBS", constraint=ConstraintSpec(min_speedup=1.5), seeded=False)
    plans = STRATEGIES[strategy](problem).plans
    assert plans and all(problem.ratio(each.plan) * 1.5 <= 1 for each in plans)


@pytest.mark.parametrize("strategy", SAMPLERS)
def test_ends_when_all_plans_within_the_limits_are_tried(strategy: str) -> None:
    # Of eight layers that only skip, six or more must go, and not all: 28 + 8 plans.
    constraint = ConstraintSpec(max_accuracy_drop=1.0, min_speedup=2.5)
    outcome = search(small(), strategy=strategy, constraint=constraint, trials=200)
    assert len(outcome.trials) == 1 + 28 + 8
    assert outcome.stopped_because == "every possible plan was tried"
