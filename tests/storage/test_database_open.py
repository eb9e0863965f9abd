"""Opening: what is created, what is refused, and that no message holds a password."""

import logging
import sqlite3
import subprocess
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage import connection, migration, schema
from storage.database import Database
from storage.errors import (
    BadDatabaseURL,
    BusyDatabase,
    DatabaseError,
    NotADatabase,
    OldSchema,
    UnreachableDatabase,
)
from storage.queue import jobs

SECRET = "s3cret-w0rd"


def test_missing_sqlite_file_is_created_and_usable(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with Database.open(url) as db:
        submitted = jobs.submit(db, {"a": 1}, "h")
    with Database.open(url) as db:
        assert jobs.get(db, submitted.id).spec == {"a": 1}


def test_missing_sqlite_file_is_not_created_by_a_reader(tmp_path):
    path = tmp_path / "new.db"
    with pytest.raises(UnreachableDatabase, match="there is no database at"):
        Database.open(f"sqlite:///{path}", create=False)
    assert not path.exists()


def test_sqlite_connections_are_set_up(tmp_path):
    with Database.open(f"sqlite:///{tmp_path / 'a.db'}") as db, db.reading() as session:
        values = {
            name: session.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "busy_timeout", "synchronous")
        }
    assert values == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 60_000, "synchronous": 2}


def test_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UnreachableDatabase, match=r"directory .*/absent does not exist"):
        Database.open(f"sqlite:///{tmp_path / 'absent' / 'a.db'}")


def test_directory_instead_of_a_file(tmp_path):
    with pytest.raises(NotADatabase, match="is a directory"):
        Database.open(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize(
    "content", [b"not a database, just some words of text", b"x", b"SQLite format 3\x00" + b"?" * 5000]
)
def test_file_that_is_no_database_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(NotADatabase, match=r"notes\.txt"):
        Database.open(f"sqlite:///{path}")
    assert path.read_bytes() == content


def test_place_where_no_file_can_be_made():
    with pytest.raises(UnreachableDatabase, match=r"cannot open sqlite:////proc/skipplan\.db"):
        Database.open("sqlite:////proc/skipplan.db")


def test_name_that_no_file_system_takes(tmp_path):
    with pytest.raises(UnreachableDatabase, match="File name too long"):
        Database.open(f"sqlite:///{tmp_path / ('x' * 300)}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("skipplan.db", "cannot be read"),
        ("", "cannot be read"),
        (f"postgresql://u:{SECRET}@host:port/db", "cannot be read"),
        (f"mysql://u:{SECRET}@host/db", "'mysql' is not supported"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite://skipplan.db", "three slashes"),
        (f"postgresql+asyncpg://u:{SECRET}@host/db", "is not supported"),
        (f"postgresql://u:first@{SECRET}@host/db", "%40 for @"),
        (f"postgresql://u:first@{SECRET}/more@host:5432/db", "%40 for @"),
        (f"postgresql://u:first@more/{SECRET}@host:5432/db", "%40 for @"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(BadDatabaseURL, match=message) as caught:
        Database.open(url)
    assert "\n" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("rest", ["a?b.db", "skipplan.db?", "a.db?mode=x", "what?/a.db?timeout=5&b=1"])
def test_a_question_mark_in_a_path_opens_no_other_file(tmp_path, rest):
    with pytest.raises(BadDatabaseURL, match="the path ends at the question mark of the URL; give a path without one"):
        Database.open(f"sqlite:///{tmp_path}/{rest}")
    assert not list(tmp_path.iterdir())
    Database.open(f"sqlite:///{tmp_path}/a.db?timeout=5").close()


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ("e", "connection refused for user me"),
        ("me", "connection refused for user ***"),
        ("connection", "*** refused for user me"),
        ("(", "connection refused for user me"),
    ],
)
def test_a_short_password_is_not_cut_out_of_other_words(secret, expected):
    error = DBAPIError("", {}, Exception("connection refused for user me"))
    url = connection.parse("postgresql://127.0.0.1:9/db").set(username="u", password=secret)
    message = str(connection.translate(error, url))
    assert expected in message


@pytest.mark.parametrize("form", ["postgresql://u:{}@127.0.0.1:9/db", "postgresql://127.0.0.1:9/db?user=u&password={}"])
def test_unreachable_server_is_one_line_without_the_password(form, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(UnreachableDatabase) as caught:
        Database.open(form.format(SECRET))
    message = str(caught.value)
    assert "127.0.0.1:9" in message
    assert "\n" not in message
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in caplog.text


@pytest.mark.postgres
def test_wrong_password_is_not_repeated(postgresql_server):
    url = postgresql_server.url().replace("not-to-be-shown", SECRET)
    with pytest.raises(UnreachableDatabase, match="password authentication failed") as caught:
        Database.open(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_open_database_does_not_show_its_password(database_url):
    with Database.open(database_url) as db:
        assert "not-to-be-shown" not in repr(db) + db.safe_url + repr(db.engine)


@pytest.mark.postgres
def test_empty_postgresql_is_refused_with_the_command(postgresql_admin_url):
    with pytest.raises(OldSchema, match="skipplan db upgrade"):
        Database.open(postgresql_admin_url)


def test_existing_sqlite_file_without_our_tables_is_refused(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (id INTEGER)")
    with pytest.raises(OldSchema, match="skipplan db upgrade"):
        Database.open(f"sqlite:///{path}")


@pytest.mark.parametrize("revision", ["9999", "abcdef"])
def test_newer_schema_is_refused_by_open_and_upgrade(empty_database_url, revision):
    with Database.open(empty_database_url, migrate=True) as db, db.transaction() as session:
        session.execute(text(f"UPDATE {connection.VERSION_TABLE} SET version_num = '{revision}'"))
    with pytest.raises(OldSchema, match="newer"):
        Database.open(empty_database_url)
    with pytest.raises(OldSchema, match="newer"):
        Database.open(empty_database_url, migrate=True)


def test_older_schema_is_refused_with_the_command(database_url, monkeypatch):
    known = schema.REVISION
    monkeypatch.setattr(schema, "REVISION", "newer")
    with pytest.raises(OldSchema, match=rf"has schema {known}, this version needs newer; .*skipplan db upgrade"):
        Database.open(database_url)


def test_more_threads_than_connections_is_said(db, monkeypatch):
    monkeypatch.setattr(db.engine.pool, "_timeout", 0.05)
    with ExitStack() as held:
        for _ in range(db.engine.pool.size() + db.engine.pool._max_overflow):
            held.enter_context(db.engine.connect())
        with pytest.raises(BusyDatabase, match="too many threads"):
            jobs.count(db)


def test_old_servers_are_refused(db, monkeypatch):
    monkeypatch.setattr(connection, "SQLITE_OLDEST", (99, 0))
    monkeypatch.setattr(connection, "POSTGRESQL_OLDEST", (99,))
    with db.engine.connect() as probe, pytest.raises(DatabaseError, match=r"is too old; 99.* or newer is needed"):
        connection.check_server(probe)


def test_opening_checks_the_revision_that_the_models_were_written_for():
    assert migration.head() == schema.REVISION


def test_storage_imports_nothing_heavy():
    code = (
        "import sys, pkgutil, importlib, storage\n"
        "for m in pkgutil.walk_packages(storage.__path__, 'storage.'):\n"
        "    importlib.import_module(m.name)\n"
        "heavy = {'torch', 'ray', 'transformers', 'pandas', 'numpy', 'optuna', 'workers', 'optimizer'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    root = Path(schema.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
