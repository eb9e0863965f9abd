"""A database with a job in every state, and the dashboard over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_builders import claimed, finished_job, identities, queued, record_profile

from storage.database import Database
from storage.queue import jobs, leases


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
