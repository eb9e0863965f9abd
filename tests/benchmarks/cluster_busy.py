"""How busy whole jobs keep a large cluster: real service, stages, pool and database, workers that only take time.

    PYTHONPATH=.:tests/helpers python tests/benchmarks/cluster_busy.py             # 8 nodes of 8 GPUs: the cases below
    PYTHONPATH=.:tests/helpers python tests/benchmarks/cluster_busy.py --jobs 100 --at-once 8
    PYTHONPATH=.:tests/helpers python tests/benchmarks/cluster_busy.py --jobs 1 --trials 1000 --batch 64 --search 2048

Seconds of requests are those assumed for a 7B model on a GPU (`Costs` in tests/helpers/simulated_cluster.py), the
driver's are real. Busy is the time in requests over the time that all workers have, from the first request to the end
of the last job: with every stage, and with the ends, when few jobs are left. Of one job, the rest is told apart: before
its search (while one device is profiled), in the search, and behind it (while a device each times the finalists).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from simulated_cluster import SimulatedCluster, beside, job_fields

from optimizer.job.spec import JobSpec
from optimizer.service.runner import stored_spec
from optimizer.service.server import Server
from optimizer.stages.progress import Progress
from storage.database import Database
from storage.queue import jobs
from workers.messages import EvaluatePlans

LARGE = {"trials": 1000, "batch": 64, "search": 2048, "held_out": 4096}


def run(cluster: SimulatedCluster, count: int, at_once: int, sizes: dict[str, int]) -> dict[str, float]:
    """Serve so many queued jobs to their end; return figures of the cluster."""
    with (
        tempfile.TemporaryDirectory() as directory,
        cluster.in_place_of_ray(),
        Database.open(f"sqlite:///{directory}/skipplan.db") as db,
    ):
        for number in range(count):
            spec = JobSpec.model_validate(job_fields(number, Path(directory) / "artifacts", **sizes))
            jobs.submit(db, stored_spec(spec), f"job {number}")
        began = time.process_time()
        Server(db, progress=lambda job: Progress(), at_once=at_once).run(once=True)
        driver = time.process_time() - began
        ended = {job.id: (job.state, job.error) for job in jobs.list_jobs(db)}
    assert all(state in ("succeeded", "infeasible") for state, _ in ended.values()), ended
    assert not beside(cluster)
    return {
        "jobs": count,
        "at_once": at_once,
        "workers": cluster.size,
        "busy_share": cluster.busy_share(),
        **(idle_shares(cluster) if count == 1 else {}),
        "hours": cluster.seconds() / 3600,
        "worker_hours": sum(each.ends - each.began for each in cluster.done) / 3600,
        "requests": len(cluster.done),
        "driver_cpu_seconds_per_job": driver / count,
    }


def idle_shares(cluster: SimulatedCluster) -> dict[str, float]:
    """Shares of all workers' time in which nothing is asked of them: before one job's search, in it, and behind it."""
    asked = [(each, each.request) for each in cluster.done if isinstance(each.request, EvaluatePlans)]
    dense = ("R" * cluster.costs.layers,)
    search = [each for each, request in asked if request.split == "search" and request.plans != dense]
    first, last = min(each.began for each in cluster.done), max(each.ends for each in cluster.done)
    bounds = [first, min(each.began for each in search), max(each.ends for each in search), last]
    found = {}
    for name, (begins, ends) in zip(("before", "in", "behind"), pairwise(bounds), strict=True):
        busy = sum(max(0.0, min(each.ends, ends) - max(each.began, begins)) for each in cluster.done)
        found[f"idle_{name}_search"] = (cluster.size * (ends - begins) - busy) / (cluster.size * (last - first))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8, help="of each node")
    parser.add_argument("--cpu", action="store_true", help="the workers of a node share its processor")
    parser.add_argument("--jobs", type=int, default=None, help="one case of so many queued jobs")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--no-driver", action="store_true", help="the driver takes no time")
    for name in ("trials", "batch", "calibration", "search", "held-out"):
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    names = ("trials", "batch", "calibration", "search", "held_out")
    sizes = {name: getattr(options, name) for name in names if getattr(options, name)}
    cases = [(options.jobs, options.at_once, sizes)]
    if options.jobs is None:
        cases = [(1, 1, LARGE | sizes), (1, 1, sizes), (8, 8, sizes), (100, 8, sizes)]
    for count, at_once, wanted in cases:
        cluster = SimulatedCluster(options.nodes, options.workers, gpus=not options.cpu, driver=not options.no_driver)
        figures = run(cluster, count, at_once, wanted)
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
