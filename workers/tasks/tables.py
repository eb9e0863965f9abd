"""Read a task's table: a user's CSV, JSONL or Parquet file, or a dataset of the Hugging Face hub (extra ``hub``)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import TaskError
from workers.text import one_line

from .images import HubImage, ImageFile, hash_image, load_undecoded
from .rows import Table, cell_text, read_rows
from .samples import Sample
from .spec import FileSource, HubSource, TaskSpec

if TYPE_CHECKING:
    import pandas as pd


def read_file(spec: TaskSpec, source: FileSource) -> list[Sample]:
    """Read every row of a file; images must exist, their content gives the image key.

    Raises:
        TaskError: the file, a column, an image or an answer is missing; the message names file and row (the first
            row of data is row 1).
    """
    table = _read_table(source)
    keys: dict[Path, str] = {}

    def image_of(cell: Any, number: int, where: str) -> tuple[ImageFile, str]:
        path = Path(source.images or ".") / cell_text(cell, where, source.columns.image)
        if path not in keys:
            keys[path] = hash_image(path, where)
        return ImageFile(str(path)), keys[path]

    rows = Table(source.path, list(table.columns), table.to_dict("records"), first=1)
    samples = read_rows(spec, source.columns, rows, image_of, source.answer_separator)
    if not samples:
        raise TaskError(f"{source.path}: has no rows")
    return samples


def read_hub(spec: TaskSpec, source: HubSource) -> list[Sample]:
    """Read every row of a dataset. Raises TaskError naming dataset, column and row (from 0, as the hub shows them)."""
    place = (source.id, source.subset, source.split, source.revision, source.columns.image)
    table = load_undecoded(*place)

    def image_of(cell: dict[str, Any] | None, number: int, where: str) -> tuple[HubImage, str]:
        if cell is None:
            raise TaskError(f"{where}: has no image")
        stored = cell.get("bytes")
        key = hash_image(Path(cell["path"]), where) if stored is None else hashlib.sha256(stored).hexdigest()
        return HubImage(*place, number), key

    rows = Table(f"dataset {source.id}", table.column_names, table, first=0)
    return read_rows(spec, source.columns, rows, image_of, None)


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
