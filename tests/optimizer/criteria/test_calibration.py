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
from workers.redundancy.table import LayerMeasurement, LayerTable

MEASURED = sorted((Path(__file__).parent / "tables").glob("*.json"))
"""Written from documents of tests/benchmarks/criterion_measured.py: the columns read here, in four digits, and harm."""


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
    rows = [row if row.name == "final_divergence" else replace(row, layer=moved[row.layer]) for row in table.rows]
    return LayerTable(table.num_layers, tuple(rows))


def planted(layers: int, seed: int, *, foreseen: bool) -> LayerTable:
    """Harm of removals is log-normal over layers.

    Every other measurement is in its order where it is ``foreseen``, and in an order of its own otherwise.
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
    return LayerTable(layers, tuple(rows))


def rho(risk: tuple[float, ...], harm: np.ndarray) -> float:
    return float(spearmanr(risk, harm).statistic)


# The calibrated criterion -----------------------------------------------------------------------------------------


def tried(**columns: tuple[float, ...]) -> LayerTable:
    """Trials by action, with standard errors of a fifth."""
    rows = [
        LayerMeasurement(f"trial_divergence@{action}", "answer", layer, value, value / 5, 8)
        for action, values in columns.items()
        for layer, value in enumerate(values)
    ]
    return LayerTable(4, tuple(rows))


def test_calibrated_risk_by_hand() -> None:
    table = tried(skip=(1.0, 0.01, 4.0, 0.5), freeze=(0.1, 0.2, 0.3, 0.0))
    found = criteria.load("calibrated", {"safe": 0.5}).risk(table)
    assert found.risk["S"] == pytest.approx((2.0, 0.02, 8.0, 1.0)) and found.risk["F"][3] == 0.0
    assert found.risk["B"] == (math.inf,) * 4  # no layer takes it
    assert found.spread["S"] == pytest.approx((0.2,) * 4) and found.spread["F"][3] == 0.0 == found.spread["B"][0]


def test_trials_rank_the_harm_of_other_samples_better_than_distances() -> None:
    (file,) = (file for file in MEASURED if file.stem == "llava-12-easy-vqa")
    table, harm = read(file)

    def mean_rho(name: str) -> float:
        risk = criteria.load(name).risk(table)
        return float(
            np.mean([rho([risk.of(layer, a) for layer in harm[a]], np.array([*harm[a].values()])) for a in "FBS"])
        )

    others = {name: mean_rho(name) for name in ("cosine", "block-influence", "angular", "early-exit")}
    assert mean_rho("calibrated") > max(others.values())


# The check --------------------------------------------------------------------------------------------------------


REMOVED = ("propagation",)


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
    table = planted(12, 0, foreseen=True)
    harm = table.values("final_divergence", "answer")
    against = Risk("mine", {"S": tuple(1 / value for value in harm)})
    found = check(against, table, REMOVED)
    assert found.weight == 0.0
    assert found.verdict.startswith("criterion mine does not predict harm on this model: rank correlation over 12 ")
    assert "its order counts 0.00" in found.verdict
    rows = [LayerMeasurement("final_divergence", "answer", layer, layer + 1.0, None, 1) for layer in range(6)]
    thin = check(Risk("mine", {"S": (2.0, 1.0, 4.0, 3.0, 6.0, 5.0)}), LayerTable(6, tuple(rows)), REMOVED)
    assert not thin.agrees and not thin.fails and thin.weight == 1.0
    assert thin.verdict.startswith("criterion mine is not shown to predict harm on this model (6 layers)")
    right = check(Risk("mine", {"S": harm}), table, REMOVED)
    assert right.agrees and "agrees with removals on calibration samples" in right.verdict
    nothing = check(against, LayerTable(12, ()), REMOVED)
    assert nothing.agreement.rho is None and nothing.weight == 1.0 and nothing.verdict == ""


def test_only_what_the_criterion_needs_is_looked_at() -> None:
    table = planted(12, 0, foreseen=True)
    kinds = {name: criteria.load(name) for name in ("cosine", "skip-it")}
    # Another job's removals are in the table; a job with cosine alone would not find them.
    assert check(kinds["cosine"].risk(table), table, kinds["cosine"].needs).agreement.pairs == 0
    assert check(kinds["skip-it"].risk(table), table, kinds["skip-it"].needs).agrees
    # One that reads the harm of every action itself would agree with its own numbers.
    for name in ("calibrated", "skip-it-causal"):
        risk = kinds["skip-it"].risk(table)
        assert check(risk, table, (*criteria.load(name).needs, "propagation")).verdict == ""


def test_a_risk_is_weighed_by_hand() -> None:
    risk = Risk("c", {"S": (1.0, 3.0, math.inf)}, spread={"S": (math.log(2), 0.0, 0.0)})
    assert risk.weighed(1.0).risk["S"] == pytest.approx((2.0, 3.0, math.inf))
    assert risk.weighed(0.5).risk["S"] == pytest.approx((2.25, 2.75, math.inf))
    assert risk.weighed(0.0).risk["S"] == pytest.approx((2.5, 2.5, math.inf))
