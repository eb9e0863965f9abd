"""How much memory a device's worker may take."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from workers.device import memory


@pytest.mark.parametrize("limit", [None, "max", "9223372036854771712", str(3 * 2**30)])
@pytest.mark.parametrize(("threads", "part"), [(1, 4), (2, 2), (8, 1)])
def test_it_is_a_part_of_the_machines_or_of_its_containers(
    limit: str | None, threads: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (total,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    whole = int(total) * 1024
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        whole = min(whole, int(limit)) if limit.isdigit() else whole
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert memory.memory_bytes(torch.device("cpu")) == pytest.approx(whole / part, rel=1e-6)
