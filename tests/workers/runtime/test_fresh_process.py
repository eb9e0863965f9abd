"""What only a fresh process shows: in which order modules are imported, and how much memory was ever taken."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, resource, sys, types
import workers.runtime as runtime
values = [getattr(runtime, name) for name in sorted(runtime.__all__, reverse=True)]
values += [getattr(runtime, name) for name in runtime.__all__]

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from workers.runtime import SkipPlan, save_pruned
torch.set_num_threads(1)
config = dict(hidden_size=1024, intermediate_size=2048, num_attention_heads=8, vocab_size=64)
save_pruned(LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=2)), SkipPlan.parse("RS"), sys.argv[1] + "/warm")
model = LlamaForCausalLM(LlamaConfig(**config, num_hidden_layers=8))
size = sum(p.numel() * p.element_size() for p in model.parameters())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
save_pruned(model, SkipPlan.parse("RRRSRRRS"), sys.argv[1] + "/model", max_shard_size="40MB")
taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(json.dumps({"modules": sum(isinstance(value, types.ModuleType) for value in values), "share": taken / size}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("pruned")
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def test_public_names_are_what_they_say_in_whatever_order_they_are_asked_for(found: dict[str, Any]) -> None:
    """No module of the package may hide a function of the same name."""
    assert found["modules"] == 0


def test_saving_holds_no_second_copy_of_the_model(found: dict[str, Any]) -> None:
    assert found["share"] < 0.3  # of the model's own size; a second copy would be 0.75
