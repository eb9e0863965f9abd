from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import in_process
import pytest
import tiny_llava
from processes import write_task

from optimizer.job.inputs import prepare
from storage.database import Database


@pytest.fixture(scope="session")
def worker() -> in_process.OneWorker:
    return in_process.OneWorker("llava-12", prepare(in_process.spec()).task)


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Database]:
    with Database.open(sqlite_url) as database:
        yield database


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model, with a task in it."""
    model: Path = tiny_llava.save(tmp_path_factory.mktemp("tiny-llava"))
    write_task(model)
    return model


@pytest.fixture(autouse=True)
def own_lock(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    in_process.lock_apart(monkeypatch, tmp_path_factory.getbasetemp())
