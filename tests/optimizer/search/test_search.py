"""The search loop on planted problems whose best plans are known."""

import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from planted import SAMPLES, Planted, problem_of, random_problem, search, small

from optimizer import criteria
from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.registries import CRITERIA, SAMPLERS, STRATEGIES
from optimizer.search.budget import Budget, rung_sizes
from optimizer.search.constraints import Limits
from optimizer.search.loop import Search, at_once
from optimizer.search.problem import PlanList
from optimizer.search.seeding import with_seeds
from optimizer.search.space import Candidate
from optimizer.search.trial import Trial, paired_difference
from optimizer.stages.together import Turns
from workers.redundancy.kinds import ANSWER, GROUPS, INTERVENTIONS, OPERATORS
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime import SkipPlan
from workers.runtime.plan import LETTERS

LAYERS = 8


@pytest.mark.parametrize("strategy", ["surrogate", "nsga2"])
def test_finds_the_plan_of_all_harmless_layers_and_evaluates_nothing_twice(strategy):
    planted = small()
    outcome = search(planted, strategy=strategy, trials=60 if strategy == "surrogate" else 120)
    assert len(planted.asked) == len(set(planted.asked))
    harmless = [trial for trial in outcome.front() if trial.difference == 0 and trial.plan.count("S") == 3]
    assert [trial.plan for trial in harmless] == ["RRSRSRSR"]


@pytest.mark.parametrize("strategy", SAMPLERS)
def test_evaluations_are_as_many_as_asked_for_and_none_twice(strategy):
    planted = small()
    outcome = search(planted, LETTERS, strategy=strategy, trials=12)
    assert len(planted.asked) == len(set(planted.asked)) and len(outcome.trials) == 13
    assert outcome.stopped_because == "the budget of 12 trials is spent"


@pytest.mark.parametrize("strategy", ["surrogate", "tpe", "random", "evopress"])
def test_same_seed_same_search_whatever_the_order_of_arrival(strategy):
    first, second = (search(small(order=order), strategy=strategy, seeds="none", trials=24) for order in (1, 2))
    assert first == second
    assert first.trials != search(small(), strategy=strategy, seeds="none", trials=24, seed=1).trials


class Noting(PlanList):
    """Plans of a list, and what the loop asks for and tells in which order."""

    def __init__(self, problem, *, asks_ahead):
        sets = ([layer for layer in range(LAYERS) if number >> layer & 1] for number in range(1, 200))
        super().__init__([Candidate(SkipPlan.skipping(LAYERS, each)) for each in sets], problem, "noting")
        self.asks_ahead, self.said = asks_ahead, []

    def ask(self, count):
        asked = super().ask(count)
        self.said.append(f"ask {len(asked)}")
        return asked

    def tell(self, answers):
        self.said.append(f"tell {len(answers)}")


@pytest.mark.parametrize(
    ("batch", "asks_ahead", "said"),
    [
        (40, True, "ask 20, ask 20, tell 20, ask 20, tell 20, ask 10, tell 20, tell 10"),
        (40, False, "ask 40, tell 40, ask 30, tell 30"),
        (31, True, "ask 31, tell 31, ask 31, tell 31, ask 8, tell 8"),
    ],
)
def test_large_batches_go_in_halves_where_the_strategy_asks_ahead(batch, asks_ahead, said):
    spec = SearchSpec(trials=70, batch=batch, rungs=(50,))
    problem = problem_of(small(), spec=spec, seeded=False)
    strategy = Noting(problem, asks_ahead=asks_ahead)
    outcome = Search(problem, strategy, Budget(spec, lambda: 0.0), evaluate=small()).run()
    assert ", ".join(strategy.said) == said and len(outcome.trials) == 71


