"""Validate a job file offline, without starting workers; report what passed and what could not be checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optimizer.errors import UsageFault
from optimizer.job.inputs import (
    check_images,
    check_rungs,
    find_model,
    limited,
    load_general_text,
    load_job_task,
    load_other_tasks,
    load_other_text,
    model_source,
    require_other_passages,
    samples_of,
    tasks_of,
)
from optimizer.job.loading import load_job
from optimizer.job.sections import TRANSFORMERS
from optimizer.job.spec import JobSpec
from optimizer.stages.judged import judged_of
from optimizer.stages.progress import Progress
from optimizer.verification.verdict import least_provable_drop
from workers.engines.interface import ENGINES
from workers.errors import EngineError, ModelError, TaskError
from workers.guard.needs import needed_prompts, too_few
from workers.models.checkpoint import BUILT_MODELS, built_directory, bundled_models
from workers.tasks import Sample, Task, load_task
from workers.tasks.joint import JOINED_BY
from workers.tasks.spec import FileSource, HubSource, TaskSpec, load_spec
from workers.tasks.splits import SPLITS


@dataclass(frozen=True)
class Checked:
    """The result for a job file that is usable as far as could be checked offline."""

    file: str
    model: str
    task: str
    checked: tuple[str, ...]
    """Parts that were checked and are good."""
    unchecked: tuple[str, ...]
    """Parts that only the job itself can check, with the reason."""
    notes: tuple[str, ...] = ()
    """Settings that are allowed, but will probably not do what was meant."""


SHOWN_PROBLEMS = 5
"""Samples that cannot be asked that are named; the others are counted."""


def check_job_file(
    path: Path,
    *,
    environment: Mapping[str, str] | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Check the job's fields, its task file, and whatever of data and model lies on this machine.

    Every sample goes through the model's processor as in the job, with ``quick`` the first and last of each split.
    Nothing is downloaded. Raises UsageFault naming the file and the field, column, row, image or model file.
    """
    progress = progress or Progress()
    spec = load_job(path, environment=environment)
    try:
        tasks = tasks_of(spec)
    except UsageFault as fault:
        raise UsageFault(f"{path}: {fault}") from None
    served_by = _served_by(spec)
    is_here = is_local(spec.model.path)
    if is_here:
        find_model(spec)
    progress.begin(f"check {path}: data and images")  # what is named wrongly has been found by now, in one line
    good, unknown = ["fields of the job file", *(f"task {task.name}: fields" for task in tasks)], []
    if served_by is not None:
        good.append(served_by)
    elif spec.latency.engine != TRANSFORMERS:
        unknown.append(f"latency.engine: {spec.latency.engine} on the workers' machines")
    notes: list[str] = []
    data = None
    on_hub = [task.source.id for task in tasks if isinstance(task.source, HubSource)]
    unknown += [f"data set {each}: its rows and images are on the hub" for each in on_hub]
    if not on_hub:
        data = load_job_task(spec)
        notes += too_few_to_guard(spec, data)
    here = _local(tasks) if data is None else data.parts or (data,)
    for each in here:
        check_images(samples_of(each))
        splits = (each.calibration, each.search, each.held_out)
        sizes = "{} calibration, {} search, {} held-out samples".format(*map(len, splits))
        good.append(f"data of task {each.name}: {sizes}, every image opens")
    others, theirs = _other_tasks(spec, unknown), spec.collateral.samples
    good += [f"task {each.name} beside it: {len(each.held_out[:theirs])} samples, every image opens" for each in others]
    text = load_other_text(spec)
    if text is not None:
        good.append(f"text {spec.collateral.text}")
    if data is not None:
        data = replace(data, beside=limited(spec, data, others, text))
        check_rungs(spec, data)
        notes += too_few_to_prove(spec, data)
    general = load_general_text(spec)
    if general is not None:
        good.append(f"text {spec.compensation.text}")
    if data is not None and spec.compensation.kind != "none":
        require_other_passages(data, general)
    if is_here:
        good.append(f"model {spec.model.path}: configuration, weight files and processor")
        asked = [(each.spec, _asked(each, quick=quick)) for each in here]
        most, judged = 2 if quick else theirs, spec.collateral.max_accuracy_drop is not None
        asked += [(each.spec, [*(each.search[:most] if judged else ()), *each.held_out[:most]]) for each in others]
        count = sum(len(samples) for _, samples in asked)
        progress.begin(f"check {path}: prompts", count)
        for task, samples in asked:
            _require_askable(spec, task, samples, progress)
        if count:
            good.append(f"{count} prompts, as the model's processor makes them")
    else:
        unknown.append(f"model {spec.model.path}: its files are on the hub")
    name = JOINED_BY.join(sorted(task.name for task in tasks))
    return Checked(str(path), spec.model.path, name, tuple(good), tuple(unknown), tuple(notes))


