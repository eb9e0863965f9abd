"""What tests of several rooms share: a local Ray cluster, and an empty database for each test on both engines."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from command_line import own_locks
from postgresql_server import PostgresqlServer, find_binaries
from psycopg import sql
from sqlalchemy import make_url

from storage.database import Database
from storage.schema import Base

# Several processes compute at a time; threads that wait for each other's processors make all of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray runs workers at low priority; beside a test that computes they would hardly ever run.
os.environ.setdefault("RAY_worker_niceness", "0")
hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no fault of what is tested
hypothesis.settings.load_profile("busy")

LONGEST_FIRST = (
    "test_bad_inputs.py",
    "test_families.py",
    "test_pool_membership.py",
    "test_interruption.py",
    "test_serving.py",
    "test_simulated_cluster.py",
    "test_supervisor.py",
    "test_worker_pool.py",
    "test_exported_models.py",
    "test_spread_models.py",
    "test_several_tasks.py",
    "test_several_tasks_job.py",
    "test_generation.py",
    "test_running_commands.py",
    "test_job_claims.py",
)
"""Files that take longest: begun last, they would keep one processor waiting."""

_numbers = itertools.count()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what the imports make out of garbage collection: it stays, and going through it would take seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the long files come first; xdist hands out whole files in this order."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray cluster with two CPUs, whatever the machine has; pools find it and leave it running.

    One for the whole session, because starting it takes seconds.
    """
    import ray

    from workers.cluster.connection import connect, disconnect
    from workers.cluster.settings import ClusterSettings

    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:  # its workers must not wait for others on this machine
        for name, value in own_locks(tmp_path_factory.mktemp("locks")).items():
            patch.setenv(name, value)
        connect(ClusterSettings(address="local"), cpus=2)
    yield
    disconnect()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    """A server of our own, that a test may also halt. Absent binaries skip the test, except under ``CI=true``."""
    binaries = find_binaries()
    if binaries is None:
        reason = "no PostgreSQL binaries found (Debian: apt-get install postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    server = PostgresqlServer(binaries)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgresql_admin_url(request: pytest.FixtureRequest) -> str:
    """A server on which databases may be created: the one named in the environment, or our own."""
    given = os.environ.get("SKIPPLAN_TEST_POSTGRES_URL")
    if given:
        return given
    server: PostgresqlServer = request.getfixturevalue("postgresql_server")
    return server.url()


def _as_admin(admin_url: str, statement: str, *names: str) -> None:
    url = make_url(admin_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _database_url(admin_url: str, name: str) -> str:
    return make_url(admin_url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    Database.open(f"sqlite:///{path}").close()
    return path


def _fresh_database(admin_url: str, template: str) -> Iterator[str]:
    name = f"skipplan_test_{os.getpid()}_{next(_numbers)}"
    _as_admin(admin_url, "CREATE DATABASE {} TEMPLATE {}", name, template)
    yield _database_url(admin_url, name)
    _as_admin(admin_url, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def postgresql_database(postgresql_admin_url: str) -> Iterator[Database]:
    """A migrated database that tests share one after the other."""
    for url in _fresh_database(postgresql_admin_url, "template1"):
        with Database.open(url, migrate=True) as database:
            yield database


def _emptied(database: Database) -> str:
    """Delete all rows: ten times faster than another database."""
    with database.transaction() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    return database.engine.url.render_as_string(hide_password=False)


_ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    """The URL of an empty file with the current schema: copied, as migrating takes a hundred times longer."""
    path = tmp_path / "skipplan.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=_ENGINES)
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database with the current schema, on each engine; tests must leave the schema as it is."""
    if request.param == "postgresql":
        return _emptied(request.getfixturevalue("postgresql_database"))
    url: str = request.getfixturevalue("sqlite_url")
    return url


@pytest.fixture(params=_ENGINES)
def empty_database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database without any table (an SQLite file that is not there), on each engine."""
    if request.param == "postgresql":
        yield from _fresh_database(request.getfixturevalue("postgresql_admin_url"), "template1")
    else:
        yield f"sqlite:///{request.getfixturevalue('tmp_path') / 'skipplan.db'}"


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """An empty open database, on each engine."""
    with Database.open(database_url) as database:
        yield database
