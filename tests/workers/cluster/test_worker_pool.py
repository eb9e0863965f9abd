from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from workers.cluster.connection import connect
from workers.cluster.pool import WorkerPool
from workers.cluster.settings import ClusterSettings
from workers.errors import ClusterError, ModelError, TaskError
from workers.evaluation.plain import PlainEvaluator
from workers.messages import (
    CompareLatency,
    EvaluatePlans,
    EvaluationFailure,
    Evaluations,
    Failure,
    LatencyComparison,
    LatencyProfile,
    MeasureRedundancy,
    ModelSource,
    ProfileLatency,
    RedundancySums,
    Workload,
)
from workers.models.loading import LoadedModel
from workers.redundancy.sums import merge
from workers.runtime.plan import SkipPlan
from workers.tasks import Task, load_spec, load_task

# Half a CPU each, so that a second pool fits beside the first on the two CPUs of the cluster.
SETTINGS = ClusterSettings(workers=2, cpus_per_worker=0.5, max_attempts=2)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(load_spec("easy-vqa").with_splits(calibration=6, search=60, held_out=6))


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tiny_directory: Path, task: Task) -> Iterator[WorkerPool]:
    with WorkerPool(SETTINGS, ModelSource(str(tiny_directory)), task) as pool:
        yield pool
    assert ray.is_initialized()  # the pool leaves a connection alone that it did not make


def evaluate(plan: str, split: str, n_samples: int | None = None) -> EvaluatePlans:
    return EvaluatePlans((plan,), split, n_samples, path="plain")


def test_results_equal_those_of_this_process(pool: WorkerPool, tiny: LoadedModel, task: Task) -> None:
    assert [info.worker for info in pool.info] == [0, 1]
    assert len({info.process for info in pool.info} | {os.getpid()}) == 3
    assert {info.fingerprint for info in pool.info} == {tiny.fingerprint}
    assert pool.info[0].allowed_actions == ("RFBSAMQP",) * 6
    assert (pool.info[0].threads, pool.info[0].dtype, pool.info[0].num_layers) == (1, "float32", 6)
    plans = ["RRRRRR", "RSRRRR", "RRSSRR", "FFFRRR"]
    results = dict(pool.run([evaluate(plan, "search", 24) for plan in plans]))
    here = PlainEvaluator(tiny, task)
    for index, plan in enumerate(plans):
        expected = here.evaluate(SkipPlan.parse(plan), "search", 24)
        found = results[index]
        assert isinstance(found, Evaluations)
        assert [replace(each, seconds=0) for each in found.results] == [replace(expected, seconds=0)]


def test_shards_and_timings_in_one_run(pool: WorkerPool, task: Task) -> None:
    requests = [
        MeasureRedundancy(("distance",), 0, 2),
        ProfileLatency(repeats=2, workload=Workload(1, 2)),
        MeasureRedundancy(("distance",), 1, 2),
        CompareLatency("RSRRRR", Workload(1, 2), precision=1.0, max_seconds=5),
    ]
    results = dict(pool.run(requests))
    sums = [results[0], results[2]]
    assert all(isinstance(part, RedundancySums) for part in sums)
    merged = merge([part for part in sums if isinstance(part, RedundancySums)])
    assert merged.samples == len(task.calibration)
    assert isinstance(results[1], LatencyProfile) and isinstance(results[3], LatencyComparison)


def test_timing_requests_run_alone(pool: WorkerPool) -> None:
    """While one runs, none other is handed out, and it waits for those that run."""
    evaluation = evaluate("RRRRRR", "search", 64)
    timing = CompareLatency("RSRRRR", Workload(1, 2), precision=0.0, max_seconds=0.5)
    numbers = [pool.submit(request) for request in (evaluation, timing, evaluation, evaluation)]
    order = []
    for _ in numbers:
        done = pool.next_done()
        assert done is not None and not isinstance(done[1], Failure)
        order.append(numbers.index(done[0]))
    assert order.index(1) == 1  # after the evaluation before it, before both that came later


def test_an_error_in_a_request_is_its_failure_alone(pool: WorkerPool) -> None:
    requests = [
        CompareLatency("RRR", Workload(1, 2)),
        evaluate("RRRRRR", "test", 2),
        evaluate("RRRRRR", "search", 2),
    ]
    results = dict(pool.run(requests))
    assert isinstance(results[2], Evaluations) and not isinstance(results[2].results[0], EvaluationFailure)
    reasons = [result.reason for result in (results[0], results[1]) if isinstance(result, Failure)]
    assert reasons[0].startswith("PlanError: the plan has 3 layers")
    assert "no split 'test'" in reasons[1]
    assert all(isinstance(r, Failure) and r.attempts == 1 for r in (results[0], results[1]))


