"""Halving chains of plans: the last good one of each is found, in few evaluations."""

from dataclasses import replace
from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import SAMPLES, problem_of, random_problem, search, small

from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.registries import STRATEGIES
from optimizer.search.seeding import with_given
from optimizer.search.space import Candidate
from optimizer.search.strategies.bisection import Chain
from optimizer.search.trial import Scores, paired_difference, trial_of
from workers.runtime import SkipPlan

LIMIT = ConstraintSpec(max_accuracy_drop=0.1)


def plans(*texts: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(SkipPlan.parse(text)) for text in texts)


@given(st.integers(0, 60).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))))
def test_halving_finds_the_last_good_plan(size_and_good: tuple[int, int]) -> None:
    size, good = size_and_good
    names = list(range(size))
    chain, asked = Chain(names), []  # type: ignore[arg-type]  # numbers stand for plans
    while (middle := chain.next) is not None:
        asked.append(middle)
        chain.narrow(middle < good)
    assert len(asked) == len(set(asked)) <= ceil(log2(size + 1) / log2(4 / 3)) + 1
    assert good == 0 or good - 1 in asked, "the last good plan itself was evaluated"
    assert good == size or good in asked, "and the one behind it"


@pytest.mark.parametrize("letters", ["RS", "RFBS"])
def test_the_last_good_plan_of_every_chain_is_tried(letters: str) -> None:
    planted = small()
    problem = problem_of(planted, letters, constraint=LIMIT)
    outcome = search(planted, letters, strategy="surrogate", trials=100, constraint=LIMIT, rungs=None)
    tried = {each.candidate for each in outcome.trials}
    dense = planted.scores(Candidate(SkipPlan.dense(8)), SAMPLES).values
    assert len(problem.chains) > 3
    for chain in problem.chains:
        by_speed = sorted(chain, key=lambda candidate: -problem.ratio(candidate.plan))
        good = [paired_difference(dense, planted.scores(each, SAMPLES).values)[0] >= -0.1 for each in by_speed]
        if good == sorted(good, reverse=True) and any(good):
            assert by_speed[sum(good) - 1] in tried


def test_where_parts_are_allowed_the_additive_solutions_of_whole_layers_are_a_chain_too() -> None:
    planted = random_problem(12, "RFBSAMQP", 0)
    wholes, parts = (problem_of(planted, letters) for letters in ("RFBS", "RFBSAMQP"))
    assert wholes.chains[0] and wholes.chains[0] in parts.chains
    assert any(set("AMQP") & set(str(each)) for each in parts.chains[0])


@pytest.mark.parametrize(("letters", "own"), [("RFSAM", "FS"), ("RFAM", "FAM")])
def test_parts_of_layers_have_chains_where_whole_layers_cannot_go(letters: str, own: str) -> None:
    # The criterion of these problems gives parts no risk of their own.
    problem = problem_of(small(), letters, constraint=LIMIT)
    texts = [{str(each).replace("R", "") for each in chain} for chain in problem.chains]
    of_one_action = {
        next(iter(text))[0] for text in texts if all(len(set(each)) == 1 for each in text) and len(text) > 5
    }
    assert of_one_action == set(own)
    outcome = search(small(), letters, strategy="surrogate", trials=30, constraint=LIMIT)
    assert any(each.candidate.plan.partial for each in outcome.trials)


def test_chains_take_their_share_of_the_evaluations_and_no_more() -> None:
    planted = small()
    problem = replace(problem_of(planted, "RFBS", constraint=LIMIT), seeds=(), bisections=3)
    strategy = STRATEGIES["surrogate"](problem)
    dense = Candidate(SkipPlan.dense(8))
    scores = planted.scores(dense, SAMPLES)
    strategy.start(trial_of(dense, scores, scores, 1.0, SAMPLES))
    of_chains = {plan for chain in problem.chains for plan in chain}
    first = [ask.candidate for ask in strategy.ask(8)]
    assert len(first) == 3 and set(first) <= of_chains
    assert strategy.expected_gain is None
    strategy.tell([(each, trial_of(each, planted.scores(each, SAMPLES), scores, 0.5, SAMPLES)) for each in first])
    assert len(strategy.ask(8)) == 8
    assert strategy.expected_gain is not None


