"""Store fitted maps in a directory or at an fsspec URL, as files named by their own checksum. Needs no torch."""

from __future__ import annotations

import hashlib
import uuid

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from workers.messages import Artifact
from workers.text import first_line

from .recipe import CompensationError

SUFFIX = ".safetensors"
REFIT = "`skipplan refit` makes them again from the record"


def checksum(content: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def put(store: str, content: bytes) -> Artifact:
    """Write ``content`` into the store and say where it lies; a file that is there already is not written again.

    Raises :class:`CompensationError` when the store cannot be written.
    """
    digest = checksum(content)
    try:
        files, directory = url_to_fs(store)
        path = f"{directory.rstrip('/')}/{digest}{SUFFIX}"
        files.makedirs(directory, exist_ok=True)
        if not isinstance(files, LocalFileSystem):  # object stores show a file when it is complete
            files.pipe_file(path, content)
            return Artifact(f"{store.rstrip('/')}/{digest}{SUFFIX}", digest)
        if not files.isfile(path) or checksum(files.cat_file(path)) != digest:
            unfinished = f"{path}.{uuid.uuid4().hex}"
            files.pipe_file(unfinished, content)
            files.mv(unfinished, path)
    except (OSError, ValueError, ImportError) as error:
        raise CompensationError(f"artifact store {store}: cannot be written: {first_line(error)}") from None
    return Artifact(path, digest)


def get(artifact: Artifact, *, name: str = "compensation maps", remedy: str = REFIT) -> bytes:
    """Read an artifact back. Raises :class:`CompensationError` when it is missing or not what was written.

    ``name`` and ``remedy`` say in the error what it is and how it is made again.
    """
    try:
        files, path = url_to_fs(artifact.location)
        content: bytes = files.cat_file(path)
    except (OSError, ValueError, ImportError) as error:
        raise CompensationError(f"{name} {artifact.location}: cannot be read: {first_line(error)}; {remedy}") from None
    if checksum(content) != artifact.checksum:
        raise CompensationError(
            f"{name} {artifact.location}: not what was fitted (checksum {checksum(content)[:12]}, recorded "
            f"{artifact.checksum[:12]}); {remedy}"
        )
    return content
