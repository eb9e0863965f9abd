"""Where fitted maps lie: a directory or an fsspec URL, files named by their own checksum. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from workers.messages import Artifact
from workers.text import first_line

from .recipe import CompensationError

SUFFIX = ".safetensors"


def checksum(content: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def is_url(location: str) -> bool:
    """Whether a store or an artifact is named by an fsspec URL such as ``s3://bucket/maps``."""
    return "://" in location


def put(store: str, content: bytes) -> Artifact:
    """Write ``content`` into the store and say where it lies; what is there already is not written again.

    Raises :class:`CompensationError` when the store cannot be written.
    """
    digest = checksum(content)
    location = f"{store.rstrip('/')}/{digest}{SUFFIX}"
    try:
        if is_url(store):
            _put_url(location, content)
        else:
            location = str(Path(location).expanduser().resolve())
            _put_file(Path(location), content)
    except (OSError, ValueError, ImportError) as error:
        raise CompensationError(f"artifact store {store}: cannot be written: {first_line(error)}") from None
    return Artifact(location, digest)


def get(artifact: Artifact) -> bytes:
    """Read an artifact back. Raises :class:`CompensationError` when it is missing or not what was written."""
    try:
        if is_url(artifact.location):
            import fsspec

            with fsspec.open(artifact.location, "rb") as stream:
                content: bytes = stream.read()
        else:
            content = Path(artifact.location).read_bytes()
    except (OSError, ValueError, ImportError) as error:
        raise CompensationError(
            f"compensation maps {artifact.location}: cannot be read: {first_line(error)}; "
            "`skipplan refit` makes them again from the record"
        ) from None
    if checksum(content) != artifact.checksum:
        raise CompensationError(
            f"compensation maps {artifact.location}: are not what was fitted (checksum {checksum(content)[:12]}, "
            f"recorded {artifact.checksum[:12]}); `skipplan refit` makes them again from the record"
        )
    return content


def _put_file(path: Path, content: bytes) -> None:
    if path.is_file() and checksum(path.read_bytes()) == path.name.removesuffix(SUFFIX):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)  # mkstemp makes it private
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _put_url(location: str, content: bytes) -> None:
    import fsspec

    files, path = fsspec.core.url_to_fs(location)
    files.makedirs(files._parent(path), exist_ok=True)
    files.pipe_file(path, content)
