"""Task files: what a task's data are, how it is asked, answered and scored, and how it is split."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workers.errors import TaskError
from workers.tasks.metrics import CHOICE_METRICS, METRICS
from workers.text import did_you_mean

BUNDLED_TASKS = Path(__file__).resolve().parents[2] / "configs" / "tasks"
FILE_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
SOURCE_KINDS = ("easy-vqa", "scenes", "file", "hub")
ANSWER_KINDS = ("short", "free", "choice")
OPTIONS = ("texts", "letters")
CHOICE_TOKENS = 4
"""Tokens of an answer where one is generated although the task is to choose: when an export is compared."""
SPLIT_UNITS = ("images", "samples")
PLAIN_PROMPT = "{image}\n{prompt}"


@dataclass(frozen=True)
class EasyVqaSource:
    """The dataset of the PyPI package ``easy-vqa``."""


@dataclass(frozen=True)
class ScenesSource:
    """The project's own generator of captioned scenes."""

    seed: int = 0


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table."""

    image: str = "image"
    question: str = "question"
    answers: str = "answers"
    choices: str | None = None
    """Options of multiple-choice questions; the answer is then the place of the right one, from 0."""


@dataclass(frozen=True)
class FileSource:
    """A CSV, JSONL or Parquet file; image paths are relative to ``images``."""

    path: str
    format: str
    images: str
    columns: Columns = Columns()
    answer_separator: str | None = None


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face hub."""

    id: str
    split: str
    subset: str | None = None
    revision: str | None = None
    columns: Columns = Columns()


Source = EasyVqaSource | ScenesSource | FileSource | HubSource


@dataclass(frozen=True)
class Answer:
    """Say how the model answers.

    ``kind``: a word or two (``short``), generated text (``free``), or the likeliest of given options (``choice``).
    ``options`` and ``separator`` are for ``choice``: whether options are scored as ``texts``, or shown in the prompt
    and scored as ``letters``; and what stands between the prompt and an option (``None``: a space, unless the prompt
    ends with white space).
    """

    kind: str
    max_new_tokens: int
    options: str | None = None
    separator: str | None = None


@dataclass(frozen=True)
class SplitSizes:
    """Sizes of the three splits, in images or in samples, and the seed of the shuffle by image.

    ``calibration_per_image`` is the most calibration samples about one image: many images tell more about a model's
    layers than many questions about few. All of an image's samples where it is absent.
    """

    calibration: int
    search: int
    held_out: int
    unit: str = "images"
    seed: int = 0
    calibration_per_image: int | None = None

    def most_per_image(self, split: str) -> int | None:
        """The most samples of a split about one image, if there is such a limit."""
        return self.calibration_per_image if split == "calibration" else None


@dataclass(frozen=True)
class TaskSpec:
    """A task as data. ``prompt`` is the user's text; ``plain_prompt`` wraps it for processors without chat template."""

    name: str
    source: Source
    prompt: str
    answer: Answer
    metric: str
    splits: SplitSizes
    secondary: tuple[str, ...] = ()
    plain_prompt: str = PLAIN_PROMPT
    description: str = ""

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

    def with_sizes(self, calibration: int, search: int, held_out: int) -> TaskSpec:
        """Return the same task with other split sizes."""
        return replace(self, splits=replace(self.splits, calibration=calibration, search=search, held_out=held_out))


def bundled_tasks() -> tuple[str, ...]:
    """Return the names of the tasks that ship with the project."""
    return tuple(sorted(path.stem for path in BUNDLED_TASKS.glob("*.yaml")))


def load_spec(name_or_path: str | Path) -> TaskSpec:
    """Read a task file: a bundled task's name, or the path of a YAML file. Raises TaskError."""
    import yaml

    path = Path(name_or_path)
    if str(name_or_path) in bundled_tasks():
        path = BUNDLED_TASKS / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise TaskError(
            f"task {name_or_path}: no such task file, nor a bundled task (bundled: {', '.join(bundled_tasks())})"
            f"{did_you_mean(str(name_or_path), bundled_tasks())}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TaskError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read as text: {error}") from None
    return parse_spec(content, where=str(path), base=path.resolve().parent)


