"""Join several tasks into one, for everything that asks prompts without scoring the answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from workers.errors import TaskError

from .loading import Task, load_task
from .samples import Sample
from .spec import Answer, SplitSizes, TaskSpec
from .splits import SPLITS

JOINED_BY = "+"

APART = (("search", "held_out"), ("calibration", "held_out"), ("calibration", "search"))
"""Splits of two tasks that must share no image."""


def load_tasks(name: str | Path) -> Task:
    """Load a task (:func:`load_task`), or a joint one where bundled names or paths are joined by ``+``.

    Raises:
        TaskError: as :func:`load_task` and :func:`join_tasks`.
    """
    names = str(name).split(JOINED_BY)
    if Path(name).is_file() or len(names) == 1:
        return load_task(name)
    return join_tasks([load_task(each) for each in names])


def join_tasks(tasks: Sequence[Task]) -> Task:
    """Make one task of several, which are its ``parts``, in the order of their names.

    Its samples are those of the parts as they ask them, with ids ``part/id``; every beginning of a split holds the
    parts in proportion. Answers are free, as long as those of the part whose are longest. It is to be asked and fitted
    to: :meth:`Task.part` says what plans are scored on.

    Raises:
        TaskError: two tasks have one name, a name holds ``+``, their ``plain_prompt`` differ, or an image that one is
            searched on or calibrated on is in another split of another.
    """
    parts = tuple(sorted(tasks, key=lambda task: task.name))
    _require_joinable(parts)
    calibration, search, held_out = (_interleaved([(part, part.split(split)) for part in parts]) for split in SPLITS)
    return Task(
        spec=_joint_spec(parts),
        calibration=calibration,
        search=search,
        held_out=held_out,
        data_hash=joint_hash({part.name: part.data_hash for part in parts}),
        split_hash=joint_hash({part.name: part.split_hash for part in parts}),
        definition_hash=joint_hash({part.name: part.definition_hash for part in parts}),
        parts=parts,
    )


def asked_apart(task: Task) -> tuple[Task, ...]:
    """Return the tasks to ask one by one: a joint task's parts with its own ids of samples, or the task itself."""

    def renamed(part: Task, split: str) -> tuple[Sample, ...]:
        return tuple(replace(sample, id=_id(part, sample)) for sample in part.split(split))

    return tuple(
        replace(
            part,
            calibration=renamed(part, "calibration"),
            search=renamed(part, "search"),
            held_out=renamed(part, "held_out"),
        )
        for part in task.parts
    ) or (task,)


def joint_hash(hashes: Mapping[str, str]) -> str:
    """Return a joint task's hash from those of its parts by name."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def _joint_spec(parts: Sequence[Task]) -> TaskSpec:
    first = parts[0].spec
    units = {part.spec.splits.unit for part in parts}
    if len(units) == 1:
        sizes = {split: sum(getattr(part.spec.splits, split) for part in parts) for split in SPLITS}
    else:
        sizes = {split: sum(len(part.split(split)) for part in parts) for split in SPLITS}
    return first.changed(
        name=JOINED_BY.join(part.name for part in parts),
        description="",
        prompt="{question}",
        answer=Answer(kind="free", max_new_tokens=max(part.spec.answer.max_new_tokens for part in parts)),
        secondary=(),
        splits=SplitSizes(unit=units.pop() if len(units) == 1 else "samples", seed=first.splits.seed, **sizes),
    )


def _interleaved(samples: Sequence[tuple[Task, Sequence[Sample]]]) -> tuple[Sample, ...]:
    """Merge the parts' samples, each at its share of the way through its own part."""
    placed = [
        ((number + 0.5) / len(own), place, _asked(part, sample))
        for place, (part, own) in enumerate(samples)
        for number, sample in enumerate(own)
    ]
    return tuple(sample for *_, sample in sorted(placed, key=lambda each: each[:2]))


def _asked(part: Task, sample: Sample) -> Sample:
    return replace(sample, id=_id(part, sample), question=part.spec.ask(sample.question))


def _id(part: Task, sample: Sample) -> str:
    return f"{part.name}/{sample.id}"


def _require_joinable(parts: Sequence[Task]) -> None:
    if len(parts) < 2:
        raise TaskError("a joint task is made of two tasks at least")
    for name, times in Counter(part.name for part in parts).items():
        if JOINED_BY in name:
            raise TaskError(f"task {name}: a name with {JOINED_BY!r} cannot be joined; rename the task")
        if times > 1:
            raise TaskError(f"task {name} is given {times} times; give each task once, or rename one")
    for part in parts[1:]:
        if part.spec.plain_prompt != parts[0].spec.plain_prompt:
            raise TaskError(
                f"tasks {parts[0].name} and {part.name} have different plain_prompt; give both the same, which a "
                "processor without chat template needs"
            )
    require_apart(parts)


def require_apart(tasks: Sequence[Task]) -> None:
    """Refuse tasks of which one is searched on or calibrated on with images of another's later split.

    Raises:
        TaskError: naming two such tasks and their splits.
    """
    for one, other in permutations(tasks, 2):
        for own, theirs in APART:
            shared = {sample.image_key for sample in one.split(own)} & {s.image_key for s in other.split(theirs)}
            if shared:
                raise TaskError(
                    f"tasks {one.name} and {other.name} share {len(shared)} images between the {own} split of the "
                    f"first and the {theirs} split of the second; give both the same split seed and sizes, or other "
                    "data"
                )
