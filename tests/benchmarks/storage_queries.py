"""How fast the database answers, over a million evaluations and 100,000 plans, on both engines, with query plans.

    python tests/benchmarks/storage_queries.py [--engine NAME] [--evaluations N] [--plans N] [--plans-shown]

Two fifths of the plans belong to one model, task, device and workload, so that the fullest group is a hard case.
"Call" is the whole public function, with what Python does before and after; "database" the statements alone.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from postgresql_server import PostgresqlServer, find_binaries  # noqa: E402
from sqlalchemy import event, insert, text  # noqa: E402

from storage import evaluations, jobs, measurements, pareto, plans, scores  # noqa: E402
from storage.database import Database  # noqa: E402
from storage.schema import EvaluationRow, JobRow, PlanRow  # noqa: E402

MODELS, TASKS, DEVICES, WORKLOADS, JOBS, LAYERS = 20, 4, 4, 2, 500, 30
REPEATS = 200
BATCH = 20_000


def plan_text(rng: random.Random) -> str:
    return "".join(rng.choices("RSBF", (6, 2, 1, 1), k=LAYERS))


def add_people(db: Database) -> tuple[list[int], list[int], list[int]]:
    models = [
        measurements.ensure_model(
            db, name=f"models/m{n}", fingerprint=f"{n:08x}", family="llava", num_layers=LAYERS, parameters=10**9
        )
        for n in range(MODELS)
    ]
    tasks = [
        measurements.ensure_task(
            db, name=f"task-{n}", data_hash="d", split_seed=0, calibration_size=1, search_size=2, held_out_size=3
        )
        for n in range(TASKS)
    ]
    devices = [measurements.ensure_device(db, name=f"device {n}") for n in range(DEVICES)]
    with db.transaction() as session:
        rows = [
            {"spec": {}, "spec_hash": str(n), "state": "succeeded", "precedence": 0, "attempt": 1, "attempt_limit": 5,
             "progress": {}}
            for n in range(JOBS)
        ]  # fmt: skip
        session.execute(insert(JobRow), rows)
    return models, tasks, devices


def evaluation_rows(rng: random.Random, count: int, models: list[int], tasks: list[int]) -> Iterator[dict]:
    packed = scores.pack([1, 0] * 250)
    for number in range(count):
        job = number % JOBS
        yield {
            "job_id": job + 1, "model_id": models[job % MODELS], "task_id": tasks[job // MODELS % TASKS],
            "plan": plan_text(rng), "compensation": "none", "settings": "", "split": "search",
            "split_hash": f"split-{job % 3}", "rung": number % 7, "n": 500, "accuracy": 0.5, "scores": packed,
            "secondary": {}, "seconds": 1.0, "failure": None, "reused_from": None, "recorded_at": datetime.now(UTC),
        }  # fmt: skip


def plan_rows(
    rng: random.Random, count: int, models: list[int], tasks: list[int], devices: list[int]
) -> Iterator[dict]:
    for number in range(count):
        if number % 5 < 2:
            group = (models[0], tasks[0], devices[0], "batch=1 new=4")
        else:
            workload = f"batch={rng.randrange(WORKLOADS) + 1} new=4"
            group = (rng.choice(models), rng.choice(tasks), rng.choice(devices), workload)
        speedup = 1 + rng.random() * 1.5
        loss = max(0.0, (speedup - 1) ** 2 * rng.uniform(0.02, 0.3) + rng.gauss(0, 0.005))
        width = rng.uniform(0.005, 0.02)
        yield {
            "job_id": number % JOBS + 1, "model_id": group[0], "task_id": group[1], "device_id": group[2],
            "workload": group[3], "plan": plan_text(rng), "compensation": "none", "origin": "measured", "n": 2000,
            "accuracy": 0.95 - loss, "accuracy_low": 0.94 - loss, "accuracy_high": 0.96 - loss,
            "dense_accuracy": 0.95, "difference": -loss, "difference_low": -loss - width,
            "difference_high": -loss + width, "confidence": 0.95, "dense_seconds": 1.0,
            "seconds": rng.uniform(0.98, 1.02) / speedup, "speedup": speedup, "speedup_low": speedup - 0.05,
            "speedup_high": speedup + 0.05, "dense_kv_cache_bytes": 4096, "kv_cache_bytes": 2048,
            "layers_touched": 9, "secondary": {}, "on_front": False, "contender": False,
            "published_at": datetime.now(UTC),
        }  # fmt: skip


def load(db: Database, table: type, rows: Iterator[dict]) -> None:
    batch: list[dict] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            with db.transaction() as session:
                session.execute(insert(table), batch)
            batch = []
    if batch:
        with db.transaction() as session:
            session.execute(insert(table), batch)


def fill(db: Database, evaluation_count: int, plan_count: int) -> None:
    rng = random.Random(0)
    models, tasks, devices = add_people(db)
    load(db, EvaluationRow, evaluation_rows(rng, evaluation_count, models, tasks))
    load(db, PlanRow, plan_rows(rng, plan_count, models, tasks, devices))
    with db.transaction() as session:
        groups = {group for job in range(1, JOBS + 1) for group in pareto.groups_of_job(session, job)}
        start = time.perf_counter()
        pareto.recompute(session, pareto.Group(models[0], tasks[0], devices[0], "batch=1 new=4"))
        print(f"front of the fullest group computed in {time.perf_counter() - start:.2f} s")
        for group in sorted(groups):
            pareto.recompute(session, group)
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE" if db.dialect == "sqlite" else "VACUUM ANALYZE"))


class Recorder:
    """Keeps the statements that a call sends, and the time that the driver takes over them."""

    def __init__(self, db: Database) -> None:
        self.statements: list[tuple[str, object]] = []
        self.seconds = 0.0
        event.listen(db.engine, "before_cursor_execute", self._before)
        event.listen(db.engine, "after_cursor_execute", self._after)

    def _before(self, connection, cursor, statement, parameters, context, executemany):
        self._start = time.perf_counter()

    def _after(self, connection, cursor, statement, parameters, context, executemany):
        self.seconds += time.perf_counter() - self._start
        self.statements.append((statement, parameters))

    def measure(self, call: Callable[[], object]) -> tuple[list[float], list[float]]:
        calls, database = [], []
        for _ in range(REPEATS):
            self.statements, self.seconds = [], 0.0
            start = time.perf_counter()
            call()
            calls.append(time.perf_counter() - start)
            database.append(self.seconds)
        return calls, database


def explain(db: Database, statement: str, parameters: object) -> str:
    prefix = "EXPLAIN QUERY PLAN " if db.dialect == "sqlite" else "EXPLAIN (ANALYZE, BUFFERS) "
    with db.engine.connect() as connection:
        rows = connection.exec_driver_sql(prefix + statement, parameters).all()
    return "\n".join("    " + str(row[-1]) for row in rows)


def measure(db: Database, show_plans: bool) -> None:
    hot = ("models/m0", "task-0")
    one = {"device": "device 0", "workload": "batch=1 new=4"}
    with db.reading() as session:
        counts = {
            table: session.execute(text(f"SELECT count(*) FROM {table}")).scalar()
            for table in ("evaluations", "plans", "plans WHERE contender", "plans WHERE on_front")
        }
        known = session.query(EvaluationRow).order_by(EvaluationRow.id.desc()).first()
        assert known is not None
        key = {
            "model_id": known.model_id,
            "task_id": known.task_id,
            "split_hash": known.split_hash,
            "plan": known.plan,
            "rung": known.rung,
        }
        job_id = known.job_id
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    recorder = Recorder(db)
    queries: dict[str, Callable[[], object]] = {
        "best, fullest group": lambda: plans.best(db, *hot, **one),
        "best, drop at most 0.02": lambda: plans.best(db, *hot, **one, max_accuracy_drop=0.02),
        "best, four constraints": lambda: plans.best(
            db, *hot, **one, max_accuracy_drop=0.05, min_accuracy=0.9, min_speedup=1.2, max_latency=0.8
        ),
        "best, none meets them": lambda: plans.best(db, *hot, **one, max_accuracy_drop=0.0, min_speedup=2.4),
        "best, any device and workload": lambda: plans.best(db, *hot, max_accuracy_drop=0.02),
        "best, ordinary model": lambda: plans.best(db, "models/m7", "task-2", max_accuracy_drop=0.02),
        "list, fullest group, 50 fastest": lambda: plans.list_plans(db, *hot, **one),
        "list, on the front": lambda: plans.list_plans(db, *hot, **one, on_front=True),
        "list, drop at most 0.02": lambda: plans.list_plans(db, *hot, **one, max_accuracy_drop=0.02),
        "list, one model, most accurate": lambda: plans.list_plans(db, "models/m0", sort="accuracy"),
        "list, everything, newest": lambda: plans.list_plans(db, sort="newest"),
        "list, everything, fastest": lambda: plans.list_plans(db),
        "evaluation found across jobs": lambda: evaluations.find(db, **key),
        "evaluations of a job (2,000)": lambda: evaluations.for_job(db, job_id),
        "idle claim": lambda: jobs.claim(db, "benchmark", 60),
    }
    print(f"{'query':34} {'call median':>12} {'call p95':>10} {'database median':>16} {'database p95':>13}   (ms)")
    for name, call in queries.items():
        call()
        calls, database = recorder.measure(call)
        figures = [1000 * pick(times) for times in (calls, database) for pick in (statistics.median, p95)]
        print(f"{name:34} {figures[0]:12.2f} {figures[1]:10.2f} {figures[2]:16.2f} {figures[3]:13.2f}", flush=True)
        if show_plans and name.startswith(("best", "list, fullest", "evaluation found")):
            statement, parameters = max(recorder.statements, key=lambda s: "ORDER BY" in s[0] and "LIMIT" in s[0])
            main = [s for s in recorder.statements if "plans.speedup" in s[0] or "FROM evaluations" in s[0]]
            print(explain(db, *(main[0] if main else (statement, parameters))))


def p95(times: list[float]) -> float:
    return sorted(times)[int(0.95 * len(times))]


@contextmanager
def opened(engine: str) -> Iterator[Database]:
    if engine == "sqlite":
        with tempfile.TemporaryDirectory() as folder, Database.open(f"sqlite:///{folder}/benchmark.db") as db:
            yield db
        return
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("no PostgreSQL binaries found")
    server = PostgresqlServer(binaries)
    try:
        with Database.open(server.url(), migrate=True) as db:
            yield db
    finally:
        server.stop()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--engine", choices=["sqlite", "postgresql"], action="append")
    arguments.add_argument("--evaluations", type=int, default=1_000_000)
    arguments.add_argument("--plans", type=int, default=100_000)
    arguments.add_argument("--plans-shown", action="store_true", help="print the query plans")
    options = arguments.parse_args()
    for engine in options.engine or ["sqlite", "postgresql"]:
        with opened(engine) as db:
            with db.engine.connect() as connection:
                version = ".".join(map(str, connection.dialect.server_version_info or ()))
            print(f"\n{engine} {version}")
            start = time.perf_counter()
            fill(db, options.evaluations, options.plans)
            print(f"filled in {time.perf_counter() - start:.0f} s")
            measure(db, options.plans_shown)


if __name__ == "__main__":
    main()
