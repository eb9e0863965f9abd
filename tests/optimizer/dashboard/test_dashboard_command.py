"""``skipplan dashboard``: where it listens, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from optimizer.cli.main import _run
from optimizer.dashboard.access import is_loopback
from storage.database import Database


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_what_counts_as_this_machine_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("arguments", "token", "told"),
    [
        (["--host", "0.0.0.0"], "", "set a token in SKIPPLAN_DASHBOARD_TOKEN, or listen on 127.0.0.1"),
        (["--host", "127.0.0.1"], "short", "must have at least 16 characters"),
    ],
)
def test_refusals(
    filled: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    token: str,
    told: str,
) -> None:
    monkeypatch.setenv("SKIPPLAN_DATABASE", filled.engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("SKIPPLAN_DASHBOARD_TOKEN", token)
    assert _run(["dashboard", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_taken_port(filled: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    monkeypatch.setenv("SKIPPLAN_DATABASE", filled.engine.url.render_as_string(hide_password=False))
    monkeypatch.delenv("SKIPPLAN_DASHBOARD_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _run(["dashboard", "--port", str(port)]) == 2
    assert "cannot listen there: Address already in use" in capsys.readouterr().err


def test_served_until_stopped(filled: Database, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = filled.engine.url.render_as_string(hide_password=False)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SKIPPLAN_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "optimizer.cli.main", "--database", url, "dashboard", "--port", str(port)],
        env={**environment, "PYTHONPATH": str(Path.cwd())}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        told = server.stderr.readline()
        assert f"http://127.0.0.1:{port}/" in told
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs") as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    assert server.returncode in (0, 130)
