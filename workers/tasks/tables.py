"""Rows of a task from a user's CSV, JSONL or Parquet file."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import TaskError

from .samples import ImageFile, Sample
from .spec import Columns, FileSource

if TYPE_CHECKING:
    import pandas as pd

FEWEST_OPTIONS = 2


def read_file_samples(source: FileSource, *, uses_question: bool, options: str | None = None) -> list[Sample]:
    """Read every row of the file; images must exist, their content gives the image key.

    ``options`` is how the task's options are scored (:class:`Answer`), ``None`` where the task is not to choose.

    Raises:
        TaskError: the file, a column, an image or an answer is missing; the message names file and row (the first
            row of data is row 1).
    """
    table = _read_table(source)
    columns = source.columns
    needed = needed_columns(columns, uses_question=uses_question)
    for column in needed:
        if column not in table.columns:
            present = ", ".join(str(name) for name in table.columns)
            raise TaskError(f"{source.path}: no column {column!r}; it has {present} (source.columns maps the names)")
    if table.empty:
        raise TaskError(f"{source.path}: has no rows")
    keys: dict[Path, str] = {}
    samples = []
    for number, row in enumerate(table.to_dict("records"), start=1):
        where = f"{source.path}, row {number}"
        image = _image_path(row[columns.image], source, where, columns.image)
        if image not in keys:
            keys[image] = image_key(image, where)
        question = asked(row, columns, source.answer_separator, where, uses_question=uses_question, options=options)
        samples.append(
            Sample(
                id=f"row-{number}",
                image=ImageFile(str(image)),
                image_key=keys[image],
                question=question.text,
                answers=question.answers,
                choices=question.choices,
            )
        )
    return samples


def needed_columns(columns: Columns, *, uses_question: bool) -> list[str]:
    """The columns that a table must have."""
    return [
        columns.image,
        columns.answers,
        *([columns.question] if uses_question else []),
        *([columns.choices] if columns.choices else []),
    ]


@dataclass(frozen=True)
class Asked:
    """What a row asks: the question's text, the accepted answers, and the options that the model chooses among."""

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def asked(
    row: Mapping[Any, Any],
    columns: Columns,
    separator: str | None,
    where: str,
    *,
    uses_question: bool,
    options: str | None = None,
) -> Asked:
    """Read a row. Where it has options, they follow the question, one a line, and the answer is a letter.

    With ``options="texts"`` the question stands alone, and the answer is the right option's text.
    """
    question = cell_text(row[columns.question], where, columns.question) if uses_question else ""
    if columns.choices is None:
        return Asked(question, cell_answers(row[columns.answers], separator, where, columns.answers))
    texts = cell_answers(row[columns.choices], separator, where, columns.choices, what="option", blanks=True)
    if options is not None and len(set(texts)) < FEWEST_OPTIONS:
        raise TaskError(
            f"{where}: column {columns.choices!r} has {len(set(texts))} different option, "
            f"a choice needs at least {FEWEST_OPTIONS}"
        )
    if options != "texts" and len(texts) > len(string.ascii_uppercase):
        raise TaskError(f"{where}: column {columns.choices!r} has {len(texts)} options, more than there are letters")
    place = str(row[columns.answers]).strip()
    if not place.isdigit() or int(place) >= len(texts):
        raise TaskError(
            f"{where}: column {columns.answers!r} must be the place of an option, 0 to {len(texts) - 1}, not {place!r}"
        )
    if options == "texts":
        return Asked(question, (texts[int(place)],), tuple(dict.fromkeys(texts)))
    letters = tuple(string.ascii_uppercase[: len(texts)])
    lettered = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    text = "\n".join([question, *lettered] if question else lettered)
    return Asked(text, (letters[int(place)],), letters if options == "letters" else ())


def image_key(path: Path, where: str) -> str:
    """Hash an image file's content. Raises TaskError if it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise TaskError(f"{where}: image {path} does not exist") from None
    except OSError as error:
        raise TaskError(f"{where}: image {path} cannot be read: {error.strerror}") from None


def cell_text(value: Any, where: str, column: str) -> str:
    """Return a cell's text. Raises TaskError if it holds none."""
    if is_blank(value):
        raise TaskError(f"{where}: column {column!r} is empty")
    return str(value).strip()


def cell_answers(
    value: Any, separator: str | None, where: str, column: str, what: str = "answer", *, blanks: bool = False
) -> tuple[str, ...]:
    """Return the accepted answers in a cell: a list, or a text that ``separator`` may split.

    A list may hold mappings with an ``answer`` each, as VQA data sets have them, or be a mapping with a list of those.
    Blank ones are left out, or refused where ``blanks`` says that each place counts.
    """
    if isinstance(value, Mapping):
        value = value.get("answer")
    if isinstance(value, str):
        parts: list[Any] = value.split(separator) if separator else [value]
    elif hasattr(value, "__len__"):
        parts = [part.get("answer") if isinstance(part, Mapping) else part for part in value]
    else:
        parts = [value]
    answers = tuple(str(part).strip() for part in parts if not is_blank(part))
    if not answers:
        raise TaskError(f"{where}: column {column!r} has no {what}")
    if blanks and len(answers) < len(parts):
        raise TaskError(f"{where}: column {column!r} has a blank {what}")
    return answers


def is_blank(value: Any) -> bool:
    """Whether a cell is missing, NaN, or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _image_path(value: Any, source: FileSource, where: str, column: str) -> Path:
    return Path(source.images) / cell_text(value, where, column)


def _read_jsonl(path: Path) -> pd.DataFrame:
    """Read one JSON object a line; values keep the types they have in the file."""
    import pandas as pd

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise TaskError(f"{path}, line {number}: must be a JSON object, one a line")
            rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def _read_table(source: FileSource) -> pd.DataFrame:
    import pandas as pd

    path = Path(source.path)
    if not path.is_file():
        raise TaskError(f"{path}: no such file (source.path)")
    try:
        if source.format == "csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        if source.format == "jsonl":
            return _read_jsonl(path)
        return pd.read_parquet(path)
    except ImportError:
        raise TaskError(f"{path}: reading Parquet needs pyarrow: pip install 'skipplan[parquet]'") from None
    except pd.errors.EmptyDataError:
        raise TaskError(f"{path}: is empty") from None
    except (ValueError, OSError) as error:  # pandas and pyarrow parser errors are both of these kinds
        raise TaskError(f"{path}: not a readable {source.format} file: {' '.join(str(error).split())}") from None