def test_nothing_pending_and_nothing_finished_in_time(pool: WorkerPool) -> None:
    assert pool.next_done() is None
    number = pool.submit(evaluate("RRRRRR", "search"))
    assert pool.next_done(timeout=0.01) is None and pool.pending == 1
    done = pool.next_done()
    assert done is not None and done[0] == number and pool.pending == 0


def test_what_is_wrong_before_any_worker_starts(ray_cluster: None, tiny_directory: Path, task: Task) -> None:
    model = ModelSource(str(tiny_directory))
    with pytest.raises(TaskError, match="no such task file"):
        WorkerPool(SETTINGS, model, "nothing")
    with pytest.raises(ModelError, match="no such directory, nor a bundled model"):
        WorkerPool(SETTINGS, ModelSource("/nowhere"), task).start()
    with pytest.raises(ClusterError, match="9 workers with 1 CPUs and 0 GPUs each need 9 CPUs, the cluster has 2"):
        WorkerPool(ClusterSettings(workers=9), model, task).start()
    with pytest.raises(ClusterError, match="need 1 GPUs, the cluster has 0; missing 1"):
        WorkerPool(ClusterSettings(workers=1, gpus_per_worker=1), model, task).start()
    with pytest.raises(ClusterError, match="to run on a GPU; the cluster has 0"):
        WorkerPool(ClusterSettings(), replace(model, device="cuda"), task).start()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "cluster.workers must be at least 1, not 0"),
        ({"max_attempts": -1}, "cluster.max_attempts must be at least 1"),
        ({"request_timeout_seconds": 0}, "cluster.request_timeout_seconds must be above 0"),
        ({"cpus_per_worker": -0.5}, "must not be below 0"),
    ],
)
def test_settings_are_checked(change: dict[str, float], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        ClusterSettings(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["somewhere", "http://127.0.0.1:1", "ray://127.0.0.1", "127.0.0.1:99999"])
def test_an_address_of_no_known_form_is_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match=r"give local, auto, host:port, or ray://host:port"):
        connect(ClusterSettings(address=address))


def test_an_address_where_no_cluster_answers_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"cluster {closed}: nothing answers"):
            connect(ClusterSettings(address=closed))
        listener.listen()
        threading.Thread(target=_accept_and_say_nothing, args=(listener,), daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"cluster {closed}: no Ray cluster answers there within 3 s"):
            connect(ClusterSettings(address=closed, connect_timeout_seconds=3.0))
        assert time.monotonic() - started < 15


def _accept_and_say_nothing(listener: socket.socket) -> None:
    connections = []
    while True:
        try:
            connections.append(listener.accept())
        except OSError:
            return


DRIVER = """
import sys
from workers.cluster.settings import ClusterSettings
from workers.errors import ClusterError
from workers.messages import EvaluatePlans, ModelSource
from workers.cluster.pool import WorkerPool
from workers.tasks import load_spec, load_task

task = load_task(load_spec("easy-vqa").with_splits(calibration=2, search=2, held_out=2))
try:
    with WorkerPool(ClusterSettings(address=sys.argv[1], workers=1), ModelSource(sys.argv[2]), task) as pool:
        print(*(type(result).__name__ for _, result in pool.run([EvaluatePlans(("RRRRRR",), "search")])))
except ClusterError as error:
    print(error)
"""


STOPPING = """
import os, signal, sys
from workers.cluster.connection import connect, disconnect
from workers.cluster.settings import ClusterSettings

def stop(number, frame):
    print("stopped", moment, flush=True)

signal.signal(signal.SIGTERM, stop)
for moment in ("connected", "disconnected"):
    connect(ClusterSettings(), cpus=1) if moment == "connected" else disconnect()
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_a_process_stops_by_is_its_own_whether_connected_or_not(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": root}
    command = [sys.executable, "-c", STOPPING]
    done = subprocess.run(command, check=False, env=plain, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.stdout.split("\n"), done.returncode) == (["stopped connected", "stopped disconnected", ""], 0), done


@pytest.mark.slow
def test_a_running_cluster_is_joined_with_its_token_only(tiny_directory: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    root = str(Path(__file__).resolve().parents[3])
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": root}
    token = plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--block"]
    options = ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need a short path
    head = subprocess.Popen(
        [*start, *options, f"--temp-dir={directory}"], env=token, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_port(port)
        command = [sys.executable, "-c", DRIVER, f"127.0.0.1:{port}", str(tiny_directory)]

        def drive(environment: dict[str, str]) -> str:
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

        assert drive(token) == "Evaluations"
        assert "asks for a token; set RAY_AUTH_MODE=token" in drive(plain | {"RAY_AUTH_MODE": "disabled"})
    finally:
        head.terminate()
        head.wait(timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


def wait_for_port(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the head node did not start")