class Delayed:
    """Evaluates after a while, others going on meanwhile; notes where a later batch came first."""

    def __init__(self, planted, turns, seed):
        self.planted, self.turns, self.chance = planted, turns, random.Random(seed)
        self.under_way, self.overtaken = [], False

    def __call__(self, requests):
        self.under_way.append(requests)
        with self.turns.waiting():
            time.sleep(self.chance.choice([0.001, 0.03]))
        self.overtaken |= self.under_way[0] is not requests
        self.under_way.remove(requests)
        yield from self.planted(requests)


@pytest.mark.parametrize("strategy", ["surrogate", "tpe"])
def test_halves_under_way_find_the_same_whichever_ends_first(strategy):
    spec = SearchSpec(strategy=strategy, trials=100, batch=32, rungs=(50,))
    planted = random_problem(12, "RFBS", 0)
    problem = problem_of(planted, "RFBS", spec=spec)

    def run(evaluate, begin=at_once):
        return Search(
            problem, STRATEGIES[strategy](problem), Budget(spec, lambda: 0.0), evaluate=evaluate, begin=begin
        ).run()

    def beside(delayed):
        with delayed.turns.beside() as begin:
            return run(delayed, begin)

    found, delays = run(planted), [Delayed(planted, Turns(), seed) for seed in range(2)]
    for delayed in delays:
        assert delayed.turns.together(partial(beside, delayed)) == [found]
    assert any(delayed.overtaken for delayed in delays)
    assert len(found.trials) == 101 and len(planted.asked) == 3 * len(set(planted.asked))


def test_seeds_come_first_in_order():
    planted = small()
    search(planted, first=["RRSRRRRR", "RRSRSRRR"], batch=2, trials=4)
    assert [plan for plan, _ in planted.asked[1:3]] == ["RRSRRRRR", "RRSRSRRR"]


def test_hopeless_plans_end_on_the_first_rung():
    planted = small()
    outcome = search(planted, first=["SSSSSSSR", "RRSRRRRR"], trials=2)
    assert ("RRSRRRRR", SAMPLES) in planted.asked
    assert ("SSSSSSSR", SAMPLES) not in planted.asked
    by_plan = {trial.plan: trial for trial in outcome.trials}
    assert not by_plan["SSSSSSSR"].complete and by_plan["SSSSSSSR"].n_samples == 50
    assert by_plan["RRSRRRRR"].complete


def test_plans_that_cannot_meet_a_known_constraint_end_on_the_first_rung():
    constraint = ConstraintSpec(max_accuracy_drop=0.3, max_latency_ms=65.0)
    planted = small()
    search(planted, first=["RRSRSRRR", "RRSRSRSR", "RSSRSRSR"], trials=3, constraint=constraint)
    assert ("RRSRSRSR", SAMPLES) not in planted.asked and ("RSSRSRSR", SAMPLES) in planted.asked


@pytest.mark.parametrize("strategy", ["surrogate", "tpe"])
def test_a_failed_plan_is_recorded_and_the_search_goes_on(strategy):
    outcome = search(small(fail="RRSRRRRR"), first=["RRSRRRRR"], trials=10, strategy=strategy)
    assert outcome.failed == {"RRSRRRRR": "worker died twice"}
    assert len(outcome.trials) == 10  # nine others and dense


def test_dense_that_fails_ends_the_search():
    with pytest.raises(RuntimeError, match="dense model cannot be evaluated: worker died"):
        search(small(fail="R" * LAYERS))


@pytest.mark.parametrize("strategy", ["surrogate", "tpe"])
def test_stops_when_every_plan_was_tried_and_says_so(strategy):
    outcome = search(small(), trials=10_000, max_touched=1, strategy=strategy)
    assert len(outcome.trials) == 1 + LAYERS
    assert outcome.stopped_because == "every possible plan was tried"


@pytest.mark.parametrize("strategy", ["surrogate", "tpe", "evopress", "sleb"])
def test_never_touches_more_layers_than_allowed(strategy):
    outcome = search(small(), max_touched=2, trials=30, strategy=strategy)
    assert max(trial.plan.count("S") for trial in outcome.trials) == 2


