"""The paper's claims answered on harm whose truth is known: each rule can say yes, no, and not decided."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.validation.claims import (
    band,
    band_claims,
    condition_cells,
    mean_interval,
    overlap_claim,
    welch_interval,
)
from optimizer.validation.harm import PlanHarm
from workers.redundancy.table import LayerMeasurement, LayerTable

LAYERS = 24
IMAGES = [f"image {number}" for number in range(40)]


def planted(rule: dict[tuple[bool, bool], float], layers: int = LAYERS) -> tuple[LayerTable, dict[int, np.ndarray]]:
    """Layers that meet the conditions in turn, each with its own harm of bypass, which varies by a third."""
    rows, divergences = [], {}
    generator = np.random.default_rng(0)
    for layer in range(layers):
        redundant, little = layer % 2 == 0, layer % 4 < 2
        for group in ("vision", "text"):
            rows.append(LayerMeasurement("cosine_distance", group, layer, 0.1 if redundant else 0.9, None, 1))
        rows.append(LayerMeasurement("vision_attention", "text", layer, 0.1 if little else 0.9, None, 1))
        divergences[layer] = rule[redundant, little] * generator.lognormal(0, 0.3, len(IMAGES))
    return LayerTable(layers, tuple(rows)), divergences


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ({(True, True): 0.01, (True, False): 0.1, (False, True): 0.2, (False, False): 0.5}, "yes"),
        ({(True, True): 0.1, (True, False): 0.01, (False, True): 0.2, (False, False): 0.5}, "no"),
        ({(True, True): 0.1, (True, False): 0.1, (False, True): 0.2, (False, False): 0.5}, "not decided"),
    ],
)
def test_both_conditions(rule: dict[tuple[bool, bool], float], answer: str) -> None:
    cells, claim = condition_cells(*planted(rule), 0.95)
    assert claim.answer == answer
    for cell in cells:
        assert len(cell.layers) == LAYERS // 4
        harm = rule[cell.redundant, cell.little_attention] * np.exp(0.3**2 / 2)  # the mean of a log-normal
        assert cell.kl == pytest.approx(harm, rel=0.1) and cell.low < cell.kl < cell.high


def test_conditions_that_no_layer_misses_alone_decide_nothing() -> None:
    table, divergences = planted(dict.fromkeys([(True, True), (True, False), (False, True), (False, False)], 0.1))
    only = {layer: values for layer, values in divergences.items() if layer % 4 in (0, 3)}
    cells, claim = condition_cells(table, only, 0.95)
    assert claim.answer == "not decided" and [len(cell.layers) for cell in cells] == [6, 0, 0, 6]
    assert condition_cells(table, {}, 0.95)[1].answer == "not decided"


@pytest.mark.parametrize("layers", [8, 20, 30])
def test_harm_that_knows_no_conditions_is_seldom_decided(layers: int) -> None:
    generator = np.random.default_rng(layers)
    answers = []
    for _ in range(200):
        rows = []
        for layer, (distance, attention) in enumerate(generator.uniform(size=(layers, 2)).tolist()):
            rows += [
                LayerMeasurement("cosine_distance", group, layer, distance, None, 1) for group in ("vision", "text")
            ]
            rows.append(LayerMeasurement("vision_attention", "text", layer, attention, None, 1))
        harm = np.exp(generator.normal(-4, 2, layers))
        shown = {layer: harm[layer] * generator.lognormal(0, 0.3, 20) for layer in range(layers)}
        answers.append(condition_cells(LayerTable(layers, tuple(rows)), shown, 0.95)[1].answer)
    assert sum(answer != "not decided" for answer in answers) <= 10  # 5 %
    assert layers > 8 or set(answers) == {"not decided"}


def test_intervals_are_those_of_textbooks() -> None:
    # Student's t with 4 degrees of freedom, 2.776; mean 3, standard error sqrt(2.5 / 5).
    interval = mean_interval(np.arange(1.0, 6.0), 0.95)
    assert interval is not None and interval.high == pytest.approx(3 + 2.776 * 0.5**0.5, abs=1e-3)
    assert mean_interval(np.arange(4.0), 0.95) is None
    # Equal sizes and spreads: Welch's degrees of freedom are 8, t 2.306, standard error 1.
    found = welch_interval(np.arange(1.0, 6.0), np.arange(1.0, 6.0) + 1, 0.95)
    assert (found.low, found.high) == pytest.approx((-1 - 2.306, -1 + 2.306), abs=1e-3)


def test_bands_of_layers() -> None:
    assert band("early", range(12)) == (0, 1, 2) and band("late", (1, 4, 5)) == (5,)
    losses = {"early": (-0.5, -0.6, -0.4), "late": (0.0, -0.01, 0.01), "open": (-0.02, -0.05, 0.01)}
    harms = {(name, "F"): PlanHarm("plan", 0.5, *points, None) for name, points in losses.items()}
    claims = band_claims({**harms, ("early", "B"): None}, None)
    assert [each.answer for each in claims] == ["no", "yes", "not decided", "not decided"]
    assert "early" in claims[0].claim and "-50.0 [-60.0, -40.0] points" in claims[0].evidence
    assert [each.answer for each in band_claims(harms, 0.7)] == ["yes", "yes", "yes"]


def test_overlap_against_chance() -> None:
    allowed = {"S": range(12)}
    same = overlap_claim([("S", (0, 1, 2), (0, 1, 2))], allowed, 0.95, 0)
    assert same.answer == "yes"  # by chance 1 of 220 draws
    assert overlap_claim([("S", (0, 1, 2), (2, 3, 4))], allowed, 0.95, 0).answer == "not decided"
    # Methods that agree with each other are one piece of evidence, not three: 1 of 4 layers is what chance gives.
    assert overlap_claim([("S", (0, 1), (1, 2))] * 9, {"S": range(8)}, 0.95, 0).answer == "not decided"
    assert overlap_claim([("S", range(6), range(6, 12))], allowed, 0.95, 0).answer == "no"  # 1 of 924 draws
    assert overlap_claim([], allowed, 0.95, 0).answer == "not decided"
