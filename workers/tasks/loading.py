"""Load a task: its samples in three splits, and the hashes that identify them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from workers.errors import TaskError

from .images import READING, ImageFile, RenderedImage, SceneImage, hash_image
from .metrics import VQA_MINIMUM_ANSWERS, metric_version
from .passages import TextTask
from .samples import Sample
from .spec import (
    DrawnSource,
    EasyVqaSource,
    FileSource,
    HubSource,
    LmmsEvalSource,
    RenderedTextSource,
    ScenesSource,
    SettledLmmsEvalSource,
    SplitSizes,
    TaskSpec,
    load_spec,
)
from .splits import SPLITS, Region, make_splits
from .tables import read_file, read_hub

if TYPE_CHECKING:
    from PIL.Image import Image

ASKING_VERSION = 1
"""Raised when a question and its image become another prompt for the same model (``workers/models/prompts.py``)."""


@dataclass(frozen=True)
class Task:
    """A task with its data: the spec, the samples of each split, and hashes that identify them.

    ``data_hash`` covers every sample read from the source (image content, question, answers, options);
    ``split_hash`` the samples of each split in order; ``definition_hash`` prompt, answer format, metrics, and the
    versions of what reads images, asks and scores.

    ``parts`` are the tasks of a joint one (:func:`workers.tasks.joint.join_tasks`). ``beside`` is what plans are scored
    on too, while nothing is fitted to it: further tasks, and general text.
    """

    spec: TaskSpec
    calibration: tuple[Sample, ...]
    search: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    data_hash: str
    split_hash: str
    definition_hash: str
    parts: tuple[Task, ...] = ()
    beside: tuple[Task | TextTask, ...] = ()

    @property
    def name(self) -> str:
        return self.spec.name

    def part(self, name: str) -> Task | TextTask:
        """Return what plans are scored on: the part or the task beside of that name, the task itself for ``""``.

        Raises:
            TaskError: there is none of that name, or a joint task is to be scored as a whole.
        """
        known = {each.name: each for each in (*self.beside, *self.parts)}
        if not name and not self.parts:
            return self
        if name not in known:
            wrong = f"nothing of it is named {name!r}" if name else "it cannot be scored as a whole"
            raise TaskError(f"task {self.name}: {wrong}; there are {', '.join(known) or 'no other tasks'}")
        return known[name]

    def split(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of a split. Raises TaskError for an unknown name."""
        if name not in SPLITS:
            raise TaskError(f"task {self.name}: no split {name!r}; there are {', '.join(SPLITS)}")
        samples: tuple[Sample, ...] = getattr(self, name)
        return samples


def load_task(task: str | Path | TaskSpec) -> Task:
    """Read a task: a bundled name, the path of a task file, or a spec.

    Columns and files are checked here; an image that is there but cannot be decoded shows at evaluation.

    Raises:
        TaskError: naming the field, file, column or row, and what would be right.
    """
    spec = task if isinstance(task, TaskSpec) else load_spec(task)
    spec = settled(spec)
    data = _read(spec)
    if "vqa_accuracy" in spec.metrics:
        _require_annotators(data.regions, spec)
    splits = make_splits(data.regions, spec.splits, spec.name)
    return Task(
        spec=spec,
        calibration=splits["calibration"],
        search=splits["search"],
        held_out=splits["held_out"],
        data_hash=data.hash,
        split_hash=_hash_text(
            json.dumps({name: [[s.id, s.image_key] for s in samples] for name, samples in splits.items()})
        ),
        definition_hash=hash_definition(spec),
    )


def settled(spec: TaskSpec) -> TaskSpec:
    """Return a spec with what its harness says of the task; one of no harness as it is. Raises TaskError."""
    if not isinstance(spec.source, LmmsEvalSource):
        return spec
    from .harness.source import settle

    return settle(spec, spec.source)


def hash_data(spec: TaskSpec) -> str:
    """Read a task's source and return the ``data_hash`` that its task has. Raises TaskError."""
    return _read(spec).hash


