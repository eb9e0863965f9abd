"""Directories that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimizer.errors import UsageFault
from workers.models.checkpoint import share_as_its_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(output: Path, *, force: bool) -> None:
    """Refuse a destination that may not be written. Raises UsageFault."""
    if output.is_symlink():
        raise UsageFault(f"--output: {output} is a symbolic link; name the directory itself")
    if output.exists() and not output.is_dir():
        raise UsageFault(f"--output: {output} is a file; give a directory")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageFault(f"--output: {output} exists; give another directory, or --force to replace it")
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageFault(f"--output: {output} holds the working directory; give a directory of its own")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "is no directory" if not above.is_dir() else "may not be written to"
        raise UsageFault(f"--output: {output} cannot be written: {above} {reason}")


@contextmanager
def whole_directory(output: Path, *, force: bool) -> Iterator[Path]:
    """Make a fresh directory that takes the place of ``output`` when the block ends well, and vanishes otherwise.

    It is written beside ``output`` and moved there by one rename (an exchange where ``output`` is replaced). What a
    killed process left beside ``output`` is removed by the next export to it.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link that is to be refused
    check_target(output, force=force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        staging = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
    except OSError as error:
        raise UsageFault(f"--output: {output} cannot be written: {error.strerror}") from None
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for as long as this process lives
        fresh = staging / output.name
        fresh.mkdir()
        yield fresh
        require_contained(fresh)
        share_as_its_directory(fresh)
        _sync(fresh)
        check_target(output, force=force)
        _take_place(fresh, output, staging / "replaced")
    except OSError as error:
        raise UsageFault(f"--output: {output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def require_contained(directory: Path) -> None:
    """Refuse anything in ``directory`` but plain files and directories: a link could lead out of it."""
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageFault(f"the export holds {path.relative_to(directory)}, which is no plain file")


def inside(directory: Path, name: str) -> Path:
    """Return the path of ``name`` in ``directory``. Raises UsageFault when it would lie outside."""
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()) or path.resolve() == directory.resolve():
        raise UsageFault(f"the file name {name!r} leads out of the export's directory")
    return path


def checksum(file: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _prefix(output: Path) -> str:
    return f".{output.name}.unfinished-"


def _remove_abandoned(output: Path) -> None:
    """Remove what exports that were killed have left: those whose lock nobody holds."""
    for path in output.parent.iterdir():
        if not path.name.startswith(_prefix(output)) or path.is_symlink() or not path.is_dir():
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its export is still running
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _sync(directory: Path) -> None:
    """Have the files on disk before their directory gets its name, so that a power cut leaves no empty files."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _take_place(fresh: Path, output: Path, replaced: Path) -> None:
    """Give ``fresh`` the name ``output``; a directory that has it already leaves in the same step."""
    if not output.exists() or not any(output.iterdir()):
        fresh.replace(output)  # over an empty directory, too
    elif not _exchange(fresh, output):
        output.replace(replaced)
        try:
            fresh.replace(output)
        except BaseException:
            replaced.replace(output)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories' names in one step; false where the system cannot (it takes Linux and glibc or musl)."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    result: int = function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return result == 0
