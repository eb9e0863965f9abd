"""Mark the published plans that are worth offering, per model, task, device, workload and mode.

Two sets are kept as flags on the plans, computed anew whenever the plans of a group change:

- ``on_front``: the Pareto front that people look at, held-out accuracy against measured speed-up; of lossless plans,
  which are all as accurate as dense, extra memory against measured speed-up.
- ``contender``: the plans that no other one equals or beats in *everything* that ``best`` can be asked for. Whatever
  the thresholds, if any plan meets them then a contender does and is no slower, so ``best`` reads only the few
  contenders of a group, however many plans there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from storage.schema import ModelRow, PlanRow, TaskRow

JOINED_BY = "+"
"""What stands between the names of several tasks that one job judges plans by."""
STANDALONE = "standalone"


@dataclass(frozen=True, order=True)
class Group:
    """The model, task, device, workload and mode within which plans are compared."""

    model_id: int
    task_id: int
    device_id: int
    workload: str
    mode: str = STANDALONE


@dataclass(frozen=True)
class Point:
    """The figures that plans are compared by; the less memory a lossless plan takes, the higher its ``accuracy``."""

    id: int
    speedup: float
    accuracy: float
    difference_low: float
    latency_seconds: float


def front(points: Iterable[Point]) -> set[int]:
    """Ids of the points that none beats in accuracy or speed-up without losing in the other; equals stay together."""
    members: set[int] = set()
    best = kept = float("-inf")  # the highest accuracy so far, and the speed-up that it was reached at
    for point in sorted(points, key=lambda each: (-each.speedup, -each.accuracy)):
        if point.accuracy > best or (point.accuracy == best and point.speedup == kept):
            members.add(point.id)
            best, kept = point.accuracy, point.speedup
    return members


def contenders(points: Iterable[Point]) -> set[int]:
    """Ids of the points that none equals or beats in every respect; of exact equals the oldest."""
    # In this order a point can only be beaten by one before it.
    ordered = sorted(points, key=lambda p: (-p.speedup, -p.accuracy, -p.difference_low, p.latency_seconds, p.id))
    members: list[Point] = []
    for point in ordered:
        if not any(
            other.accuracy >= point.accuracy
            and other.difference_low >= point.difference_low
            and other.latency_seconds <= point.latency_seconds
            for other in members
        ):
            members.append(point)
    return {point.id for point in members}


def groups_of_job(session: Session, job_id: int) -> list[Group]:
    """Return the groups that a job has published plans in, in a fixed order."""
    query = (
        select(PlanRow.model_id, PlanRow.task_id, PlanRow.device_id, PlanRow.workload, PlanRow.mode)
        .where(PlanRow.job_id == job_id)
        .distinct()
    )
    return sorted(Group(*row) for row in session.execute(query))


def lock(session: Session, groups: Sequence[Group]) -> None:
    """Let nobody else change these groups' plans until the end of the transaction."""
    # Locking the models suffices, and needs no rows of its own. Readers and foreign keys are not held up.
    for model_id in sorted({group.model_id for group in groups}):
        session.execute(select(ModelRow.id).where(ModelRow.id == model_id).with_for_update(key_share=True))


def recompute(session: Session, group: Group) -> None:
    """Bring both flags of a group's plans up to date; ``lock`` the group before changing its plans."""
    compared = {each.name: getattr(PlanRow, each.name) for each in fields(Point)}
    if group.mode != STANDALONE:
        compared["accuracy"] = -PlanRow.extra_bytes
    elif JOINED_BY in session.execute(select(TaskRow.name).where(TaskRow.id == group.task_id)).scalar_one():
        compared["accuracy"] = PlanRow.difference_low  # accuracies of several tasks are of each plan's worst one
    own = [getattr(PlanRow, name) == value for name, value in asdict(group).items()]
    query = select(*compared.values(), PlanRow.on_front, PlanRow.contender).where(*own)
    rows = session.execute(query).all()
    points = [Point(*row[: len(compared)]) for row in rows]
    on_front, contending = front(points), contenders(points)
    changed = [
        {"id": row.id, "on_front": row.id in on_front, "contender": row.id in contending}
        for row in rows
        if (row.on_front, row.contender) != (row.id in on_front, row.id in contending)
    ]
    if changed:
        session.execute(update(PlanRow), changed)
