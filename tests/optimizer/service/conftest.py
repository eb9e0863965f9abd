"""Tiny real jobs for the tests of the service: a random six-layer LLaVA on a few samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llava
from processes import TwoNodes, write_task


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model, with a task in it."""
    model: Path = tiny_llava.save(tmp_path_factory.mktemp("tiny-llava"))
    write_task(model)
    return model


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    """A Ray cluster of two nodes, in processes of its own."""
    cluster = TwoNodes(tmp_path)
    yield cluster
    cluster.stop()