def test_given_plans_come_before_chains() -> None:
    problem = with_given(problem_of(small(), constraint=LIMIT), ["RSRRRRRR"])
    strategy = STRATEGIES["surrogate"](problem)
    dense = trial_of(
        Candidate(SkipPlan.dense(8)), small().scores(Candidate(SkipPlan.dense(8)), 200), Scores((1.0,) * 200), 1, 200
    )
    strategy.start(dense)
    asked = [ask.candidate for ask in strategy.ask(8)]
    assert asked[: len(problem.seeds)] == list(problem.seeds)
    assert len(asked) == len(set(asked)) > len(problem.seeds)


def test_what_is_known_is_not_asked_again_and_halves_chains() -> None:
    planted = small()
    problem = problem_of(planted, constraint=LIMIT)
    dense = planted.scores(Candidate(SkipPlan.dense(8)), SAMPLES)
    (chain, *_) = problem.chains
    by_speed = sorted(chain, key=lambda candidate: -problem.ratio(candidate.plan))
    known = tuple(
        trial_of(each, planted.scores(each, SAMPLES), dense, problem.ratio(each.plan), SAMPLES) for each in by_speed
    )
    strategy = STRATEGIES["surrogate"](replace(problem, known=known, chains=(chain,), seeds=()))
    strategy.start(trial_of(Candidate(SkipPlan.dense(8)), dense, dense, 1.0, SAMPLES))
    assert not {ask.candidate for ask in strategy.ask(8)} & set(chain)


def test_seeds_that_are_known_leave_their_places_to_chains() -> None:
    planted = small()
    problem = problem_of(planted, constraint=LIMIT)
    dense = planted.scores(Candidate(SkipPlan.dense(8)), SAMPLES)
    known = tuple(
        trial_of(each, planted.scores(each, SAMPLES), dense, problem.ratio(each.plan), SAMPLES)
        for each in problem.seeds
    )
    assert known
    strategy = STRATEGIES["surrogate"](replace(problem, known=known))
    strategy.start(trial_of(Candidate(SkipPlan.dense(8)), dense, dense, 1.0, SAMPLES))
    rungs = {each for chain in problem.chains for each in chain}
    assert {ask.candidate for ask in strategy.ask(2)} <= rungs


def test_a_failed_plan_counts_as_harmful() -> None:
    planted = small()
    problem = replace(
        problem_of(planted, constraint=LIMIT), chains=(plans("RRSRRRRR", "RRSRSRRR", "RRSRSRSR"),), seeds=()
    )
    strategy = STRATEGIES["surrogate"](problem)
    dense = Candidate(SkipPlan.dense(8))
    scores = planted.scores(dense, SAMPLES)
    strategy.start(trial_of(dense, scores, scores, 1.0, SAMPLES))
    (middle,) = (ask.candidate for ask in strategy.ask(1))
    assert middle.plan.text == "RRSRRRRR"
    strategy.tell([(middle, None)])
    assert not {ask.candidate for ask in strategy.ask(8)} & set(problem.chains[0]), "what comes behind it is worse"


def test_a_search_with_chains_does_not_depend_on_the_order_of_arrival() -> None:
    first, second = (
        search(replace(random_problem(12, "RFBS", 3), order=order), "RFBS", strategy="surrogate", trials=40)
        for order in (1, 2)
    )
    assert first == second


def test_random_and_no_seeds_have_no_chains() -> None:
    for seeds in ("random", "none"):
        assert problem_of(small(), spec=SearchSpec(seeds=seeds)).chains == ()