def parse_spec(content: Any, *, where: str = "task", base: Path | None = None) -> TaskSpec:
    """Build a TaskSpec from a mapping; relative paths in it are relative to ``base``. Raises TaskError."""
    fields = _Fields(content, where)
    spec = TaskSpec(
        name=fields.text("name"),
        description=fields.text("description", default=""),
        source=_source(fields.mapping("source"), base or Path.cwd()),
        prompt=_template(fields, "prompt", ("question",)),
        plain_prompt=_template(fields, "plain_prompt", ("image", "prompt"), default=PLAIN_PROMPT, required=True),
        answer=_answer(fields.mapping("answer")),
        metric=fields.choice("metric", (*METRICS, *CHOICE_METRICS)),
        secondary=fields.choices("secondary", (*METRICS, *CHOICE_METRICS)),
        splits=_splits(fields.mapping("splits")),
    )
    fields.finish()
    if not spec.uses_question and isinstance(spec.source, EasyVqaSource):
        raise TaskError(f"{where}: prompt must contain {{question}}, for easy-vqa asks several about each image")
    _check_choices(spec, where)
    return spec


def _check_choices(spec: TaskSpec, where: str) -> None:
    columns = spec.source.columns if isinstance(spec.source, FileSource | HubSource) else Columns()
    if spec.is_choice and columns.choices is None:
        raise TaskError(f"{where}.answer.kind: choice needs source.columns.choices, the column that holds the options")
    allowed = CHOICE_METRICS if spec.is_choice else METRICS
    for name in spec.metrics:
        if name not in allowed:
            kind = spec.answer.kind
            raise TaskError(f"{where}: metric {name} cannot score {kind} answers; allowed: {', '.join(allowed)}")


def _source(fields: _Fields, base: Path) -> Source:
    kind = fields.choice("kind", SOURCE_KINDS)
    source: Source
    if kind == "easy-vqa":
        source = EasyVqaSource()
    elif kind == "scenes":
        source = ScenesSource(seed=fields.integer("seed", default=0, minimum=0))
    elif kind == "file":
        path = base / fields.text("path")
        images = base / fields.text("images") if "images" in fields else path.parent
        source = FileSource(
            path=str(path),
            format=_file_format(fields, path),
            images=str(images),
            columns=_columns(fields),
            answer_separator=fields.text("answer_separator", default="") or None,
        )
    else:
        source = HubSource(
            id=fields.text("id"),
            split=fields.text("split"),
            subset=fields.text("subset", default="") or None,
            revision=fields.text("revision", default="") or None,
            columns=_columns(fields),
        )
    fields.finish()
    return source


def _file_format(fields: _Fields, path: Path) -> str:
    formats = tuple(FILE_FORMATS.values())
    if "format" in fields:
        return fields.choice("format", formats)
    if path.suffix.lower() not in FILE_FORMATS:
        raise TaskError(
            f"{fields.where}.path: the extension of {path.name} is none of {', '.join(FILE_FORMATS)}; "
            f"say source.format: one of {', '.join(formats)}"
        )
    return FILE_FORMATS[path.suffix.lower()]


def _columns(fields: _Fields) -> Columns:
    if "columns" not in fields:
        return Columns()
    columns = fields.mapping("columns")
    default = Columns()
    result = Columns(
        image=columns.text("image", default=default.image),
        question=columns.text("question", default=default.question),
        answers=columns.text("answers", default=default.answers),
        choices=columns.text("choices", default="") or None,
    )
    columns.finish()
    return result


def _answer(fields: _Fields) -> Answer:
    kind = fields.choice("kind", ANSWER_KINDS)
    if kind == "choice":
        answer = Answer(
            kind=kind,
            max_new_tokens=fields.integer("max_new_tokens", minimum=1, default=CHOICE_TOKENS),
            options=fields.choice("options", OPTIONS, default=OPTIONS[0]),
            separator=fields.separator("separator"),
        )
    else:
        answer = Answer(kind=kind, max_new_tokens=fields.integer("max_new_tokens", minimum=1))
    fields.finish()
    return answer


