"""``skipplan jobs`` and ``skipplan export-study`` on a database that a test fills by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import storage_builders

from optimizer.cli.main import main
from storage.database import Database
from storage.queue import jobs, leases, stages

SPEC = {
    "model": {"path": "llava-12"},
    "task": "easy-vqa",
    "search": {"latency_model": "layers"},
    "attempts": 3,
}


@pytest.fixture
def db(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setenv("SKIPPLAN_DATABASE", sqlite_url)
    monkeypatch.chdir(tmp_path)
    with Database.open(sqlite_url) as database:
        yield database


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    said = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else 0), said.out, said.err


def queued(db: Database, priority: int = 0) -> int:
    return jobs.submit(db, SPEC, "hash", priority=priority, max_attempts=3).id


def searched(db: Database) -> int:
    """A running job that evaluated dense and three plans: one complete, one stopped early, one failed."""
    number = queued(db)
    job = leases.claim(db, "me", 60, number)
    assert job is not None
    ids = {
        "model_id": storage_builders.model(db, "llava-12", "f"),
        "task_id": storage_builders.task(db),
        "split": "search",
        "split_hash": "s",
    }
    storage_builders.record(db, job, plan="RRRR", scores=(1, 1, 1, 0), **ids)
    storage_builders.record(db, job, plan="RRRS", scores=(1, 1), **ids)
    storage_builders.record(db, job, plan="RRRS", scores=(1, 1, 0, 0), **ids)
    storage_builders.record(db, job, plan="RSSR", scores=(0, 0), **ids)
    storage_builders.record_failure(db, job, plan="SSSS", n_samples=2, reason="the worker's process died", **ids)
    stages.add_counters(db, job, {"evaluations": 4, "layer_executions": 40, "layer_executions_saved": 8, "retries": 1})
    return number


def test_list_shows_the_newest_first_and_filters(db, capsys):
    first, second = queued(db), queued(db, priority=7)
    jobs.cancel(db, first)
    code, output, _ = run(capsys, "jobs", "list", "--json")
    assert code == 0
    assert [(job["id"], job["state"], job["priority"]) for job in json.loads(output)] == [
        (second, "queued", 7),
        (first, "cancelled", 0),
    ]
    _, output, _ = run(capsys, "jobs", "list", "--state", "queued", "--json")
    assert [job["id"] for job in json.loads(output)] == [second]
    code, output, errors = run(capsys, "jobs", "list")
    assert run(capsys, "jobs") == (code, output, errors)  # what is asked most often
    assert "llava-12" in output and "cancelled" in output


def test_show_has_counters_stages_and_history(db, capsys):
    number = searched(db)
    _, output, _ = run(capsys, "jobs", "show", str(number), "--json")
    shown = json.loads(output)
    assert shown["counters"] == {
        "attempts": 1.0,
        "evaluations": 4.0,
        "layer_executions": 40.0,
        "layer_executions_saved": 8.0,
        "retries": 1.0,
    }
    assert [event["event"] for event in shown["events"]] == ["submitted", "claimed"]
    assert shown["specification"]["task"] == "easy-vqa"
    _, output, _ = run(capsys, "jobs", "show", str(number))
    assert "layer_executions_saved 8" in output and "claimed" in output


@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("infeasible", 3), ("failed", 1), ("cancelled", 1)])
def test_watch_follows_to_the_end_and_says_how_it_was(db, capsys, end, code):
    number = queued(db)
    job = leases.claim(db, "me", 60, number)
    {
        "succeeded": lambda: leases.finish(db, job),
        "infeasible": lambda: leases.infeasible(db, job, "too slow"),
        "failed": lambda: leases.fail(db, job, "disk full"),
        "cancelled": lambda: jobs.cancel(db, number),
    }[end]()
    found, output, _ = run(capsys, "jobs", "watch", str(number), "--json")
    assert found == code
    assert [json.loads(line)["event"] for line in output.splitlines()] == ["submitted", "claimed", end]


def test_cancel_resume_remove(db, capsys):
    first, second = queued(db), queued(db)
    assert run(capsys, "jobs", "cancel", str(first), str(second), "--reason", "wrong model")[0] == 0
    assert jobs.get(db, first).error == "wrong model"
    assert run(capsys, "jobs", "resume", str(first))[:2] == (0, f"job {first} queued\n")
    resumed = jobs.get(db, first)
    assert (resumed.state, resumed.attempt_limit) == ("queued", 3)
    assert run(capsys, "jobs", "remove", str(second))[0] == 0
    assert [job.id for job in jobs.list_jobs(db)] == [first]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cancel", "77"), "there is no job 77"),
        (("resume", "1"), "only failed and cancelled jobs can be resumed"),
        (("watch", "77"), "there is no job 77"),
        (("show", "77"), "there is no job 77"),
        (("remove", "77"), "there is no job 77"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(db, capsys, arguments, words):
    queued(db)
    code, output, errors = run(capsys, "jobs", *arguments)
    assert (code, output) == (2, "") and words in errors and len(errors.splitlines()) == 1


def test_a_search_becomes_an_optuna_study(db, capsys, tmp_path):
    number = searched(db)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    code, output, _ = run(capsys, "export-study", str(number), "--storage", storage, "--json")
    assert (code, json.loads(output)) == (0, {"name": f"skipplan job {number}", "trials": 4, "complete": 2})
    study = optuna.load_study(study_name=f"skipplan job {number}", storage=storage)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    trials = {trial.user_attrs["plan"]: trial for trial in study.trials}
    assert trials["RRRR"].values == [1.0, 0.0]
    assert trials["RRRS"].values == [0.75, 0.25]  # the last rung counts
    assert trials["RRRS"].params == {"layer 000": "R", "layer 001": "R", "layer 002": "R", "layer 003": "S"}
    assert trials["RSSR"].state.name == "PRUNED" and trials["RSSR"].user_attrs["difference"] == -1.0
    assert trials["SSSS"].state.name == "FAIL" and "died" in trials["SSSS"].user_attrs["failure"]
    assert {trial.user_attrs["plan"] for trial in study.best_trials} == {"RRRR", "RRRS"}
    again, _, errors = run(capsys, "export-study", str(number), "--storage", storage)
    assert again == 2 and "--name" in errors


def test_a_study_that_cannot_be_written_keeps_passwords_to_itself(db, capsys):
    number = searched(db)
    code, _, errors = run(capsys, "export-study", str(number), "--storage", "postgresql://me:secret@127.0.0.1:9/x")
    assert code == 4 and "secret" not in errors and len(errors.splitlines()) == 1
    waiting = queued(db)
    code, _, errors = run(capsys, "export-study", str(waiting), "--storage", "sqlite:///study.db")
    assert code == 2 and "no evaluation" in errors
