"""Families whose processors have a part for videos, from ``init`` to a verified export without torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_video_families
import yaml

from optimizer.cli.main import _run

# Random weights answer nothing right, so any loss is allowed. A request of many tokens spends its time in the layers.
SMALL = {
    "constraint": {"max_accuracy_drop": 1.0, "min_dense_accuracy": 0},
    "search": {"plans": ["RRSSSS"], "trials": 4, "batch": 4, "finalists": 1, "rungs": [8]},
    "splits": {"calibration": 4, "search": 8, "held_out": 8, "unit": "samples"},
    "workload": {"new_tokens": 16},
    "latency": {"max_seconds": 3},
    "cluster": {"workers": 1},
}


@pytest.fixture
def skipplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command in an empty directory, which must succeed; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        capsys.readouterr()
        assert _run(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


def begin(skipplan: Callable[..., str], family: str) -> None:
    """From a checkpoint to a small job file that is found usable."""
    tiny_video_families.save(Path("model"), family)
    skipplan("init", "--model", "model", "--task", "easy-vqa")
    written = yaml.safe_load(Path("job.yaml").read_text())
    assert written["actions"] == ["skip"]
    Path("job.yaml").write_text(yaml.safe_dump(written | SMALL))
    assert "20 prompts, as the model's processor makes them" in skipplan("validate", "job.yaml")


@pytest.mark.parametrize("family", tiny_video_families.FAMILIES)
def test_a_family_with_videos_is_found_usable(skipplan: Callable[..., str], family: str) -> None:
    begin(skipplan, family)


@pytest.mark.slow  # Ray and a fresh process that loads the export, for each family
@pytest.mark.parametrize("family", tiny_video_families.FAMILIES)
def test_a_family_with_videos_goes_from_init_to_a_verified_export(
    skipplan: Callable[..., str], family: str, ray_cluster: None
) -> None:
    begin(skipplan, family)
    best = json.loads(skipplan("run", "job.yaml", "--json"))["best"]
    skipplan("export", str(best["id"]), "--format", "checkpoint", "--output", "exported")
    assert json.loads(skipplan("verify-export", "exported", "--json"))["passed"]
