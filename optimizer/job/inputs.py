"""Load, check and hash what a job needs before anything is stored or started: its tasks' data, its model's files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optimizer.errors import UsageFault
from optimizer.job.spec import LEAST_TOKENS, JobSpec
from workers.compensation.recipe import id_of_text
from workers.errors import ImageError, ModelError, TaskError
from workers.messages import ModelSource
from workers.models.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    find_here,
    fingerprint_checkpoint,
    quantisation_method,
)
from workers.tasks import Sample, Task, load_spec, load_task
from workers.tasks.images import ImageFile
from workers.tasks.joint import join_tasks, require_apart
from workers.tasks.passages import TEXT, Passage, TextTask
from workers.tasks.spec import LmmsEvalSource, TaskSpec
from workers.tasks.splits import SPLITS
from workers.versions import installed_versions


@dataclass(frozen=True)
class JobInputs:
    """A job whose inputs were found usable, loaded once for all of its stages."""

    spec: JobSpec
    task: Task
    fingerprint: str
    """The model's fingerprint; empty until a worker says it when its files are on a cluster's nodes only."""
    other_tasks: tuple[Task, ...] = ()
    """Tasks of ``collateral.tasks``."""
    other_text: str | None = None
    """Contents of ``collateral.text``."""
    general_text: str | None = None
    """Contents of ``compensation.text``."""

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hashes of the tasks, the text and the model, by what they are called to the user."""
        found = {"task": task_hash(self.task), "model files": self.fingerprint}
        found |= {f"collateral.tasks[{n}]": task_hash(task) for n, task in enumerate(self.other_tasks)}
        if self.other_text is not None:
            found["collateral.text"] = hashlib.sha256(self.other_text.encode()).hexdigest()
        if self.general_text is not None:
            found["compensation.text"] = hashlib.sha256(self.general_text.encode()).hexdigest()
        return found

    @property
    def compensations(self) -> tuple[str, ...]:
        """List the compensations that candidates may have, as texts."""
        text = self.general_text
        return self.spec.compensation.choices() if text is None else self.spec.compensation.choices(id_of_text(text))

    @cached_property
    def spec_hash(self) -> str:
        """An equal job is found again by it: hash of the specification, the contents, and, here, the versions."""
        versions = installed_versions() if self.spec.cluster.address == "local" else {}
        return self.spec.digest(**self.contents, **versions)


def prepare(spec: JobSpec, *, download: bool = True) -> JobInputs:
    """Load the tasks, open every image that the job asks about, look at the model's files.

    Without ``download`` a model of the hub that is not on this machine has no fingerprint yet. Raises UsageFault naming
    the file, field, column, row or image.
    """
    task = load_job_task(spec)
    check_images(samples_of(task))
    is_here = download or find_here(model_source(spec)) is not None
    fingerprint = model_fingerprint(spec) if is_here else ""
    tasks, text = load_other_tasks(spec), load_other_text(spec)
    task = replace(task, beside=limited(spec, task, tasks, text))
    check_rungs(spec, task)
    general = load_general_text(spec)
    if spec.compensation.kind != "none":
        require_other_passages(task, general)
    return JobInputs(spec, task, fingerprint, tasks, text, general)


def require_other_passages(task: Task, general: str | None) -> None:
    """Refuse to judge plans on passages of the text that their maps are fitted on. Raises UsageFault."""
    fitted_on = " ".join((general or "").split())
    for each in task.beside:
        passages = (*each.search, *each.held_out) if isinstance(each, TextTask) else ()
        if any(" ".join(passage.text.split()) in fitted_on for passage in passages):
            raise UsageFault(
                "collateral.max_kl: passages of collateral.text stand in compensation.text, on which maps are fitted, "
                "so a limit could not be proven on them; name another text"
            )


def limited(
    spec: JobSpec, task: Task, other_tasks: Sequence[Task], other_text: str | None
) -> tuple[Task | TextTask, ...]:
    """Return what is judged beside the job's tasks, as ``collateral`` limits it. Raises UsageFault."""
    collateral = spec.collateral
    found: list[Task | TextTask] = list(other_tasks) if collateral.max_accuracy_drop is not None else []
    own = {part.name for part in task.parts or (task,)}
    if twice := [each.name for each in found if each.name in own]:
        raise UsageFault(f"collateral.tasks: {twice[0]} is a task of the job itself; take it out here")
    most = collateral.samples
    try:
        for each in other_tasks if found else ():
            beside = replace(each, calibration=(), search=each.search[:most], held_out=each.held_out[:most])
            for part in task.parts or (task,):
                require_apart((part, beside))
    except TaskError as error:
        raise UsageFault(f"collateral.tasks: {error}") from None
    if collateral.max_kl is not None and other_text is not None:
        if TEXT in own | {each.name for each in other_tasks}:
            raise UsageFault(f"collateral.max_kl: a task of the job is named {TEXT}, as the text is; rename the task")
        try:
            found.append(TextTask.of(other_text))
        except TaskError as error:
            raise UsageFault(f"collateral.text: {error}") from None
    return tuple(found)


def load_other_tasks(spec: JobSpec, names: Sequence[str] | None = None) -> tuple[Task, ...]:
    """Load the data of ``collateral.tasks``, all or those named, and open the images that the job asks about.

    Raises UsageFault naming the file, field, column, row or image.
    """
    try:
        tasks = tuple(load_task(name) for name in (spec.collateral.tasks if names is None else names))
    except TaskError as error:
        raise UsageFault(f"collateral.tasks: {error}") from None
    if twice := [name for name, times in Counter(each.name for each in tasks).items() if times > 1]:
        raise UsageFault(f"collateral.tasks: several tasks are named {twice[0]}; results are told apart by name")
    for each in tasks:
        most = spec.collateral.samples
        searched = each.search[:most] if spec.collateral.max_accuracy_drop is not None else ()
        try:
            check_images([*searched, *each.held_out[:most]])
        except UsageFault as fault:
            raise UsageFault(f"collateral.tasks: {fault}") from None
    return tasks