@pytest.mark.parametrize("strategy", ["surrogate", "tpe"])
def test_all_actions_can_be_proposed(strategy):
    outcome = search(small(), "RFBS", trials=40, strategy=strategy)
    assert set("".join(trial.plan for trial in outcome.trials)) == set("RFBS")


def measured(*, parts):
    """Some value of everything that criteria read, with or without attention and MLPs by themselves."""
    names = ["cosine_distance", "propagation_gain", "final_change", "vision_attention", "withdrawal"]
    names += [f"angular_distance@{length}" for length in range(1, LAYERS + 1)]
    names += [f"linear_redundancy@{length}" for length in range(1, LAYERS)]
    tried = INTERVENTIONS + (OPERATORS if parts else ())
    names += [f"{name}@{action.label}" for name in ("layer_contribution", "trial_divergence") for action in tried]
    if parts:
        names += [f"operator_{name}@{part}" for name in ("distance", "angle", "share") for part in ("attention", "mlp")]
    keys = [(name, group, layer) for name in names for group in (*GROUPS, ANSWER) for layer in range(LAYERS)]
    values = np.random.default_rng(0).random(len(keys))
    rows = (LayerMeasurement(*key, float(value), 0.01, 9) for key, value in zip(keys, values, strict=True))
    return LayerTable(LAYERS, tuple(rows))


@pytest.mark.parametrize("parts", [True, False], ids=["parts measured", "whole layers measured"])
@pytest.mark.parametrize("criterion", CRITERIA.built_in)
def test_all_actions_are_searched_under_every_criterion(criterion, parts):
    table, spec = measured(parts=parts), SearchSpec(strategy="surrogate", trials=9, rungs=(50,))
    problem = replace(problem_of(small(), LETTERS, spec=spec, table=table, seeded=False), trust=0.5)
    problem = with_seeds(replace(problem, risk=criteria.load(criterion).risk(table).weighed(0.5)), spec)
    assert {letter for candidate in problem.reserve for letter in candidate.plan.text} == set(LETTERS)
    outcome = Search(problem, STRATEGIES["surrogate"](problem), Budget(spec, lambda: 0.0), evaluate=small()).run()
    assert len(outcome.trials) == 10 and not outcome.failed


def test_compensated_and_plain_plans_are_searched_together():
    harm = {(layer, letter): {"S": 0.2, "C": 0.01}[letter] for layer in range(LAYERS) for letter in "SC"}
    planted = Planted(harm, layers=LAYERS)
    outcome = search(planted, strategy="surrogate", compensations=("none", "linear x"), trials=50)
    assert len(planted.asked) == len(set(planted.asked))
    assert {trial.compensation for trial in outcome.trials} == {"none", "linear x"}
    fastest = outcome.front()[0]
    assert fastest.compensation == "linear x" and fastest.plan.count("S") >= 4
    assert all(trial.plan[0] == "R" for trial in outcome.trials if trial.compensation != "none")


def test_the_study_gets_the_constraints():
    problem = problem_of(small(), spec=SearchSpec(strategy="tpe"))
    strategy = STRATEGIES["tpe"](problem)
    dense = Trial("R" * LAYERS, 200, 1.0, 0.0, 0.0, 1.0, True)
    strategy.start(dense)
    (ask,) = strategy.ask(1)
    seen = Trial(ask.candidate.plan.text, 200, 0.8, -0.2, 0.01, 0.9, True)
    strategy.tell([(ask.candidate, seen)])
    trial = strategy._study.trials[-1]
    assert trial.constraints == {"max_accuracy_drop": pytest.approx(0.15)} and trial.values == [0.9, 0.2]


