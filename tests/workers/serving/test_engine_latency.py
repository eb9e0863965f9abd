"""Latency in an engine: both models served from checkpoints of their layers, asked the same in turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_llava
from choice_tasks import as_choices
from scripted_engine import ScriptedEngine

from workers.engines.interface import ENGINES, ChatReply, ChatRequest
from workers.errors import EngineError, MeasurementError, UnknownNameError
from workers.messages import CompareEngineLatency, ModelSource, Workload
from workers.models.loading import LoadedModel, load_model
from workers.serving import latency
from workers.serving.latency import compare_engine_latency, find_engine
from workers.tasks import Task, join_tasks, load_spec, load_task

LAYER_SECONDS = 0.004
REQUEST = CompareEngineLatency("", "scripted", (1, 4), Workload(1, 3), precision=0.5, max_seconds=5.0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    scripted = ScriptedEngine(layer_seconds=LAYER_SECONDS)
    monkeypatch.setitem(ENGINES.built_in, "scripted", scripted)  # type: ignore[arg-type]
    monkeypatch.setattr(ENGINES, "_found", {})
    return scripted


def test_a_plan_of_half_the_layers_takes_half_the_time(
    engine: ScriptedEngine, tiny: LoadedModel, small_task: Task
) -> None:
    layers = tiny.model.config.text_config.num_hidden_layers
    plan = "R" * (layers // 2) + "S" * (layers - layers // 2)
    found = compare_engine_latency(tiny, small_task, replace(REQUEST, plan=plan))
    assert [count for count, _ in engine.served] == [layers, layers // 2]
    dense, own = (serving for _, serving in engine.served)
    assert dense == own and dense.dtype == "float32" and dense.concurrency == 4 and not dense.prefix_caching
    assert (found.engine, found.version, found.plan) == ("scripted", "1", plan)
    assert [level.concurrency for level in found.levels] == [1, 4]
    for level in found.levels:
        assert 1.4 < level.speedup < 2.2 and level.speedup_low <= level.speedup <= level.speedup_high
        assert level.dense.seconds_per_token == pytest.approx(LAYER_SECONDS * layers, rel=0.5)
        assert level.plan.seconds_per_token == pytest.approx(LAYER_SECONDS * layers / 2, rel=0.9)
        assert level.plan.first_token_seconds < level.plan.latency_seconds
    alone, four = found.levels
    assert 2 * alone.plan.requests_per_second < four.plan.requests_per_second  # the program waits, it does not compute


class Recording:
    """A server whose every request takes a known time of a clock that nobody waits for."""

    engine, version = "recording", "1"

    def __init__(self, name: str, seconds: float, clock: list[float], log: list[tuple[str, tuple[str, ...]]]) -> None:
        self.name, self.seconds, self.clock, self.log = name, seconds, clock, log
        self.awake = False

    def ask(self, request: ChatRequest) -> ChatReply:
        raise AssertionError

    def ask_all(self, requests: Sequence[ChatRequest], concurrency: int = 1) -> list[ChatReply]:
        assert self.awake
        self.log.append((self.name, tuple(request.text for request in requests)))
        self.clock[0] += self.seconds * len(requests) / concurrency
        parts = (self.seconds / 2, self.seconds)
        return [ChatReply("", "length", 9, each.max_tokens, self.seconds, parts) for each in requests]

    def kv_cache_tokens(self) -> int | None:
        return None

    def pause(self) -> None:
        assert self.awake
        self.awake = False

    def resume(self) -> None:
        assert not self.awake
        self.awake = True


@pytest.mark.parametrize("concurrency", [1, 3])
def test_pairs_of_rounds_ask_both_the_same_in_alternating_order(
    monkeypatch: pytest.MonkeyPatch, concurrency: int
) -> None:
    clock, log = [0.0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    servers = [Recording("dense", 0.3, clock, log), Recording("plan", 0.2, clock, log)]
    prompts = [ChatRequest(str(number), max_tokens=2) for number in range(7)]
    level = latency._level(servers, prompts, concurrency, REQUEST, np.random.default_rng(0))
    names = [name for name, _ in log]
    assert len(log) == 2 * level.rounds and level.rounds == latency.LEAST_ROUNDS
    assert names[:6] == ["dense", "plan", "plan", "dense", "dense", "plan"]
    rounds = [asked for _, asked in log[::2]]
    assert rounds == [asked for _, asked in log[1::2]]
    assert all(len(asked) == (1 if concurrency == 1 else 2 * concurrency) for asked in rounds)
    assert all(one != other for one, other in pairwise(rounds))
    assert level.speedup == pytest.approx(1.5) and level.speedup_low == pytest.approx(level.speedup_high)
    assert level.plan.first_token_seconds == pytest.approx(0.1) and level.plan.seconds_per_token == pytest.approx(0.1)
    assert level.dense.requests_per_second == pytest.approx(concurrency / 0.3)


def test_rounds_are_added_until_the_interval_is_narrow_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    dense, plan = Recording("dense", 0.3, clock, log), Recording("plan", 0.2, clock, log)
    noise = np.random.default_rng(1)
    steady = plan.ask_all

    def unsteady(requests: Sequence[ChatRequest], concurrency: int = 1) -> list[ChatReply]:
        plan.seconds = float(noise.uniform(0.1, 0.3))
        return steady(requests, concurrency)

    monkeypatch.setattr(plan, "ask_all", unsteady)
    prompts = [ChatRequest("0", max_tokens=2)]

    def level(precision: float, max_seconds: float) -> latency.EngineLevel:
        asked = replace(REQUEST, precision=precision, max_seconds=max_seconds)
        return latency._level([dense, plan], prompts, 1, asked, np.random.default_rng(0))

    narrow = level(0.1, 1e6)
    assert narrow.rounds > 3 * latency.LEAST_ROUNDS
    assert narrow.speedup_high - narrow.speedup_low <= 0.1 * narrow.speedup
    assert level(0.1, 0.0).rounds == latency.LEAST_ROUNDS
    assert statistics.median([0.3 / 0.1, 0.3 / 0.3]) > narrow.speedup > 1


def test_the_prompts_of_all_parts_of_a_joint_task_are_asked(
    engine: ScriptedEngine, tiny: LoadedModel, small_task: Task
) -> None:
    scenes = load_task(load_spec("scenes").with_splits(calibration=4, search=1, held_out=1))
    joint = join_tasks([as_choices(small_task), scenes])
    prompts, longest, failed = latency._prompts(tiny, joint, 3)
    assert [each.text for each in prompts] == [each.question for each in joint.calibration[: latency.PROMPTS]]
    assert {"describe the image"} < {each.text for each in prompts} and longest > 20 and failed == {}
    found = compare_engine_latency(tiny, joint, replace(REQUEST, plan="RRRRRS", concurrencies=(1,)))
    assert found.levels[0].speedup > 0


def test_what_cannot_be_measured_is_named(
    engine: ScriptedEngine, tiny: LoadedModel, small_task: Task, tmp_path: Path
) -> None:
    layers = tiny.model.config.text_config.num_hidden_layers
    plan = "R" * (layers - 1) + "S"
    silent = load_model(ModelSource(str(tiny_llava.save(tmp_path / "m", chat_template=None)), device="cpu"))
    with pytest.raises(MeasurementError, match="has no chat template"):
        compare_engine_latency(silent, small_task, replace(REQUEST, plan=plan))
    engine.fault = "refuses"
    with pytest.raises(EngineError, match="scripted refuses the request: At most 0 image"):
        compare_engine_latency(tiny, small_task, replace(REQUEST, plan=plan))
    engine.fault = ""
    found = find_engine("scripted", tiny)
    assert (found.version, found.letters) == ("1", "RS")
    with pytest.raises(MeasurementError, match="has no chat template"):
        find_engine("scripted", silent)
    too_many = replace(REQUEST, plan=plan, workload=Workload(1, 20))
    with pytest.raises(EngineError, match="scripted answered 7 tokens where 20 were asked for"):
        compare_engine_latency(tiny, small_task, too_many)
    with pytest.raises(UnknownNameError, match=r"'scriptd' is unknown; choose one of .*did you mean"):
        find_engine("scriptd", tiny)
