"""Read task files: where a task's data are, how it is asked, answered and scored, and how it is split."""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from workers.errors import TaskError
from workers.tasks.metrics import CHOICE_METRICS, METRICS
from workers.text import did_you_mean
from workers.validation import explain, load_yaml, require_one_of

HARNESS = "lmms-eval"
"""Begins the names of tasks (``lmms-eval:textvqa_val``) and metrics that are lmms-eval's."""
HARNESS_SPLITS = {"calibration": 100, "search": 300, "held_out": 300}
"""Images of the splits where a job names a task of lmms-eval and no sizes."""
BUNDLED_TASKS = Path(__file__).resolve().parents[2] / "configs" / "tasks"
FILE_FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")
CHOICE_TOKENS = 4
"""Tokens of an answer where one is generated although the task is to choose: when an export is compared."""


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("must be a text that is not empty")
    return text


def _metric(name: str) -> str:
    if name == HARNESS:
        return name
    return require_one_of(name, (*METRICS, *CHOICE_METRICS))


Text = Annotated[StrictStr, AfterValidator(_not_empty)]
Metric = Annotated[Text, AfterValidator(_metric)]
Count = Annotated[StrictInt, Field(ge=1)]
Seed = Annotated[StrictInt, Field(ge=0)]


class _Section(BaseModel):
    """A mapping in a task file: frozen, without other fields; a field that is null counts as absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {name: value for name, value in content.items() if value is not None}

    def changed(self, **changes: Any) -> Self:
        """Return a copy with other values, which are not checked."""
        return self.model_copy(update=changes)


class EasyVqaSource(_Section):
    """The dataset of the PyPI package ``easy-vqa``."""

    kind: Literal["easy-vqa"] = "easy-vqa"


class ScenesSource(_Section):
    """The project's own generator of scenes, each with what answers a question about it."""

    kind: Literal["scenes"] = "scenes"
    seed: Seed = 0
    question: Literal["caption", "description", "count"] = "caption"
    """What is asked of every scene; the task's ``prompt`` asks it."""


class RenderedTextSource(_Section):
    """The project's own generator of images of one word or number."""

    kind: Literal["rendered-text"] = "rendered-text"
    seed: Seed = 0


class Columns(_Section):
    """Names of the columns of a table."""

    image: Text = "image"
    question: Text = "question"
    answers: Text = "answers"
    choices: Text | None = None
    """Options of multiple-choice questions; the answer is then the index of the right one, from 0."""


class FileSource(_Section):
    """A CSV, JSONL or Parquet file, plain or compressed; image paths are relative to ``images``, else to the file."""

    kind: Literal["file"] = "file"
    path: Text
    format: Literal["csv", "jsonl", "parquet"] | None = None
    """By default what the extension says."""
    images: Text | None = None
    columns: Columns = Columns()
    answer_separator: Text | None = None

    @property
    def table_format(self) -> str:
        suffixes = [suffix.lower() for suffix in Path(self.path).suffixes]
        if suffixes and suffixes[-1] in COMPRESSED:
            suffixes.pop()
        return self.format or FILE_FORMATS.get(suffixes[-1] if suffixes else "", "")

    @model_validator(mode="after")
    def _format_is_known(self) -> FileSource:
        if not self.table_format:
            raise ValueError(
                f"the extension of {Path(self.path).name} (path) is none of {', '.join(FILE_FORMATS)}; "
                f"say source.format: one of {', '.join(dict.fromkeys(FILE_FORMATS.values()))}"
            )
        return self

    def located(self, base: Path) -> FileSource:
        """Return the source with paths that are relative to ``base`` made absolute."""
        path = base / self.path
        images = base / self.images if self.images else path.parent
        return self.changed(path=str(path), images=str(images))


class HubSource(_Section):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    id: Text
    split: Text
    subset: Text | None = None
    revision: Text | None = None
    columns: Columns = Columns()


