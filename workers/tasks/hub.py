"""Rows of a task from a dataset of the Hugging Face hub (optional extra ``hub``)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from workers.errors import TaskError

from .images import HubImage, load_undecoded
from .rows import asked, needed_columns
from .samples import Sample
from .spec import HubSource


def read_hub_samples(source: HubSource, *, uses_question: bool, options: str | None = None) -> list[Sample]:
    """Read every row of the dataset; ``options`` as for files. Raises TaskError naming dataset, column and row."""
    columns = source.columns
    table = load_undecoded(source.id, source.subset, source.split, source.revision, columns.image)
    for column in needed_columns(columns, uses_question=uses_question):
        if column not in table.column_names:
            raise TaskError(f"dataset {source.id}: no column {column!r}; it has {', '.join(table.column_names)}")
    samples = []
    for number, row in enumerate(table):
        where = f"dataset {source.id}, row {number}"
        question = asked(row, columns, None, where, uses_question=uses_question, options=options)
        samples.append(
            Sample(
                id=f"row-{number}",
                image=HubImage(source.id, source.subset, source.split, source.revision, columns.image, number),
                image_key=_key(row[columns.image], where),
                question=question.text,
                answers=question.answers,
                choices=question.choices,
            )
        )
    return samples


def _key(stored: dict[str, Any] | None, where: str) -> str:
    if stored is None:
        raise TaskError(f"{where}: has no image")
    if stored.get("bytes") is not None:
        return hashlib.sha256(stored["bytes"]).hexdigest()
    try:
        with Path(stored["path"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TaskError(f"{where}: image {stored['path']} cannot be read: {error.strerror}") from None
