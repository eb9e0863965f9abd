"""The example job files: all four models on all four tasks, usable as far as can be seen without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.job.loading import load_job
from optimizer.preflight.checks import check_job_file
from workers.tasks import load_spec

EXAMPLES = Path(__file__).resolve().parents[3] / "configs" / "examples"
MODELS = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
}
TASKS = ("vqav2", "textvqa", "scienceqa", "pope")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_example_is_usable(model: str, task: str) -> None:
    path = EXAMPLES / f"{model}-{task}.yaml"
    found = check_job_file(path, environment={})
    assert (found.model, found.task) == (MODELS[model], task)
    spec = load_job(path, environment={})
    assert spec.workload.new_tokens == load_spec(spec.task).answer.max_new_tokens
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()


def test_there_is_no_other_example() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) == len(MODELS) * len(TASKS)
