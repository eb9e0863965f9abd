"""``skipplan validate --show``: samples as the model sees them."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optimizer.cli.main import _run
from optimizer.job.inputs import load_job_task
from optimizer.job.loading import load_job
from workers.evaluation.shown import _drawn, _tiles

JOB = """\
model: {path: llava-12, dtype: float32, device: cpu}
task: easy-vqa
splits: {calibration: 1, search: 6, held_out: 1, unit: samples}
"""


def test_samples_are_shown_with_answers_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    assert _run(["validate", "job.yaml", "--quick", "--show", "3", "--html", "page.html", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    asked = load_job_task(load_job(Path("job.yaml"))).search[::2]
    assert [each["sample"] for each in found["samples"]] == [sample.id for sample in asked]
    page = Path("page.html").read_text()
    pictures = [base64.b64decode(each) for each in re.findall(r"base64,([^\"]+)", page)]
    assert len(pictures) == 3
    for shown, sample, picture in zip(found["samples"], asked, pictures, strict=True):
        assert f"<image>\\n{sample.question}" in shown["prompt"]
        assert shown["accepted"] == repr(sample.answers[0]) and float(shown["score"]) == float(
            shown["answer"] == repr(sample.answers[0])
        )
        drawn = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=float)
        original = np.asarray(sample.image.open(), dtype=float)  # of the size that the model wants already
        assert shown["image"] == "64x64, to the model 64x64" and np.abs(drawn - original).max() <= 1
        assert sample.question in page


def test_a_page_needs_samples_of_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert _run(["validate", str(tmp_path / "job.yaml"), "--html", "page.html"]) == 2
    assert "--show 3" in capsys.readouterr().err


def test_patches_in_rows_are_put_together_again() -> None:
    from transformers import Qwen2VLImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 100)
    inputs = processor(images=[image], return_tensors="pt")
    tiles = _tiles(processor, inputs)
    assert tiles is not None
    drawn = np.asarray(Image.open(io.BytesIO(_drawn(processor, tiles))), dtype=float)
    assert np.abs(drawn - np.asarray(image, dtype=float)).max() <= 1


def test_a_layout_that_is_not_known_is_not_drawn() -> None:
    assert _tiles(object(), {"pixel_values": torch.zeros(5, 7)}) is None and _tiles(object(), {}) is None
    assert _tiles(object(), {"pixel_values": torch.zeros(2, 4, 3, 8, 8)}).shape == (8, 3, 8, 8)  # type: ignore[union-attr]