def load_other_text(spec: JobSpec) -> str | None:
    """Read ``collateral.text`` as UTF-8. Raises UsageFault."""
    return _read_text("collateral.text", spec.collateral.text)


def load_general_text(spec: JobSpec) -> str | None:
    """Read ``compensation.text`` as UTF-8. Raises UsageFault, also where ``collateral.text`` says the same."""
    text = _read_text("compensation.text", spec.compensation.text)
    other = load_other_text(spec) if text is not None and spec.compensation.kind != "none" else None
    if text is not None and other is not None and text.split() == other.split():
        raise UsageFault(
            "collateral.text: it says the same as compensation.text, on which maps are fitted, so nothing could be "
            "told from it; name another text"
        )
    return text


def _read_text(field: str, name: str | None) -> str | None:
    if name is None:
        return None
    path = Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageFault(f"{field}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageFault(f"{field}: {path} cannot be read as UTF-8 text ({error})") from None


def tasks_of(spec: JobSpec) -> tuple[TaskSpec, ...]:
    """Read the files of the job's tasks, with the job's split sizes. Raises UsageFault."""
    sizes = {name: value for name, value in spec.splits.model_dump().items() if value is not None}
    try:
        tasks = tuple(load_spec(name).with_splits(**sizes) for name in spec.task_names)
    except TaskError as error:
        raise UsageFault(str(error)) from None
    if spec.is_lossless and not isinstance(tasks[0].source, LmmsEvalSource):
        _require_long_answers(tasks[0])
    return tasks


def _require_long_answers(task: TaskSpec) -> None:
    """Refuse tasks whose answers leave nothing to draft. Raises UsageFault."""
    if task.is_choice:
        raise UsageFault(
            f"task {task.name}: its answers are chosen, not generated, so there is nothing to draft; a lossless job "
            "needs answer.kind free"
        )
    if task.answer.max_new_tokens < LEAST_TOKENS:
        raise UsageFault(
            f"task {task.name}: answer.max_new_tokens {task.answer.max_new_tokens} leaves too little to draft; a "
            f"lossless job needs {LEAST_TOKENS} or more"
        )


def load_job_task(spec: JobSpec) -> Task:
    """Load the data of the job's task, or of its tasks, joined, with the job's split sizes. Raises UsageFault."""
    try:
        tasks = [load_task(task) for task in tasks_of(spec)]
        if spec.is_lossless:
            _require_long_answers(tasks[0].spec)  # which the harness of its own may have settled
        return tasks[0] if len(tasks) == 1 else join_tasks(tasks)
    except TaskError as error:
        raise UsageFault(str(error)) from None


def check_rungs(spec: JobSpec, task: Task) -> None:
    """Refuse rungs larger than the search splits together. Raises UsageFault."""
    largest, most = max(spec.search.rungs or (0,)), spec.collateral.samples
    beside = [len(each.search) if isinstance(each, TextTask) else min(most, len(each.search)) for each in task.beside]
    size = len(task.search) + sum(beside)
    if largest > size:
        raise UsageFault(f"search.rungs: {largest} is more than the {size} samples of the search split")


def samples_of(task: Task) -> list[Sample]:
    """Return the samples of all three splits."""
    return [sample for split in SPLITS for sample in task.split(split)]


def check_images(samples: Iterable[Sample]) -> None:
    """Decode every image once, so that a bad one is named before hours of work.

    Raises UsageFault naming the first image that cannot be decoded.
    """
    images = {sample.image_key: sample for sample in samples}
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
    """Translate ``model`` of the job file for the workers."""
    return ModelSource(**spec.model.model_dump())


def find_model(spec: JobSpec) -> Path:
    """Find the directory of the job's model, with all the files that it needs. Raises UsageFault."""
    try:
        directory = find_checkpoint(model_source(spec))
        check_checkpoint(directory, spec.model.allow_pickle, trust_remote_code=spec.model.trust_remote_code)
        method = quantisation_method(directory)
    except ModelError as error:
        raise UsageFault(str(error)) from None
    if method and spec.compensation.kind != "none":
        raise UsageFault(
            f"compensation.kind: {spec.compensation.kind} needs weights that maps can be folded into, those of model "
            f"{spec.model.path} are quantised ({method}); use none, or the checkpoint that it was made of"
        )
    return directory


def model_fingerprint(spec: JobSpec) -> str:
    """Hash the model's files; empty when they are on a cluster's nodes only. Raises UsageFault."""
    if spec.cluster.address != "local":
        return ""
    return fingerprint_checkpoint(
        find_model(spec), spec.model.allow_pickle, trust_remote_code=spec.model.trust_remote_code
    )


def task_hash(task: Task | TextTask) -> str:
    """Hash everything that a score on this task depends on: data, prompt, answers, metric."""
    return _hash([task.data_hash, task.definition_hash, task.split_hash])


def split_hash(task: Task | TextTask, split: str) -> str:
    """Hash one split's samples in order, with how they are asked and scored."""
    return _hash([task.definition_hash, *_sample_lines(task.split(split))])


def _sample_lines(samples: Iterable[Sample | Passage]) -> Iterable[Any]:
    return ([sample.id, *sample.content] for sample in samples)


def _hash(parts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
