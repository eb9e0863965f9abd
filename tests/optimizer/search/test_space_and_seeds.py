"""Space and seeds on numbers small enough to check by hand or by trying everything."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import SMALL, problem_of, small

from optimizer.criteria import Risk
from optimizer.errors import UsageFault
from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.job.spec import JobSpec
from optimizer.search.constraints import Limits
from optimizer.search.seeding import with_given, with_seeds
from optimizer.search.seeds.additive import AdditiveProblem, budgets, savings, spread_order
from optimizer.search.seeds.blocks import best_blocks, unexplained_shares
from optimizer.search.seeds.feasible import FeasiblePlans
from optimizer.search.seeds.nested import nested_sets
from optimizer.search.seeds.theory import random_seeds
from optimizer.search.space import Candidate, PlanSpace, plan_space, touched
from workers.messages import WorkerInfo
from workers.redundancy.table import LayerMeasurement, LayerTable
from workers.runtime import SkipPlan


def texts(candidates):
    return [str(candidate) for candidate in candidates]


def worker(allowed):
    return WorkerInfo(0, "n", "cpu", 1, "llava", "f", len(allowed), tuple(allowed), 1, "float32")


def spec(**fields):
    return JobSpec.model_validate({"model": {"path": "m"}, "task": "t", **fields})


def test_nested_sets_grow_in_risk_order_and_never_empty_the_model():
    risk = Risk("r", dict.fromkeys("FBS", (0.1, 0.5, 0.2)))
    skips = PlanSpace(("RS", "RS", "RS"), 3)
    assert texts(nested_sets(skips, risk)) == ["SRR", "SRS"]
    both = PlanSpace(("RFS", "RFS", "RF"), 2)
    assert texts(nested_sets(both, risk)) == ["FRR", "SRR", "FRF", "SSR"]
    compensated = PlanSpace(("RS", "RS", "RS"), 3, ("linear x",))
    assert texts(nested_sets(compensated, risk)) == [
        "RRS (linear x)",
        "RSS (linear x)",
    ]  # nothing stands before layer 0


def test_space_is_what_model_and_job_both_allow():
    space = plan_space(spec(actions=["skip", "freeze"], protect=[1]), worker(["RFBS", "RFBS", "RS", "R"]))
    assert space.letters == ("RFS", "R", "RS", "R")
    assert space.free_layers == (0, 2) and space.size == 6
    inside = [text for text in ("FRSR", "RSRR", "RR") if Candidate(SkipPlan.parse(text)) in space]
    assert inside == ["FRSR"]


def test_space_counts_touched_layers():
    space = plan_space(spec(constraint={"max_layers_touched": 1}), worker(["RS"] * 4))
    assert len(list(space.enumerate())) == 5
    assert all(touched(candidate.plan) <= 1 for candidate in space.enumerate())


def test_space_names_what_is_wrong():
    with pytest.raises(UsageFault, match=r"protect: layer 9 .* 0\.\.1"):
        plan_space(spec(protect=[9]), worker(["RS", "RS"]))
    with pytest.raises(UsageFault, match="actions: no layer"):
        plan_space(spec(actions=["bypass"]), worker(["RS", "RS"]))


def test_compensated_candidates_have_one_way_to_be_said():
    space = PlanSpace(("RFS",) * 3, 3, ("none", "linear x"))
    assert space.genome_letters == ("RFS", "RFSC", "RFSC")
    every = list(space.enumerate())
    assert len(every) == len(set(every)) and all(space.candidate(space.genome(each)) == each for each in every)
    assert Candidate(SkipPlan.parse("RFR"), "linear x") not in space  # nothing to compensate
    assert Candidate(SkipPlan.parse("SRR"), "linear x") not in space  # no layer before the gap
    assert Candidate(SkipPlan.parse("RSR"), "linear x") in space and Candidate(SkipPlan.parse("SRR")) in space
    assert Candidate(SkipPlan.parse("RSR"), "linear y") not in space
    assert not space.allows("RSC")


def test_parts_of_layers_are_compensated_beside_skips_and_where_there_is_no_other_way():
    both, linear = (PlanSpace(("RSAQ",) * 3, 3, own) for own in (("none", "linear x"), ("linear x",)))
    for space in (both, linear):
        every = list(space.enumerate())
        assert len(every) == len(set(every)) and all(space.candidate(space.genome(each)) == each for each in every)
        assert all(each in space for each in every)
        for part in space.parts:
            assert set(part.enumerate()) <= set(every)
    beside, alone, neither = (SkipPlan.parse(text) for text in ("ASR", "ARR", "QRR"))
    assert Candidate(beside, "linear x") in both and Candidate(beside) in both
    assert Candidate(beside, "linear x") in linear and Candidate(beside) not in linear
    assert Candidate(alone) in both and Candidate(alone, "linear x") not in both
    assert Candidate(alone, "linear x") in linear and Candidate(alone) not in linear
    assert all(Candidate(neither) in space and Candidate(neither, "linear x") not in space for space in (both, linear))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_additive_problem_is_solved_exactly(seed):
    random = np.random.default_rng(seed)
    space = PlanSpace(("RFSAM", "RFS", "RSAM", "RFSQ", "RS"), int(random.integers(1, 6)))
    steps = [(layer, letter) for layer, own in enumerate(space.letters) for letter in own[1:]]
    risk = {step: float(random.random()) for step in steps}
    saving = {step: float(random.uniform(0.02, 0.2)) for step in steps}
    ratio = 1 - float(random.uniform(0, 0.6))

    def total(candidate):
        taken = {(layer, action.letter) for layer, action in enumerate(candidate.plan) if action.letter != "R"}
        return sum(risk[step] for step in taken), sum(saving[step] for step in taken)

    feasible = [total(each)[0] for each in space.enumerate() if total(each)[1] >= 1 - ratio - 1e-9]
    found = AdditiveProblem(space, risk, saving).solve(ratio)
    if not feasible:
        assert found is None
    else:
        assert found is not None and found in space and total(found)[1] >= 1 - ratio - 1e-6
        assert total(found)[0] == pytest.approx(min(feasible), abs=1e-6)


def large(seed):
    random = np.random.default_rng(seed)
    space = PlanSpace(("RFBS",) * 30, 30)
    steps = [(layer, letter) for layer in range(30) for letter in "FBS"]
    risk = {step: float(random.lognormal(0, 2)) for step in steps}
    return AdditiveProblem(space, risk, {step: float(random.uniform(0, 0.03)) for step in steps})


@pytest.mark.parametrize("seed", [16, 210])  # with scipy 1.17, HiGHS prints a line in solving them
def test_the_solver_prints_nothing(seed, capfd):
    assert large(seed).solve(0.8) is not None
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")


def test_jobs_that_solve_at_once_keep_their_standard_output(capfd):
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda seed: large(seed).solve(0.8), range(16)))
    os.write(1, b"results")
    assert capfd.readouterr().out == "results"


def test_steps_of_infinite_risk_are_never_taken():
    space = PlanSpace(("RS", "RS"), 2)
    problem = AdditiveProblem(space, {(0, "S"): float("inf"), (1, "S"): 1.0}, {(0, "S"): 0.5, (1, "S"): 0.3})
    assert texts([problem.solve(0.7)]) == ["RS"] and problem.solve(0.6) is None


def test_solutions_cover_the_latencies_middle_first():
    problem = problem_of(small())
    saving = savings(problem.space, problem.ratio)
    assert saving == pytest.approx({(layer, "S"): 0.1 for layer in range(8)})
    assert budgets(saving, 3) == pytest.approx((0.6, 0.92, 0.28))
    assert sorted(spread_order(9)) == list(range(9)) and spread_order(3)[0] == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_best_run_structures_are_those_of_trying_everything(seed):
    random = np.random.default_rng(seed)
    letters = tuple("RS" if random.random() < 0.85 else "R" for _ in range(7))
    space = PlanSpace(letters, 7, ("linear x",))
    shares = {(k, j): float(random.random()) for k in range(7) for j in range(k + 1, 7)}

    def cost(genome):
        total, layer = 0.0, 0
        while layer < 7:
            end = layer
            while end < 7 and genome[end] == "C":
                end += 1
            if end > layer:
                total += shares[layer - 1, end - 1]
            layer = end + 1
        return total

    best = {}
    for genome in map("".join, product("RC", repeat=7)):
        if space.allows(genome) and "C" in genome:
            size = genome.count("C")
            best[size] = min(best.get(size, np.inf), cost(genome))
    found = {each.plan.text.count("S"): cost(space.genome(each)) for each in best_blocks(space, shares)}
    assert found == pytest.approx(best)


def test_shares_are_read_from_the_table_of_measurements():
    rows = (
        LayerMeasurement("linear_redundancy@2", "all", 1, 0.25, None, 9),
        LayerMeasurement("cosine_distance", "all", 1, 0.5, None, 9),
    )
    assert unexplained_shares(LayerTable(4, rows)) == {(1, 3): 0.25}


def test_seeds_of_the_sampler_come_from_solutions_nested_sets_and_papers():
    planted = small()
    problem = with_seeds(problem_of(planted, seeded=False), SearchSpec())
    assert 0 < len(problem.seeds) <= problem.batch
    everything = [each.plan.text for each in (*problem.seeds, *problem.reserve)]
    best_three = "".join("S" if layer in np.argsort(SMALL, kind="stable")[:3] else "R" for layer in range(8))
    assert best_three in everything
    assert "RRRRRRSR" in everything or "RRSRRRRR" in everything
    assert all(each in problem.space for each in (*problem.seeds, *problem.reserve))


def test_a_criterion_that_does_not_predict_has_fewer_of_its_chains_searched():
    problem = problem_of(small(), seeded=False)
    asked = [with_seeds(replace(problem, trust=trust), SearchSpec(trials=60)).bisections for trust in (1.0, 0.25, 0.0)]
    assert asked == [30, 8, 0]


def test_given_plans_come_before_all_others():
    seeded = problem_of(small())
    given = seeded.seeds[-1].plan.text
    problem = with_given(seeded, ["RSSRRRRR", given])
    assert texts(problem.seeds[:2]) == ["RSSRRRRR", given]
    assert set(problem.seeds) == {*seeded.seeds, *problem.seeds[:1]} and len(problem.seeds) == len(set(problem.seeds))
    both = replace(seeded, space=replace(seeded.space, compensations=("none", "linear x")))
    assert texts(with_given(both, ["RSSRRRRR"]).seeds[:2]) == ["RSSRRRRR", "RSSRRRRR (linear x)"]
    for foreign in ("RSSR", "RFRRRRRR"):
        with pytest.raises(UsageFault, match=f"search.plans: {foreign} is no plan of this job: its 8 layers"):
            with_given(seeded, [foreign])
    with pytest.raises(ValueError, match="RSX"):
        spec(search={"plans": ["RSX"]})
    with pytest.raises(ValueError, match="strategy sleb tries its own plans only"):
        spec(search={"plans": ["RSS"], "strategy": "sleb"})
    with pytest.raises(ValueError, match="RFS has F, which is no action of this job"):
        spec(search={"plans": ["RFS"]})
    with pytest.raises(ValueError, match="RSS does not run layer 2, which is protected"):
        spec(search={"plans": ["RSS"]}, protect=[2])


def test_seeds_that_cannot_meet_a_known_constraint_are_left_out():
    constraint = ConstraintSpec(max_accuracy_drop=0.1, min_speedup=2.0)
    problem = problem_of(small(), constraint=constraint)
    assert problem.reserve and all(problem.ratio(each.plan) <= 0.5 for each in (*problem.seeds, *problem.reserve))


def test_random_seeds_are_of_the_space_and_repeatable():
    space = PlanSpace(("RFS",) * 6, 4, ("none", "linear x"))
    plans = FeasiblePlans(space, Limits(ConstraintSpec()), lambda plan: 1.0)
    seeds = random_seeds(plans, 12, 5)
    assert len(seeds.first) == 12 and all(each in space for each in seeds.first)
    assert random_seeds(plans, 12, 5) == seeds != random_seeds(plans, 12, 6)


@pytest.mark.parametrize(("trust", "own"), [(1.0, 8), (0.5, 4), (0.0, 0)])
def test_random_plans_take_the_place_of_those_of_a_criterion_that_is_not_trusted(trust, own):
    spec = SearchSpec(trials=16, strategy="tpe")
    problem = replace(problem_of(small(), "RFS", seeded=False), trust=trust)
    problem = replace(problem, risk=problem.risk.weighed(trust))
    nested = [each for each in nested_sets(problem.space, problem.risk) if each in problem.feasible]
    seeds = with_seeds(problem, spec).seeds
    assert len(seeds) == 8 and list(seeds[:own]) == nested[:own]
    others = random_seeds(problem.feasible, 8, problem.seed).first
    assert set(seeds[own:]) <= set(others)
