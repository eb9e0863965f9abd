"""A cluster of two nodes for the tests of the service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import TwoNodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    """A Ray cluster of two nodes, in processes of its own."""
    cluster = TwoNodes(tmp_path)
    yield cluster
    cluster.stop()
