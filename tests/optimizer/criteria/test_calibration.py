"""The calibrated criterion and the check of criteria, on planted harm and on measured tables of reference models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.criteria.evidence import check
from workers.redundancy.kinds import trial_layers
from workers.redundancy.table import LayerMeasurement, LayerTable

MEASURED = sorted((Path(__file__).parent / "tables").glob("*.json"))
"""Written from documents of tests/benchmarks/criterion_measured.py: the columns read here, in four digits, and harm."""
REMOVALS = ("final_divergence", "trial_divergence@freeze", "trial_divergence@bypass")


def read(file: Path) -> tuple[LayerTable, dict[str, dict[int, float]]]:
    found = json.loads(file.read_text())
    rows = [
        LayerMeasurement(*column.split(), int(layer), value, error, 64)
        for column, values in found["columns"].items()
        for layer, (value, error) in values.items()
    ]
    harm = {letter: {int(layer): value for layer, value in own.items()} for letter, own in found["harm"].items()}
    return LayerTable(found["layers"], tuple(rows)), harm


def scrambled(table: LayerTable, seed: int) -> LayerTable:
    """What criteria read moves to other layers; what removals were measured to do stays."""
    moved = np.random.default_rng(seed).permutation(table.num_layers).tolist()
    rows = [row if row.name in REMOVALS else replace(row, layer=moved[row.layer]) for row in table.rows]
    return LayerTable(table.num_layers, tuple(rows))


def planted(layers: int, seed: int, *, foreseen: bool) -> tuple[LayerTable, dict[str, np.ndarray]]:
    """Harm of skips is log-normal over layers, that of bypass a tenth and of freeze a hundredth of it.

    Every measurement is in the order of harm where it is ``foreseen``, and in an order of its own otherwise.
    """
    generator = np.random.default_rng([seed, layers])
    skip = np.exp(generator.normal(-6, 2.5, layers))
    rows = []

    def add(name: str, group: str, values: np.ndarray) -> None:
        for layer, value in enumerate(values.tolist()):
            rows.append(LayerMeasurement(name, group, layer, value, 0.1 * value, 64))

    ranked = (skip.argsort().argsort() + 1) / layers if foreseen else generator.permutation(layers) / layers + 0.01
    for name, groups in (
        ("cosine_distance", ("vision", "text", "all")),
        ("angular_distance@1", ("last",)),
        ("final_change", ("text", "last")),
        ("propagation_gain", ("vision",)),
    ):
        for group in groups:
            add(name, group, ranked)
    add("vision_attention", "text", np.full(layers, 0.5))
    add("final_divergence", "answer", skip)
    for action, share in (("freeze", 0.01), ("bypass", 0.1)):
        for layer in trial_layers(layers):
            value = share * skip[layer]
            rows.append(LayerMeasurement(f"trial_divergence@{action}", "answer", layer, value, 0.1 * value, 64))
    return LayerTable(layers, tuple(rows)), {"S": skip, "B": 0.1 * skip, "F": 0.01 * skip}


def rho(risk: tuple[float, ...], harm: np.ndarray) -> float:
    return float(spearmanr(risk, harm).statistic)


# The calibrated criterion -----------------------------------------------------------------------------------------


def test_trials_are_an_eighth_of_the_layers_spread_over_the_stack() -> None:
    assert trial_layers(6) == (3,) and trial_layers(12) == (3, 9) and trial_layers(32) == (4, 12, 20, 28)


@pytest.mark.parametrize("layers", [12, 30])
def test_removals_correct_what_nothing_foresaw(layers: int) -> None:
    table, harm = planted(layers, 1, foreseen=False)
    before, after = (criteria.load(name).risk(table) for name in ("skip-it", "calibrated"))
    for letter in "SB":
        assert rho(before.risk[letter], harm[letter]) < 0.5
        assert rho(after.risk[letter], harm[letter]) > 0.9
    # Risks are predicted divergences over the threshold: bypass does a tenth of what skip does.
    tried = trial_layers(layers)[0]
    assert after.risk["B"][tried] == pytest.approx(harm["B"][tried] / 0.01, rel=0.7)


HELD_OUT = [file for file in MEASURED if file.stem == "llava-12-easy-vqa"]
"""Tables whose harm is of other samples; that of the others is, for skips, what the criterion itself reads."""


@pytest.mark.parametrize("file", HELD_OUT, ids=lambda file: file.stem)
def test_it_ranks_measured_harm_as_well_as_its_prior_does(file: Path) -> None:
    table, harm = read(file)
    removed = table.values("final_divergence", "answer")
    assert [harm["S"][layer] for layer in range(table.num_layers)] != pytest.approx(list(removed), rel=0.01)
    before, after = (criteria.load(name).risk(table) for name in ("skip-it", "calibrated"))
    found = [
        [
            rho([risk.of(layer, letter) for layer in harm[letter]], np.array([*harm[letter].values()]))
            for letter in "FBS"
        ]
        for risk in (before, after)
    ]
    assert np.mean(found[1]) > np.mean(found[0]) and min(np.subtract(found[1], found[0])) > -0.05


def test_unseen_risks_do_not_hang_on_the_layers_own_removal() -> None:
    table, _ = planted(12, 2, foreseen=True)
    row = table.row("final_divergence", "answer", 5)
    changed = table.joined([replace(row, value=20 * row.value, standard_error=2 * row.value)])
    one, other = (criteria.load("calibrated").risk(each) for each in (table, changed))
    assert other.risk["S"][5] > 5 * one.risk["S"][5]
    assert [other.unseen[letter][5] for letter in "FBS"] == pytest.approx([one.unseen[letter][5] for letter in "FBS"])
    assert other.unseen["S"][4] > one.unseen["S"][4]  # neighbours are alike


def test_more_is_known_where_an_action_was_tried() -> None:
    risk = criteria.load("calibrated").risk(planted(30, 3, foreseen=True)[0])
    for letter in "FB":
        tried = [risk.spread[letter][layer] for layer in trial_layers(30)]
        assert max(tried) < min(spread for spread in risk.spread[letter] if spread not in tried)
    assert risk.risk["F"][-1] == 0.0  # nobody reads the last layer's vision states
    assert risk == criteria.load("calibrated").risk(planted(30, 3, foreseen=True)[0])


# The check --------------------------------------------------------------------------------------------------------


REMOVED = ("propagation", "trials")


def alike(correlation: float, layers: int, seed: int) -> tuple[Risk, LayerTable]:
    """A risk and removals whose logarithms are bivariate normal, so that Spearman's rho of both is known."""
    pearson = 2 * math.sin(math.pi * correlation / 6)
    first, second = np.random.default_rng([seed, layers]).normal(size=(2, layers))
    harm = np.exp(pearson * first + math.sqrt(1 - pearson**2) * second).tolist()
    rows = [LayerMeasurement("final_divergence", "answer", layer, value, None, 1) for layer, value in enumerate(harm)]
    return Risk("mine", {"S": tuple(np.exp(first).tolist())}), LayerTable(layers, tuple(rows))


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_a_scrambled_measured_table_is_not_taken_for_agreement(file: Path) -> None:
    table, _ = read(file)
    criterion = criteria.load("skip-it")
    assert check(criterion.risk(table), table, criterion.needs).agrees
    others = [scrambled(table, seed) for seed in range(100)]
    assert sum(check(criterion.risk(other), other, criterion.needs).agrees for other in others) <= 5


