"""The search loop on planted problems whose best plans are known."""

import random

import numpy as np
import pytest

from optimizer.job import ConstraintSpec, SearchSpec
from optimizer.proposals import Proposals
from optimizer.search import Scores, Search, SearchOutcome, Tried, choose_finalists, paired_drop, rung_sizes
from optimizer.space import PlanSpace
from workers.runtime import SkipPlan

LAYERS, SAMPLES = 8, 200
HARM = (0.5, 0.01, 0.0, 0.2, 0.0, 0.02, 0.0, 0.6)


def planted_scores(plan: SkipPlan, size: int) -> tuple[float, ...]:
    """A sample is answered wrongly when its own fixed number falls below the plan's summed harm."""
    thresholds = np.random.default_rng(0).random(SAMPLES)
    harm = sum(h for h, action in zip(HARM, plan, strict=True) if action.value != "R")
    return tuple(float(t >= harm) for t in thresholds[:size])


class Planted:
    """Evaluates on the planted problem, remembers what it was asked, answers in a shuffled order."""

    def __init__(self, fail: str | None = None, order: int = 0) -> None:
        self.asked: list[tuple[str, int]] = []
        self.fail, self.shuffle = fail, random.Random(order)

    def __call__(self, requests):
        self.asked += [(plan.text, size) for plan, size in requests]
        for plan, size in self.shuffle.sample(list(requests), len(requests)):
            failure = "worker died twice" if plan.text == self.fail else None
            yield plan, Scores(() if failure else planted_scores(plan, size), failure)


def search(evaluate, *, letters="RS", seeds=(), constraint=None, **fields) -> SearchOutcome:
    space = PlanSpace((letters,) * LAYERS, fields.pop("max_touched", LAYERS))
    return Search(
        space,
        SearchSpec(**{"evaluations": 60, "rungs": (50,), **fields}),
        constraint or ConstraintSpec(max_accuracy_drop=0.05),
        ratio=lambda plan: 1 - sum(action.value != "R" for action in plan) / (LAYERS + 2),
        seeds=[SkipPlan.parse(text) for text in seeds],
        risk_order=sorted(range(LAYERS), key=lambda layer: HARM[layer]),
        samples=SAMPLES,
        evaluate=evaluate,
    ).run()


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_finds_the_plan_of_all_harmless_layers_and_evaluates_nothing_twice(sampler):
    evaluate = Planted()
    outcome = search(evaluate, sampler=sampler, evaluations=120)
    assert len(evaluate.asked) == len(set(evaluate.asked))
    assert len(outcome.tried) == 121  # and dense
    harmless = [tried for tried in outcome.front() if tried.drop == 0 and tried.plan.count("S") == 3]
    assert [tried.plan for tried in harmless] == ["RRSRSRSR"]


def test_random_sampler_evaluates_nothing_twice():
    evaluate = Planted()
    outcome = search(evaluate, sampler="random", evaluations=150)
    assert len(evaluate.asked) == len(set(evaluate.asked)) and len(outcome.tried) == 151


def test_gp_sampler_runs_where_scipy_is_there():
    pytest.importorskip("scipy")
    assert len(search(Planted(), sampler="gp", evaluations=14).tried) == 15


def test_same_seed_same_search_whatever_the_order_of_arrival():
    first, second = search(Planted(order=1)), search(Planted(order=2))
    assert first == second
    assert first.tried != search(Planted(), seed=1).tried


def test_seeds_come_first_in_order():
    evaluate = Planted()
    search(evaluate, seeds=["RRSRRRRR", "RRSRSRRR"], batch=2, evaluations=4)
    assert [plan for plan, _ in evaluate.asked[1:3]] == ["RRSRRRRR", "RRSRSRRR"]


def test_hopeless_plans_end_on_the_first_rung():
    evaluate = Planted()
    outcome = search(evaluate, seeds=["SSSSSSSR", "RRSRRRRR"], evaluations=2)
    assert ("RRSRRRRR", SAMPLES) in evaluate.asked
    assert ("SSSSSSSR", SAMPLES) not in evaluate.asked
    by_plan = {tried.plan: tried for tried in outcome.tried}
    assert not by_plan["SSSSSSSR"].complete and by_plan["SSSSSSSR"].n == 50
    assert by_plan["RRSRRRRR"].complete