def _splits(fields: _Fields) -> SplitSizes:
    sizes = SplitSizes(
        calibration=fields.integer("calibration", minimum=1),
        search=fields.integer("search", minimum=1),
        held_out=fields.integer("held_out", minimum=1),
        unit=fields.choice("unit", SPLIT_UNITS, default="images"),
        seed=fields.integer("seed", default=0, minimum=0),
        calibration_per_image=fields.optional_integer("calibration_per_image", minimum=1),
    )
    fields.finish()
    return sizes


def _placeholders(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _template(
    fields: _Fields, key: str, allowed: tuple[str, ...], *, default: str | None = None, required: bool = False
) -> str:
    template = fields.text(key, default=default)
    names = ", ".join(f"{{{name}}}" for name in allowed)
    try:
        used = _placeholders(template)
    except ValueError as error:
        raise TaskError(f"{fields.where}.{key}: {error}; a literal brace is written twice") from None
    if not used <= set(allowed):
        unknown = ", ".join(f"{{{name}}}" for name in sorted(used - set(allowed)))
        raise TaskError(f"{fields.where}.{key}: unknown placeholder {unknown}; allowed: {names}")
    if required and used != set(allowed):
        raise TaskError(f"{fields.where}.{key}: must contain {names}")
    return template


class _Fields:
    """Reads a mapping field by field; every error names the field and what is allowed there."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, Mapping):
            raise TaskError(f"{where}: must be a mapping of fields, not {_kind(content)}")
        self.content, self.where, self.known = content, where, set[str]()

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def _get(self, key: str) -> Any:
        self.known.add(key)
        if self.content.get(key) is None:
            raise TaskError(f"{self.where}.{key}: is missing")
        return self.content[key]

    def text(self, key: str, *, default: str | None = None) -> str:
        self.known.add(key)
        if key not in self and default is not None:
            return default
        value = self._get(key)
        if not isinstance(value, str) or not value.strip():
            raise TaskError(f"{self.where}.{key}: must be a text that is not empty, not {_kind(value)}")
        return value

    def separator(self, key: str) -> str | None:
        """A text that may be empty or white space."""
        self.known.add(key)
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise TaskError(f"{self.where}.{key}: must be a text, not {_kind(value)}")
        return value

    def integer(self, key: str, *, minimum: int, default: int | None = None) -> int:
        self.known.add(key)
        if key not in self and default is not None:
            return default
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise TaskError(f"{self.where}.{key}: must be a whole number of at least {minimum}, not {value!r}")
        return value

    def optional_integer(self, key: str, *, minimum: int) -> int | None:
        self.known.add(key)
        return self.integer(key, minimum=minimum) if key in self else None

    def choice(self, key: str, allowed: tuple[str, ...], *, default: str | None = None) -> str:
        value = self.text(key, default=default)
        if value not in allowed:
            raise TaskError(
                f"{self.where}.{key}: {value!r} is none of {', '.join(allowed)}{did_you_mean(value, allowed)}"
            )
        return value

    def choices(self, key: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
        self.known.add(key)
        values = self.content.get(key) or []
        if not isinstance(values, list) or any(value not in allowed for value in values):
            raise TaskError(f"{self.where}.{key}: must be a list of {', '.join(allowed)}, not {values!r}")
        return tuple(values)

    def mapping(self, key: str) -> _Fields:
        return _Fields(self._get(key), f"{self.where}.{key}")

    def finish(self) -> None:
        unknown = [str(key) for key in self.content if key not in self.known]
        if unknown:
            allowed = ", ".join(sorted(self.known))
            hint = did_you_mean(unknown[0], self.known)
            raise TaskError(f"{self.where}: unknown field {', '.join(unknown)}; allowed here: {allowed}{hint}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
