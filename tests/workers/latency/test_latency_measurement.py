from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import MeasurementError
from workers.latency import measure
from workers.latency.measure import compare_latency, median_interval, predict_seconds, profile_latency
from workers.latency.request import cache_bytes, prepare_request, run_request
from workers.messages import CompareLatency, LatencyProfile, ModelSource, Workload
from workers.models.loading import LoadedModel, load_model
from workers.runtime.plan import SkipPlan
from workers.tasks import Task
from workers.tasks.images import ImageFile

SLOW_LAYER = 3
EXTRA_SECONDS = 0.004


def spin(*_: Any) -> None:
    """Work for a known time; sleeping would not count as the thread's own time."""
    end = time.thread_time() + EXTRA_SECONDS
    while time.thread_time() < end:
        pass


@pytest.fixture(scope="module")
def lopsided(tiny_directory: Path) -> LoadedModel:
    """A model one of whose layers takes 4 ms longer at each call."""
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    loaded.model.model.language_model.layers[SLOW_LAYER].mlp.register_forward_pre_hook(spin)
    return loaded


def test_the_profile_finds_the_slow_layer_and_predicts_plans(lopsided: LoadedModel, small_task: Task) -> None:
    workload = Workload(batch_size=2, new_tokens=3)
    profile = profile_latency(lopsided, small_task, actions="RFS", repeats=7, workload=workload)
    run = profile.layer_seconds["R"]
    assert set(profile.layer_seconds) == {"R", "F", "S"}
    assert profile.layer_seconds["S"] == (0.0,) * 6
    others = sorted(seconds for layer, seconds in enumerate(run) if layer != SLOW_LAYER)
    # Three calls a request: one prefill, two decode steps. Seconds are scaled to the dense request's wall time.
    assert run[SLOW_LAYER] - others[2] > 0.6 * 3 * EXTRA_SECONDS
    assert run[SLOW_LAYER] > 2 * others[-1]
    assert profile.layer_seconds["F"][SLOW_LAYER] > 2 * others[-1]
    assert sum(run) < profile.dense_latency_seconds
    # One of the three calls is the prefill, the others are a token each.
    for phase in (profile.prefill_seconds, profile.decode_seconds):
        assert phase["R"][SLOW_LAYER] - sorted(phase["R"])[2] > 0.6 * EXTRA_SECONDS
        assert phase["S"] == (0.0,) * 6
    assert sum(profile.prefill_seconds["R"]) < profile.dense_prefill_seconds
    assert sum(profile.decode_seconds["R"]) < profile.dense_decode_seconds
    whole = profile.dense_prefill_seconds + 2 * profile.dense_decode_seconds
    assert 0.5 * profile.dense_latency_seconds < whole <= 1.05 * profile.dense_latency_seconds
    assert profile.relative_error < 0.25
    assert profile.workload == workload
    assert "thread" in profile.device


def test_the_profile_tells_attention_from_the_mlp_and_predicts_plans_without_either(
    tiny_directory: Path, small_task: Task
) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    slow = loaded.model.model.language_model.layers[SLOW_LAYER]
    slow.self_attn.q_proj.register_forward_pre_hook(spin)
    for part in (slow.mlp.gate_proj, slow.mlp.down_proj):  # twice as long as attention
        part.register_forward_pre_hook(spin)
    workload = Workload(batch_size=2, new_tokens=3)
    profile = profile_latency(loaded, small_task, actions="RSAM", repeats=5, workload=workload)
    seconds = {letter: layers[SLOW_LAYER] for letter, layers in profile.layer_seconds.items()}
    assert set(seconds) == {"R", "S", "A", "M"} and seconds["S"] == 0.0
    attention, mlp = seconds["R"] - seconds["A"], seconds["R"] - seconds["M"]
    assert attention > 0.6 * 3 * EXTRA_SECONDS
    assert mlp / attention == pytest.approx(2.0, rel=0.25)
    assert attention + mlp == pytest.approx(seconds["R"], rel=0.25)
    assert profile.relative_error < 0.25  # of random plans over all four
    for plan in ("RRRARR", "RARMRS"):
        measured = compare_latency(loaded, small_task, CompareLatency(plan, workload, precision=0.05, max_seconds=4))
        predicted = profile.dense_latency_seconds / predict_seconds(profile, SkipPlan.parse(plan))
        assert predicted == pytest.approx(measured.speedup, rel=0.15)


def test_a_comparison_shows_what_skipping_the_slow_layer_saves(lopsided: LoadedModel, small_task: Task) -> None:
    plan = SkipPlan.parse("RRRSRR")
    comparison = compare_latency(
        lopsided, small_task, CompareLatency(plan.text, Workload(1, 3), precision=0.05, max_seconds=4)
    )
    assert 1.1 < comparison.speedup_low <= comparison.speedup <= comparison.speedup_high
    assert comparison.dense_latency_seconds - comparison.latency_seconds > 0.5 * 3 * EXTRA_SECONDS
    assert comparison.pairs >= 10
    # Six layers and five: two tensors each, 2 heads of 12 float32 values, a token for the prompt and all but the last.
    tokens = prepare_request(lopsided, small_task, Workload(1, 3)).prompt_tokens + 2
    assert comparison.dense_kv_cache_bytes == 6 * 2 * 2 * 12 * 4 * tokens
    assert comparison.kv_cache_bytes == 5 * 2 * 2 * 12 * 4 * tokens
    assert comparison.dense_peak_bytes is not None and comparison.dense_peak_bytes >= 0


