"""Several losses at once: prefixes of all, the one number that is minimised, and which plans are within the limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.job.sections import ConstraintSpec
from optimizer.search.constraints import Limits
from optimizer.search.goals import Goal, Goals, is_within
from optimizer.search.space import Candidate
from optimizer.search.trial import OPTIMISM, Scores, SearchOutcome
from optimizer.verification.finalists import choose_finalists, why_none
from workers.runtime import SkipPlan

PLAN, DENSE = Candidate(SkipPlan.parse("RRSR")), Candidate(SkipPlan.parse("RRRR"))
NAN = math.nan

STRICT = Goal("vqa", 100, 0.01)
LOOSE = Goal("captions", 40, 0.04)
TEXT = Goal("text", 8, 0.3, weight=0.0, is_text=True)


def right(number: int, of: int) -> Scores:
    return Scores((1.0,) * number + (0.0,) * (of - number))


def passages(*divergences: float) -> Scores:
    return Scores((0.5,) * len(divergences), kl=divergences)


def both(**by_goal: Scores) -> Scores:
    return Scores((), by_goal=by_goal)


TASKS = both(vqa=right(100, 100), captions=right(40, 40))
FULL = both(vqa=right(100, 100), captions=right(40, 40), text=passages(*[0.0] * 8))


def trial(goals: Goals, scores: Scores, candidate: Candidate = PLAN, ratio: float = 0.5):
    return goals.trial_of(candidate, scores, FULL, ratio, goals.size)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.data())
def test_prefixes_hold_all_goals_in_proportion_and_grow(sizes, data):
    goals = Goals(tuple(Goal(str(number), size, 0.01) for number, size in enumerate(sizes)))
    n = data.draw(st.integers(0, goals.size))
    here = goals.prefixes(n)
    assert sum(here.values()) == n
    assert goals.prefixes(goals.size) == {str(number): size for number, size in enumerate(sizes)}
    for number, size in enumerate(sizes):
        assert abs(here[str(number)] - n * size / goals.size) <= len(sizes)
    if n < goals.size:
        more = goals.prefixes(n + 1)
        assert sorted(more[name] - here[name] for name in here) == [0] * (len(sizes) - 1) + [1]


def test_worst_is_the_loss_that_is_the_largest_share_of_its_limit_in_units_of_the_least_limit():
    goals = Goals((STRICT, LOOSE, TEXT))
    found = trial(goals, both(vqa=right(99, 100), captions=right(38, 40), text=passages(*[0.15] * 8)))
    losses = {each.name: each.loss for each in found.goals}
    assert losses == pytest.approx({"vqa": 0.01, "captions": 0.05, "text": 0.15})
    assert found.difference == pytest.approx(-0.05 * 0.01 / 0.04)  # captions: 1.25 of its limit
    assert found.complete and found.n_samples == 148
    assert found.accuracy == pytest.approx((0.99 + 0.95) / 2)  # of the tasks alone
    worse_text = trial(goals, both(vqa=right(99, 100), captions=right(38, 40), text=passages(*[0.6] * 8)))
    assert worse_text.difference == pytest.approx(-0.02)  # twice its limit


def test_mean_weighs_the_jobs_own_tasks():
    goals = Goals((STRICT, Goal("captions", 40, 0.04, weight=3.0), TEXT), objective="mean")
    found = trial(goals, both(vqa=right(90, 100), captions=right(40, 40), text=passages(*[9.0] * 8)))
    assert found.difference == pytest.approx(-0.1 / 4)
    assert not is_within(found, optimistic=True)  # of text, and of vqa


def test_each_loss_is_held_to_its_own_limit():
    goals = Goals((STRICT, LOOSE))
    limits = Limits(ConstraintSpec(), goals=goals)
    keeps = trial(goals, both(vqa=right(100, 100), captions=right(39, 40)))
    misses = trial(goals, both(vqa=right(98, 100), captions=right(40, 40)))
    assert limits.values(keeps) == pytest.approx({"loss on vqa": -0.01, "loss on captions": -0.015})
    assert limits.keeps(keeps, 1.0, optimistic=False)
    assert not limits.keeps(misses, 1.0, optimistic=False)
    assert limits.keeps(misses, 1.0, optimistic=True)  # two of a hundred may be chance
    hopeless = trial(goals, both(vqa=right(60, 100), captions=right(40, 40)))
    assert not limits.promising(hopeless, [], 1.0)


def test_least_accuracy_is_a_limit_beside_the_drop():
    goal = Goal("vqa", 10, 0.5, min_accuracy=0.85)
    dense = right(9, 10)
    assert goal.figures(right(8, 10), dense).limit == pytest.approx(0.05)
    assert Goal("vqa", 10, 0.01, min_accuracy=0.85).figures(right(8, 10), dense).limit == 0.01
    assert Goal("vqa", 10, None).figures(right(8, 10), dense).limit is None


def test_failed_samples_are_left_out_under_both():
    goal = Goal("vqa", 4, 0.01)
    found = goal.figures(Scores((1.0, 0.0, NAN, 1.0)), Scores((1.0, 1.0, 1.0, NAN)))
    assert (found.accuracy, found.loss, found.n_samples) == (0.5, 0.5, 4)
    assert goal.figures(Scores((NAN,)), Scores((1.0,))) is None


def test_optimistic_end_of_a_divergence_is_its_mean_less_standard_errors():
    values = (0.2, 0.4, 0.3, 0.5)
    found = TEXT.figures(passages(*values), passages(*[0.0] * 4))
    mean = sum(values) / 4
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
    assert (found.loss, found.error) == pytest.approx((mean, max(error, mean / 4)))  # few passages tell little
    goals = Goals((STRICT, TEXT))
    scores = both(vqa=right(100, 100), text=passages(*values, *values))
    seen = goals.trial_of(PLAN, scores, FULL, 0.5, goals.size)
    own = next(each for each in seen.goals if each.is_text)
    assert own.loss > 0.3 and is_within(seen, optimistic=True) == (own.loss - OPTIMISM * own.error <= 0.3)


def test_a_single_passage_is_no_evidence_and_a_goal_without_answers_is_unknown():
    goals = Goals((STRICT, TEXT))
    dense = both(vqa=right(100, 100), text=passages(*[0.0] * 8))
    few = goals.trial_of(PLAN, both(vqa=right(12, 12), text=passages(0.6)), dense, 0.5, goals.size)
    assert is_within(few, optimistic=True) and not is_within(few, optimistic=False)
    failed = Scores((NAN,) * 3)
    known = goals.trial_of(PLAN, both(vqa=right(12, 12), text=failed), dense, 0.5, goals.size)
    assert [each.name for each in known.goals] == ["vqa"] and known.n_samples == 15
    nothing = goals.trial_of(PLAN, both(vqa=failed), dense, 0.5, goals.size)
    assert nothing.goals == () and nothing.difference_error == 1.0


def test_without_any_limit_every_loss_is_allowed():
    assert Goals((Goal("a", 5, None), Goal("b", 5, None))).allowed == 1.0
    assert Goals((Goal("a", 5, None), Goal("b", 5, 0.02))).allowed == 0.02
    assert Goals((Goal("a", 5, None, min_accuracy=0.5), Goal("b", 5, None))).allowed == 0.01


def test_reason_names_the_task_that_cannot_be_kept_and_what_could_be_had_without_it():
    goals = Goals((STRICT, LOOSE))
    limits = Limits(ConstraintSpec(), goals=goals)
    tried = [
        trial(goals, both(vqa=right(100, 100), captions=right(number, 40)), Candidate(SkipPlan.parse(plan)), ratio)
        for plan, number, ratio in (("RRSR", 20, 0.8), ("RSSR", 4, 0.5))
    ]
    dense = goals.trial_of(DENSE, TASKS, TASKS, 1.0, goals.size)
    outcome = SearchOutcome(1.0, goals.size, (dense, *tried), {}, "the budget is spent", 0)
    assert choose_finalists(outcome, limits, 4) == ()
    reason = why_none(outcome, limits)
    assert "on captions none is within its limit (the nearest, RRSR, loses 50.00 points, limit 4.00)" in reason
    assert "without captions, RSSR is predicted to run 2.00x within the other limits" in reason
    assert "vqa" not in reason


def test_finalists_keep_every_limit_plausibly():
    goals = Goals((STRICT, LOOSE))
    limits = Limits(ConstraintSpec(), goals=goals)
    good = trial(goals, both(vqa=right(100, 100), captions=right(40, 40)), Candidate(SkipPlan.parse("RRSR")), 0.8)
    bad = trial(goals, both(vqa=right(100, 100), captions=right(10, 40)), Candidate(SkipPlan.parse("RSSR")), 0.5)
    dense = goals.trial_of(DENSE, TASKS, TASKS, 1.0, goals.size)
    outcome = SearchOutcome(1.0, goals.size, (dense, good, bad), {}, "", 0)
    assert choose_finalists(outcome, limits, 4) == (good.candidate,)