def hash_definition(spec: TaskSpec) -> str:
    """Hash how samples are asked and scored: prompt, answer format, metrics, and the versions of what does it.

    Of a dataset of the hub also which one it is, since its rows are too many to be read only to compare them. Of a task
    of lmms-eval, which was loaded, also what identifies the harness and the task's YAML and code.
    """
    fields: tuple[object, ...] = (spec.prompt, spec.plain_prompt, spec.answer, spec.metric, spec.secondary)
    if isinstance(spec.source, HubSource):
        fields += (spec.source,)
    metrics = spec.metrics
    if isinstance(spec.source, SettledLmmsEvalSource):
        fields, metrics = (*fields, spec.source.identity, spec.source.task, spec.source.limit), ()
    versions = {"images": READING, "prompts": ASKING_VERSION} | {name: metric_version(name) for name in metrics}
    return _hash_text(repr((fields, versions)))


@dataclass(frozen=True)
class _Data:
    """Samples of a task's source by region, and a hash of their content."""

    regions: list[Region]

    @cached_property
    def hash(self) -> str:
        lines = sorted(json.dumps(sample.content) for region in self.regions for sample in region.samples)
        return _hash_text("\n".join(lines))


def _read(spec: TaskSpec) -> _Data:
    source = spec.source
    if isinstance(source, EasyVqaSource):
        return _read_easy_vqa()
    if isinstance(source, DrawnSource):
        return _Data(_draw(source, spec.splits))
    if isinstance(source, LmmsEvalSource):
        from .harness.source import read_samples

        return _Data([Region(SPLITS, tuple(read_samples(source)))])
    rows = read_file(spec, source) if isinstance(source, FileSource) else read_hub(spec, source)
    return _Data([Region(SPLITS, tuple(rows))])


@cache
def _read_easy_vqa() -> _Data:
    """Read calibration from the training images, search and held-out from the test images.

    The package's files are read once a process: hashing 5,000 images and 48,000 questions takes most of a second.
    """
    import easy_vqa

    parts = {
        "train": (easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()),
        "test": (easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()),
    }
    samples: dict[str, tuple[Sample, ...]] = {}
    for part, (paths, (questions, answers, images)) in parts.items():
        keys = {number: hash_image(Path(path), f"easy-vqa {part} image {number}") for number, path in paths.items()}
        samples[part] = tuple(
            Sample(f"{part}-{image}-{number}", ImageFile(paths[image], keys[image]), keys[image], question, (answer,))
            for number, (question, answer, image) in enumerate(zip(questions, answers, images, strict=True))
        )
    return _Data([Region(("calibration",), samples["train"]), Region(("search", "held_out"), samples["test"])])


def _draw(source: DrawnSource, sizes: SplitSizes) -> list[Region]:
    """Draw calibration samples from the range reference models are trained on, the others from beyond it."""
    from .scenes import FIRST_EVALUATION_INDEX

    def draw(index: int) -> Sample:
        return _draw_scene(source, index) if isinstance(source, ScenesSource) else _draw_text(source, index)

    regions = []
    for number, split in enumerate(SPLITS):
        first = number * FIRST_EVALUATION_INDEX
        samples = tuple(draw(index) for index in range(first, first + getattr(sizes, split)))
        regions.append(Region((split,), samples))
    return regions


def _draw_scene(source: ScenesSource, index: int) -> Sample:
    from .scenes import QUESTIONS, scene

    drawn = scene(index, source.seed)
    answer = QUESTIONS[source.question].answer(drawn)
    key = _hash_drawn(drawn.image)
    return Sample(f"scene-{index}", SceneImage(index, source.seed), key, "", (answer,))


def _draw_text(source: RenderedTextSource, index: int) -> Sample:
    from .rendered import rendered_text

    drawn = rendered_text(index, source.seed)
    key = _hash_drawn(drawn.image)
    return Sample(f"text-{index}", RenderedImage(index, source.seed), key, "", (drawn.text,))


def _hash_drawn(image: Image) -> str:
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()


def _require_annotators(regions: list[Region], spec: TaskSpec) -> None:
    for region in regions:
        for sample in region.samples:
            if len(sample.answers) < VQA_MINIMUM_ANSWERS:
                raise TaskError(
                    f"task {spec.name}: vqa_accuracy needs at least {VQA_MINIMUM_ANSWERS} answers a question, "
                    f"sample {sample.id} has {len(sample.answers)}; exact_match takes any number"
                )


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
