"""Remember hashes of large files in the user's cache directory, by the files' identity. Needs no torch.

A file's identity is its path, size, inode, and times of modification and of change. Who writes to a file moves its
times, unless that is within the same tick of the clock, so that nothing is remembered of a file that was young when it
began to be read. What cannot be read, is of another identity or damaged counts as not there; what cannot be written is
left out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workers.cache_directory import cache_directory

FORMAT = 1
"""Another number where the entries mean something else, so that older ones are not read."""
SMALLEST_BYTES = 16 << 20
"""Smaller files are hashed again: that takes no longer than 20 ms."""
SETTLED_SECONDS = 3.0
"""Age from which a write would move a file's times: the coarsest file systems count in steps of two seconds."""
WAITED_FOR_BYTES = 1 << 30
"""A young file of this size is let grow old first: to hash it a second time takes as long."""
OTHER_SECONDS = 600.0
"""How long another process that reads the same file is waited for, before this one reads it as well."""

Entry = tuple[str, ...]


def remembered(file: Path, compute: Callable[[], list[Entry]]) -> list[Entry]:
    """Return ``compute()``, which reads ``file`` alone, or what it gave while the file was the same.

    Processes that ask for the same file at the same time compute it once.
    """
    identity = _identity(file)
    if identity["size"] < SMALLEST_BYTES:
        return compute()
    name = hashlib.sha256(identity["path"].encode()).hexdigest()[:32]
    place = cache_directory() / "fingerprints" / f"{name}.json"
    if (known := _read(place, identity)) is not None:
        return known
    with _one_at_a_time(place):
        if (known := _read(place, identity)) is not None:
            return known
        settled = _is_settled(identity)
        found = compute()
        if settled and _identity(file) == identity:
            with suppress(OSError):
                _write(place, identity, found)
        return found


def _identity(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:  # opening asks a file server anew, where the name alone may be answered from memory
        found = os.fstat(stream.fileno())
    return {
        "path": os.path.realpath(file),
        "size": found.st_size,
        "inode": found.st_ino,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,
    }


def _is_settled(identity: dict[str, Any]) -> bool:
    age: float = time.time() - max(identity["modified"], identity["changed"]) / 1e9
    if 0 <= age < SETTLED_SECONDS and identity["size"] >= WAITED_FOR_BYTES:
        time.sleep(SETTLED_SECONDS - age)
        return True
    return age >= SETTLED_SECONDS


def _read(place: Path, identity: dict[str, Any]) -> list[Entry] | None:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        entries = [tuple(entry) for entry in content["entries"]]
        known = bool(content["checksum"] == _checksum(identity, entries))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return entries if known else None


def _checksum(identity: dict[str, Any], entries: list[Entry]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, identity, entries], sort_keys=True).encode()).hexdigest()


def _write(place: Path, identity: dict[str, Any], entries: list[Entry]) -> None:
    """Replace the entry of a file as a whole, and drop those of files that are gone."""
    content = {"path": identity["path"], "entries": entries, "checksum": _checksum(identity, entries)}
    with tempfile.NamedTemporaryFile("w", dir=place.parent, suffix=".new", encoding="utf-8", delete=False) as new:
        try:
            json.dump(content, new)
            new.close()
            Path(new.name).replace(place)
        except BaseException:
            Path(new.name).unlink()
            raise
    for other in place.parent.glob("*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            if not Path(json.loads(other.read_text(encoding="utf-8"))["path"]).exists():
                other.unlink()


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Wait for other processes at the same entry; where there can be no lock, or for too long, go on without."""
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = place.with_suffix(".lock").open("ab")
    except OSError:
        yield
        return
    with lock:
        deadline = time.monotonic() + OTHER_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
