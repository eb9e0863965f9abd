from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import UsageFault
from optimizer.exports.target import inside, whole_directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(output: Path, content: str, *, force: bool = False) -> None:
    with whole_directory(output, force=force) as directory:
        (directory / "file").write_text(content)


def test_a_finished_directory_appears_alone(tmp_path: Path):
    write(tmp_path / "deep" / "out", "new")
    assert names(tmp_path / "deep") == ["out"] and (tmp_path / "deep" / "out" / "file").read_text() == "new"
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failure_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="halfway"), whole_directory(tmp_path / "out", force=False) as directory:
        (directory / "file").write_text("half")
        raise RuntimeError("halfway")
    assert names(tmp_path) == []


def test_a_failed_replacement_leaves_the_old(tmp_path: Path):
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out", force=True) as directory:
        (directory / "file").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


def test_an_existing_directory_is_replaced_only_by_force(tmp_path: Path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "also old").touch()
    with pytest.raises(UsageFault, match="--force"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_replacing_never_leaves_a_moment_without_a_directory(tmp_path: Path):
    """Another process looks all the time while the directory is replaced again and again."""
    write(tmp_path / "out", "0")
    watch = (
        "import sys, pathlib; out = pathlib.Path(sys.argv[1]); print('ready', flush=True); looks = 0\n"
        "while not pathlib.Path(sys.argv[2]).exists():\n    out.stat(); looks += 1\n"
        "print(looks)"
    )
    stop = tmp_path / "stop"
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-c", watch, str(tmp_path / "out"), str(stop)], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == "ready\n"
    for number in range(30):
        write(tmp_path / "out", str(number), force=True)
    stop.touch()
    output, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and int(output) > 100


KILLED = """
import sys, time
from pathlib import Path
from optimizer.exports.target import whole_directory
with whole_directory(Path(sys.argv[1]), force=True) as directory:
    (directory / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_export_left_is_removed_by_the_next_and_a_running_one_is_let_be(tmp_path: Path):
    write(tmp_path / "out", "old")
    processes = []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        )
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        processes.append(process)
    killed, running = processes
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(names(tmp_path)) == 3 and (tmp_path / "out" / "file").read_text() == "old"
    write(tmp_path / "out", "new", force=True)
    assert len(names(tmp_path)) == 2 and (tmp_path / "out" / "file").read_text() == "new"
    running.kill()
    running.wait()
    time.sleep(0)
    write(tmp_path / "out", "newer", force=True)
    assert names(tmp_path) == ["out"]


def test_links_are_neither_followed_nor_exported(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(UsageFault, match="symbolic link"):
        write(tmp_path / "link", "new", force=True)
    with (
        pytest.raises(UsageFault, match="no plain file"),
        whole_directory(tmp_path / "out", force=False) as directory,
    ):
        (directory / "inner").symlink_to(outside / "precious")
    assert (outside / "precious").read_text() == "precious" and names(tmp_path) == ["link", "outside"]


@pytest.mark.parametrize("output", ["file", "file/below", ".", ".."])
def test_impossible_destinations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "file").write_text("kept")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UsageFault, match="--output"):
        write(Path(output), "new", force=True)
    assert names(tmp_path / "work") == ["file"]


@given(st.lists(st.sampled_from(["..", ".", "a", "b.json", "", "/etc", "~"]), min_size=1, max_size=5).map("/".join))
def test_a_name_is_inside_or_refused(name: str):
    root = Path("/srv/exports/out")
    try:
        path = inside(root, name)
    except UsageFault:
        return
    assert os.path.normpath(path).startswith("/srv/exports/out/")
