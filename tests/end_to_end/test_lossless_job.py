"""A whole lossless job on the bundled model, and one that is stopped again and again: both end alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Ended
from in_process import OneWorker

from optimizer.reports.html import write_report
from optimizer.service import pool
from storage.database import Database
from storage.queue import jobs, stages
from storage.records import evaluations
from workers.messages import AnswerDense, CompareSpeculation, EvaluatePlans, Reply, Request

JOB = """\
mode: lossless
model: {path: llava-12, dtype: float32}
task: scenes
compensation: {kind: linear, tokens: 512}
search: {trials: 6, batch: 3, finalists: 2, rungs: [4], latency_model: layers}
splits: {calibration: 4, search: 8, held_out: 12, unit: samples}
workload: {new_tokens: 12}
latency: {precision: 0.5, max_seconds: 0.5}
collateral: {tasks: [easy-vqa], text: general.txt, samples: 4}
cluster: {workers: 1}
"""
TEXT = "\n\n".join(f"Shape {number} in the image: is it a red circle or a blue triangle?" for number in range(3))


class Stopping(OneWorker):
    """Ends the process's patience at a request, as Ctrl-C does."""

    stops_at: type | None = None

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        for number, reply in super().run(requests):
            yield number, reply
            if self.stops_at is not None and isinstance(self.requests[-1], self.stops_at):
                type(self).stops_at = None
                raise KeyboardInterrupt


@pytest.fixture
def run(
    here: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, type | None], Ended]:
    def run(name: str, stops_at: type | None) -> Ended:
        directory = tmp_path / name
        if not directory.exists():
            directory.mkdir()
            (directory / "job.yaml").write_text(JOB)
            (directory / "general.txt").write_text(TEXT)
        monkeypatch.setattr(Stopping, "stops_at", stops_at)
        monkeypatch.setattr(pool, "_start", lambda inputs: Stopping(inputs.spec.model.path, inputs.task))
        return here(directory, "run", "job.yaml", "--json")

    return run


def found(directory: Path) -> tuple[Any, ...]:
    """What the search and the verification of the only job found, and what they evaluated."""
    with Database.open(f"sqlite:///{directory / 'skipplan.db'}", create=False) as db:
        (job,) = jobs.list_jobs(db)
        recorded = {name: stage.payload["value"] for name, stage in stages.stages(db, job.id).items()}
        known = evaluations.for_job(db, job.id)
    answers = {name: value for name, value in recorded.items() if name.startswith("dense answers")}
    scores = {(each.plan, each.split, each.n_samples): each.scores for each in known}
    return answers, recorded["search"], recorded["verify"], scores


@pytest.mark.slow
def test_a_stopped_job_goes_on_where_it_was(run: Callable[[str, type | None], Ended], tmp_path: Path) -> None:
    for stops_at in (AnswerDense, EvaluatePlans, CompareSpeculation):
        assert run("stopped", stops_at).code == 130, stops_at
    assert run("stopped", None).code in (0, 3) and run("whole", None).code in (0, 3)
    assert found(tmp_path / "stopped") == found(tmp_path / "whole")


def test_a_lossless_job_is_published_as_such(
    run: Callable[[str, type | None], Ended], here: Callable[..., Ended], tmp_path: Path
) -> None:
    whole = run("whole", None)
    assert whole.code in (0, 3), whole.errors  # half a second may not show a gain

    plans = json.loads(whole.output)["plans"]
    assert plans
    for plan in plans:
        own = plan["secondary"]["lossless"]
        assert (plan["mode"], plan["difference"], plan["accuracy"]) == ("lossless", 0.0, plan["dense_accuracy"])
        assert own["acceptance_low"] <= own["acceptance"] <= own["acceptance_high"] <= 1
        assert own["answers_compared"] == 12
        assert set(own["off_task"]) == {"easy-vqa", "general text"}
        assert 1 <= own["draft_length"] <= 8 and 0 < own["expected_time"] < 1
        assert plan["extra_bytes"] >= 0

    directory = tmp_path / "whole"
    asked = ("--model", "llava-12", "--task", "scenes")
    assert here(directory, "plans", *asked, "--json").output.strip() == "[]"
    listed = json.loads(here(directory, "plans", *asked, "--lossless", "--json").output)
    assert {plan["id"] for plan in listed} == {plan["id"] for plan in plans}
    assert here(directory, "best", *asked).code == 3
    assert here(directory, "best", *asked, "--lossless", "--max-accuracy-drop", "0").code == 0
    assert "none, lossless" in here(directory, "plans", *asked, "--lossless").output
    with Database.open(f"sqlite:///{directory / 'skipplan.db'}", create=False) as db:
        page = write_report(db, 1)
    assert "What the drafts are worth" in page and "general text" in page and "acceptance, %" in page
    refused = here(directory, "export-study", "1", "--storage", "sqlite:///study.db")
    assert refused.code == 2 and "job 1 is lossless" in refused.errors