def test_a_failed_plan_is_recorded_and_the_search_goes_on():
    outcome = search(Planted(fail="RRSRRRRR"), seeds=["RRSRRRRR"], evaluations=10)
    assert outcome.failed == {"RRSRRRRR": "worker died twice"}
    assert len(outcome.tried) == 10  # nine others and dense


def test_dense_that_fails_ends_the_search():
    with pytest.raises(RuntimeError, match="dense model cannot be evaluated: worker died"):
        search(Planted(fail="R" * LAYERS))


def test_stops_when_every_plan_was_tried_and_says_so():
    outcome = search(Planted(), evaluations=10_000, max_touched=1)
    assert len(outcome.tried) == 1 + LAYERS
    assert outcome.stopped_because == "every possible plan was tried"


def test_never_touches_more_layers_than_allowed():
    outcome = search(Planted(), max_touched=2, evaluations=30)
    assert max(tried.plan.count("S") for tried in outcome.tried) == 2
    assert len(outcome.tried) == 31


def test_all_actions_can_be_proposed():
    outcome = search(Planted(), letters="RFBS", evaluations=40)
    assert set("".join(tried.plan for tried in outcome.tried)) == set("RFBS")


def test_proposals_tell_optuna_the_constraints():
    proposals = Proposals(PlanSpace(("RS",) * 4, 4), "tpe", 0, [SkipPlan.parse("SRRR")])
    plan = proposals.ask([], range(4))
    proposals.tell(plan, (0.9, 0.2), {"max_accuracy_drop": 0.15})
    (trial,) = proposals._study.trials
    assert trial.constraints == {"max_accuracy_drop": 0.15} and trial.values == [0.9, 0.2]


def test_rungs_end_with_the_whole_split():
    assert rung_sizes(None, 256) == (64, 256)
    assert rung_sizes((16, 64), 256) == (16, 64, 256)
    assert rung_sizes((300,), 256) == (256,)


def test_paired_drop_and_its_error():
    drop, error = paired_drop([1, 1, 1, 0] * 25, [1, 1, 0, 0] * 25)
    assert drop == 0.25
    assert error == pytest.approx(np.sqrt(0.25 * 0.75 / 100), rel=0.1)
    assert paired_drop([1.0] * 10, [1.0] * 10)[1] > 0


def tried(plan, ratio, drop, complete=True):
    return Tried(plan, 200, 1 - drop, drop, 0.005, ratio, complete)


def test_finalists_are_spread_over_the_part_of_the_front_that_could_pass():
    ladder = [tried(f"p{i}", 0.9 - 0.1 * i, 0.01 * i) for i in range(8)]
    dense = tried("dense", 1.0, -0.1)
    outcome = SearchOutcome(1.0, 200, (dense, *ladder, tried("partial", 0.01, 0.0, complete=False)))
    chosen = choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=0.045), 3)
    assert chosen == ("p5", "p2", "p0") or chosen == ("p5", "p3", "p0")
    assert choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=0.045), 1) == ("p4",)
    assert choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=0.045, min_speedup=2.2), 3) == ("p5",)
    assert len(choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=None), 50)) == 8


def test_runners_up_fill_the_places_that_a_short_front_leaves():
    outcome = SearchOutcome(
        1.0,
        200,
        (tried("winner", 0.3, 0.0), tried("second", 0.4, 0.0), tried("third", 0.5, 0.0), tried("bad", 0.6, 0.3)),
    )
    assert choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=0.05), 2) == ("winner", "second")
    assert choose_finalists(outcome, ConstraintSpec(max_accuracy_drop=0.05), 9) == ("winner", "second", "third")


def test_a_plan_without_any_layer_is_never_proposed():
    evaluate = Planted()
    outcome = search(evaluate, sampler="random", evaluations=255, constraint=ConstraintSpec(max_accuracy_drop=None))
    assert len(outcome.tried) == 255 and outcome.stopped_because == "every possible plan was tried"
    assert "S" * LAYERS not in {plan for plan, _ in evaluate.asked}
