"""The validation report must be able to fail, and must be right where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import in_process
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.validation import tables
from optimizer.validation.agreement import Agreement, spearman
from optimizer.validation.report import CONTROL, plan_of, safest, scrambled, validate
from storage.database import Database
from workers.redundancy.table import LayerTable

IMAGES = [f"image {number // 2}" for number in range(60)]


def harm(layers: int, seed: int = 0) -> np.ndarray:
    """Per layer and sample; layer l harms about l times as much as layer 1."""
    rng = np.random.default_rng(seed)
    return rng.exponential(1.0, size=(layers, 60)) * np.arange(layers)[:, None]


def agreement(risk, layers: int = 30, seed: int = 0) -> Agreement:
    return Agreement.of(risk, harm(layers), IMAGES, 0.95, seed)


def test_a_criterion_that_knows_the_harm_is_said_to_predict_it() -> None:
    found = agreement(range(30))
    assert found.rho is not None and found.rho > 0.95 and found.verdict == "predicts harm"
    assert found.low is not None and 0.7 < found.low < found.rho


def test_a_criterion_that_has_it_backwards_is_said_to() -> None:
    assert agreement(range(30, 0, -1)).verdict == "predicts the opposite"


def test_scrambled_criteria_are_said_not_to_predict() -> None:
    rng = np.random.default_rng(1)
    verdicts = [agreement(rng.permutation(30), seed=number).verdict for number in range(40)]
    # A 95 % interval may exclude zero by chance, a bootstrap over 30 layers a little more often.
    assert verdicts.count("does not predict harm") >= 34
    assert verdicts.count("predicts harm") <= 5


@pytest.mark.parametrize("risk", [[1.0] * 30, list(range(30))])
def test_nothing_is_said_where_nothing_can_be(risk: list[float]) -> None:
    flat = Agreement.of(risk, np.zeros((30, 60)), IMAGES, 0.95, 0)
    assert (flat.rho, flat.verdict) == (None, "cannot be said")
    assert Agreement.of(risk[:3], harm(3), IMAGES, 0.95, 0).rho is None


def test_one_harmful_layer_is_too_little_to_tell_from_chance() -> None:
    one = np.zeros((12, 60))
    one[3] = 1.0
    found = Agreement.of([0, 1, 2, 9, 3, 4, 5, 6, 7, 8, 1.5, 2.5], one, IMAGES, 0.95, 0)
    assert found.rho is not None and found.rho > 0.4
    assert found.low == 0.0 and found.verdict == "does not predict harm"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9)), min_size=3, max_size=20))
def test_rho_equals_scipy(pairs: list[tuple[int, float]]) -> None:
    first, second = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic, abs=1e-9)


def test_infinite_risks_rank_last() -> None:
    assert spearman(np.array([1.0, np.inf, 2.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(1.0)


def test_sets_and_plans_by_hand() -> None:
    risk = Risk("r", {"S": (0.3, 0.1, 0.2, 0.0)})
    assert safest(risk, "S", (0, 1, 2), 2) == (1, 2)
    assert plan_of(4, (1, 2), "S") == "RSSR"
    mixed = scrambled(risk, 0)
    assert sorted(mixed.risk["S"]) == sorted(risk.risk["S"]) and mixed.criterion == CONTROL


@dataclass(frozen=True)
class Scrambled:
    """Names a different layer's distance at every layer."""

    name = "scrambled"
    source = "a test"
    needs = ("distance",)
    published_for = "S"
    thresholds = {}  # noqa: RUF012

    def risk(self, table: LayerTable) -> Risk:
        values = table.values("cosine_distance", "text")
        moved = tuple(values[(5 * layer + 7) % len(values)] for layer in range(len(values)))
        return Risk(self.name, dict.fromkeys("FBS", moved))


def test_the_report_on_the_reference_model(store: Database, worker: in_process.OneWorker) -> None:
    context = in_process.context(store, worker, in_process.spec())
    report = validate(context, samples=8, others=[criteria.load("layer-contribution"), Scrambled()])
    assert (report.held_out_samples, report.calibration_samples, report.set_size) == (8, 6, 3)
    assert report.dense_accuracy == 1.0 and report.failed == {}
    skip = next(action for action in report.actions if action.action == "skip")
    found = skip.by_kl or skip.by_drop
    # Twelve layers in another order may by chance stand in the opposite one.
    assert found["scrambled"].verdict in ("does not predict harm", "predicts the opposite")
    assert found[CONTROL].verdict in ("does not predict harm", "predicts the opposite")
    assert {each.kind for each in report.sets} >= {"safe", "unsafe", "random", "layer-contribution", "scrambled"}
    harms = {each.kind: each.harm for each in report.sets if each.action == "S"}
    assert harms["safe"].drop < 0.2 < harms["unsafe"].drop  # the first layers cannot go
    document = report.to_json()
    assert document["actions"][0]["action"] == "freeze" and document["criterion"] == "skip-it"
    drawn = list(tables.validation_tables(report))
    assert len(drawn) == 3 and all(table.row_count for table in drawn)


def test_a_second_report_runs_no_plan_again(store: Database, worker: in_process.OneWorker) -> None:
    others = [criteria.load("cosine")]
    first = validate(in_process.context(store, worker, in_process.spec(actions=["skip"])), samples=4, others=others)
    worker.requests.clear()
    second = validate(in_process.context(store, worker, in_process.spec(actions=["skip"])), samples=4, others=others)
    assert worker.requests == [] and second == first


@dataclass(frozen=True)
class Demanding(Scrambled):
    """Reads what nobody measures."""

    name = "demanding"

    def risk(self, table: LayerTable) -> Risk:
        return Risk(self.name, {"S": table.values("wisdom", "all")})


def test_a_criterion_that_lacks_a_measurement_is_left_out_and_named(
    store: Database, worker: in_process.OneWorker
) -> None:
    context = in_process.context(store, worker, in_process.spec(actions=["skip"]))
    report = validate(context, samples=2, others=[Demanding()])
    assert report.left_out == {"demanding": "wisdom of all tokens was not measured, or the model has none to measure"}
    assert set(report.actions[0].risks) == {"skip-it", CONTROL}
