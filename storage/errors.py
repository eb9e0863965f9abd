# ruff: noqa: N818  (named for what happened, as the words of the messages)
"""Errors of storage; every message is one line that a user can act on and holds no password."""

from __future__ import annotations

UPGRADE_COMMAND = "skipplan db upgrade"


class StorageError(Exception):
    """Anything that storage refuses or cannot do."""


class DatabaseError(StorageError):
    """The database cannot be used as it is."""


class BadDatabaseURL(DatabaseError):
    """The URL is not one that storage understands."""


class UnreachableDatabase(DatabaseError):
    """Nothing answers under the URL, or the connection broke and did not come back in time."""


class NotADatabase(DatabaseError):
    """The file is not an SQLite database."""


class BusyDatabase(DatabaseError):
    """Another process held the write lock for longer than the waiting time."""


class Conflict(DatabaseError):
    """Two transactions met and this one yielded; nothing of it was written, and running it again helps."""


class OldSchema(DatabaseError):
    """The schema is not the one that this version of skipplan writes (missing, older or newer)."""


class NotFound(StorageError):
    """No row answers to that id or name."""


class InvalidValue(StorageError):
    """A value that the schema cannot hold truthfully, such as an accuracy of 1.2 or a NaN."""


class InvalidTransition(StorageError):
    """A job cannot go from the state it is in to the state asked for."""


class KeyReused(StorageError):
    """An idempotency key came with another request than the one it was first used for."""


class LeaseLost(StorageError):
    """The job is no longer held by this owner and attempt; the caller must stop working on it."""


class JobCancelled(LeaseLost):
    """The job was cancelled while this owner worked on it."""
