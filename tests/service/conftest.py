"""Tiny real jobs for the tests of the service: a random six-layer LLaVA on a few samples."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import TwoNodes, write_task

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model, with a task in it."""
    sys.path.insert(0, str(TESTS / "workers"))
    try:
        import tiny_llava
    finally:
        sys.path.remove(str(TESTS / "workers"))
    model: Path = tiny_llava.save(tmp_path_factory.mktemp("tiny-llava"))
    write_task(model)
    return model


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    """A Ray cluster of two nodes, in processes of its own."""
    cluster = TwoNodes(tmp_path)
    yield cluster
    cluster.stop()
