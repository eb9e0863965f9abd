"""What a job takes over from others, and what it publishes where it went on elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import in_process
import pytest
import yaml
from storage_builders import figures

from optimizer.errors import UsageFault
from optimizer.job.inputs import prepare
from optimizer.job.sections import ConstraintSpec
from optimizer.stages import publish, warm_start
from optimizer.stages.context import JobContext
from optimizer.stages.verify import Finalist
from optimizer.verification.verdict import verify
from storage.database import Database
from storage.pareto import Group
from storage.records import lookup, plans
from workers.messages import LatencyComparison, Workload

FAST, CAREFUL = "R" * 8 + "S" * 4, "R" * 10 + "S" * 2


def published(context: JobContext, task_id: int, plan: str) -> None:
    device = lookup.ensure_device(context.db, "cpu")
    plans.publish(context.db, context.job, Group(context.model_id, task_id, device, "w"), [figures(plan)])


def test_plans_that_were_chosen_with_samples_held_out_here_are_not_taken_over(
    store: Database, worker: in_process.OneWorker
) -> None:
    sizes = {"calibration": 6, "search": 8, "held_out": 4, "unit": "samples"}
    before = in_process.context(store, worker, in_process.spec(splits=sizes))
    now = in_process.context(store, worker, in_process.spec())
    assert before.task_id != now.task_id  # the same images, dealt out otherwise
    published(before, before.task_id, FAST)
    assert warm_start.choose(now).plans == ()
    another = replace(lookup.task(store, now.task_id), name="another", task_hash="other", data_hash="other")
    unknown = replace(another, name=now.task.name, task_hash="older", data_hash="")  # by an earlier version
    for record, plan in ((another, CAREFUL), (unknown, FAST)):
        published(before, lookup.ensure_task(store, record), plan)
    again = in_process.context(store, worker, in_process.spec())
    assert warm_start.choose(again).plans == ((CAREFUL, "none"),)


def timed(plan: str, device: str, seconds: float) -> LatencyComparison:
    return LatencyComparison(plan, device, Workload(), 2 * seconds, seconds, 2.0, 1.9, 2.1, 10, 8, 4)


def test_finalists_that_were_timed_on_several_devices_are_published_under_their_own(
    store: Database, worker: in_process.OneWorker
) -> None:
    context = in_process.context(store, worker, in_process.spec())
    verdicts = verify(
        [1.0] * 8,
        {FAST: [1.0] * 7 + [0.0], CAREFUL: [1.0] * 8},
        [*"abcdefgh"],
        ConstraintSpec(max_accuracy_drop=1),
        seed=0,
    )
    finalists = tuple(Finalist(verdict) for verdict in verdicts)
    measured = {
        each.candidate: timed(each.verdict.plan, device, seconds)
        for each, device, seconds in zip(finalists, ("CPU A", "CPU B"), (0.1, 0.4), strict=True)
    }
    found = publish.run(context, finalists, publish.Measured(measured))
    rows = [plans.get(store, number) for number in found.plan_ids]
    assert [(row.plan, row.device, row.latency_seconds) for row in rows] == [
        (FAST, "CPU A", 0.1),
        (CAREFUL, "CPU B", 0.4),
    ]
    assert found.best == rows[1].id and all(row.on_front for row in rows)  # each alone in its group


def test_other_tasks_are_told_apart_by_name(tmp_path: Path) -> None:
    source = {"kind": "easy-vqa"}
    task = {"source": source, "prompt": "{question}", "answer": {"kind": "short", "max_new_tokens": 3}}
    task |= {"metric": "exact_match", "splits": {"calibration": 1, "search": 1, "held_out": 2}, "name": "colours"}
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(task | {"prompt": f"{{question}} {number}"}))
    files = [str(tmp_path / f"{number}.yaml") for number in (1, 2)]
    with pytest.raises(UsageFault, match=r"collateral\.tasks: several tasks are named colours"):
        prepare(in_process.spec(collateral={"tasks": files}))
    assert len(prepare(in_process.spec(collateral={"tasks": files[:1]})).other_tasks) == 1
