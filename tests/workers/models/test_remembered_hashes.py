"""Hashes of large files are remembered by the files' identity, and never given for other contents."""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.models import cache
from workers.models.cache import remembered
from workers.models.checkpoint import fingerprint_checkpoint, hash_weights

SETTLED = 0.05


@pytest.fixture(autouse=True)
def small_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", SETTLED)


class Reader:
    """Reads a file, and counts how often."""

    def __init__(self, file: Path) -> None:
        self.file, self.times = file, 0

    def __call__(self) -> list[cache.Entry]:
        self.times += 1
        return [("text", self.file.read_text())]

    def ask(self) -> str:
        ((_, text),) = remembered(self.file, self)
        return text


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    file = tmp_path / "weights"
    file.write_text("one")
    time.sleep(2 * SETTLED)
    return Reader(file)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "fingerprints").glob("*.json"))


def test_a_file_that_stays_is_read_once(reader: Reader) -> None:
    assert [reader.ask() for _ in range(3)] == ["one"] * 3
    assert reader.times == 1


def edit_and_turn_back_the_clock(file: Path) -> None:
    before = file.stat()
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (before.st_mtime_ns, before.st_size)


def put_another_in_its_place(file: Path) -> None:
    before, other = file.stat(), file.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def grow(file: Path) -> None:
    file.write_text("two and more")


@pytest.mark.parametrize("change", [grow, edit_and_turn_back_the_clock, put_another_in_its_place])
def test_a_file_that_changes_is_read_again(reader: Reader, change: object) -> None:
    assert reader.ask() == "one"
    change(reader.file)  # type: ignore[operator]
    assert reader.ask() == reader.file.read_text() != "one"
    assert reader.times == 2


def test_a_young_file_is_not_remembered_as_a_write_might_not_move_its_times(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 3600.0)
    assert [reader.ask(), reader.ask()] == ["one", "one"] and reader.times == 2
    monkeypatch.setattr(cache, "SETTLED_SECONDS", SETTLED)
    os.utime(reader.file, (time.time() + 3600,) * 2)  # of a file server whose clock is ahead
    assert [reader.ask(), reader.ask()] == ["one", "one"] and reader.times == 4


def test_a_young_file_that_takes_long_to_read_is_let_grow_old(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAITED_FOR_BYTES", 0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 0.5)
    reader.file.write_text("two")
    began = time.time()
    assert reader.ask() == "two" and time.time() - began > 0.4
    assert reader.ask() == "two" and reader.times == 1


def test_a_file_that_changes_while_it_is_read_is_not_remembered(reader: Reader) -> None:
    def read() -> list[cache.Entry]:
        found = reader()
        reader.file.write_text("two")
        return found

    assert remembered(reader.file, read) == [("text", "one")]
    assert reader.ask() == "two"


@pytest.mark.parametrize("damage", ["cut", "no JSON", "no object", "another hash", "of another file", "older format"])
def test_a_damaged_entry_counts_as_none_and_is_replaced(
    reader: Reader, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.ask()
    (entry,) = entries(tmp_path)
    text = entry.read_text()
    if damage == "older format":
        monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    elif damage == "of another file":
        other = Reader(tmp_path / "other")
        other.file.write_text("two")
        time.sleep(2 * SETTLED)
        other.ask()
        (other_entry,) = set(entries(tmp_path)) - {entry}
        shutil.copy(other_entry, entry)
    else:
        content = {"cut": text[:-9], "no JSON": "{", "no object": "[1]", "another hash": text.replace("one", "two")}
        entry.write_text(content[damage])
    assert reader.ask() == "one" and reader.times == 2
    assert reader.ask() == "one" and reader.times == 2


def test_without_a_place_for_it_the_file_is_read_each_time(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no directory")
    assert [reader.ask(), reader.ask()] == ["one", "one"] and reader.times == 2


def test_a_write_that_fails_leaves_nothing(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        assert reader.ask() == "one"
    assert [path.suffix for path in (tmp_path / "cache" / "fingerprints").iterdir()] == [".lock"]


def test_processes_that_ask_at_the_same_time_read_it_once(reader: Reader) -> None:
    begin = threading.Barrier(4)

    def slow() -> list[cache.Entry]:
        time.sleep(0.2)
        return reader()

    def ask(_: int) -> list[cache.Entry]:
        begin.wait()
        return remembered(reader.file, slow)  # files are locked by open file, as between processes

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [[("text", "one")]] * 4
    assert reader.times == 1


def test_entries_of_files_that_are_gone_go_with_the_next_one_written(reader: Reader, tmp_path: Path) -> None:
    reader.ask()
    other = Reader(reader.file.rename(tmp_path / "moved"))
    time.sleep(2 * SETTLED)
    other.ask()
    (entry,) = entries(tmp_path)
    assert json.loads(entry.read_text())["path"] == str(tmp_path / "moved")


def test_fingerprints_are_the_same_from_memory_and_follow_edits(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    file = model / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2)}, file)
    time.sleep(2 * SETTLED)
    read = fingerprint_checkpoint(model), hash_weights(model)
    (entry,) = entries(tmp_path)
    assert (fingerprint_checkpoint(model), hash_weights(model)) == read
    shutil.rmtree(entry.parent)
    assert (fingerprint_checkpoint(model), hash_weights(model)) == read
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit, in place
    assert fingerprint_checkpoint(model) != read[0] and hash_weights(model) != read[1]


def test_a_pickled_file_counts_by_the_name_it_is_asked_by(tmp_path: Path) -> None:
    """Files of the hub are links to content that several names may share."""
    blob = tmp_path / "blob"
    torch.save({"a": torch.ones(2)}, blob)
    time.sleep(2 * SETTLED)
    found = []
    for name in ("pytorch_model.bin", "other.bin"):
        model = tmp_path / name
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / name).symlink_to(blob)
        (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        found.append(fingerprint_checkpoint(model, (name,)))
    assert len(set(found)) == 2 and len(entries(tmp_path)) == 1
