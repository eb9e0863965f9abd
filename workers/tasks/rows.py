"""Rows of a table of questions: the question, its answers and options, whatever kind of file it is in."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import TaskError

from .spec import Columns

FEWEST_OPTIONS = 2


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
