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


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_it_ranks_measured_harm_as_well_as_its_prior_does(file: Path) -> None:
    table, harm = read(file)
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


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.stem)
def test_a_scrambled_measured_table_is_noticed(file: Path) -> None:
    table, _ = read(file)
    criterion = criteria.load("skip-it")
    assert check(criterion.risk(table), table).warning == ""
    noticed = 0
    for seed in range(100):
        other = scrambled(table, seed)
        noticed += bool(check(criterion.risk(other), other).warning)
    assert noticed >= 95


@pytest.mark.parametrize("layers", [8, 12, 24, 48])
def test_a_scrambled_planted_table_is_noticed(layers: int) -> None:
    criterion = criteria.load("skip-it")
    found = []
    for seed in range(100):
        table, _ = planted(layers, seed, foreseen=False)
        found.append(check(criterion.risk(table), table))
    assert sum(bool(each.warning) for each in found) >= 95
    assert np.mean([each.weight for each in found]) < 0.25
    right, _ = planted(layers, 0, foreseen=True)
    assert check(criterion.risk(right), right).weight == 1.0


def test_what_the_check_says() -> None:
    table, harm = planted(12, 0, foreseen=True)
    against = Risk("mine", {"S": tuple((1 / harm["S"]).tolist())})
    found = check(against, table)
    assert found.weight == 0.0
    assert found.warning.startswith("criterion mine does not predict harm on this model: rank correlation with 12 ")
    nothing = check(against, LayerTable(12, ()))
    assert nothing.agreement.rho is None and nothing.weight == 1.0 and nothing.warning == ""


def test_a_risk_is_weighed_by_hand() -> None:
    risk = Risk("c", {"S": (1.0, 3.0, math.inf)}, spread={"S": (math.log(2), 0.0, 0.0)})
    assert risk.weighed(1.0).risk["S"] == pytest.approx((2.0, 3.0, math.inf))
    assert risk.weighed(0.5).risk["S"] == pytest.approx((2.25, 2.75, math.inf))
    assert risk.weighed(0.0).risk["S"] == pytest.approx((2.5, 2.5, math.inf))
