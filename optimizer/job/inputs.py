"""What a job needs before anything is stored or started: its task's data and its model's files, checked and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.errors import UsageFault
from optimizer.job.spec import JobSpec
from workers.errors import ImageError, ModelError, TaskError
from workers.messages import ModelSource
from workers.models.checkpoint import check_checkpoint, find_checkpoint, fingerprint_checkpoint
from workers.tasks import Sample, Task, load_spec, load_task
from workers.tasks.images import ImageFile
from workers.tasks.splits import SPLITS


@dataclass(frozen=True)
class JobInputs:
    """A job whose inputs were found usable, and the hash under which an equal job is found again."""

    spec: JobSpec
    task: Task
    spec_hash: str
    fingerprint: str
    """The model's fingerprint; empty when its files are on a cluster's nodes only."""


def prepare(spec: JobSpec) -> JobInputs:
    """Load the task, open every image it needs, look at the model's files.

    Raises UsageFault naming the file, field, column, row or image.
    """
    task = load_job_task(spec)
    check_rungs(spec, task)
    check_images(task)
    fingerprint = model_fingerprint(spec)
    others = {f"collateral {number}": each for number, each in enumerate(collateral_hashes(spec))}
    return JobInputs(spec, task, spec.digest(task=task_hash(task), model=fingerprint, **others), fingerprint)


def load_job_task(spec: JobSpec) -> Task:
    """The job's task with the job's split sizes. Raises UsageFault."""
    try:
        sizes = {name: value for name, value in spec.splits.model_dump().items() if value is not None}
        return load_task(load_spec(spec.task).with_splits(**sizes))
    except TaskError as error:
        raise UsageFault(str(error)) from None


def collateral_hashes(spec: JobSpec) -> list[str]:
    """Hashes of the other tasks and of the general text that the job measures its plans on. Raises UsageFault."""
    try:
        hashes = [task_hash(load_task(name)) for name in spec.collateral.tasks]
    except TaskError as error:
        raise UsageFault(f"collateral.tasks: {error}") from None
    if spec.collateral.text is not None:
        try:
            hashes.append(hashlib.sha256(Path(spec.collateral.text).read_bytes()).hexdigest())
        except OSError as error:
            raise UsageFault(f"collateral.text: {spec.collateral.text} cannot be read: {error.strerror}") from None
    return hashes


def check_rungs(spec: JobSpec, task: Task) -> None:
    """Refuse rungs larger than the search split. Raises UsageFault."""
    largest = max(spec.search.rungs or (0,))
    if largest > len(task.search):
        raise UsageFault(f"search.rungs: {largest} is more than the {len(task.search)} samples of the search split")


def check_images(task: Task) -> None:
    """Decode every image of the three splits once, so that a bad one is named before hours of work.

    Raises UsageFault naming the first image that cannot be decoded.
    """
    images = {sample.image_key: sample for split in SPLITS for sample in task.split(split)}
    files = [sample for sample in images.values() if isinstance(sample.image, ImageFile)]
    with ThreadPoolExecutor() as threads:
        for problem in threads.map(_image_problem, files):
            if problem:
                threads.shutdown(wait=False, cancel_futures=True)
                raise UsageFault(problem)


def _image_problem(sample: Sample) -> str | None:
    try:
        sample.image.open()
    except ImageError as error:
        return f"{error} (sample {sample.id}); replace the file or take its row out of the task's data"
    return None


def model_source(spec: JobSpec) -> ModelSource:
    """The job's model as the workers understand it."""
    return ModelSource(**spec.model.model_dump())


def model_fingerprint(spec: JobSpec) -> str:
    """Fingerprint of the model's files; empty when they are on a cluster's nodes only. Raises UsageFault."""
    if spec.cluster.address != "local":
        return ""
    try:
        directory = find_checkpoint(model_source(spec))
        check_checkpoint(directory, spec.model.allow_pickle)
        return fingerprint_checkpoint(directory, spec.model.allow_pickle)
    except ModelError as error:
        raise UsageFault(str(error)) from None


def task_hash(task: Task) -> str:
    """Hash of everything that a score on this task depends on: data, prompt, answers, metric."""
    return _hash([task.data_hash, task.definition_hash, task.split_hash])


def split_hash(task: Task, split: str) -> str:
    """Hash of one split's samples in order, with how they are asked and scored."""
    return _hash([task.definition_hash, *_sample_lines(task.split(split))])


def _sample_lines(samples: Iterable[Sample]) -> Iterable[Any]:
    return ([sample.id, *sample.content] for sample in samples)


def _hash(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
