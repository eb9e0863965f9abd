"""Rows of a task from a user's CSV, JSONL or Parquet file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import TaskError

from .samples import ImageFile, Sample
from .spec import FileSource

if TYPE_CHECKING:
    import pandas as pd


def read_file_samples(source: FileSource, *, uses_question: bool) -> list[Sample]:
    """Read every row of the file; images must exist, their content gives the image key.

    Raises:
        TaskError: the file, a column, an image or an answer is missing; the message names file and row (the first
            row of data is row 1).
    """
    table = _read_table(source)
    columns = source.columns
    needed = [columns.image, columns.answers] + ([columns.question] if uses_question else [])
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
        samples.append(
            Sample(
                id=f"row-{number}",
                image=ImageFile(str(image)),
                image_key=keys[image],
                question=cell_text(row[columns.question], where, columns.question) if uses_question else "",
                answers=cell_answers(row[columns.answers], source.answer_separator, where, columns.answers),
            )
        )
    return samples


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


def cell_answers(value: Any, separator: str | None, where: str, column: str) -> tuple[str, ...]:
    """Return the accepted answers in a cell: a list, or a text that ``separator`` may split."""
    if isinstance(value, str):
        parts: list[Any] = value.split(separator) if separator else [value]
    elif hasattr(value, "__len__"):
        parts = list(value)
    else:
        parts = [value]
    answers = tuple(str(part).strip() for part in parts if not is_blank(part))
    if not answers:
        raise TaskError(f"{where}: column {column!r} has no answer")
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
