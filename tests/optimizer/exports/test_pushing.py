"""Uploads to the hub: what its repository holds is the export, file by file, and nothing says the token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_builders
import huggingface_hub
import pytest
import small_hub
import yaml
from huggingface_hub import ModelCard
from small_hub import SmallHub

from optimizer.cli.main import _run
from optimizer.errors import ClusterOrDatabaseFault, UsageFault
from optimizer.exports.pushing import push
from optimizer.exports.writing import export_plan
from workers.messages import ModelSource

TOKEN = "hf_a-token-that-nobody-may-see"
PLAN = "RSRRSR"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub.serving(TOKEN) as opened:
        monkeypatch.setenv("HF_ENDPOINT", opened.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The hub's newer way to send large files needs a service of its own; the older one is asked for.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield opened


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    directory = tmp_path_factory.mktemp("export") / "checkpoint"
    plan = export_builders.document(PLAN, model_directory)
    export_plan(plan, ModelSource(str(model_directory)), "checkpoint", directory)
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_repository_is_the_export_file_by_file(hub: SmallHub, exported: Path) -> None:
    done = push(exported, "team/fast", private=True)
    held = dict(hub.repositories["team/fast"])
    assert held.pop(".gitattributes")
    assert held == files_of(exported)
    assert hub.private["team/fast"] is True
    assert done.commit == hub.commits[0] and len(hub.commits) == 1
    assert done.files == {path: len(content) for path, content in files_of(exported).items()}


def test_another_export_takes_the_place_of_the_first(hub: SmallHub, exported: Path, tmp_path: Path) -> None:
    push(exported, "team/fast")
    export_plan(export_builders.document(PLAN), ModelSource("none"), "plan", tmp_path / "plan")
    push(tmp_path / "plan", "team/fast")
    held = dict(hub.repositories["team/fast"])
    del held[".gitattributes"]
    assert held == files_of(tmp_path / "plan")


def test_files_that_no_export_lists_stay(hub: SmallHub, exported: Path, tmp_path: Path) -> None:
    push(exported, "team/fast")
    hub.repositories["team/fast"]["notes.txt"] = b"somebody's work"
    before = dict(hub.repositories["team/fast"])
    export_plan(export_builders.document(PLAN), ModelSource("none"), "plan", tmp_path / "plan")
    with pytest.raises(UsageFault, match=r"no export of skipplan \(notes.txt, ...\); nothing was sent"):
        push(tmp_path / "plan", "team/fast")
    hub.repositories["team/fast"]["skipplan.json"] = b"{}"
    with pytest.raises(UsageFault, match=r"team/fast: skipplan.json is no valid plan: .*; nothing was sent"):
        push(tmp_path / "plan", "team/fast")
    assert hub.repositories["team/fast"] == before | {"skipplan.json": b"{}"}


def test_an_upload_that_was_cut_off_goes_on(hub: SmallHub, exported: Path) -> None:
    large = sum(len(content) > small_hub.LARGE for content in files_of(exported).values())
    assert large >= 3
    hub.failing_uploads = 1
    with pytest.raises(ClusterOrDatabaseFault, match="push again to go on"):
        push(exported, "team/fast")
    assert hub.commits == []
    push(exported, "team/fast")
    assert len(hub.uploaded) == len(set(hub.uploaded)) == large  # nothing was sent twice
    assert {k: v for k, v in hub.repositories["team/fast"].items() if k != ".gitattributes"} == files_of(exported)


def test_the_token_is_the_environment_s_and_stays_unsaid(
    hub: SmallHub, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["push", str(exported), "team/fast"]) == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    assert _run(["--debug", "push", str(exported), "team/fast"]) == 2
    said = capsys.readouterr()
    assert "the hub refuses it with status 401" in said.err.splitlines()[-1]
    assert TOKEN not in said.out + said.err
    assert all(TOKEN not in request for request in hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    before = len(hub.requests)
    assert _run(["push", str(exported), "team/fast"]) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err
    assert len(hub.requests) == before


def test_a_dry_run_sends_nothing_and_lists_everything(
    hub: SmallHub, exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert _run(["push", str(exported), "team/fast", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for path, content in files_of(exported).items():
        assert any(line.split() == [f"{len(content):,}", path] for line in told.splitlines()), path
    assert f"would go to {hub.url}/team/fast" in told
    assert _run(["push", str(exported), "team/fast", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] is None
    assert hub.requests == []


def test_what_is_not_uploaded(hub: SmallHub, exported: Path, tmp_path: Path) -> None:
    hub.create("team/public", private=False)
    with pytest.raises(UsageFault, match="is there already and public; nothing was sent"):
        push(exported, "team/public", private=True)
    hub.create("team/theirs", private=False)
    hub.repositories["team/theirs"]["model.safetensors"] = b"somebody's work"
    with pytest.raises(UsageFault, match="holds files that are of no export of skipplan"):
        push(exported, "team/theirs")
    assert hub.repositories["team/theirs"]["model.safetensors"] == b"somebody's work"
    with pytest.raises(UsageFault):
        push(tmp_path, "team/fast")
    assert hub.commits == [] and hub.uploaded == []


@pytest.mark.parametrize("name", ["fast", "a/b/c", "../fast", "team/..", "team/fast.git", "https://hub/x", "team/", ""])
def test_names_that_are_no_repository(exported: Path, name: str) -> None:
    with pytest.raises(UsageFault, match="OWNER/NAME"):
        push(exported, name, dry_run=True)


def test_a_hub_that_is_away(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ClusterOrDatabaseFault, match="push again to go on"):
        push(exported, "team/fast")


class TestCard:
    def metadata(self, directory: Path) -> Any:
        return yaml.safe_load((directory / "README.md").read_text().split("---")[1])

    def test_the_hub_reads_the_held_out_figures(self, exported: Path) -> None:
        """As the hub's own library reads a card."""
        plan = json.loads((exported / "skipplan.json").read_text())
        figures = plan["figures"]
        results = {each.metric_type: each for each in ModelCard.load(exported / "README.md").data.eval_results}
        assert set(results) == {"accuracy", "accuracy_difference", "speedup"}
        for kind, field in (("accuracy", "accuracy"), ("accuracy_difference", "difference"), ("speedup", "speedup")):
            assert results[kind].metric_value == pytest.approx(figures[field], abs=1e-6)
            assert results[kind].metric_args["low"] == pytest.approx(figures[f"{field}_low"], abs=1e-6)
            assert results[kind].metric_args["high"] == pytest.approx(figures[f"{field}_high"], abs=1e-6)
        assert results["accuracy"].dataset_name == plan["task"]["name"]
        assert results["accuracy"].dataset_split == "held-out"
        assert results["accuracy"].dataset_args == {"samples": figures["n_samples"]}

    def test_the_base_model_is_named_where_it_is_the_hub_s(self, exported: Path, tmp_path: Path) -> None:
        assert "base_model" not in self.metadata(exported)  # a directory of this machine
        named = export_builders.document(PLAN)
        named = named.model_copy(update={"model": replace(named.model, name="org/base")})
        export_plan(named, ModelSource("none"), "plan", tmp_path / "plan")
        assert self.metadata(tmp_path / "plan")["base_model"] == "org/base"

    def test_names_cannot_change_the_metadata(self, tmp_path: Path) -> None:
        named = export_builders.document(PLAN)
        task = replace(named.task, name="x\n---\nlicense: mine")
        export_plan(named.model_copy(update={"task": task}), ModelSource("none"), "plan", tmp_path / "plan")
        content = (tmp_path / "plan" / "README.md").read_text()
        assert ModelCard(content).data.to_dict().get("license") is None

    def test_figures_of_another_model_are_not_given_as_this_one_s(
        self, model_directory: Path, other_model_directory: Path, tmp_path: Path
    ) -> None:
        plan = export_builders.document(PLAN, model_directory)
        source = ModelSource(str(other_model_directory))
        export_plan(plan, source, "checkpoint", tmp_path / "forced", force_model=True)
        assert "model-index" not in self.metadata(tmp_path / "forced")
