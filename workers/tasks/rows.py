"""Read the rows of a table of questions as samples, whatever kind of file the table is in."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, time
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from workers.errors import TaskError

from .images import ImageReference
from .samples import Sample
from .spec import Columns, TaskSpec

FEWEST_OPTIONS = 2
_BYTES = (bytes, bytearray, memoryview)
_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
"""Characters without width that spreadsheets and web pages leave around texts."""

ImageOf = Callable[[Any, int, str], tuple[ImageReference, str]]
"""Finds the image of a row from its cell, the row's number and its place: where it is, and the hash of its content."""


@dataclass(frozen=True)
class Table:
    """A table as it was read: its name in errors, its columns, its rows, and the number of the first of them."""

    name: str
    columns: Collection[str]
    rows: Iterable[Mapping[Any, Any]]
    first: int


def needed_columns(spec: TaskSpec, columns: Columns) -> list[str]:
    """Name the columns that a task reads."""
    question = [columns.question] if spec.uses_question else []
    return [columns.image, columns.answers, *question, *([columns.choices] if columns.choices else [])]


def read_rows(spec: TaskSpec, columns: Columns, table: Table, image_of: ImageOf, separator: str | None) -> list[Sample]:
    """Read every row as a sample. Raises TaskError naming the table, and the column or the row."""
    for column in needed_columns(spec, columns):
        if column not in table.columns:
            present = ", ".join(map(str, table.columns))
            raise TaskError(f"{table.name}: no column {column!r}; it has {present} (source.columns maps the names)")
    samples = []
    for number, row in enumerate(table.rows, start=table.first):
        where = f"{table.name}, row {number}"
        image, key = image_of(row[columns.image], number, where)
        question = shown_text(row[columns.question], where, columns.question) if spec.uses_question else ""
        if columns.choices is None:
            asked = Asked(question, _answers(row[columns.answers], separator, where, columns.answers))
        else:
            texts = _answers(row[columns.choices], separator, where, columns.choices, what="option", blanks=True)
            index = _place(row[columns.answers], texts, columns, where, spec.answer.options)
            asked = _with_options(question, texts, index, spec.answer.options)
        samples.append(Sample(f"row-{number}", image, key, asked.text, asked.answers, asked.choices))
    return samples


@dataclass(frozen=True)
class Asked:
    """The question of a row, its accepted answers, and the options that the model chooses among."""

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def _place(value: Any, texts: tuple[str, ...], columns: Columns, where: str, options: str | None) -> int:
    """Return the index of the right option among ``texts``, from 0."""
    different = len(set(texts))
    if options is not None and different < FEWEST_OPTIONS:
        raise TaskError(
            f"{where}: column {columns.choices!r} has {different} different option, "
            f"a choice needs at least {FEWEST_OPTIONS}"
        )
    if options != "texts" and len(texts) > len(string.ascii_uppercase):
        raise TaskError(f"{where}: column {columns.choices!r} has {len(texts)} options, more than there are letters")
    index = str(value) if _is_blank(value) else cell_text(value, where, columns.answers)
    if not index.isdecimal() or int(index) >= len(texts):
        raise TaskError(
            f"{where}: column {columns.answers!r} must be the index of an option, 0 to {len(texts) - 1}, not {index!r}"
        )
    return int(index)


def _with_options(question: str, texts: tuple[str, ...], index: int, options: str | None) -> Asked:
    """Let the options follow the question, one a line, with a letter as the answer; ``"texts"`` leaves them out."""
    if options == "texts":
        return Asked(question, (texts[index],), tuple(dict.fromkeys(texts)))
    letters = tuple(string.ascii_uppercase[: len(texts)])
    lettered = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    text = "\n".join([question, *lettered] if question else lettered)
    return Asked(text, (letters[index],), letters if options == "letters" else ())


def cell_text(value: Any, where: str, column: str) -> str:
    """Return a cell's text: bytes as UTF-8, a whole number without a fraction whatever type it is stored in, a date.

    Raises:
        TaskError: the cell is empty, or holds a list, a mapping, an infinite number, or what is no UTF-8 text.
    """
    if isinstance(value, _BYTES):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError:
            raise TaskError(f"{where}: column {column!r} holds bytes that are no UTF-8 text") from None
    if hasattr(value, "__len__") and not isinstance(value, str):
        kind = "mapping" if isinstance(value, Mapping) else "list"
        raise TaskError(f"{where}: column {column!r} holds a {kind} where one text is needed")
    if _is_blank(value):
        raise TaskError(f"{where}: column {column!r} is empty")
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise TaskError(f"{where}: column {column!r} holds {value}, which is no number")
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    text = str(int(value) if _is_whole(value) else value).strip()
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise TaskError(f"{where}: column {column!r} holds a null character or half of a surrogate pair: {text!r}")
    return text


def shown_text(value: Any, where: str, column: str) -> str:
    """Return a cell's text as it is seen: accents composed (NFC), as models write them, nothing invisible around it.

    Raises TaskError as :func:`cell_text`.
    """
    return _trimmed(unicodedata.normalize("NFC", cell_text(value, where, column)))


def _trimmed(text: str) -> str:
    return text.strip().strip(_INVISIBLE).strip()


def _answers(
    value: Any, separator: str | None, where: str, column: str, what: str = "answer", *, blanks: bool = False
) -> tuple[str, ...]:
    """Return the accepted answers in a cell: a list, or a text that ``separator`` may split.

    A list may hold mappings with an ``answer`` each, as VQA data sets have them, or be a mapping with a list of those.
    Blank ones are left out, or refused where ``blanks`` says that each place counts.
    """
    if isinstance(value, Mapping):
        value = value.get("answer")
    if isinstance(value, _BYTES):
        value = cell_text(value, where, column)
    if isinstance(value, str):
        parts: list[Any] = value.split(separator) if separator else [value]
    elif hasattr(value, "__len__"):
        parts = [part.get("answer") if isinstance(part, Mapping) else part for part in value]
    else:
        parts = [value]
    answers = tuple(shown_text(part, where, column) for part in parts if not _is_blank(part))
    if not answers:
        raise TaskError(f"{where}: column {column!r} has no {what}")
    if blanks and len(answers) < len(parts):
        raise TaskError(f"{where}: column {column!r} has a blank {what}")
    return answers


def _is_blank(value: Any) -> bool:
    """Tell whether a cell is missing, NaN, or white space."""
    if hasattr(value, "__len__") and not isinstance(value, str):
        return len(value) == 0
    return bool(value is None or value != value or (isinstance(value, str) and not _trimmed(value)))


def _is_whole(value: Any) -> bool:
    """Tell whether a number that is stored as a float or decimal has no fraction."""
    is_float = isinstance(value, Real | Decimal) and not isinstance(value, Integral)
    return is_float and math.isfinite(value) and value == int(value)
