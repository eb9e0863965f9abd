"""Published methods on planted problems: what each must propose, worked out by hand."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from planted import SMALL, Planted, problem_of, search, small

from optimizer.errors import UsageFault
from optimizer.job.sections import ConstraintSpec
from optimizer.registries import METHODS, STRATEGIES
from optimizer.search.strategies.swift import KAPPA, upper_bound
from workers.errors import MeasurementError
from workers.redundancy.table import LayerTable

LOOSE = ConstraintSpec(max_accuracy_drop=None)
ORDER = [int(layer) for layer in np.argsort(SMALL, kind="stable")]


def genomes(strategy, planted=None, letters="RFBS", **fields):
    problem = problem_of(planted or small(), letters, seeded=False, **fields)
    return [problem.space.genome(each) for each in STRATEGIES[strategy](problem).plans]


def taking(layers, letter="S", count=8):
    return "".join(letter if layer in layers else "R" for layer in range(count))


@pytest.mark.parametrize(("strategy", "letter"), [("shortgpt", "S"), ("shortv", "F")])
def test_rankings_apply_their_action_to_the_least_harmful_layers(strategy, letter):
    sizes = range(1, 8 if letter == "S" else 9)  # skipping all leaves no model
    assert genomes(strategy) == [taking(ORDER[:size], letter) for size in sizes]


def test_skip_it_takes_every_action_in_the_order_of_the_jobs_own_criterion():
    found = genomes("skip-it")
    assert found[:3] == [taking(ORDER[:1], letter) for letter in "FBS"]
    assert taking(ORDER[:5], "B") in found and len(found) == 8 + 8 + 7


def test_vtw_withdraws_vision_tokens_from_a_layer_on():
    assert genomes("vtw")[:2] == ["RRRRRRRB", "RRRRRRBB"] and genomes("vtw")[-1] == "BBBBBBBB"


def test_angular_removes_the_block_whose_ends_are_closest():
    found = genomes("angular")
    for length, genome in enumerate(found, start=1):
        best = min(range(9 - length), key=lambda start: (sum(SMALL[start : start + length]), start))
        assert genome == taking(range(best, best + length))


def test_replaceme_compensates_the_same_blocks_and_never_layer_0():
    found = genomes("replaceme", compensations=("none", "linear x"))
    plain = genomes("angular")
    assert found[0] == plain[0].replace("S", "C") and set("".join(found)) == {"R", "C"}
    assert all(genome[0] == "R" for genome in found)


def test_sleb_removes_greedily_what_hurts_least_measured_anew():
    # Layer 2 and layer 4 are harmless alone but not together, so the second removal must avoid the pair.
    planted = Planted(small().singles, {((2, "S"), (4, "S")): 0.5})
    search(planted, strategy="sleb", constraint=LOOSE, trials=8 + 1 + 7)
    complete = [plan for plan, size in planted.asked if size == 200]
    assert complete == ["RRRRRRRR", taking([2]), taking([2, 6])]
    assert len(planted.asked) == len(set(planted.asked))


ATTENTION, MLP = (0.5, 0.01, 0.03), (0.2, 0.3, 0.02)
"""Harm of leaving out a part of each of three layers; a layer that loses both is skipped."""
PARTS = {
    (layer, letter): harm
    for layer in range(3)
    for letter, harm in (("A", ATTENTION[layer]), ("M", MLP[layer]), ("S", ATTENTION[layer] + MLP[layer]))
}
TOGETHER = {((1, first), (2, second)): 0.4 for first in "AS" for second in "MS"}
"""What else it costs that attention of layer 1 and the MLP of layer 2 are both gone."""


def test_finercut_removes_attention_or_mlp_whichever_hurts_least_measured_anew():
    # Worked out by hand: attention of 1 (0.01), then of 2 (0.03); the MLP of 2, the next best alone, costs 0.42 now, so
    # the MLP of 0 goes (0.2), then that of 1 (0.3), which leaves nothing of layer 1, then that of 2 (0.42).
    planted = Planted(PARTS, TOGETHER, layers=3)
    outcome = search(planted, "RSAM", strategy="finercut", constraint=LOOSE, trials=100)
    complete = [plan for plan, size in planted.asked if size == 200]
    assert complete == ["RRR", "RAR", "RAA", "MAA", "MSA", "MSS"]
    assert len(planted.asked) == len(set(planted.asked))
    assert outcome.stopped_because == "finercut has removed everything that may go"


@pytest.mark.parametrize(("letters", "last"), [("RA", "AAA"), ("RM", "MMM")])
def test_finercut_removes_one_kind_alone_where_the_job_allows_no_other(letters, last):
    planted = Planted(PARTS, TOGETHER, layers=3)
    search(planted, letters, strategy="finercut", constraint=LOOSE, trials=100)
    assert [plan for plan, size in planted.asked if size == 200][-1] == last
    assert set("".join(plan for plan, _ in planted.asked)) == set(letters)


def test_gsop_removes_operations_on_vision_tokens_whichever_hurts_least_measured_anew():
    # Worked out by hand, in what a step adds: attention of layer 1 (0.01), its MLP (0.02), text's attention to it
    # (0.05), the MLP of layer 0 (0.1), its attention (0.5), text's attention to it (0.3).
    harm = {(0, "Q"): 0.3, (0, "P"): 0.1, (0, "F"): 0.6, (0, "B"): 0.9}
    harm |= {(1, "Q"): 0.01, (1, "P"): 0.04, (1, "F"): 0.03, (1, "B"): 0.08}
    planted = Planted(harm, layers=2)
    outcome = search(planted, "RFBQP", strategy="gsop", constraint=LOOSE, trials=100)
    complete = [plan for plan, size in planted.asked if size == 200]
    assert complete == ["RR", "RQ", "RF", "RB", "PB", "FB", "BB"]
    assert len(planted.asked) == len(set(planted.asked))
    assert outcome.stopped_because == "gsop has removed everything that may go"


@pytest.mark.parametrize(("letters", "last"), [("RQ", "QQQ"), ("RP", "PPP"), ("RFQP", "FFF")])
def test_gsop_goes_as_far_as_the_job_allows(letters, last):
    planted = Planted({(layer, letter): 0.1 for layer in range(3) for letter in letters[1:]}, layers=3)
    search(planted, letters, strategy="gsop", constraint=LOOSE, trials=100)
    assert [plan for plan, size in planted.asked if size == 200][-1] == last


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("RA", ["RAR", "RAA", "AAA"]),
        ("RM", ["RRM", "MRM", "MMM"]),
        # Distances 0.01 (A of 1), 0.02 (M of 2), 0.03 (A of 2), 0.2 (M of 0), 0.3 (M of 1); 0.5 would leave no layer.
        ("RSAM", ["RAR", "RAM", "RAS", "MAS", "MSS"]),
    ],
)
def test_llm_drop_leaves_out_the_parts_that_turn_the_states_least(letters, expected):
    assert genomes("llm-drop", Planted(PARTS, layers=3), letters) == expected


def test_llm_drop_goes_on_where_a_layer_may_not_go_as_a_whole():
    problem = problem_of(Planted(PARTS, layers=3), "RSAM", seeded=False)
    space = replace(problem.space, letters=("RSAM", "RSM", "RAM"))
    found = STRATEGIES["llm-drop"](replace(problem, space=space)).plans
    assert [each.plan.text for each in found] == ["RRM", "MRM", "MMM", "SMM"]


def test_evopress_keeps_the_budget_and_gets_better():
    planted = small()
    outcome = search(planted, strategy="evopress", constraint=LOOSE, trials=220)
    assert len(planted.asked) == len(set(planted.asked))
    complete = {trial.plan for trial in outcome.trials if trial.complete}
    assert taking(ORDER[:3]) in complete and taking(ORDER[:1]) in complete
    assert len(complete) < len(outcome.trials) / 2  # the others ended on the first rung


@pytest.mark.parametrize("weights", [(1,) * 8, (1, 1, 2, 1, 1, 3, 1, 1)])
def test_knapspec_fills_every_budget_with_the_layers_of_the_greatest_cosine(weights):
    problem = replace(
        problem_of(small(), seeded=False),
        ratio=lambda plan: 1 - sum(w for w, action in zip(weights, plan, strict=True) if action.letter == "S") / 20,
    )

    def cosine(skipped):
        gaps = "".join("S" if layer in skipped else " " for layer in range(8))
        runs = [(at - len(run), at) for run, at in ends_of_runs(gaps)]
        return math.prod(math.cos(math.pi * sum(SMALL[start:end])) for start, end in runs)

    best = {}
    for size in range(1, 7):
        for layers in combinations(range(1, 7), size):
            units = sum(weights[layer] for layer in layers)
            if units <= sum(weights) // 2 and cosine(layers) >= 0.5:
                best[units] = max(best.get(units, 0.0), cosine(layers))
    found = [
        [layer for layer, action in enumerate(each.plan) if action.letter == "S"]
        for each in STRATEGIES["knapspec"](problem).plans
    ]
    assert {sum(weights[layer] for layer in layers): pytest.approx(cosine(layers)) for layers in found} == best
    assert [sum(weights[layer] for layer in layers) for layers in found] == sorted(best)


def ends_of_runs(text):
    """Each run of skipped layers, and where it ends."""
    at = 0
    for part in text.split(" "):
        at += len(part)
        if part:
            yield part, at
        at += 1


def test_swift_keeps_its_sizes_the_ends_and_the_sets_that_were_better():
    planted = Planted({(layer, "S"): 0.01 * (layer + 1) for layer in range(14)}, layers=14)
    outcome = search(planted, strategy="swift", constraint=LOOSE, trials=150)
    plans = [trial.plan for trial in outcome.trials if trial.plan != "R" * 14]
    assert all(plan[0] == plan[-1] == "R" for plan in plans)
    assert {plan.count("S") for plan in plans} == {1, 2, 4, 5, 6}  # shares of twelve layers
    assert len(planted.asked) == len(set(planted.asked))
    for size in (2, 4):
        values = {trial.plan: trial.kl for trial in outcome.trials if trial.plan.count("S") == size}
        complete = {trial.plan for trial in outcome.trials if trial.complete}
        first = [plan for plan, samples in planted.asked if samples == 50 and plan.count("S") == size]
        best_so_far = [
            plan
            for at, plan in enumerate(first)
            if at == 0 or planted.harm(plan) < min(planted.harm(other) for other in first[:at])
        ]
        assert len(complete & values.keys()) < len(values)
        assert complete >= set(best_so_far[-1:])


def test_swifts_process_goes_through_what_it_saw_and_knows_nothing_far_away():
    seen = np.eye(6)[:4]
    values = np.array([1.0, 2.0, 3.0, 6.0])
    at_seen = upper_bound(seen, values, seen)
    assert at_seen == pytest.approx((values - 3.0) / values.std(), abs=0.02)
    assert upper_bound(seen, values, 1000 * np.ones((1, 6)))[0] == pytest.approx(KAPPA)


def test_exhaustive_tries_every_plan_few_touched_layers_first():
    found = genomes("exhaustive", letters="RS", max_touched=2)
    assert found == [taking(layers) for size in (1, 2) for layers in sorted(combinations(range(8), size), key=taking)]
    with pytest.raises(UsageFault, match=r"exhaustive would try 4\.29e\+09 plans"):
        genomes("exhaustive", Planted(dict.fromkeys(((i, a) for i in range(16) for a in "FBS"), 0.1), layers=16))


@pytest.mark.parametrize(
    ("strategy", "letters", "missing"),
    [
        ("shortgpt", "RF", "skip"),
        ("sleb", "RF", "skip"),
        ("evopress", "RB", "skip"),
        ("swift", "RF", "skip"),
        ("knapspec", "RB", "skip"),
        ("shortv", "RS", "freeze"),
        ("vtw", "RS", "bypass"),
        ("replaceme", "RS", "compensation: linear or both"),
        ("finercut", "RS", r"leaves out a part of a layer \(actions: \[skip_attention, skip_mlp, skip\]"),
        ("finercut", "RAM", "skip"),
        ("llm-drop", "RS", "leaves out a part of a layer"),
        ("gsop", "RFB", r"leaves out a part of a layer \(actions: \[freeze_attention, freeze_mlp, freeze\]"),
        ("gsop", "RQP", "freeze"),
    ],
)
def test_what_a_method_needs_is_said(strategy, letters, missing):
    with pytest.raises(UsageFault, match=f"search.strategy: {strategy} .*{missing}"):
        genomes(strategy, letters=letters)


@pytest.mark.parametrize("strategy", ["shortgpt", "angular", "shortv", "knapspec", "llm-drop"])
def test_what_was_not_measured_is_said(strategy):
    with pytest.raises(MeasurementError, match="not measured"):
        genomes(strategy, letters="RFBSAM", table=LayerTable(8, ()))


def test_every_published_strategy_ends_and_says_why():
    for strategy in METHODS:
        planted = small()
        outcome = (
            search(
                planted, "RFBSAMQP", strategy=strategy, trials=40, compensations=("none", "linear x"), constraint=LOOSE
            )
            if strategy != "exhaustive"
            else search(planted, strategy=strategy, trials=40)
        )
        assert outcome.stopped_because and len(planted.asked) == len(set(planted.asked))
