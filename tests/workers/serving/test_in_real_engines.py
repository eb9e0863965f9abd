"""The contract of engines, and latency in them, by the real ones that variables name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.testing import check_engine
from workers.engines.interface import ENGINES, Engine
from workers.errors import EngineError
from workers.messages import CompareEngineLatency, ModelSource, Workload
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan
from workers.serving.checkpoint import write_served_checkpoint
from workers.serving.latency import LEAST_ROUNDS, compare_engine_latency
from workers.serving.requests import chat_request
from workers.tasks import Task

pytestmark = pytest.mark.slow
PLAN = "RRRSRRSRSSSS"


@pytest.fixture(scope="module", params=["vllm", "llama.cpp", "openvino"])
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = ENGINES[request.param]
    try:
        found.installed()
    except EngineError as error:
        pytest.skip(str(error))
    if request.param == "llama.cpp":
        pytest.skip("its converter does not take the CLIP tower of the bundled model")
    return found


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(ModelSource("llava-12", dtype="float32"), device="cpu")


def test_the_contract_is_kept(engine: Engine, reference: LoadedModel, small_task: Task, tmp_path: Path) -> None:
    write_served_checkpoint(reference, SkipPlan.parse(PLAN), tmp_path / "model")
    check_engine(engine, tmp_path / "model", chat_request(small_task, small_task.held_out[0]).images)


def test_latency_is_that_of_both(engine: Engine, reference: LoadedModel, small_task: Task) -> None:
    request = CompareEngineLatency(PLAN, engine.name, (1, 4), Workload(1, 8), precision=0.1, max_seconds=20)
    found = compare_engine_latency(reference, small_task, request)
    assert (found.engine, found.version) == (engine.name, engine.installed().version)
    for level in found.levels:
        assert level.speedup_low <= level.speedup <= level.speedup_high and level.rounds >= LEAST_ROUNDS
        for side in (level.dense, level.plan):
            assert side.seconds_per_token is not None
            assert 0 < side.first_token_seconds < side.latency_seconds
    if engine.name == "vllm":
        if "F" in engine.installed().letters:  # the plug-in is there
            frozen = replace(request, plan="RRRFRRFRSSSS", concurrencies=(1,), compiled=False)
            assert compare_engine_latency(reference, small_task, frozen).levels[0].rounds >= LEAST_ROUNDS
        assert found.kv_cache_tokens is not None and found.dense_kv_cache_tokens is not None
        assert found.kv_cache_tokens == pytest.approx(2 * found.dense_kv_cache_tokens, rel=0.02)