def _local(tasks: Sequence[TaskSpec]) -> tuple[Task, ...]:
    """Load those of the job's tasks that are on this machine, where not all are. Raises UsageFault."""
    try:
        return tuple(load_task(task) for task in tasks if not isinstance(task.source, HubSource))
    except TaskError as error:
        raise UsageFault(str(error)) from None


def _other_tasks(spec: JobSpec, unknown: list[str]) -> tuple[Task, ...]:
    """Load the tasks of ``collateral`` that are on this machine; those on the hub are added to ``unknown``."""
    here = []
    for name in spec.collateral.tasks:
        try:
            source = load_spec(name).source
        except TaskError as error:
            raise UsageFault(f"collateral.tasks: {error}") from None
        if isinstance(source, HubSource):
            unknown.append(f"data set {source.id}: its rows and images are on the hub")
        else:
            here.append(name)
    return load_other_tasks(spec, here)


def _served_by(spec: JobSpec) -> str | None:
    """Name the engine that judges latency where workers run here. Raises UsageFault where it is not there."""
    name = spec.latency.engine
    if name == TRANSFORMERS or spec.cluster.address != "local":
        return None
    try:
        found = ENGINES[name].installed()
    except EngineError as error:
        raise UsageFault(f"latency.engine: {error}") from None
    if reason := spec.not_served(found.letters):
        raise UsageFault(reason)
    return f"latency.engine: {name} {found.version}"


def _asked(task: Task, *, quick: bool) -> list[Sample]:
    """All samples, or with ``quick`` the first and last of each split."""
    samples: list[Sample] = []
    for split in SPLITS:
        whole = task.split(split)
        samples += [whole[0], whole[-1]] if quick and whole else whole
    return samples


def _require_askable(spec: JobSpec, task: TaskSpec, samples: Sequence[Sample], progress: Progress) -> None:
    """Put samples through the model's processor. Raises UsageFault naming file, row and column."""
    from workers.models.dry_run import find_problems

    def counted() -> Iterator[Sample]:
        for sample in samples:
            yield sample
            progress.advance()

    try:
        problems = list(find_problems(model_source(spec), task, counted()))
    except ModelError as error:
        raise UsageFault(str(error)) from None
    if problems:
        lines = [_place(task, sample, field) + reason for sample, (field, reason) in problems[:SHOWN_PROBLEMS]]
        more = len(problems) - len(lines)
        raise UsageFault("; ".join(lines) + (f"; and {more} more of {len(samples)} samples" if more > 0 else ""))


def _place(task: TaskSpec, sample: Sample, field: str) -> str:
    """Name a sample's row of its file, and a column; a sample of another source by its id."""
    source = task.source
    if not isinstance(source, FileSource):
        return f"task {task.name}, sample {sample.id}: "
    column = f", column {getattr(source.columns, field)!r}: " if field else ": "
    return f"{source.path}, {sample.id.replace('-', ' ')}{column}"


def too_few_to_prove(spec: JobSpec, task: Task) -> list[str]:
    """Warn where the held-out samples are too few to prove the allowed loss even of a plan that changes no answer."""
    judged = judged_of(spec, task)
    notes = []
    for name, each in judged.items():
        allowed = each.goal.max_loss
        if allowed is None or each.goal.is_text:
            continue
        images = [sample.image_key for sample in each.task.held_out[: each.size("held_out")]]
        least = least_provable_drop(images, spec.constraint, spec.search.finalists, seed=spec.search.seed)
        if least > allowed:
            field = "constraint.max_accuracy_drop" if len(judged) == 1 else f"max_accuracy_drop of {name}"
            notes.append(
                f"{field}: {allowed:g} cannot be proven with {len(images)} held-out samples: even a plan "
                f"that changes no answer may lose {least:.3f} by its interval; take more samples, or allow more"
            )
    return notes


def too_few_to_guard(spec: JobSpec, task: Task) -> list[str]:
    """Say where plans will have no guard."""
    images, rate = len({sample.image_key for sample in task.search}), spec.guard.false_alarms
    if rate is None or spec.is_lossless or images >= needed_prompts(rate):
        return []
    return [f"plans get no guard: {too_few(images, rate)}"]


def is_local(model: str) -> bool:
    """Tell whether a model is a directory here, bundled, or built already."""
    built = model in BUILT_MODELS and built_directory(model).is_dir()
    return built or model in bundled_models() or Path(model).expanduser().exists() or model.count("/") != 1
