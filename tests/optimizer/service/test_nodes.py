"""Jobs on a cluster of two nodes: of each kind at once, and while a node, or the head, is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import TASK, Serving, TwoNodes, front, measured, submit, tiny_job, wait_until_done

from optimizer.job.spec import JobSpec
from storage.database import Database
from storage.queue import events, jobs, stages
from storage.records import evaluations

pytestmark = pytest.mark.slow


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database:
        yield database


def serve(nodes: TwoNodes, tmp_path: Path) -> Serving:
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    return Serving.start(url, tmp_path / "serve.log", environment=nodes.environment)


def spec(nodes: TwoNodes, model: Path, evaluations_wanted: int) -> JobSpec:
    job = tiny_job(model, 40, address=nodes.address, workers=2, cpus_per_worker=1.0)
    search = job.search.model_copy(update={"trials": evaluations_wanted})
    return job.model_copy(update={"search": search, "actions": ("skip", "freeze", "bypass")})


def wait_for(condition, log: Path, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def happened(log: Path) -> list[str]:
    return [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]


def test_a_job_outlives_a_node_and_takes_in_another(nodes, db, tiny_model, tmp_path):
    number = submit(db, spec(nodes, tiny_model, 60)).id
    serving = serve(nodes, tmp_path)
    try:
        wait_for(lambda: len(evaluations.for_job(db, number)) >= 3, serving.log)
        nodes.tell("lose node")
        wait_for(lambda: "worker_lost" in happened(serving.log), serving.log)
        nodes.tell("gain node")
        wait_until_done(db, [number], [serving], 900)
        assert jobs.get(db, number).state in ("succeeded", "infeasible")
        assert jobs.get(db, number).attempt == 1
        assert happened(serving.log).count("worker_ready") >= 3  # two at first, and at least one on the new node
        assert measured(db, number) and front(db, number)
    finally:
        serving.stop()


def test_a_lost_head_puts_the_job_back(nodes, db, tiny_model, tmp_path):
    number = submit(db, spec(nodes, tiny_model, 1000)).id  # a minute or more: it must not end before that is noticed
    serving = serve(nodes, tmp_path)
    try:
        wait_for(lambda: len(evaluations.for_job(db, number)) >= 3, serving.log)
        nodes.tell("lose head")
        wait_for(lambda: "job_put_back" in happened(serving.log), serving.log, 120)
        assert serving.alive  # Ray would end a process whose head is gone
        job = jobs.get(db, number)
        assert job.state == "queued" and job.not_before is not None and job.owner is None
        assert "head node does not answer" in events.for_job(db, number)[-1].message
    finally:
        serving.kill()


def kinds(nodes: TwoNodes, model: Path) -> dict[str, JobSpec]:
    """A job of each kind: plain with everything beside its task, compensated, and lossless."""
    cluster = {"address": nodes.address, "workers": 2, "cpus_per_worker": 1.0, "max_attempts": 100}
    text = model / "general.txt"
    text.write_text("A few words of text, and a few more of them. " * 40)
    long_answers = (model / TASK).with_name("long.yaml")
    task = yaml.safe_load((model / TASK).read_text())
    task |= {"name": "long", "answer": {"kind": "free", "max_new_tokens": 8}}
    long_answers.write_text(yaml.safe_dump(task))
    fields = {
        "plain": {
            "actions": ["skip", "freeze", "bypass"],
            "collateral": {"tasks": [str(long_answers)], "text": str(text), "samples": 8},
            "guard": {"false_alarms": 0.1},
        },
        "compensated": {"compensation": {"kind": "linear", "tokens": 64, "text_share": 0.0}},
        "lossless": {
            "mode": "lossless",
            "task": str(long_answers),
            "constraint": {"min_dense_accuracy": 0.0},
            "workload": {"new_tokens": 8},
            "guard": {"false_alarms": None},
        },
    }
    found = {}
    for number, (kind, own) in enumerate(fields.items()):
        base = tiny_job(model, 2 * number).model_dump(
            mode="json", exclude={"database", "mode", "guard", "compensation"}
        )
        found[kind] = JobSpec.model_validate(base | {"cluster": cluster} | own)
    return found


def test_a_job_of_each_kind_shares_two_nodes(nodes, db, tiny_model, tmp_path):
    numbers = {kind: submit(db, wanted).id for kind, wanted in kinds(nodes, tiny_model).items()}
    url = f"sqlite:///{tmp_path / 'skipplan.db'}"
    serving = Serving.start(url, tmp_path / "serve.log", "--jobs", "3", environment=nodes.environment)
    try:
        wait_until_done(db, [*numbers.values()], [serving], 900)
        ended = {kind: jobs.get(db, number) for kind, number in numbers.items()}
        assert {kind: job.error for kind, job in ended.items() if job.state not in ("succeeded", "infeasible")} == {}
        assert all(job.attempt == 1 for job in ended.values())
        assert happened(serving.log).count("worker_ready") == 2  # all three on the same two
        on_record = {kind: set(stages.stages(db, number)) for kind, number in numbers.items()}
        assert {"can draft", "dense answers search 0", "publish"} <= on_record["lossless"]
        assert {"guard", "publish"} <= on_record["plain"]
        assert any(name.startswith("collateral ") for name in on_record["plain"])
        assert any(name.startswith("compensate ") for name in on_record["compensated"])
    finally:
        serving.stop()
