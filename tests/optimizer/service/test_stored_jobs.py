"""Jobs that an earlier version stored with fields or values that are no more: one line each, and the queue goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from optimizer.cli.main import _run
from optimizer.service.server import Server
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import events, jobs
from storage.schema import JobRow

DUMP = Path(__file__).parents[2] / "fixtures" / "databases" / "sqlite_0002.sql"

STALE = [
    (
        {"compensation": {"kind": "linear", "weighting": "rms"}},
        "compensation.weighting: must be 'uniform' or 'answers', not 'rms'",
    ),
    ({"compensation": {"kind": "linear", "gain": True}}, "compensation.gain: unknown field"),
    ({"compensation": {"kind": "linear", "groups": 4}}, "compensation.groups: unknown field"),
    ({"export": "mergekit"}, "export: unknown field"),
    ({"search": {"sampler": "tpe"}}, "search.sampler: unknown field"),
    ({"search": {"evaluations": 48}}, "search.evaluations: unknown field; search.evaluations is search.trials now"),
    ({"search": {"latency": "measured"}}, "search.latency: unknown field; search.latency is search.latency_model "),
    ({"latency_seconds": 20.0}, "latency_seconds: unknown field; latency_seconds is latency.max_seconds now"),
    ({"latency_precision": 0.02}, "latency_precision: unknown field; latency_precision is latency.precision now"),
]
REMEDY = "another version of skipplan stored this job; submit its job file again, without that"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database of the second schema, upgraded; its job 2 has failed."""
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.executescript(DUMP.read_text(encoding="utf-8"))
    url = f"sqlite:///{tmp_path / 'old.db'}"
    monkeypatch.setenv("SKIPPLAN_DATABASE", url)
    with Database.open(url, migrate=True) as db:
        yield db


def store(db: Database, number: int, fields: dict[str, object]) -> None:
    """Let a job say what it was stored with."""
    spec = jobs.get(db, number).spec | fields
    with db.transaction() as session:
        session.execute(update(JobRow).where(JobRow.id == number).values(spec=spec))


@pytest.mark.parametrize(("fields", "line"), STALE)
def test_resume_refuses_it_and_show_says_why(old: Database, capsys, fields: dict[str, object], line: str) -> None:
    store(old, 2, fields)
    assert _run(["jobs", "resume", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith(f"skipplan: job 2: {line}") and REMEDY in said.err
    assert jobs.get(old, 2).state == "failed"
    assert _run(["jobs", "show", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"problem    job 2: {line}" in shown and "its cluster was lost" in shown
    assert _run(["jobs", "list"]) == 0
    store(old, 1, fields)  # has its result: nothing is to be run
    capsys.readouterr()
    assert _run(["jobs", "show", "1"]) == 0
    assert "problem" not in capsys.readouterr().out


def test_the_service_fails_it_with_the_line_and_takes_the_next(old: Database) -> None:
    spec = jobs.get(old, 1).spec
    stale = [jobs.submit(old, spec | fields, f"hash {number}").id for number, (fields, _) in enumerate(STALE)]
    missing = jobs.submit(old, spec | {"task": "no-such-task"}, "another hash").id
    assert Server(old, progress=lambda job: Progress()).run(once=True) == len(STALE) + 1
    for number, (_, line) in zip(stale, STALE, strict=True):
        job = jobs.get(old, number)
        assert job.state == "failed" and job.error.startswith(f"job {number}: {line}") and REMEDY in job.error
        assert [event.kind for event in events.for_job(old, number)] == ["submitted", "claimed", "failed"]
    assert jobs.get(old, missing).error.startswith("task no-such-task: no such task file")


def test_one_that_can_be_read_is_resumed_with_its_own_number_of_attempts(old: Database) -> None:
    store(old, 2, {"attempts": 7})
    assert _run(["jobs", "resume", "2"]) == 0
    job = jobs.get(old, 2)
    assert (job.state, job.attempt_limit - job.attempt) == ("queued", 7)
