"""A job whose every figure is known beforehand, written through storage as a driver writes it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import storage_builders
from sqlalchemy import insert, select

from storage.database import Database
from storage.pareto import Group
from storage.queue import jobs, leases, stages
from storage.queue.jobs import Job
from storage.records import lookup, measurements, plans, scores
from storage.records.lookup import ModelRecord, TaskRecord
from storage.records.measurements import ProfileRecord
from storage.records.plans import PlanFigures
from storage.schema import EvaluationRow

LAYERS = 8
SAMPLES = 40
WORKLOAD = "batch 1, 4 new tokens"
SETTINGS = "dtype=float32 attention=sdpa device=cpu torch=2.13.0"

# The specification of a job as an early version stored it: later fields are absent and must not be needed.
SPEC: dict[str, Any] = {
    "model": {"path": "models/tiny-llava", "revision": None},
    "task": "shapes",
    "actions": ["skip"],
    "constraint": {"max_accuracy_drop": 0.05, "confidence": 0.95, "min_accuracy": None},
    "search": {"evaluations": 12, "sampler": "tpe", "seed": 7},
}


IN_ENGINE = (
    storage_builders.engine_latency(1.082),
    storage_builders.engine_latency(1.043, concurrency=16, seconds_per_token=None, kv_cache_tokens=None),
)
"""What an engine took to serve the second of the published plans."""


def skipping(*layers: int, of: int = LAYERS) -> str:
    return "".join("S" if layer in layers else "R" for layer in range(of))


def scores_with(wrong: int, samples: int = SAMPLES) -> list[float]:
    """Scores of which the first ``wrong`` are 0."""
    return [0.0] * wrong + [1.0] * (samples - wrong)


def figures(plan: str, *, accuracy: float, speedup: float, meets: bool, **changes: Any) -> PlanFigures:
    values: dict[str, Any] = {
        "plan": plan,
        "n_samples": 321,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.031,
        "accuracy_high": min(1.0, accuracy + 0.027),
        "dense_accuracy": 0.947,
        "difference": accuracy - 0.947,
        "difference_low": accuracy - 0.947 - 0.0123,
        "difference_high": accuracy - 0.947 + 0.0117,
        "confidence": 0.95,
        "dense_latency_seconds": 0.0471,
        "latency_seconds": 0.0471 / speedup,
        "speedup": speedup,
        "speedup_low": speedup - 0.041,
        "speedup_high": speedup + 0.037,
        "dense_kv_cache_bytes": 8000,
        "kv_cache_bytes": 1000 * plan.count("R"),
        "layers_touched": sum(letter != "R" for letter in plan),
        "secondary": {"meets_constraint": meets, "images": 55, "latency_pairs": 71, "difference_confidence": 0.975},
    }
    return PlanFigures(**(values | changes))


def queued(db: Database, **changes: Any) -> Job:
    return jobs.submit(db, {**SPEC, **changes}, "spec-hash-of-the-test")


def claimed(db: Database, **changes: Any) -> Job:
    job = leases.claim(db, "driver-1", 600, queued(db, **changes).id)
    assert job is not None
    return job


def identities(db: Database, layers: int = LAYERS) -> dict[str, int]:
    model = ModelRecord(
        name="models/tiny-llava",
        fingerprint="f1e2d3c4b5a6",
        family="llava",
        num_layers=layers,
        parameters=1_234_567,
    )
    task = TaskRecord(
        name="shapes",
        task_hash="task-hash-of-the-test",
        split_seed=3,
        calibration_size=16,
        search_size=SAMPLES,
        held_out_size=321,
    )
    return {"model_id": lookup.ensure_model(db, model), "task_id": lookup.ensure_task(db, task)}


def record_profile(db: Database, job: Job, ids: dict[str, int], layers: int = LAYERS) -> None:
    running = tuple(0.004 + 0.0001 * layer for layer in range(layers))
    profile = ProfileRecord(
        **ids,
        device="test device, 1 thread",
        workload=WORKLOAD,
        prompt_tokens=77,
        dense_latency_seconds=0.05 + sum(running),
        layer_seconds={"R": running, "S": (0.0,) * layers},
        relative_error=0.0123,
    )
    measurements.record_profile(db, job, profile)


def record_redundancy(db: Database, job: Job, ids: dict[str, int], layers: int = LAYERS) -> None:
    rows = [
        measurements.Redundancy(layer, group, "cosine_distance", 0.01 * (layer + 1) + offset, 0.0007, 1234)
        for group, offset in (("vision", 0.0), ("text", 0.05), ("all", 0.02))
        for layer in range(layers)
    ]
    measurements.record_redundancy(db, job, **ids, calibration_hash="calibration", measurements=rows)


def record_scores(
    db: Database, job: Job, ids: dict[str, int], plan: str, values: Sequence[float], split: str = "search", **more: Any
) -> None:
    storage_builders.record(
        db, job, **ids, plan=plan, split=split, split_hash=f"hash of {split}", scores=values, settings=SETTINGS,
        result={"seconds": 1.5}, **more,
    )  # fmt: skip


def finished_job(db: Database, tried: int = 12, *, dense_warning: str = "", **changes: Any) -> int:
    """A job that succeeded: profile, redundancy, ``tried`` plans, one failure, three published plans."""
    job = claimed(db, **changes)
    ids = identities(db)
    record_profile(db, job, ids)
    record_redundancy(db, job, ids)
    record_scores(db, job, ids, "R" * LAYERS, scores_with(2))
    chosen = random.Random(0)
    plans_tried = [skipping(layer) for layer in range(LAYERS)]
    while len(plans_tried) < tried:
        plan = "".join(chosen.choice("RS") for _ in range(LAYERS))
        if "S" in plan and "R" in plan and plan not in plans_tried:
            plans_tried.append(plan)
    for number, plan in enumerate(plans_tried[:tried]):
        record_scores(db, job, ids, plan, scores_with(0, 10) if number % 4 == 3 else scores_with(2 + number % 5))
    storage_builders.record_failure(
        db, job, **ids, plan=skipping(0, 1, 2, 3), split="search", split_hash="hash of search", n_samples=10,
        reason="NaN in the logits", settings=SETTINGS,
    )  # fmt: skip
    device_id = lookup.ensure_device(db, "test device, 1 thread")
    to_publish = [
        figures(skipping(2, 3, 4), accuracy=0.944, speedup=1.523, meets=True),
        figures(skipping(4), accuracy=0.951, speedup=1.131, meets=True, engine_latencies=IN_ENGINE),
        figures(skipping(1, 2, 3, 4), accuracy=0.811, speedup=1.871, meets=False),
    ]
    if dense_warning:
        to_publish = [replace(e, secondary={**e.secondary, "dense_warning": dense_warning}) for e in to_publish]
    group = Group(**ids, device_id=device_id, workload=WORKLOAD)
    published = plans.publish(db, job, group, figures=to_publish)
    best = next(plan.id for plan in published if plan.speedup == 1.523)
    outcome = {"trials": [{}] * (tried + 1), "failed": {}, "stopped_because": "the budget is spent"}
    stages.record_stage(db, job, "search", {"value": outcome})
    stages.record_stage(db, job, "publish", {"value": {"plan_ids": [], "best": best, "reason": ""}})
    counters = {"evaluations": tried + 1.0, "samples": 4321.0, "evaluation_seconds": 12.5, "failed_samples": 3.0}
    stages.add_counters(db, job, counters | {"near_ties": 17.0})
    leases.finish(db, job)
    return job.id


SEVERAL: dict[str, Any] = {
    "task": None,
    "tasks": [
        {"task": "shapes", "max_accuracy_drop": 0.01, "min_accuracy": None, "weight": 3.0},
        {"task": "counts", "max_accuracy_drop": 0.03, "min_accuracy": 0.7, "weight": 1.0},
    ],
    "collateral": {"text": "general.txt", "max_kl": 0.4},
}
"""What a job file of two tasks and a text is stored as."""


def loss(name: str, lost: float, low: float, high: float, max_loss: float | None, **changes: Any) -> dict[str, Any]:
    """A held-out loss as a job stores it, of a dense model at 0.92."""
    own = {"name": name, "n_samples": 100, "loss": lost, "loss_low": low, "loss_high": high, "max_loss": max_loss}
    accuracy = 0.92 - lost
    own |= {"accuracy": accuracy, "accuracy_low": accuracy - 0.031, "accuracy_high": accuracy + 0.027}
    own |= {"dense_accuracy": 0.92, "min_accuracy": None, "weight": 1.0, "is_text": False, "within": True}
    return own | changes


LOSSES = [
    loss("counts", 0.02, 0.01, 0.025, 0.03, min_accuracy=0.7),
    loss("shapes", 0.01, 0.0, 0.012, 0.01, weight=3.0, within=False),
    loss("text", 0.2, 0.1, 0.25, 0.4, weight=0.0, is_text=True),
]


def task_row(db: Database, name: str) -> int:
    sizes = {"calibration_size": 16, "search_size": SAMPLES, "held_out_size": 321}
    return lookup.ensure_task(db, TaskRecord(name=name, task_hash=f"task-hash of {name}", split_seed=3, **sizes))


def begun_joint_job(db: Database, **changes: Any) -> tuple[Job, dict[str, int]]:
    """A running job of several tasks that has scored the dense model, with the ids of its model and joint task."""
    job = claimed(db, **(SEVERAL | changes))
    ids = identities(db)
    for name in ("counts", "shapes", "text"):
        own = {"model_id": ids["model_id"], "task_id": task_row(db, name)}
        key = {"split": "search", "split_hash": f"hash of {name}", "settings": SETTINGS}
        storage_builders.record(db, job, **own, **key, plan="R" * LAYERS, scores=scores_with(2))
    return job, ids | {"task_id": task_row(db, "counts+shapes")}


def joint_job(db: Database, **changes: Any) -> int:
    """A job of several tasks that succeeded: one plan tried and published, with its losses."""
    job, ids = begun_joint_job(db, **changes)
    record_profile(db, job, ids)
    plan = skipping(2, 3)
    goals = [
        {"name": each["name"], "n_samples": SAMPLES, "accuracy": each["accuracy"], "loss": each["loss"], "error": 0.01}
        | {"limit": each["max_loss"], "weight": each["weight"], "is_text": each["is_text"]}
        for each in LOSSES
    ]
    tried = {"plan": plan, "compensation": "none", "n_samples": 3 * SAMPLES, "accuracy": 0.9, "difference": -0.01}
    trials = [tried | {"complete": True, "goals": goals}]
    outcome = {"trials": trials, "failed": {}, "stopped_because": "the budget is spent", "n_samples": 3 * SAMPLES}
    stages.record_stage(db, job, "search", {"value": outcome})
    group = Group(**ids, device_id=lookup.ensure_device(db, "test device, 1 thread"), workload=WORKLOAD)
    secondary = {"meets_constraint": True, "difference_confidence": 0.975, "goals": LOSSES}
    found = figures(plan, accuracy=0.9, speedup=1.3, meets=True, secondary=secondary)
    (published,) = plans.publish(db, job, group, figures=[found])
    stages.record_stage(db, job, "publish", {"value": {"plan_ids": [published.id], "best": published.id, "reason": ""}})
    leases.finish(db, job)
    return job.id


def record_many(db: Database, job_id: int, number: int) -> None:
    """Further plans of a job, in one statement: every plan of the model in as many compensations as it takes."""
    chosen = random.Random(1)
    with db.transaction() as session:
        first = session.scalars(select(EvaluationRow).where(EvaluationRow.job_id == job_id).limit(1)).one()
        same = {"job_id": job_id, "model_id": first.model_id, "task_id": first.task_id, "settings": SETTINGS}
        same |= {"split": "search", "split_hash": "hash of search", "secondary": {}, "seconds": 1.0}
        rows = []
        for place in range(number):
            plan = format(1 + place % (2**LAYERS - 2), f"0{LAYERS}b").replace("0", "R").replace("1", "S")
            n = chosen.choice((10, SAMPLES))
            values = scores_with(min(n, chosen.randint(0, 3 * plan.count("S"))), n)
            rows.append(
                same
                | {"plan": plan, "compensation": f"linear ridge={place // 254 + 1}", "n_samples": n}
                | {"accuracy": sum(values) / n, "scores": scores.pack(values)}
            )
        session.execute(insert(EvaluationRow), rows)
