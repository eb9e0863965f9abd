"""Migrations on both engines: from empty, equal to the models, safe to run from several processes at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import inspect, text
from storage_builders import claimed

from storage import connection, migration, schema
from storage.database import Database
from storage.errors import DatabaseError


def _unmigrated(url):
    return Database.open(url, check_schema=False, migrate=False) if "postgresql" in url else _sqlite_with_a_table(url)


def _sqlite_with_a_table(url):
    """An existing SQLite file of another application, which opening does not migrate by itself."""
    import sqlite3

    with sqlite3.connect(url.removeprefix("sqlite:///")) as other:
        other.execute("CREATE TABLE theirs (id INTEGER)")
    return Database.open(url, check_schema=False)


@pytest.fixture
def migrated(empty_database_url):
    """A migrated database whose schema a test may change."""
    with Database.open(empty_database_url, migrate=True) as db:
        yield db


def _tables(db):
    return set(inspect(db.engine).get_table_names()) - {"theirs"}


def _dump(db):
    """Every column, index and constraint, as the database itself describes them."""
    found = inspect(db.engine)
    return {
        table: (
            [(c["name"], str(c["type"]), c["nullable"]) for c in found.get_columns(table)],
            sorted((i["name"], tuple(i["column_names"]), bool(i["unique"])) for i in found.get_indexes(table)),
            sorted((str(f["name"]), f["referred_table"]) for f in found.get_foreign_keys(table)),
            sorted(str(c["name"]) for c in found.get_check_constraints(table)),
            sorted(str(u["name"]) for u in found.get_unique_constraints(table)),
        )
        for table in found.get_table_names()
    }


def test_empty_to_head(empty_database_url):
    with _unmigrated(empty_database_url) as db:
        assert migration.current(db.engine) is None
        migration.upgrade(db.engine)
        assert migration.current(db.engine) == schema.REVISION
        assert _tables(db) == {*schema.Base.metadata.tables, connection.VERSION_TABLE}
        assert migration.check(db.engine) == []


def test_models_and_migrations_agree(db):
    assert migration.check(db.engine) == []


def test_every_constraint_of_the_models_is_in_the_migrations(migrated):
    """What ``check`` cannot see, such as check constraints."""
    by_migrations = _dump(migrated)
    with migrated.engine.begin() as connected:
        schema.Base.metadata.drop_all(connected)
        schema.Base.metadata.create_all(connected)
    assert _dump(migrated) == by_migrations


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE plans ADD COLUMN surprise INTEGER",
        "DROP INDEX ix_plans_contenders",
        "DROP TABLE job_counters",
    ],
)
def test_check_names_what_differs(migrated, change):
    with migrated.transaction() as session:
        session.execute(text(change))
    assert len(migration.check(migrated.engine)) == 1


def test_check_of_an_unmigrated_database_says_what_to_run(empty_database_url):
    with _unmigrated(empty_database_url) as db:
        assert migration.check(db.engine) == [
            f"schema is at no revision, this version writes {schema.REVISION}; run: skipplan db upgrade"
        ]


def test_tables_of_others_are_left_alone(empty_database_url):
    with _unmigrated(empty_database_url) as db:
        with db.transaction() as session:
            session.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
        migration.upgrade(db.engine)
        assert migration.check(db.engine) == []
        assert "alembic_version" in _tables(db)


def test_failing_migration_leaves_nothing(empty_database_url, monkeypatch):
    def broken(config, revision):
        original(config, revision)
        config.attributes["connection"].execute(text("SELECT * FROM not_there"))

    with _unmigrated(empty_database_url) as db:
        original = migration.command.upgrade
        monkeypatch.setattr(migration.command, "upgrade", broken)
        with pytest.raises(DatabaseError, match="not_there"):
            migration.upgrade(db.engine)
        assert _tables(db) == set()


def test_several_threads_migrate_at_once(empty_database_url):
    def migrate(_):
        with Database.open(empty_database_url, migrate=True) as db:
            return migration.current(db.engine)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(migrate, range(4))) == {schema.REVISION}


def test_upgrade_works_from_any_directory(empty_database_url, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code = (
        "import sys\n"
        "from storage.database import Database\n"
        "from storage import migration\n"
        "with Database.open(sys.argv[1], migrate=True) as db:\n"
        "    print(migration.current(db.engine), migration.check(db.engine))\n"
    )
    root = os.path.dirname(os.path.dirname(schema.__file__))  # noqa: PTH120
    answer = subprocess.run(
        [sys.executable, "-c", code, empty_database_url],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == f"{schema.REVISION} []"
    assert list(folder.iterdir()) == []


def test_upgrade_keeps_what_is_there(db):
    job = claimed(db, kept=True)
    migration.upgrade(db.engine)
    with db.reading() as session:
        assert session.get(schema.JobRow, job.id).spec == {"kept": True}
