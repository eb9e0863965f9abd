"""Processes are killed at random moments, again and again; nothing may be lost, doubled or changed by it.

The number of kills is that of SKIPPLAN_CHAOS_KILLS, 100 on each engine by default.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import Serving, front, measured, send_kill, submit, tiny_job, wait_until_done

from optimizer.job import JobSpec
from storage import events, jobs, stages
from storage.database import Database

KILLS = int(os.environ.get("SKIPPLAN_CHAOS_KILLS", "100"))
SEED = 20
DRIVERS, DATABASES = 0.25, 0.05
"""Share of the kills that hit a driver; of moments at which a server is restarted besides."""

LEASE = ("--lease", "6")


@dataclass
class Chaos:
    """Kills one thing after another while jobs run."""

    url: str
    log: Path
    restart_database: Callable[[], None] | None
    random: random.Random
    longest_pause: float
    kills: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0, "database": 0})
    serving: Serving = field(init=False)

    def __post_init__(self) -> None:
        self.serving = Serving.start(self.url, self.log, *LEASE)

    @property
    def killed(self) -> int:
        return self.kills["driver"] + self.kills["worker"]

    def strike(self) -> None:
        """Wait for a random moment and kill a worker, or else the driver."""
        time.sleep(self.random.uniform(0.0, self.longest_pause))
        assert self.serving.alive, self.log.read_text()[-3000:]
        if self.restart_database is not None and self.random.random() < DATABASES:
            self.restart_database()
            self.kills["database"] += 1
        workers = self.serving.workers()
        if workers and self.random.random() > DRIVERS:
            self.kills["worker"] += send_kill(self.random.choice(workers))
            return
        self.serving.kill()
        self.kills["driver"] += 1
        self.serving = Serving.start(self.url, self.log, *LEASE)


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


@pytest.mark.slow
def test_jobs_end_as_if_nothing_had_been_killed(place, tiny_model: Path, tmp_path: Path):
    url, restart = place
    with Quiet(tmp_path) as quiet, Database.open(url) as db:
        quiet.run(tiny_job(tiny_model, 0))
        chaos = Chaos(url, tmp_path / "serve.log", restart, random.Random(SEED), quiet.seconds)
        numbers: list[int] = []
        try:
            while chaos.killed < KILLS:
                numbers.append(submit(db, tiny_job(tiny_model, len(numbers))).id)
                while not jobs.get(db, numbers[-1]).is_finished and chaos.killed < KILLS:
                    chaos.strike()
            wait_until_done(db, numbers, [chaos.serving], 3600)
        finally:
            chaos.serving.kill()
            print(f"chaos on {db.dialect}: {chaos.kills}, {len(numbers)} jobs, pauses up to {quiet.seconds:.0f} s")
        for index, number in enumerate(numbers):
            _check_end(db, number)
            expected = quiet.result(tiny_job(tiny_model, index))
            assert (front(db, number), measured(db, number)) == expected


class Quiet:
    """The same jobs where nothing is killed."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._url = directory, f"sqlite:///{directory / 'quiet.db'}"
        self._known: dict[str, int] = {}
        self.seconds = 0.0
        """How long the last job took."""

    def __enter__(self) -> Quiet:
        self._db = Database.open(self._url)
        self._serving = Serving.start(self._url, self._directory / "quiet.log")
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.kill()
        self._db.close()

    def run(self, spec: JobSpec) -> int:
        job = submit(self._db, spec)
        begun = time.monotonic()
        wait_until_done(self._db, [job.id], [self._serving], 3600)
        self.seconds = time.monotonic() - begun
        self._known[spec.digest()] = job.id
        return job.id

    def result(self, spec: JobSpec) -> tuple[object, object]:
        known = self._known.get(spec.digest())
        number = self.run(spec) if known is None else known
        return front(self._db, number), measured(self._db, number)


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
