"""Read a task's table: a user's CSV, JSONL or Parquet file, or a dataset of the Hugging Face hub (extra ``hub``)."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from workers.errors import TaskError
from workers.text import one_line

from .images import HubImage, ImageFile, hash_image, load_undecoded
from .rows import Table, cell_text, needed_columns, read_rows
from .samples import Sample
from .spec import FileSource, HubSource, TaskSpec

_PACKED: dict[bytes, Callable[[io.BytesIO], io.BufferedIOBase]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
MOST_UNPACKED = 2**31
"""No table of questions unpacks to more bytes; a file that was made to fill the memory does."""
_ARCHIVES = {b"PK\x03\x04": "ZIP", b"\x28\xb5\x2f\xfd": "Zstandard", b"7z\xbc\xaf\x27\x1c": "7z"}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16, and so stands before it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SEPARATORS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r'\A"?sep=[,;\t|]"?\r?\n')
"""Spreadsheets write it before the header, and show it nowhere."""


def read_file(spec: TaskSpec, source: FileSource) -> list[Sample]:
    """Read every row of a file; images must exist, their content gives the image key.

    Raises:
        TaskError: the file, a column, an image or an answer is missing; the message names file and row (the first
            row of data is row 1).
    """
    columns, cells = _read_table(source, needed_columns(spec, source.columns))
    keys: dict[Path, str] = {}

    def image_of(cell: Any, number: int, where: str) -> tuple[ImageFile, str]:
        path = Path(source.images or ".") / cell_text(cell, where, source.columns.image)
        if path not in keys:
            keys[path] = hash_image(path, where)
        return ImageFile(str(path), keys[path]), keys[path]

    rows = Table(source.path, columns, cells, first=1)
    samples = read_rows(spec, source.columns, rows, image_of, source.answer_separator)
    if not samples:
        raise TaskError(f"{source.path}: has no rows")
    return samples


def read_hub(spec: TaskSpec, source: HubSource) -> list[Sample]:
    """Read every row of a dataset. Raises TaskError naming dataset, column and row (from 0, as the hub shows them)."""
    origin = (source.id, source.subset, source.split, source.revision, source.columns.image)
    table = load_undecoded(*origin)

    def image_of(cell: dict[str, Any] | None, number: int, where: str) -> tuple[HubImage, str]:
        if cell is None:
            raise TaskError(f"{where}: has no image")
        stored = cell.get("bytes")
        key = hash_image(Path(cell["path"]), where) if stored is None else hashlib.sha256(stored).hexdigest()
        return HubImage(*origin, number, key), key

    rows = Table(f"dataset {source.id}", table.column_names, table, first=0)
    return read_rows(spec, source.columns, rows, image_of, None)


Cells = tuple[list[str], list[dict[str, Any]]]
"""The names of a table's columns, and its rows."""


def _read_table(source: FileSource, needed: Collection[str]) -> Cells:
    path = Path(source.path)
    if not path.is_file():
        raise TaskError(f"{path}: no such file (source.path)")
    try:
        content = unpacked(path.read_bytes())
        if source.table_format == "parquet":
            columns, rows = _parquet(content)
        else:
            text = decoded(content)
            columns, rows = _csv(text, needed) if source.table_format == "csv" else _jsonl(text)
    except ImportError:
        raise TaskError(f"{path}: reading Parquet needs pyarrow: pip install 'skipplan[parquet]'") from None
    except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:  # pyarrow's are of these
        raise TaskError(f"{path}: not a readable {source.table_format} file: {one_line(error)}") from None
    for column in needed:
        if columns.count(column) > 1:
            raise TaskError(f"{path}: has {columns.count(column)} columns {column!r}; which one is meant?")
    return columns, rows


def unpacked(content: bytes) -> bytes:
    """Decompress gzip, bzip2 or xz, told by how the content begins.

    Raises ValueError for other archives, and for more than ``MOST_UNPACKED`` bytes.
    """
    for beginning, open_packed in _PACKED.items():
        if content.startswith(beginning):
            with open_packed(io.BytesIO(content)) as file:
                found = file.read(MOST_UNPACKED + 1)
            if len(found) > MOST_UNPACKED:
                raise ValueError(f"it unpacks to more than {MOST_UNPACKED / 2**30:g} GiB")
            return found
    for beginning, name in _ARCHIVES.items():
        if content.startswith(beginning):
            raise ValueError(f"it is a {name} file; unpack it, or compress it with gzip")
    return content


def decoded(content: bytes) -> str:
    """Decode UTF-8, or what a byte order mark names. Raises ValueError naming the first byte that does not fit."""
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = content[error.start]
        raise ValueError(
            f"line {line} is no {error.encoding} text (byte {error.start}: 0x{found:02x}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            "it holds null characters, as UTF-16 without a byte order mark and binary files do; save it as UTF-8"
        )
    return text


def _csv(text: str, needed: Collection[str]) -> Cells:
    """Read cells as text, separated by the character under which the first line names the needed columns."""
    text = _SEPARATOR_LINE.sub("", text, count=1)
    separator = next((each for each in _SEPARATORS if set(needed) <= set(_header(_reader(text, each)))), ",")
    reader = _reader(text, separator, strict=True)
    header = _header(reader)
    if not header:
        raise ValueError("it is empty")
    if not set(needed) <= set(header):
        return header, []  # which column is missing says more than which row does not fit
    rows = []
    for number, row in enumerate(filter(None, reader), start=1):
        while len(row) > len(header) and not row[-1].strip():
            row.pop()  # separators at the end of every line
        if len(row) != len(header):
            raise ValueError(f"row {number} (line {reader.line_num}) has {len(row)} cells, the header {len(header)}")
        rows.append(dict(zip(header, row, strict=True)))
    return header, rows


def _reader(text: str, separator: str, *, strict: bool = False) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict)


def _header(reader: Iterator[list[str]]) -> list[str]:
    """Read the first line that is not blank."""
    return [name.strip() for name in next(filter(any, reader), ())]


def _jsonl(text: str) -> Cells:
    """Read one JSON object a line, or one list of objects; values keep the types that they have in the file."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        rows = [("row", number, row) for number, row in enumerate(_json(text, "it"), start=1)]
    else:
        rows = [("line", number, _json(line, f"line {number}")) for number, line in lines]
    for kind, number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{kind} {number} must be a JSON object, one a line")
    columns = list(dict.fromkeys(name for _, _, row in rows for name in row))
    return columns, [dict.fromkeys(columns) | row for _, _, row in rows]


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is given twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _parquet(content: bytes) -> Cells:
    """Read cells as Python's own types; a 32-bit float as the shortest number that it stands for."""
    import numpy as np
    import pyarrow
    from pyarrow import parquet

    table = parquet.ParquetFile(io.BytesIO(content)).read()  # read_table's error for a name that is there twice is long
    cells = []
    for field, column in zip(table.schema, table.columns, strict=True):
        values = column.to_pylist()
        if pyarrow.types.is_float32(field.type) or pyarrow.types.is_float16(field.type):
            short = np.float32 if pyarrow.types.is_float32(field.type) else np.float16
            values = [None if value is None else float(str(short(value))) for value in values]
        cells.append(values)
    return table.column_names, [dict(zip(table.column_names, row, strict=True)) for row in zip(*cells, strict=True)]
