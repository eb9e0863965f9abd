"""The choice of the plans that are verified, from searches of which every trial is made up."""

from dataclasses import replace

from optimizer.job.sections import ConstraintSpec
from optimizer.search.constraints import Limits
from optimizer.search.trial import SearchOutcome, Trial
from optimizer.verification.finalists import choose_finalists, why_none


def plan(count):
    return "S" * count + "R" * (10 - count)


def trial_at(layers, ratio, loss, complete=True):
    return Trial(plan(layers), 200, 1 - loss, -loss, 0.005, ratio, complete)


def finalists(outcome, count, **constraint):
    return [each.plan.text for each in choose_finalists(outcome, Limits(ConstraintSpec(**constraint)), count)]


def test_finalists_are_spread_over_the_part_of_the_front_that_could_pass():
    family = [trial_at(i + 1, 0.9 - 0.1 * i, 0.01 * i) for i in range(8)]
    dense = trial_at(0, 1.0, -0.1)
    outcome = SearchOutcome(1.0, 200, (dense, *family, trial_at(9, 0.01, 0.0, complete=False)))
    chosen = finalists(outcome, 3, max_accuracy_drop=0.045)
    assert chosen in ([plan(6), plan(3), plan(1)], [plan(6), plan(4), plan(1)])
    assert finalists(outcome, 1, max_accuracy_drop=0.045) == [plan(5)]
    assert finalists(outcome, 3, max_accuracy_drop=0.045, min_speedup=2.2) == [plan(6)]
    assert finalists(outcome, 3, max_accuracy_drop=0.045, max_layers_touched=2) == [plan(2), plan(1)]
    assert len(finalists(outcome, 50, max_accuracy_drop=None)) == 8


def test_runners_up_fill_the_places_that_a_short_front_leaves():
    figures = (trial_at(7, 0.3, 0.0), trial_at(6, 0.4, 0.0), trial_at(5, 0.5, 0.0), trial_at(4, 0.6, 0.3))
    outcome = SearchOutcome(1.0, 200, figures)
    assert finalists(outcome, 2, max_accuracy_drop=0.05) == [plan(7), plan(6)]
    assert finalists(outcome, 9, max_accuracy_drop=0.05) == [plan(7), plan(6), plan(5)]


def test_runners_up_are_spread_from_fast_to_careful_by_their_divergence():
    # No plan loses anything on the search split; the divergence alone tells the careful ones, and one is dominated.
    kls = {7: 0.4, 6: 0.3, 5: 0.2, 4: 0.25, 3: 0.01, 2: 0.001, 1: 0.0001}
    figures = tuple(replace(trial_at(layers, 1 - 0.1 * layers, 0.0), kl=kl) for layers, kl in kls.items())
    outcome = SearchOutcome(1.0, 200, figures)
    assert finalists(outcome, 4, max_accuracy_drop=0.05) == [plan(7), plan(6), plan(3), plan(1)]
    assert finalists(outcome, 2, max_accuracy_drop=0.05) == [plan(7), plan(3)]
    assert finalists(outcome, 7, max_accuracy_drop=0.05)[-1] == plan(4)


def test_a_search_without_finalists_says_what_kept_each_plan_out():
    tried = (trial_at(0, 1.0, 0.0), trial_at(5, 0.5, 0.3), trial_at(6, 0.4, 0.2), trial_at(1, 1.1, 0.0))
    outcome = SearchOutcome(1.0, 200, tried, failed={plan(9): "out of memory", plan(8): "NaN"})
    assert finalists(outcome, 3, max_accuracy_drop=0.05) == []
    assert why_none(outcome, Limits(ConstraintSpec(max_accuracy_drop=0.05))) == (
        "no plan that the search tried could meet the constraint: of 5, 2 lose more accuracy than allowed (the "
        f"nearest, {plan(6)}, is at -20.00 points to dense on 200 search samples), 1 are predicted to be no faster "
        f"than dense, or outside the limits, 2 failed (such as {plan(9)}: out of memory)"
    )
