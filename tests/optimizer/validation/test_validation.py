"""The validation report must be able to fail, and must be right where the truth is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import in_process
import pytest

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.validation import tables
from optimizer.validation.report import CONTROL, plan_of, safest, scrambled, validate
from storage.database import Database
from workers.redundancy.table import LayerTable


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """One database, so that what was measured of the layers is measured once."""
    with Database.open(f"sqlite:///{tmp_path_factory.mktemp('validation') / 'skipplan.db'}") as database:
        yield database


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
    # Six samples of one image do not show what the third layer does to others, which the state does.
    context = in_process.context(store, worker, in_process.spec(criterion="skip-it"))
    report = validate(context, samples=8, others=[criteria.load("layer-contribution"), Scrambled()])
    assert (report.held_out_samples, report.calibration_samples, report.set_size) == (8, 6, 3)
    assert report.dense_accuracy == 1.0 and report.failed == {}
    skip = next(action for action in report.actions if action.action == "skip")
    found = skip.by_kl or skip.by_accuracy
    # Twelve layers in another order may by chance stand in the opposite one.
    assert found["scrambled"].verdict in ("does not predict harm", "predicts the opposite")
    assert found[CONTROL].verdict in ("does not predict harm", "predicts the opposite")
    assert {each.kind for each in report.sets} >= {"safe", "unsafe", "random", "layer-contribution", "scrambled"}
    harms = {each.kind: each.harm for each in report.sets if each.action == "S"}
    assert harms["safe"].difference > -0.2 > harms["unsafe"].difference  # the first layers cannot go
    document = report.to_json()
    assert document["actions"][0]["action"] == "freeze" and document["criterion"] == "skip-it"
    drawn = list(tables.validation_tables(report))
    assert len(drawn) == 5 and all(table.row_count for table in drawn)
    claims = {each["claim"]: each for each in document["claims"]}
    early = claims["early vision tokens are redundant (bypass)"]
    assert early["answer"] != "yes" and early["evidence"].startswith("BBBRRRRRRRRR: -")  # the model reads them at once
    assert len(claims) == 6 and sum(len(cell.layers) for cell in report.conditions) == 12


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
    assert set(report.actions[0].risks) == {"calibrated", CONTROL}