def test_a_cache_is_timed_and_counted_though_the_checkpoint_was_saved_in_training(
    tiny: LoadedModel, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = CompareLatency("RRRSRR", Workload(1, 2), 10.0, max_seconds=0.0)
    expected = compare_latency(tiny, small_task, wanted)
    monkeypatch.setattr(tiny.model.generation_config, "use_cache", False)
    found = compare_latency(tiny, small_task, wanted)
    assert (found.dense_kv_cache_bytes, found.kv_cache_bytes) == (
        expected.dense_kv_cache_bytes,
        expected.kv_cache_bytes,
    )
    assert found.kv_cache_bytes > 0


def test_a_comparison_stops_when_precise_enough_or_late(tiny: LoadedModel, small_task: Task) -> None:
    dense = SkipPlan.parse("RRRRRR")
    precise = compare_latency(tiny, small_task, CompareLatency(dense.text, Workload(1, 1), 10.0, max_seconds=60))
    assert precise.pairs == 10
    late = compare_latency(tiny, small_task, CompareLatency(dense.text, Workload(1, 1), 0.0, max_seconds=0.0))
    assert late.pairs == 5
    assert late.speedup_low <= late.speedup <= late.speedup_high


def test_a_request_has_the_forced_length(tiny: LoadedModel, small_task: Task) -> None:
    request = prepare_request(tiny, small_task, Workload(batch_size=3, new_tokens=9))
    output = run_request(tiny, request)
    assert tuple(output.sequences.shape) == (3, request.prompt_tokens + 9)
    ends = output.sequences[:, request.prompt_tokens :] == tiny.processor.tokenizer.eos_token_id
    assert not ends[:, :-1].any()


def test_a_request_leaves_out_images_that_do_not_open(tiny: LoadedModel, small_task: Task, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    first, second, *_ = small_task.calibration
    broken = replace(first, image=ImageFile(str(tmp_path / "broken.png")))
    task = replace(small_task, calibration=(broken, second))
    assert prepare_request(tiny, task, Workload(1, 1)).inputs["input_ids"].shape[0] == 1
    with pytest.raises(MeasurementError, match="1 usable samples, fewer than the batch_size 2"):
        prepare_request(tiny, task, Workload(2, 1))


def test_a_profile_ends_early_where_repeats_take_long(
    tiny: LoadedModel, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    timed = measure.time_request
    monkeypatch.setattr(measure, "time_request", lambda *asked: requests.append(asked) or timed(*asked))
    monkeypatch.setattr(measure, "PROFILE_SECONDS", 0.0)
    profile_latency(tiny, small_task, repeats=7)
    plans = 1 + measure.CHECK_PLANS
    assert len(requests) == measure.WARM_UP_REQUESTS + measure.LEAST_REPEATS * plans


def test_bad_settings_are_refused(tiny: LoadedModel, small_task: Task) -> None:
    with pytest.raises(MeasurementError, match="allowed letters are R, F, B, S"):
        profile_latency(tiny, small_task, actions="RX")
    with pytest.raises(MeasurementError, match="repeats must be at least 1"):
        profile_latency(tiny, small_task, repeats=0)
    with pytest.raises(MeasurementError, match="at least 1"):
        prepare_request(tiny, small_task, Workload(0, 1))


@given(st.text("RFS", min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_the_prediction_is_additive(text: str, costs: list[float]) -> None:
    table = {"R": tuple(costs[:4]), "F": tuple(costs[4:]), "S": (0.0,) * 4}
    rest = 2.5
    profile = LatencyProfile(
        device="none",
        workload=Workload(1, 3),
        prompt_tokens=1,
        dense_latency_seconds=rest + 3 * sum(table["R"]),
        dense_prefill_seconds=1.0,
        dense_decode_seconds=1.0,
        prefill_seconds=table,
        decode_seconds=table,
        relative_error=0.0,
    )
    executed = sum(table[letter][layer] for layer, letter in enumerate(text))
    assert predict_seconds(profile, SkipPlan.parse(text)) == pytest.approx(rest + 3 * executed)


def test_the_bootstrap_interval_has_the_width_theory_gives() -> None:
    generator = np.random.default_rng(5)
    values = generator.normal(1.5, 0.1, size=2001)
    low, high = median_interval(values.tolist(), 0.95, generator)
    # Normal data: the median's standard error is sqrt(pi / 2) sigma / sqrt(n).
    assert (high - low) / 2 == pytest.approx(1.96 * 1.2533 * 0.1 / np.sqrt(2001), rel=0.25)
    assert low < np.median(values) < high


def test_cache_bytes_count_each_storage_once() -> None:
    tensor = torch.zeros(10, dtype=torch.float32)
    assert cache_bytes([tensor, (tensor.view(2, 5), {"k": torch.zeros(3, dtype=torch.bfloat16)}), None]) == 46
