from __future__ import annotations

from pathlib import Path

import in_process
import pytest
import tiny_llava
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of six layers with random weights."""
    return tiny_llava.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one of the same shape."""
    directory = tmp_path_factory.mktemp("models") / "other"
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor, seed=1).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def loaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is compared, not of what can be imported."""
    in_process.load_exports_here(monkeypatch)
