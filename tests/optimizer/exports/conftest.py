from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llava
import torch

from optimizer.exports import fresh_process, verification


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
    """What verifies an export loads it in this process: for tests of what is compared, not of what can be imported."""

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-I", fresh_process.__file__]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "meta_path", [*sys.meta_path])
            fresh_process.main(command[3])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(verification.subprocess, "run", run)