@pytest.mark.parametrize(("layers", "failing"), [(8, 5), (12, 25), (24, 60), (48, 90)])
def test_a_criterion_that_predicts_nothing_fails_where_layers_suffice(layers: int, failing: int) -> None:
    found = [check(*alike(0.0, layers, seed), REMOVED) for seed in range(200)]
    assert sum(each.agrees for each in found) <= 10
    assert sum(each.fails for each in found) >= 2 * failing
    assert all(each.weight == 1.0 for each in found if not each.fails)


@pytest.mark.parametrize("layers", [6, 12, 30])
@pytest.mark.parametrize("correlation", [0.5, 0.7])
def test_a_useful_criterion_seldom_fails(correlation: float, layers: int) -> None:
    found = [check(*alike(correlation, layers, seed), REMOVED) for seed in range(400)]
    assert sum(each.fails for each in found) <= 20


def test_what_the_check_says() -> None:
    table, harm = planted(12, 0, foreseen=True)
    against = Risk("mine", {"S": tuple((1 / harm["S"]).tolist())})
    found = check(against, table, REMOVED)
    assert found.weight == 0.0
    assert found.verdict.startswith("criterion mine does not predict harm on this model: rank correlation over 12 ")
    assert "its order counts 0.00" in found.verdict
    rows = [LayerMeasurement("final_divergence", "answer", layer, layer + 1.0, None, 1) for layer in range(6)]
    thin = check(Risk("mine", {"S": (2.0, 1.0, 4.0, 3.0, 6.0, 5.0)}), LayerTable(6, tuple(rows)), REMOVED)
    assert not thin.agrees and not thin.fails and thin.weight == 1.0
    assert thin.verdict.startswith("criterion mine is not shown to predict harm on this model (6 layers)")
    right = check(Risk("mine", {"S": tuple(harm["S"].tolist())}), table, REMOVED)
    assert right.agrees and "agrees with removals on calibration samples" in right.verdict
    nothing = check(against, LayerTable(12, ()), REMOVED)
    assert nothing.agreement.rho is None and nothing.weight == 1.0 and nothing.verdict == ""


def test_only_what_the_criterion_needs_is_looked_at() -> None:
    table, _ = planted(12, 0, foreseen=True)
    kinds = {name: criteria.load(name) for name in ("cosine", "skip-it", "calibrated")}
    # Another job's removals are in the table; a job with cosine alone would not find them.
    assert check(kinds["cosine"].risk(table), table, kinds["cosine"].needs).agreement.pairs == 0
    own = replace(table, rows=tuple(row for row in table.rows if not row.name.startswith("trial")))
    risk, needs = kinds["skip-it"].risk(own), kinds["skip-it"].needs
    assert check(risk, table, needs) == check(risk, own, needs) and check(risk, own, needs).agrees
    large, _ = planted(48, 0, foreseen=True)
    assert check(kinds["calibrated"].risk(large), large, ("trials",)).agreement.pairs == len(trial_layers(48))
    # One that reads the harm of every action itself would agree with its own numbers.
    assert check(risk, table, criteria.load("skip-it-causal").needs).verdict == ""


def test_a_risk_is_weighed_by_hand() -> None:
    risk = Risk("c", {"S": (1.0, 3.0, math.inf)}, spread={"S": (math.log(2), 0.0, 0.0)})
    assert risk.weighed(1.0).risk["S"] == pytest.approx((2.0, 3.0, math.inf))
    assert risk.weighed(0.5).risk["S"] == pytest.approx((2.25, 2.75, math.inf))
    assert risk.weighed(0.0).risk["S"] == pytest.approx((2.5, 2.5, math.inf))
