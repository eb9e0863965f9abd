"""Whole jobs through the real service, stages and pool, on workers that only take simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from simulated_cluster import SimulatedCluster, beside, job_fields

from optimizer.job.spec import JobSpec
from optimizer.service.runner import stored_spec
from optimizer.service.server import Server
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs, stages
from storage.records import evaluations

SIZES = {"trials": 16, "calibration": 40, "search": 128, "held_out": 128}
HALVES = SIZES | {"trials": 80, "batch": 32}
"""Sizes of a job whose batches go in halves."""


def serve(path: Path, cluster: SimulatedCluster, *, at_once: int = 1, count: int = 3, **sizes: int) -> list[Any]:
    """Serve jobs to their end; return what each evaluated and found out of it."""
    with Database.open(f"sqlite:///{path}") as db, cluster.in_place_of_ray():
        fields = [job_fields(n, path.parent / "artifacts", **(sizes or SIZES)) for n in range(count)]
        specs = [JobSpec.model_validate(each) for each in fields]
        found = [jobs.submit(db, stored_spec(spec), f"job {number}").id for number, spec in enumerate(specs)]
        assert Server(db, progress=lambda job: Progress(), at_once=at_once).run(once=True) == count
        return [_outcome(db, number) for number in found]


def _outcome(db: Database, number: int) -> tuple[str, dict[Any, Any], Any, set[str]]:
    scored = {(e.split, e.plan, e.n_samples): e.scores for e in evaluations.for_job(db, number)}
    ended = stages.stages(db, number)
    return jobs.get(db, number).state, scored, ended["verify"].payload, set(ended)


@pytest.mark.parametrize("gpus", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_jobs_find_does_not_depend_on_workers_or_on_jobs_beside_them(tmp_path: Path, gpus: bool) -> None:
    alone = serve(tmp_path / "alone.db", SimulatedCluster(1, 1, driver=False), at_once=1)
    cluster = SimulatedCluster(2, 8, gpus=gpus, driver=False)
    assert serve(tmp_path / "shared.db", cluster, at_once=3) == alone
    assert beside(cluster) == []  # measurements were alone on their device
    timed = [each for each in cluster.done if type(each.request).__name__ == "CompareLatency"]
    together = [o for n, one in enumerate(timed) for o in timed[:n] if one.began < o.ends and o.began < one.ends]
    assert together, "measured at the same time on other devices"


def test_halves_of_batches_find_the_same_on_many_workers_and_in_a_job_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = serve(tmp_path / "alone.db", SimulatedCluster(1, 1, driver=False), count=1, **HALVES)
    assert serve(tmp_path / "many.db", SimulatedCluster(2, 8, driver=False), count=1, **HALVES) == alone
    stored = []

    def record(*arguments: Any, **named: Any) -> Any:
        stored.append(arguments)
        if len(stored) == 70:
            raise OSError("the disk is gone")
        return kept(*arguments, **named)

    kept = evaluations.record
    monkeypatch.setattr(evaluations, "record", record)
    with pytest.raises(KeyError, match="verify"):
        serve(tmp_path / "broken.db", SimulatedCluster(2, 8, driver=False), count=1, **HALVES)
    before = len(stored)
    fewer = SimulatedCluster(1, 5, driver=False)
    with Database.open(f"sqlite:///{tmp_path / 'broken.db'}") as db, fewer.in_place_of_ray():
        jobs.resume(db, 1)
        assert Server(db, progress=lambda job: Progress()).run(once=True) == 1
        assert [_outcome(db, 1)] == alone
    assert 70 <= before < len(stored) == len(alone[0][1]) + 1  # nothing was evaluated again


def test_jobs_that_share_workers_keep_them_busier(tmp_path: Path) -> None:
    shares = []
    for at_once in (1, 3):
        cluster = SimulatedCluster(1, 8, driver=False)
        serve(tmp_path / f"{at_once}.db", cluster, at_once=at_once)
        shares.append(cluster.busy_share())
    assert shares[1] > 1.3 * shares[0]
