"""Rows of a task from a user's CSV, JSONL or Parquet file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import TaskError
from workers.text import one_line

from .images import ImageFile
from .rows import asked, cell_text, image_key, needed_columns
from .samples import Sample
from .spec import FileSource

if TYPE_CHECKING:
    import pandas as pd


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


def _image_path(value: Any, source: FileSource, where: str, column: str) -> Path:
    return Path(source.images or ".") / cell_text(value, where, column)


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
        if source.table_format == "csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        if source.table_format == "jsonl":
            return _read_jsonl(path)
        return pd.read_parquet(path)
    except ImportError:
        raise TaskError(f"{path}: reading Parquet needs pyarrow: pip install 'skipplan[parquet]'") from None
    except pd.errors.EmptyDataError:
        raise TaskError(f"{path}: is empty") from None
    except (ValueError, OSError) as error:  # pandas and pyarrow parser errors are both of these kinds
        raise TaskError(f"{path}: not a readable {source.table_format} file: {one_line(error)}") from None