def test_layer_executions_count_new_samples_times_layers_that_run():
    planted = small()
    outcome = search(planted, first=["SSSSSSSR", "RRSRRRRR"], trials=2)
    # Dense on all samples, one layer on the first rung, seven layers on all samples (the first rung is part of them).
    assert outcome.layer_executions == 200 * 8 + 50 * 1 + 200 * 7
    parts = search(small(), "RSAM", first=["AMRRRRRR"], trials=1)
    # Of a layer without attention two thirds, of one without its MLP a third; it is dropped on the first rung.
    assert parts.layer_executions == 200 * 8 + 50 * (6 + 2 / 3 + 1 / 3)
    limited = search(small(), trials=10_000, layer_executions=20_000)
    assert 20_000 <= limited.layer_executions < 20_000 + 8 * 200 * 8
    assert limited.stopped_because == "the budget of 20000 layer executions is spent"


def test_ends_by_time_and_by_small_gain():
    clock = iter(range(1000))
    timed = search(small(), seconds=5.0, elapsed=lambda: float(next(clock)))
    assert timed.stopped_because == "the budget of 5 seconds is spent" and len(timed.trials) == 1 + 5 * 8
    quiet = search(small(), strategy="surrogate", trials=240, min_gain=0.002, patience=3)
    assert "expected gain of the front's hypervolume stayed under 0.2 % for 3 batches" in quiet.stopped_because
    assert len(quiet.trials) < 200


def test_what_earlier_jobs_know_is_used_and_not_evaluated_again():
    first = search(small(), strategy="surrogate", trials=24)
    known = tuple(trial for trial in first.trials if trial.plan != "R" * LAYERS)
    planted = small()
    spec = SearchSpec(strategy="surrogate", trials=16, rungs=(50,), seed=1)
    problem = replace(problem_of(planted, spec=spec), known=known)
    outcome = Search(problem, STRATEGIES["surrogate"](problem), Budget(spec, lambda: 0.0), evaluate=planted).run()
    complete = {trial.plan for trial in known}
    assert not complete & {plan for plan, _ in planted.asked}
    assert complete <= {trial.plan for trial in outcome.trials} and len(outcome.trials) == 1 + 24 + 16


def test_rungs_end_with_the_whole_split():
    assert rung_sizes(None, 256) == (64, 256)
    assert rung_sizes((16, 64), 256) == (16, 64, 256)
    assert rung_sizes((300,), 256) == (256,)


def test_paired_difference_and_its_error():
    difference, error = paired_difference([1, 1, 1, 0] * 25, [1, 1, 0, 0] * 25)
    assert difference == -0.25
    assert error == pytest.approx(np.sqrt(0.25 * 0.75 / 100), rel=0.1)
    assert paired_difference([1.0] * 10, [1.0] * 10)[1] > 0


def test_constraints_are_numbers_met_at_zero():
    spec = ConstraintSpec(
        max_accuracy_drop=0.1, min_accuracy=0.7, min_speedup=2.0, max_latency_ms=40, max_kv_cache_bytes=50
    )
    limits = Limits(spec, dense_latency_seconds=0.1, kv_cache_bytes=lambda plan: 10.0 * len(plan.kept))
    values = limits.values(Trial("SSSSSRRRRR", 10, 0.8, -0.2, 0.0, 0.5, True))
    assert values == pytest.approx(
        {
            "max_accuracy_drop": 0.1,
            "min_accuracy": -0.1,
            "min_speedup": 0.0,
            "max_latency_ms": 0.25,
            "max_kv_cache_bytes": 0.0,
        }
    )
    assert limits.least_difference(0.75) == pytest.approx(-0.05)


def test_a_plan_without_any_layer_is_never_proposed():
    planted = small()
    outcome = search(
        planted, strategy="random", trials=255, constraint=ConstraintSpec(max_accuracy_drop=None), seeds="none"
    )
    assert len(outcome.trials) == 255 and outcome.stopped_because == "every possible plan was tried"
    assert "S" * LAYERS not in {plan for plan, _ in planted.asked}
    assert Candidate(SkipPlan.parse("S" * LAYERS)) not in problem_of(small()).space
