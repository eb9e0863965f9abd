"""Tiny real jobs for the tests of the service: a random six-layer LLaVA on a few samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    sys.path.insert(0, str(TESTS / "workers"))
    try:
        import tiny_llava
    finally:
        sys.path.remove(str(TESTS / "workers"))
    return tiny_llava.save(tmp_path_factory.mktemp("tiny-llava"))
