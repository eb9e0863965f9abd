"""A database with a job in every state, and the dashboard over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from report_builders import claimed, finished_job, identities, queued, record_profile

from optimizer.dashboard.app import Writing, create_app
from storage.database import Database
from storage.queue import jobs, leases, tokens

CALLERS = ("read", "submit", "other", "admin")
OWN_TOKEN = "the dashboard's own token"
TASK = """\
name: red
source: {kind: file, path: red.csv}
prompt: "{question}"
answer: {kind: short, max_new_tokens: 4}
metric: exact_match
splits: {unit: images, calibration: 2, search: 4, held_out: 8}
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Database]:
    """Job 1 succeeded with three plans, 2 runs, 3 failed, 4 was cancelled, 5 is infeasible, 6 waits."""
    path = tmp_path_factory.mktemp("dashboard") / "filled.db"
    shutil.copy(sqlite_template, path)
    with Database.open(f"sqlite:///{path}") as db:
        finished_job(db)
        running = claimed(db)
        record_profile(db, running, identities(db))
        leases.heartbeat(db, running, 600, {"stage": "search", "done": 37, "total": 200, "news": "RSRR"})
        leases.fail(db, claimed(db), "the model <script>alert(1)</script> cannot be loaded")
        jobs.cancel(db, claimed(db).id)
        leases.infeasible(db, claimed(db), "no plan meets the constraint")
        queued(db, task='tasks/</title>odd & "quoted".yaml')
        yield db


@dataclass(frozen=True)
class Service:
    """The API over a database of its own, with a token of every role and a task file laid out."""

    db: Database
    app: FastAPI
    tokens: dict[str, str]
    files: Path

    def client(self, role: str | None = None) -> TestClient:
        """A client that sends the token of a role; its connection begins where every browser's would."""
        headers = {} if role is None else {"Authorization": f"Bearer {self.tokens[role]}"}
        return TestClient(self.app, headers=headers, follow_redirects=False, raise_server_exceptions=False)


@pytest.fixture
def service(filled: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """The filled database, copied; ``read``, ``submit``, ``other`` (submits too) and ``admin`` have tokens."""
    monkeypatch.chdir(tmp_path)
    for name in ("SKIPPLAN_DATABASE", "SKIPPLAN_CLUSTER_ADDRESS", "SKIPPLAN_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    with filled.engine.connect() as connection:  # what is in the write-ahead log goes into the file first
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(str(filled.engine.url.database), tmp_path / "service.db")
    files = tmp_path / "files"
    files.mkdir()
    for number in range(14):
        Image.new("RGB", (8, 8), (number * 15, 0, 0)).save(files / f"{number}.png")
    rows = [f"{number}.png,How red?,{number}" for number in range(14)]
    (files / "red.csv").write_text("\n".join(["image,question,answers", *rows]))
    (files / "red.yaml").write_text(TASK)
    with Database.open(f"sqlite:///{tmp_path / 'service.db'}") as db:
        made = {role: tokens.create(db, role, "submit" if role == "other" else role)[1] for role in CALLERS}
        app = create_app(db, token=OWN_TOKEN, writing=Writing(files, tmp_path / "exports"))
        yield Service(db, app, made | {"dashboard": OWN_TOKEN}, files)
