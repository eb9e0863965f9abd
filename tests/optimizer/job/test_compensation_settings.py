"""Compensation and collateral in job files, in the space of plans, and in what `best` is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import pytest

from optimizer.errors import UsageFault
from optimizer.job.best import _within
from optimizer.job.inputs import JobInputs, load_general_text
from optimizer.job.loading import load_job
from optimizer.job.spec import JobSpec
from optimizer.stages.collateral import Collateral, OtherTask
from storage.records import evaluations
from workers.compensation.recipe import Recipe
from workers.messages import NO_COMPENSATION, TextDivergence

BASE = {"model": {"path": "llava-12"}, "task": "easy-vqa"}
ALONE = "linear ridge=0.001 weighting=answers tokens=16384"
DEFAULT = f"{ALONE} text_share=0.1"


def test_the_database_and_the_workers_call_no_compensation_the_same() -> None:
    assert evaluations.NO_COMPENSATION == NO_COMPENSATION == Recipe().text


@pytest.mark.parametrize(
    ("section", "choices"),
    [
        ({}, ("none",)),
        ({"kind": "none", "tokens": 5}, ("none",)),
        ({"kind": "linear"}, (DEFAULT,)),
        ({"kind": "linear", "text_share": 0}, (ALONE,)),
        ({"kind": "linear", "scope": "projection"}, (f"{ALONE} scope=projection text_share=0.1",)),
        ({"kind": "both", "ridge": 0.01, "weighting": "uniform", "tokens": 64}, None),
    ],
)
def test_candidates_have_the_compensations_that_the_job_names(section: dict, choices: tuple | None) -> None:
    spec = JobSpec.model_validate({**BASE, "compensation": section})
    if choices is None:
        choices = ("none", "linear ridge=0.01 weighting=uniform tokens=64 text_share=0.1")
    assert spec.compensation.choices() == choices
    for text in choices:
        assert Recipe.parse(text).text == text


def test_what_changes_the_maps_changes_the_job(tmp_path: Path) -> None:
    def digest(**section: object) -> str:
        return JobSpec.model_validate({**BASE, "compensation": section}).digest()

    texts = [{}, {"kind": "linear"}, {"kind": "both"}, {"kind": "linear", "tokens": 5}, {"kind": "linear", "ridge": 1}]
    assert len({digest(**each) for each in texts}) == len(texts)
    here = JobSpec.model_validate({**BASE, "artifacts": "here"})
    assert here.digest() == JobSpec.model_validate({**BASE, "artifacts": "s3://there"}).digest()


def test_a_mixture_is_part_of_candidates_and_of_the_job(tmp_path: Path) -> None:
    """Its text counts by its content: the same words in another file are the same maps."""

    def inputs(words: str | None, **section: object) -> JobInputs:
        mixed = JobSpec.model_validate({**BASE, "compensation": {"kind": "linear", **section}})
        return JobInputs(mixed, None, "", general_text=words)  # type: ignore[arg-type]

    own = inputs(None, text_share=0.25)
    assert own.compensations == (f"{ALONE} text_share=0.25",)
    (tmp_path / "general.txt").write_text("some words")
    given = inputs("some words", text_share=0.25, text=str(tmp_path / "general.txt"))
    named = hashlib.sha256(b"some words").hexdigest()[:16]
    assert given.compensations == (f"{ALONE} text_share=0.25 text_id={named}",)
    assert load_general_text(given.spec) == "some words" and load_general_text(own.spec) is None
    digests = {each.spec.digest() for each in (own, given, inputs(None, text_share=0), inputs(None, text_share=0.5))}
    plain = JobSpec.model_validate(BASE)
    assert "text_share" not in plain.canonical()["compensation"]  # jobs of before there were mixtures are found again
    assert len(digests) == 4 and "text_share" not in inputs(None, text_share=0).spec.canonical()["compensation"]


def test_a_text_that_cannot_be_mixed_in_is_named(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {path: llava-12}\ntask: easy-vqa\ncompensation: {kind: linear, text_share: 0, text: general.txt}\n"
    )
    with pytest.raises(UsageFault, match="text: needs a text_share above 0"):
        load_job(file)
    file.write_text(file.read_text().replace("text_share: 0,", ""))
    spec = load_job(file)
    assert spec.compensation.text == str(tmp_path / "general.txt")
    with pytest.raises(UsageFault, match=r"compensation\.text: .*general\.txt cannot be read: No such file"):
        load_general_text(spec)
    (tmp_path / "general.txt").write_bytes(b"\xff\xfe words")
    with pytest.raises(UsageFault, match=r"compensation\.text: .* cannot be read as UTF-8"):
        load_general_text(spec)


@pytest.mark.parametrize("kind", ["linear", "both", "none"])
def test_maps_are_not_judged_on_the_text_that_they_are_fitted_on(tmp_path: Path, kind: str) -> None:
    (tmp_path / "general.txt").write_text("some words\n")
    (tmp_path / "other.txt").write_text("some\r\nwords")
    texts = {"compensation": {"kind": kind, "text": str(tmp_path / "general.txt")}}
    spec = JobSpec.model_validate({**BASE, **texts, "collateral": {"text": str(tmp_path / "other.txt")}})
    if kind == "none":
        assert load_general_text(spec) == "some words\n"
    else:
        with pytest.raises(UsageFault, match=r"collateral\.text: it says the same as compensation\.text"):
            load_general_text(spec)
    (tmp_path / "other.txt").write_text("other words")
    assert load_general_text(spec) == "some words\n"


def test_paths_are_made_absolute_and_urls_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "job.yaml"
    file.write_text(
        "model: {path: llava-12}\ntask: easy-vqa\nartifacts: maps\ncollateral: {tasks: [scenes], text: general.txt}\n"
    )
    spec = load_job(file, environment={})
    assert spec.artifacts == str(tmp_path / "maps")
    assert spec.collateral.text == str(tmp_path / "jobs" / "general.txt") and spec.collateral.tasks == ("scenes",)
    spec = load_job(file, environment={"SKIPPLAN_ARTIFACTS": "s3://bucket/maps"})
    assert spec.artifacts == "s3://bucket/maps"


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ("{kind: affine}", "compensation.kind"),
        ("{kind: linear, ridge: 0}", "compensation.ridge"),
        ("{kind: linear, tokens: 0}", "compensation.tokens"),
        ("{kind: linear, weigthing: uniform}", "did you mean weighting"),
    ],
)
def test_mistakes_are_named_by_field(tmp_path: Path, section: str, named: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"model: {{path: llava-12}}\ntask: easy-vqa\ncompensation: {section}\n")
    with pytest.raises(UsageFault, match=named):
        load_job(file, environment={})


class Published:
    """Of a plan, what `best` looks at."""

    def __init__(self, beside: Collateral | None, mode: str = "standalone") -> None:
        self.mode = mode
        self.secondary = {} if beside is None else {"collateral": asdict(beside)}


def test_best_takes_only_plans_measured_beside_their_task() -> None:
    text = TextDivergence("RS", tokens=100, kl=0.2, dense_loss=2.0, plan_loss=2.1)
    tasks = {"a": OtherTask(10, 0.80, 0.85), "b": OtherTask(10, 0.9, 0.9)}
    plan, unmeasured = Published(Collateral(tasks, text)), Published(None)
    assert _within(plan, 0.06, 0.3) and _within(plan, None, 0.2) and _within(plan, 0.06, None)
    assert not _within(plan, 0.04, None) and not _within(plan, 0.06, 0.1)
    assert not _within(unmeasured, 1.0, None) and not _within(unmeasured, None, 10.0)
    assert not _within(Published(Collateral(tasks)), None, 10.0)
    assert _within(Published(None, "lossless"), 0.0, 0.0)  # which answers as dense, wherever