class LmmsEvalSource(_Section):
    """A task of lmms-eval, which says prompts, images, answers and scores.

    ``include`` is a directory of YAML files, of which ``task`` names one; without it the task is the harness's own.
    ``metric`` is the one that counts (its first one if absent), ``max_new_tokens`` replaces the task's own, and
    ``limit`` takes the first documents alone.
    """

    kind: Literal["lmms-eval"] = "lmms-eval"
    task: Text
    include: Text | None = None
    metric: Text | None = None
    max_new_tokens: Count | None = None
    limit: Count | None = None

    def located(self, base: Path) -> LmmsEvalSource:
        """Return the source with a directory that is relative to ``base`` made absolute."""
        return self if self.include is None else self.changed(include=str((base / self.include).resolve()))


class SettledLmmsEvalSource(LmmsEvalSource):
    """The same after the harness was asked: its version, and the hash of it and of the task's YAML and code."""

    version: str
    identity: str


DrawnSource = ScenesSource | RenderedTextSource
"""Sources of which as many samples are drawn as the splits hold."""

Source = EasyVqaSource | DrawnSource | FileSource | HubSource | LmmsEvalSource


class Answer(_Section):
    """Say how the model answers.

    ``kind``: a word or two (``short``), generated text (``free``), or the likeliest of given options (``choice``).
    ``options`` and ``separator`` are for ``choice``: whether options are scored as ``texts``, or shown in the prompt
    and scored as ``letters``; and what stands between the prompt and an option (``None``: a space, unless the prompt
    ends with white space).
    """

    kind: Literal["short", "free", "choice"]
    max_new_tokens: Count
    options: Literal["texts", "letters"] | None = None
    separator: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete_choice(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or content.get("kind") != "choice":
            return content
        given = {name: value for name, value in content.items() if value is not None}
        return {"max_new_tokens": CHOICE_TOKENS, "options": "texts", **given}

    @model_validator(mode="after")
    def _only_choice_has_options(self) -> Answer:
        if self.kind != "choice" and (self.options, self.separator) != (None, None):
            raise ValueError("options and separator are for kind choice")
        return self


class SplitSizes(_Section):
    """Sizes of the three splits, in images or in samples, and the seed of the shuffle by image.

    ``calibration_per_image`` is the most calibration samples about one image: many images tell more about a model's
    layers than many questions about few. All of an image's samples where it is absent.
    """

    calibration: Count
    search: Count
    held_out: Count
    unit: Literal["images", "samples"] = "images"
    seed: Seed = 0
    calibration_per_image: Count | None = None

    def most_per_image(self, split: str) -> int | None:
        """Return the most samples of a split about one image, if there is such a limit."""
        return self.calibration_per_image if split == "calibration" else None


class TaskSpec(_Section):
    """A task as data. ``prompt`` is the user's text; ``plain_prompt`` wraps it for processors without chat template."""

    name: Text
    source: Annotated[Source, Field(discriminator="kind")]
    prompt: Text
    answer: Answer
    metric: Metric
    splits: SplitSizes
    secondary: tuple[Metric, ...] = ()
    plain_prompt: Text = "{image}\n{prompt}"
    description: Text = ""

    @property
    def is_choice(self) -> bool:
        """Whether the model chooses among options, and generates nothing."""
        return self.answer.kind == "choice"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metric, then the secondary ones."""
        return (self.metric, *self.secondary)

    @property
    def uses_question(self) -> bool:
        """Whether the prompt shows the sample's question."""
        return "question" in _placeholders(self.prompt)

    def ask(self, question: str) -> str:
        """Return what the user says about the image."""
        return self.prompt.format(question=question)

    def with_splits(self, **changes: Any) -> TaskSpec:
        """Return the same task with other split sizes: fields of :class:`SplitSizes`."""
        return self.changed(splits=self.splits.changed(**changes))

    @model_validator(mode="before")
    @classmethod
    def _leave_to_harness(cls, content: Any) -> Any:
        """Let tasks of lmms-eval say nothing that the harness says; it is asked when the task is loaded."""
        source = content.get("source") if isinstance(content, Mapping) else None
        if not isinstance(source, Mapping) or source.get("kind") != HARNESS:
            return content
        if said := [name for name in ("prompt", "answer", "metric", "secondary") if content.get(name) is not None]:
            raise ValueError(f"{said[0]} is what lmms-eval says of its task; source takes metric and max_new_tokens")
        unknown = {"kind": "free", "max_new_tokens": 1}
        return {**content, "prompt": "{question}", "answer": unknown, "metric": HARNESS}

    @field_validator("prompt", "plain_prompt")
    @classmethod
    def _known_placeholders(cls, template: str, info: ValidationInfo) -> str:
        allowed = ("question",) if info.field_name == "prompt" else ("image", "prompt")
        try:
            used = _placeholders(template)
        except ValueError as error:
            raise ValueError(f"{error}; a literal brace is written twice") from None
        if unknown := used.difference(allowed):
            raise ValueError(f"unknown placeholder {_braced(sorted(unknown))}; allowed: {_braced(allowed)}")
        if info.field_name == "plain_prompt" and len(used) < len(allowed):
            raise ValueError(f"must contain {_braced(allowed)}")
        return template

    @model_validator(mode="after")
    def _parts_fit(self) -> TaskSpec:
        if not self.uses_question and isinstance(self.source, EasyVqaSource):
            raise ValueError("prompt must contain {question}, for easy-vqa asks several about each image")
        columns = self.source.columns if isinstance(self.source, FileSource | HubSource) else Columns()
        if self.is_choice and columns.choices is None:
            raise ValueError("answer.kind: choice needs source.columns.choices, the column that holds the options")
        if isinstance(self.source, LmmsEvalSource):
            return self
        allowed = CHOICE_METRICS if self.is_choice else METRICS
        for name in self.metrics:
            if name not in allowed:
                kind = self.answer.kind
                raise ValueError(f"metric {name} cannot score {kind} answers; allowed: {', '.join(allowed)}")
        return self


def bundled_tasks() -> tuple[str, ...]:
    """Return the names of the tasks that ship with the project."""
    return tuple(sorted(path.stem for path in BUNDLED_TASKS.glob("*.yaml")))


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """Read a task file: a bundled task's name, or the path of a YAML file. Raises TaskError."""
    path = Path(name_or_path)
    if str(name_or_path).startswith(f"{HARNESS}:"):
        return _harness_spec(str(name_or_path))
    if str(name_or_path) in bundled_tasks():
        path = BUNDLED_TASKS / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise TaskError(
            f"task {name_or_path}: no such task file, nor a bundled task (bundled: {', '.join(bundled_tasks())})"
            f"{did_you_mean(str(name_or_path), bundled_tasks())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as text: {error}") from None
    try:
        content = load_yaml(text, str(path))
    except ValueError as error:
        raise TaskError(str(error)) from None
    return parse_spec(content, where=str(path), base=path.resolve().parent)


def _harness_spec(name: str) -> TaskSpec:
    """Build the spec of ``lmms-eval:NAME``, or of ``lmms-eval:DIRECTORY/NAME`` where a directory has the YAML file."""
    _, _, place = name.partition(":")
    include, _, task = place.rpartition("/")
    source = {"kind": HARNESS, "task": task} | ({"include": include} if include else {})
    return parse_spec({"name": f"{HARNESS}:{task}", "source": source, "splits": HARNESS_SPLITS}, where=f"task {name}")


def parse_spec(content: Any, *, where: str = "task", base: Path | None = None) -> TaskSpec:
    """Build a TaskSpec from a mapping; relative paths in it are relative to ``base``. Raises TaskError."""
    try:
        spec = TaskSpec.model_validate(content)
    except ValidationError as error:
        raise TaskError(f"{where}: {explain(error, TaskSpec)}") from None
    if isinstance(spec.source, FileSource | LmmsEvalSource):
        return spec.changed(source=spec.source.located(base or Path.cwd()))
    return spec


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _braced(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)
