from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import in_process
import pytest

from optimizer.job.inputs import prepare
from storage.database import Database


@pytest.fixture(scope="session")
def worker() -> in_process.OneWorker:
    return in_process.OneWorker("llava-12", prepare(in_process.spec()).task)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path / 'skipplan.db'}") as database:
        yield database
