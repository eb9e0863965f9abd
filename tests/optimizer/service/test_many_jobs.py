"""Several serving processes on one queue: every job is run exactly once.

The number of jobs is that of SKIPPLAN_MANY_JOBS, 400 on each engine by default.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from processes import TASK, Serving, TwoNodes, measured, submit, tiny_job, wait_until_done

from optimizer.job.spec import JobSpec
from storage.database import Database
from storage.queue import events, jobs, stages

JOBS = int(os.environ.get("SKIPPLAN_MANY_JOBS", "400"))
SERVERS = 4
SHARED = 20
"""Every so many jobs, one runs on a cluster that the processes share, the others on their process's own."""


def tiniest_job(model: Path, number: int, address: str) -> JobSpec:
    """Two evaluations on four samples, other ones for each job; no latency measured but that of one finalist."""
    spec = tiny_job(model, number, workers=1, address=address if number % SHARED == 0 else "local")
    task = (model / TASK).read_text().replace("unit: samples", f"unit: samples, seed: {number}")
    own_task = (model / TASK).with_name(f"task-{number}.yaml")
    own_task.write_text(task)
    return spec.model_copy(
        update={
            "task": str(own_task),
            "search": spec.search.model_copy(update={"trials": 1, "batch": 1, "finalists": 1, "rungs": None}),
            "splits": spec.splits.model_copy(update={"calibration": 2, "search": 4, "held_out": 4}),
            "latency": spec.latency.model_copy(update={"max_seconds": 0.05}),
        }
    )


@pytest.mark.slow
def test_each_of_many_jobs_is_run_exactly_once(
    empty_database_url: str, nodes: TwoNodes, tiny_model: Path, tmp_path: Path
):
    with Database.open(empty_database_url, migrate=True) as db:
        numbers = [submit(db, tiniest_job(tiny_model, number, nodes.address)).id for number in range(JOBS)]
        serving = [
            Serving.start(empty_database_url, tmp_path / f"serve{number}.log", environment=nodes.environment)
            for number in range(SERVERS)
        ]
        try:
            wait_until_done(db, numbers, serving, 7200)
        finally:
            ends = [each.stop() for each in serving if each.alive]
        assert ends == [128 + signal.SIGINT] * SERVERS
        assert jobs.count(db)["succeeded"] + jobs.count(db)["infeasible"] == JOBS
        for number in numbers:
            history = Counter(event.kind for event in events.for_job(db, number))
            assert history["submitted"] == history["claimed"] == 1
            assert history["succeeded"] + history["infeasible"] == 1
            assert set(stages.stages(db, number)) >= {"search", "verify", "publish"}
            assert {split for _, split, _ in measured(db, number)} == {"search", "held_out"}
        shares = Counter(events.for_job(db, number)[1].message.split()[1] for number in numbers)
        print(f"{JOBS} jobs on {db.dialect}, by process: {sorted(shares.values())}")
        assert len(shares) == SERVERS, "a process that ran none would make this a test of fewer"
