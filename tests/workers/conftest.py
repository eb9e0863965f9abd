from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llava
import torch

from workers.messages import ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.tasks import Task, load_spec, load_task


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.save(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def tiny(tiny_directory: Path) -> LoadedModel:
    return load_model(ModelSource(str(tiny_directory), device="cpu"))


@pytest.fixture(scope="session")
def small_task() -> Task:
    return load_task(load_spec("easy-vqa").with_splits(calibration=4, search=8, held_out=8))
