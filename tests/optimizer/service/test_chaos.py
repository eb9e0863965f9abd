"""Processes are killed at random moments, again and again; nothing may be lost, doubled or changed by it.

The number of kills is that of SKIPPLAN_CHAOS_KILLS, 100 on each engine by default; SKIPPLAN_CHAOS_SEED draws others.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from processes import Serving, TwoNodes, front, measured, send_kill, submit, tiny_job, wait_until_done

from optimizer.job.spec import JobSpec
from storage.database import Database
from storage.queue import events, jobs, stages

KILLS = int(os.environ.get("SKIPPLAN_CHAOS_KILLS", "100"))
SEED = int(os.environ.get("SKIPPLAN_CHAOS_SEED", "20"))
DRIVERS, DATABASES = 0.25, 0.05
"""Share of the kills that hit a driver; of moments at which a server is restarted besides."""

LOCAL_SHARE = 0.1
"""Share of the kills that hit drivers with a Ray cluster of their own, which they must start again each time; the
others share a cluster that stands."""

WHILE_STARTING = 1 / 3
"""Share of the kills that do not wait for a worker that is ready. Those after it let the job get on, on any machine."""

START_SECONDS, JOB_SECONDS = 8.0, 4.0
"""Moments are drawn from so long: after the last kill, and after a worker was ready (a tiny job takes about two)."""

LEASE = ("--lease", "6")


@dataclass
class Chaos:
    """Kills one thing after another while jobs run."""

    url: str
    log: Path
    nodes: TwoNodes
    restart_database: Callable[[], None] | None
    random: random.Random
    kills: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0, "database": 0})
    serving: Serving = field(init=False)

    def __post_init__(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.serving = Serving.start(self.url, self.log, *LEASE, environment=self.nodes.environment)

    @property
    def address(self) -> str:
        """Where the next job's workers run."""
        return "local" if self.killed < LOCAL_SHARE * KILLS else self.nodes.address

    @property
    def killed(self) -> int:
        return self.kills["driver"] + self.kills["worker"]

    def strike(self, finished: Callable[[], bool]) -> None:
        """Kill a worker or the driver at a random moment; nobody where the job is finished before that moment."""
        victim = "driver" if self.random.random() < DRIVERS else "worker"
        early = self.random.random() < WHILE_STARTING
        if not self._wait_for_worker(finished, ready=not early, needed=not (early and victim == "driver")):
            return
        time.sleep(self.random.uniform(0.0, START_SECONDS if early else JOB_SECONDS))
        if self.restart_database is not None and self.random.random() < DATABASES:
            self.restart_database()
            self.kills["database"] += 1
        assert self.serving.alive, self.log.read_text()[-3000:]
        if victim == "driver":
            self.serving.kill()
            self.kills["driver"] += 1
            self._serve()
        elif workers := self._workers():
            self.kills["worker"] += send_kill(self.random.choice(workers))

    def _wait_for_worker(self, finished: Callable[[], bool], *, ready: bool, needed: bool) -> bool:
        """Wait until there is a worker, one that said it is ready if so asked; false when the job ended first."""
        deadline = time.monotonic() + 600
        while needed and not (self._ready() if ready else self._workers()):
            if finished():
                return False
            assert self.serving.alive and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return True

    def _ready(self) -> set[int]:
        lines = [line for line in self.log.read_text().splitlines() if '"worker_ready"' in line and line.endswith("}")]
        return {json.loads(line)["process"] for line in lines} & set(self._workers())

    def _workers(self) -> list[int]:
        return [*self.serving.workers(), *self.nodes.workers()]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """A database, and how to restart its server where it has one."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'skipplan.db'}", None
        return
    server = request.getfixturevalue("postgresql_server")  # our own: it is halted

    def restart() -> None:
        server.halt()
        server.start()

    with Database.open(server.url(), migrate=True):
        pass
    yield server.url(), restart


def chaos_job(model: Path, number: int, **cluster: Any) -> JobSpec:
    """A tiny job with half of its plans evaluated, so that several kills fit into it."""
    spec = tiny_job(model, number, **cluster)
    return spec.model_copy(update={"search": spec.search.model_copy(update={"trials": 32})})


@pytest.mark.slow
def test_jobs_end_as_if_nothing_had_been_killed(place, nodes: TwoNodes, tiny_model: Path, tmp_path: Path):
    url, restart = place
    with Database.open(url) as db:
        began = time.monotonic()
        chaos = Chaos(url, tmp_path / "serve.log", nodes, restart, random.Random(SEED))
        numbers: list[int] = []
        try:
            while chaos.killed < KILLS:
                job = submit(db, chaos_job(tiny_model, len(numbers), address=chaos.address))
                numbers.append(job.id)

                def finished(number: int = job.id) -> bool:
                    return jobs.get(db, number).is_finished

                while not finished() and chaos.killed < KILLS:
                    chaos.strike(finished)
            wait_until_done(db, numbers, [chaos.serving], 3600)
        finally:
            chaos.serving.kill()
            print(f"chaos on {db.dialect}: {chaos.kills}, {len(numbers)} jobs, {time.monotonic() - began:.0f} s")
        with Quiet(tmp_path) as quiet:
            for index, number in enumerate(numbers):
                _check_end(db, number)
                assert (front(db, number), measured(db, number)) == quiet.result(chaos_job(tiny_model, index))


class Quiet:
    """The same jobs where nothing is killed, on one worker: that others have two must not change them either."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._url = directory, f"sqlite:///{directory / 'quiet.db'}"

    def __enter__(self) -> Quiet:
        self._db = Database.open(self._url)
        self._serving = Serving.start(self._url, self._directory / "quiet.log")
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.kill()
        self._db.close()

    def result(self, spec: JobSpec) -> tuple[object, object]:
        one_worker = spec.cluster.model_copy(update={"workers": 1})
        job = submit(self._db, spec.model_copy(update={"cluster": one_worker}))
        wait_until_done(self._db, [job.id], [self._serving], 600)
        return front(self._db, job.id), measured(self._db, job.id)


def _check_end(db: Database, number: int) -> None:
    """The final state says what the job published; nothing was counted that is not there."""
    job = jobs.get(db, number)
    best = stages.stages(db, number)["publish"].payload["value"]["best"]
    assert job.state == ("infeasible" if best is None else "succeeded"), job.error
    history = [event.kind for event in events.for_job(db, number)]
    assert history[-1] == job.state and history.count(job.state) == 1
    assert history.count("claimed") == job.attempt
    # A counter follows its evaluation: one that was run twice would show as one more than there are.
    assert stages.counters(db, number)["evaluations"] <= len(measured(db, number))
