"""Exports of a plan whose gaps are compensated: the maps are in the weights, and their file goes along."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from export_builders import document

from optimizer.errors import UsageFault
from optimizer.exports.document import PlanDocument, read
from optimizer.exports.importing import import_plan
from optimizer.exports.maps import FILE_NAME
from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from storage.database import Database
from workers.compensation import store
from workers.compensation.compensator import Compensator
from workers.messages import Artifact, FitCompensation, ModelSource
from workers.models.loading import load_model
from workers.tasks import load_spec, load_task

LINEAR = "linear ridge=0.001 weighting=answers tokens=200"
PLAN, MIXED, PARTS, JOINED = "RSSRSR", "RSFRBR", "RAMSPR", "RMSARS"
RECIPES = {PLAN: LINEAR, MIXED: f"{LINEAR} drift=yes scope=projection", PARTS: LINEAR, JOINED: LINEAR}


@pytest.fixture(scope="module")
def compensator(model_directory: Path) -> Compensator:
    task = load_task(load_spec("easy-vqa").with_splits(calibration=4, search=4, held_out=4))
    return Compensator(load_model(ModelSource(str(model_directory), device="cpu")), task)


@pytest.fixture(scope="module")
def kept(compensator: Compensator, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    place = str(tmp_path_factory.mktemp("maps"))
    fits = {plan: compensator.fit(FitCompensation(plan, recipe)) for plan, recipe in RECIPES.items()}
    return {plan: store.put(place, own.content) for plan, own in fits.items()}


def compensated(plan: str, directory: Path, kept: dict[str, Artifact]) -> PlanDocument:
    return document(plan, directory, compensation=RECIPES[plan], artifact_checksum=kept[plan].checksum)


def check_folded(name: str, plan: str, kept: dict[str, Artifact], model_directory: Path, tmp_path: Path) -> None:
    source = ModelSource(str(model_directory))
    written = export_plan(compensated(plan, model_directory, kept), source, name, tmp_path / name, artifact=kept[plan])
    assert (written.directory / FILE_NAME).read_bytes() == store.get(kept[plan])
    found = verify_export(written.directory, source, samples=2)
    assert found.passed and len(found.answers) == 2, found
    assert FILE_NAME in written.document.export.files


@pytest.mark.parametrize("plan", [PLAN, JOINED])
def test_a_folded_checkpoint_answers_as_the_live_model(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path, loaded_here: None, plan: str
) -> None:
    check_folded("checkpoint", plan, kept, model_directory, tmp_path)


@pytest.mark.parametrize("plan", [MIXED, PARTS])
def test_a_folded_model_with_its_runtime_answers_as_the_live_one_in_a_fresh_process(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path, plan: str
) -> None:
    check_folded("runtime", plan, kept, model_directory, tmp_path)


def test_a_drafter_holds_the_maps_and_drafts_for_the_dense_model(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path, loaded_here: None
) -> None:
    check_folded("drafter", PLAN, kept, model_directory, tmp_path)
    source = ModelSource(str(model_directory))
    plan = compensated(PLAN, model_directory, kept)
    checkpoint = export_plan(plan, source, "checkpoint", tmp_path / "checkpoint", artifact=kept[PLAN]).directory
    weights = "model.safetensors"
    assert (tmp_path / "drafter" / weights).read_bytes() == (checkpoint / weights).read_bytes()


def test_weights_without_the_maps_do_not_pass(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path, loaded_here: None
) -> None:
    """Verification can fail: the plain skip's weights in place of the folded ones."""
    source = ModelSource(str(model_directory))
    folded = export_plan(
        compensated(PLAN, model_directory, kept), source, "checkpoint", tmp_path / "folded", artifact=kept[PLAN]
    )
    plain = export_plan(document(PLAN, model_directory), source, "checkpoint", tmp_path / "plain")
    (folded.directory / FILE_NAME).write_bytes(b"other")
    with pytest.raises(UsageFault, match="not as it was written"):
        verify_export(folded.directory, source, samples=1)
    shutil.copy(kept[PLAN].location, folded.directory / FILE_NAME)
    (plain.directory / "compensation").mkdir()
    shutil.copy(kept[PLAN].location, plain.directory / FILE_NAME)
    text = (plain.directory / "skipplan.json").read_text()
    told = text.replace('"compensation": "none"', f'"compensation": "{LINEAR}"')
    told = told.replace('"artifact_checksum": null', f'"artifact_checksum": "{kept[PLAN].checksum}"')
    size, digest = (folded.directory / FILE_NAME).stat().st_size, kept[PLAN].checksum
    told = told.replace('"files": {', f'"files": {{"{FILE_NAME}": {{"size": {size}, "sha256": "{digest}"}},')
    (plain.directory / "skipplan.json").write_text(told)
    assert not verify_export(plain.directory, source, samples=2).passed


def test_a_plan_whose_maps_are_gone_is_refused_by_formats_with_weights(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path
) -> None:
    plan, source = compensated(PLAN, model_directory, kept), ModelSource(str(model_directory))
    for name in ("checkpoint", "llama-cpp"):
        with pytest.raises(UsageFault, match="its maps are not at hand"):
            export_plan(plan, source, name, tmp_path / "none")
        assert not (tmp_path / "none").exists()
    assert export_plan(plan, source, "plan", tmp_path / "plan").directory.is_dir()


def test_an_imported_plan_takes_its_maps_along(
    kept: dict[str, Artifact], model_directory: Path, tmp_path: Path
) -> None:
    source = ModelSource(str(model_directory))
    plan = compensated(PLAN, model_directory, kept)
    directory = export_plan(plan, source, "plan", tmp_path / "plan", artifact=kept[PLAN]).directory
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database:
        stored = import_plan(database, read(directory), directory)
    assert stored.compensation == LINEAR and stored.artifact_checksum == kept[PLAN].checksum
    assert stored.artifact is not None and Path(stored.artifact) == (directory / FILE_NAME).resolve()
    again = Artifact(stored.artifact, stored.artifact_checksum)
    assert export_plan(plan, source, "checkpoint", tmp_path / "again", artifact=again).directory.is_dir()
