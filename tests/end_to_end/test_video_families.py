"""Families whose processors have a part for videos, through ``init`` and ``validate`` without torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_video_families
import yaml

from optimizer.cli.main import _run

SMALL = {
    "constraint": {"max_accuracy_drop": 1.0},
    "search": {"evaluations": 4, "batch": 4, "finalists": 1, "rungs": [8]},
    "splits": {"calibration": 4, "search": 8, "held_out": 8, "unit": "samples"},
    "workload": {"new_tokens": 2},
    "latency_seconds": 1,
    "cluster": {"workers": 1},
}


@pytest.mark.parametrize("family", tiny_video_families.FAMILIES)
def test_a_family_with_videos_is_found_usable(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_video_families.save(Path("model"), family)

    def skipplan(*arguments: str) -> str:
        capsys.readouterr()
        assert _run(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    skipplan("init", "--model", "model", "--task", "easy-vqa")
    written = yaml.safe_load(Path("job.yaml").read_text())
    assert written["actions"] == ["skip"]
    Path("job.yaml").write_text(yaml.safe_dump(written | SMALL))
    assert "20 prompts, as the model's processor makes them" in skipplan("validate", "job.yaml")
