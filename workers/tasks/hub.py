"""Rows of a task from a dataset of the Hugging Face hub (optional extra ``hub``)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from workers.errors import TaskError

from .samples import HubImage, Sample
from .spec import HubSource
from .tables import asked, needed_columns


def load_undecoded(dataset: str, subset: str | None, split: str, revision: str | None, column: str) -> Any:
    """Load a dataset with its image column left undecoded (``{"bytes": ..., "path": ...}``). Raises TaskError."""
    try:
        import datasets
    except ImportError:
        raise TaskError("source.kind hub needs the datasets package: pip install 'skipplan[hub]'") from None
    try:
        loaded = datasets.load_dataset(dataset, subset, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds: of its own, of the hub client, of the network
        raise TaskError(f"dataset {dataset} cannot be loaded (split {split}): {' '.join(str(error).split())}") from None
    if column not in loaded.column_names:
        raise TaskError(f"dataset {dataset}: no column {column!r}; it has {', '.join(loaded.column_names)}")
    if not isinstance(loaded.features[column], datasets.Image):
        raise TaskError(f"dataset {dataset}: column {column!r} holds no images")
    return loaded.cast_column(column, datasets.Image(decode=False))


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
