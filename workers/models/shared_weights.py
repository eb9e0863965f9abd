"""Share weights that are computed with in float32 between the processes of a machine.

transformers maps safetensors files into memory: all processes have the same pages of the page cache. Weights of another
dtype than is computed in are converted while they are loaded, and each process would hold a copy of its own, twice as
large as the checkpoint for float32. So the files are converted once, and the converted ones are mapped. float32 holds
every float16 and bfloat16 number: the model is the same bit for bit.

The files lie in the machine's temporary directory, beside copies of all else of the checkpoint's directory: directories
that differ in any of it, say in their generation settings, have files of their own. Those that no process uses any more
go when others are made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import torch

from .checkpoint import PICKLED_PATTERNS, read_header

SMALLEST_BYTES = 256 << 20
"""Smaller checkpoints are converted by each process: a copy costs less than a file."""
WIDENED = {"BF16": torch.bfloat16, "F16": torch.float16}
_BLOCK_BYTES = 1 << 24
_ALIGNED_BYTES = 64
_NOT_COPIED = ("*.safetensors", *PICKLED_PATTERNS)
_BOOT = Path("/proc/sys/kernel/random/boot_id")

_in_use: dict[str, IO[bytes]] = {}
"""Locks that keep files from being removed while this process lives, by directory."""


def share_in_float32(directory: Path, files: Sequence[Path], fingerprint: Callable[[], str]) -> tuple[Path, str]:
    """Return a directory with the model of ``directory`` in float32, and why it is not shared, if it is not.

    ``files`` are its weights, safetensors all of them, and ``fingerprint`` is the model's. The directory given comes
    back where there is nothing to share, or no room.
    """
    if sum(_widened_bytes(file) for file in files) < SMALLEST_BYTES:
        return directory, ""
    folder = Path(tempfile.gettempdir()) / f"skipplan-weights-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return directory, f"weights are converted by every worker: {folder} belongs to another user"
        # What was written before a crash of the machine may be incomplete: each start of it has files of its own.
        boot = _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else ""
        before, beside = fingerprint(), _digest_beside(directory)
        place = folder / f"{before[:32]}-{beside[:16]}-{boot}"

        def is_whole() -> bool:
            return all((place / file.name).is_file() for file in files) and _digest_beside(place) == beside

        def make() -> None:
            with _appears_complete(place) as new:
                _convert(directory, files, new)
                if fingerprint() != before or _digest_beside(new) != beside:
                    raise OSError(0, "the checkpoint changed while it was read")

        _get_or_make(place, is_whole, make)
        return place, ""
    except OSError as error:
        return (
            directory,
            f"weights are converted by every worker: {folder} cannot hold them ({error.strerror or error})",
        )


def _get_or_make(place: Path, is_whole: Callable[[], bool], make: Callable[[], None]) -> None:
    """Have ``place`` made once, anew where something is gone from it, and kept while this process lives.

    Raises OSError also where it is not whole, and others use it.
    """
    while str(place) not in _in_use:
        lock = place.with_suffix(".lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_SH)
        there = place.is_dir()
        if there and is_whole():
            _in_use[str(place)] = lock
            return
        with lock:  # the lock cannot be made an exclusive one without being free in between
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if there else 0))
            except BlockingIOError:
                raise OSError(0, f"files are gone from {place.name}, which others use") from None
            for killed in place.parent.glob(f"{place.name}.*"):
                if killed.suffix != ".lock":
                    shutil.rmtree(killed)
            if place.is_dir() and not is_whole():
                shutil.rmtree(place)
            if not place.is_dir():
                _remove_unused(place.parent)
                make()


def _remove_unused(folder: Path) -> None:
    for other in folder.iterdir():
        if other.suffix != ".lock":
            with suppress(OSError), other.with_suffix(".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other)


@contextmanager
def _appears_complete(place: Path) -> Iterator[Path]:
    """Give a new directory that gets its name when the block ends, and is gone where that fails."""
    new = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}."))
    try:
        yield new
        new.rename(place)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _convert(directory: Path, files: Sequence[Path], new: Path) -> None:
    """Write the converted files into ``new``, and copies of all else of the directory but weights."""
    needed, free = sum(file.stat().st_size + _widened_bytes(file) for file in files), shutil.disk_usage(new).free
    if needed > 0.95 * free:
        raise OSError(0, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    for file in files:
        _widen(file, new / file.name)
    for name in _names_beside(directory):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(directory / name, new / name)


def _names_beside(directory: Path) -> list[str]:
    """Names of all files below a directory but weights."""
    found = []
    for folder, _, names in os.walk(directory, followlinks=True):
        kept = (Path(folder, name) for name in names if not any(fnmatch(name, weights) for weights in _NOT_COPIED))
        found += [str(path.relative_to(directory)) for path in kept if path.is_file()]
    return sorted(found)


def _digest_beside(directory: Path) -> str:
    """SHA-256 over the names and contents of all files below a directory but weights."""
    digest = hashlib.sha256()
    for name in _names_beside(directory):
        with (directory / name).open("rb") as file:
            digest.update(
                f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()


def _widened_bytes(file: Path) -> int:
    """Bytes of the tensors of a file that are converted."""
    _, header, _ = read_header(file)
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values() if entry["dtype"] in WIDENED
    )


def _widen(source: Path, target: Path) -> None:
    """Copy a safetensors file, tensors of 16 bits as float32."""
    start, header, metadata = read_header(source)
    by_offset = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    written: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, entry in by_offset:
        begin, (first, last) = end, entry["data_offsets"]
        widened = entry["dtype"] in WIDENED
        end += (last - first) * (2 if widened else 1)
        dtype = "F32" if widened else entry["dtype"]
        written[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(written, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED_BYTES)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(len(text).to_bytes(8, "little") + text)
        for _, entry in by_offset:
            first, last = entry["data_offsets"]
            read.seek(start + first)
            dtype = WIDENED.get(entry["dtype"])
            for position in range(first, last, _BLOCK_BYTES):
                block = bytearray(read.read(min(_BLOCK_BYTES, last - position)))
                write.write(block if dtype is None else torch.frombuffer(block, dtype=dtype).float().numpy().data)
