"""``skipplan redundancy`` and ``validate-theory`` in processes of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ended, command

JOB = """\
model: {path: llava-12, dtype: float32}
task: easy-vqa
actions: [skip, bypass, freeze]
splits: {calibration: 8, search: 8, held_out: 16, unit: samples}
cluster: {workers: 1}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theory")
    (path / "job.yaml").write_text(JOB)
    return path


def test_pictures_of_an_unknown_kind_are_refused_before_anything_is_done(
    directory: Path, here: Callable[..., Ended]
) -> None:
    for name in ("redundancy", "validate-theory"):
        ended = here(directory, name, "job.yaml", "--plot", "layers.gif")
        assert ended.code == 2 and "layers.gif: pictures are drawn as .png, .svg, .pdf" in ended.errors
    assert not (directory / "skipplan.db").exists()


@pytest.mark.slow
def test_score_prints_writes_and_draws(directory: Path) -> None:
    wanted = ["--output", "layers.json", "--csv", "layers.csv", "--plot", "layers.svg"]
    ended = command(directory, "redundancy", "job.yaml", *wanted)
    assert ended.code == 0, ended.errors
    assert "risk skip" in ended.output and ended.output.count("│") > 12 * 10
    document = json.loads((directory / "layers.json").read_text())
    assert document["layers"] == 12 and set(document["risk"]) == {"freeze", "bypass", "skip"}
    rows = list(csv.DictReader((directory / "layers.csv").open()))
    assert len(rows) == len(document["measurements"]) > 500
    assert {row["name"] for row in rows} >= {"cosine_distance", "vision_attention", "cka", "propagation_gain"}
    assert (directory / "layers.svg").read_text().startswith("<?xml")
    again = command(directory, "redundancy", "job.yaml", "--json")
    assert json.loads(again.output) == document


@pytest.mark.slow
def test_validate_theory_prints_writes_and_draws(directory: Path) -> None:
    ended = command(directory, "validate-theory", "job.yaml", "--output", "theory.json", "--plot", "theory.png")
    assert ended.code == 0, ended.errors
    report = json.loads((directory / "theory.json").read_text())
    assert report["held_out_samples"] == 16 and len(report["actions"]) == 3
    assert "scrambled (control)" in ended.output and "does not predict harm" in ended.output
    assert (directory / "theory.png").read_bytes().startswith(b"\x89PNG")
    asked = command(directory, "validate-theory", "job.yaml", "--samples", "99999")
    assert asked.code == 2 and "--samples: 99999 is more than the 16 samples" in asked.errors
