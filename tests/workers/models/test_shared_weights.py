"""Weights in float32 lie in one file of the machine, and are those that each process would make of the checkpoint."""

import fcntl
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_llava
import torch
from safetensors.torch import load_file, save_file

from workers.cluster.handler import Handler
from workers.cluster.settings import WorkerSettings
from workers.messages import ModelSource
from workers.models import shared_weights
from workers.models.loading import load_model
from workers.models.shared_weights import share_in_float32
from workers.tasks import Task


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, and no checkpoint too small to be shared."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(shared_weights, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(shared_weights, "_in_use", {})
    return folder


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16, of several files."""
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def mapped_files() -> list[tuple[int, int, str]]:
    """Ranges of this process's memory, and the files that they are of."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(line[0].split("-"), line[5]) for line in lines if len(line) == 6]
    return [(int(first, 16), int(last, 16), path) for (first, last), path in ranges]


def test_a_worker_maps_the_shared_file_and_has_the_model_it_would_have_made(narrow: Path, temporary: Path) -> None:
    source = ModelSource(str(narrow), dtype="float32", device="cpu")
    own, shared = load_model(source), load_model(source, measuring=True)
    assert (shared.fingerprint, shared.not_shared) == (own.fingerprint, "")
    ours, theirs = shared.model.state_dict(), own.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == torch.float32 for name in ours)
    files = mapped_files()
    for name, tensor in shared.model.named_parameters():
        assert any(
            first <= tensor.data_ptr() < last and path.startswith(str(temporary)) for first, last, path in files
        ), name
    assert shared.model.generation_config.to_dict() == own.model.generation_config.to_dict()
    assert str(shared.model.config._name_or_path) == str(narrow)


def test_only_what_is_converted_to_float32_is_shared(narrow: Path, temporary: Path) -> None:
    for options in ({"dtype": "bfloat16"}, {"dtype": "float16"}):
        load_model(ModelSource(str(narrow), device="cpu", **options), measuring=True)
    load_model(ModelSource(str(tiny_llava.save(narrow.parent / "wide")), dtype="float32", device="cpu"), measuring=True)
    assert list(temporary.iterdir()) == []


def test_files_are_converted_exactly_whatever_is_in_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7, 2, 2).bfloat16(),
        "odd values": torch.tensor([float("inf"), float("nan"), -0.0, 1e-45, 65504.0, 3e38]).bfloat16(),
        "smallest": torch.tensor([6e-8, -6e-8, 0.0]).half(),
        "single": torch.randn(4),
        "double": torch.randn(2).double(),
        "whole": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4).half(),
    }
    save_file(tensors, tmp_path / "narrow.safetensors", metadata={"format": "pt", "note": "ü"})
    shared_weights._widen(tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors")
    found = load_file(tmp_path / "wide.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name].nan_to_num(nan=12.0), expected.nan_to_num(nan=12.0)), name
    content = (tmp_path / "wide.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 64 == 0
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt", "note": "ü"}


def shared(directory: Path, fingerprint: str) -> tuple[Path, str]:
    return share_in_float32(directory, sorted(directory.glob("*.safetensors")), lambda: fingerprint)


def test_files_that_no_process_uses_go_when_others_are_made(narrow: Path, temporary: Path) -> None:
    first, _ = shared(narrow, "1" * 64)
    inode = (first / "config.json").stat(follow_symlinks=False).st_ino
    assert shared(narrow, "1" * 64)[0] == first
    assert (first / "config.json").stat(follow_symlinks=False).st_ino == inode  # not made anew
    second, _ = shared(narrow, "2" * 64)
    assert first.is_dir() and second.is_dir()  # this process holds both
    for lock in shared_weights._in_use.values():
        lock.close()
    shared_weights._in_use.clear()
    with second.with_suffix(".lock").open("ab") as another_process:
        fcntl.flock(another_process, fcntl.LOCK_SH)
        third, _ = shared(narrow, "3" * 64)
    assert [first.is_dir(), second.is_dir(), third.is_dir()] == [False, True, True]


def test_without_room_each_worker_converts_and_says_so(
    narrow: Path, temporary: Path, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(temporary)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    worker = Handler.load(ModelSource(str(narrow), dtype="float32", device="cpu"), small_task, WorkerSettings(0))
    assert worker.loaded.model.dtype == torch.float32
    (folder,) = temporary.glob("skipplan-weights-*")
    assert worker.info.hint == (
        f"weights are converted by every worker: {folder} cannot hold them (0.0 GB are needed, 0.0 GB are free)"
    )
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_what_changes_meanwhile_is_not_shared(narrow: Path, temporary: Path) -> None:
    answers = iter(["1" * 64, "2" * 64])
    files = sorted(narrow.glob("*.safetensors"))
    place, reason = share_in_float32(narrow, files, lambda: next(answers))
    assert place == narrow and "the checkpoint changed while it was read" in reason
    assert all(path.suffix == ".lock" for folder in temporary.iterdir() for path in folder.iterdir())


def test_a_folder_that_someone_else_has_laid_out_is_not_used(narrow: Path, temporary: Path, tmp_path: Path) -> None:
    place, _ = shared(narrow, "1" * 64)
    folder = place.parent
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    shared_weights._in_use.clear()
    assert shared(narrow, "1" * 64) == (
        narrow,
        f"weights are converted by every worker: {folder} belongs to another user",
    )


def contents(directory: Path) -> dict[str, bytes]:
    """What lies beside the weights of a directory."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_what_lies_beside_the_weights_is_that_of_the_directory_that_is_loaded(narrow: Path, temporary: Path) -> None:
    (narrow / "code").mkdir()
    (narrow / "code" / "layers.py").write_text("LAYERS = 6\n")
    (narrow / "pytorch_model.bin").write_bytes(b"not read")
    first, _ = shared(narrow, "1" * 64)
    expected = contents(narrow)
    del expected["pytorch_model.bin"]
    assert contents(first) == expected
    edited = Path(shutil.copytree(narrow, narrow.parent / "edited"))
    (edited / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    second, reason = shared(edited, "1" * 64)
    assert reason == "" and json.loads((second / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    narrow.rename(narrow.parent / "moved")
    assert contents(first) == expected
    assert shared(narrow.parent / "moved", "1" * 64)[0] == first


@pytest.mark.parametrize("gone", ["generation_config.json", "*.safetensors"])
def test_files_that_something_is_gone_from_are_made_anew(narrow: Path, temporary: Path, gone: str) -> None:
    place, _ = shared(narrow, "1" * 64)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    next(place.glob(gone)).unlink()
    shared_weights._in_use.pop(str(place)).close()
    with place.with_suffix(".lock").open("ab") as another_process:
        fcntl.flock(another_process, fcntl.LOCK_SH)
        directory, reason = shared(narrow, "1" * 64)
        assert directory == narrow and f"files are gone from {place.name}, which others use" in reason
    assert shared(narrow, "1" * 64) == (place, "")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_what_a_killed_process_left_is_removed_by_the_next_one_of_the_same_model(narrow: Path, temporary: Path) -> None:
    place, _ = shared(narrow, "1" * 64)
    shared_weights._in_use.pop(str(place)).close()
    place.rename(place.parent / f"{place.name}.k1lled")  # as it is called while it is written
    assert shared(narrow, "1" * 64) == (place, "")
    assert sorted(place.parent.iterdir()) == [place, place.with_suffix(".lock")]
