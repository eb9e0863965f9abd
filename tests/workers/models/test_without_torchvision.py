"""Processors of families with videos where torchvision is missing, broken, or needed after all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_video_families
import torch
import transformers
from command_line import PROJECT
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from workers.errors import ModelError
from workers.messages import ModelSource
from workers.models.loading import load_config
from workers.models.processors import load_processor
from workers.models.prompts import build_inputs
from workers.models.without_torchvision import torchvision_problem
from workers.tasks import Task

BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
LOADING = """\
import sys
from workers.messages import ModelSource
from workers.models.processors import load_processor
from workers.models.without_torchvision import torchvision_problem
print(torchvision_problem())
print(type(load_processor(sys.argv[1], ModelSource(sys.argv[1]), None)).__name__)
"""


RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))


def load(directory: Path) -> Any:
    source = ModelSource(str(directory))
    return load_processor(directory, source, load_config(directory, source))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("families")
    for family in tiny_video_families.FAMILIES:
        tiny_video_families.save(base / family, family)
    return base


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torchvision_problem():
        pytest.skip("torchvision works here")


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.parametrize("family", tiny_video_families.FAMILIES)
def test_a_processor_reads_images_without_its_video_part(checkpoints: Path, small_task: Task, family: str) -> None:
    if family == "smolvlm" and RELEASE < (5, 18):  # its image processor without torchvision is not found
        with pytest.raises(ModelError, match="torchvision: not installed"):
            load(checkpoints / family)
        return
    processor = load(checkpoints / family)
    samples = small_task.search[:2]
    inputs = build_inputs(processor, small_task.spec, samples, [sample.image.open() for sample in samples])
    assert len(inputs["input_ids"]) == 2 and inputs["pixel_values"].isfinite().all()
    with pytest.raises(ImportError, match="videos need torchvision"):
        processor.video_processor([])


@pytest.mark.usefixtures("without_torchvision")
def test_tokens_and_pixels_are_those_of_the_parts_alone(checkpoints: Path) -> None:
    processor = load(checkpoints / "qwen2_vl")
    image = Image.effect_noise((40, 24), 60).convert("RGB")
    inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|>yes"], images=[[image]], return_tensors="pt")
    alone = Qwen2VLImageProcessorPil.from_pretrained(checkpoints / "qwen2_vl")(image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    _, high, wide = alone["image_grid_thw"][0].tolist()
    text = "<|vision_start|>" + "<|image_pad|>" * (high * wide // 4) + "<|vision_end|>yes"
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"]]


@pytest.mark.usefixtures("without_torchvision")
def test_settings_of_videos_are_saved_as_they_were_read(checkpoints: Path, tmp_path: Path) -> None:
    load(checkpoints / "internvl").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    read = json.loads((checkpoints / "internvl" / "video_preprocessor_config.json").read_text())
    assert saved["video_processor"] == read == {"video_processor_type": "InternVLVideoProcessor", "num_frames": 3}
    assert load_processor(tmp_path, ModelSource("x"), None).video_processor.num_frames == 3


def test_a_torchvision_that_cannot_be_imported_is_hidden(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(BROKEN)
    paths = os.pathsep.join([str(tmp_path), str(PROJECT)])
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(checkpoints / "qwen2_vl")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["operator torchvision::nms does not exist", "Qwen2VLProcessor"], done.stderr


@pytest.mark.usefixtures("without_torchvision")
def test_a_family_that_needs_torchvision_for_images_says_so(checkpoints: Path, tmp_path: Path) -> None:
    for file in (checkpoints / "qwen2_vl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "Llama4ImageProcessorFast"}))
    with pytest.raises(
        ModelError, match=r"processor cannot be loaded: .*; torchvision: .*; install the build"
    ) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
