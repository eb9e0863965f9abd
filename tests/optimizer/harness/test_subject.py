"""What lmms-eval is given to evaluate: a plan on its model, or an export, answers as the live model under the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llava
import torch
from export_builders import document, drafting_document

from optimizer.errors import UsageFault
from optimizer.exports.importing import import_plan
from optimizer.exports.writing import export_plan
from optimizer.harness.subject import Evaluated, of_database, of_export
from storage.database import Database
from workers.evaluation.plain import PlainEvaluator
from workers.messages import ModelSource
from workers.models.loading import load_model
from workers.runtime import SkipPlan
from workers.tasks import Task, load_task
from workers.tasks.spec import load_spec

SKIPS, MIXED = "RSRRSR", "RSFRBR"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of six layers with random weights."""
    torch.set_num_threads(1)
    return tiny_llava.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(load_spec("easy-vqa").with_splits(calibration=1, search=1, held_out=6, unit="samples"))


def answers(found: Evaluated, task: Task) -> dict[str, tuple[int, ...]]:
    return PlainEvaluator(found.loaded, task).answer(found.plan, task.held_out, found.maps).tokens


def expected(model: Path, plan: str, task: Task) -> dict[str, tuple[int, ...]]:
    loaded = load_model(ModelSource(str(model)), device="cpu")
    own = PlainEvaluator(loaded, task).answer(SkipPlan.parse(plan), task.held_out).tokens
    assert own != PlainEvaluator(loaded, task).answer(SkipPlan.dense(len(plan)), task.held_out).tokens
    return own


@pytest.mark.parametrize(("plan", "name"), [(SKIPS, "checkpoint"), (MIXED, "runtime"), (MIXED, "plan")])
def test_an_export_answers_as_the_live_model_under_the_plan(
    plan: str, name: str, model: Path, task: Task, tmp_path: Path
) -> None:
    export_plan(document(plan, model), ModelSource(str(model)), name, tmp_path / "export")
    found = of_export(tmp_path / "export", str(model), "cpu")
    assert answers(found, task) == expected(model, plan, task)


def test_a_published_plan_is_put_on_its_model(model: Path, task: Task, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'plans.db'}"
    with Database.open(url) as db:
        plan = import_plan(db, document(MIXED, model), tmp_path / "skipplan.json")
        drafting = import_plan(db, drafting_document(SKIPS, model), tmp_path / "skipplan.json")
        other = import_plan(db, document("RRSRRR"), tmp_path / "skipplan.json")
    found = of_database(plan.id, url, str(model), "cpu")
    assert (found.plan, found.maps) == (SkipPlan.parse(MIXED), None)
    assert answers(found, task) == expected(model, MIXED, task)
    with pytest.raises(UsageFault, match="is lossless: it drafts for the dense model"):
        of_database(drafting.id, url, str(model), "cpu")
    with pytest.raises(UsageFault, match="is not the one that the plan was measured on"):
        of_database(other.id, url, str(model), "cpu")


def test_exports_that_transformers_does_not_load_or_that_are_damaged_are_refused(model: Path, tmp_path: Path) -> None:
    export_plan(document(SKIPS, model), ModelSource(str(model)), "drafter", tmp_path / "drafter")
    with pytest.raises(UsageFault, match="format drafter is not loaded by transformers; export as checkpoint or run"):
        of_export(tmp_path / "drafter", None, "cpu")
    with (tmp_path / "drafter" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UsageFault, match=r"config.json is not as it was written: the export is damaged"):
        of_export(tmp_path / "drafter", None, "cpu")
