from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONNECT = """\
from workers.cluster.connection import connect
from workers.cluster.settings import ClusterSettings
from workers.errors import ClusterError
try:
    connect(ClusterSettings(address="local"), cpus=1)
except ClusterError as error:
    print(error)
"""


def test_a_directory_too_deep_for_sockets_is_named_with_what_to_do(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env=environment | {"TMPDIR": str(deep), "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("cluster local: cannot be used: ") and "AF_UNIX path length cannot exceed" in line
    assert line.endswith("; set RAY_TMPDIR to a directory with a short path, such as /tmp")
