"""Models whose layers lie on several devices, or on disk, answer and are measured as the whole model is."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import accelerate
import in_process
import numpy as np
import pytest
import quantised
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from two_devices import Places, two_devices

from workers.cluster.settings import ClusterSettings
from workers.compensation.compensator import Compensator
from workers.errors import ClusterError, ModelError
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.guard.states import task_features
from workers.latency.measure import compare_latency, profile_latency
from workers.latency.request import RequestTimer, cache_bytes, cache_of, prepare_request, run_request
from workers.messages import CompareLatency, EvaluatePlans, FitCompensation, ModelSource, Workload
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, _over_gpus, load_model, quantised_bytes
from workers.models.prompts import to_device
from workers.models.spread import Spread, _balance, spread_layers
from workers.redundancy.kinds import KINDS
from workers.redundancy.measure import measure_redundancy
from workers.runtime import SkipPlan, apply
from workers.runtime.locate import locate
from workers.tasks import Task

LAYERS = 6
PLANS = ("RRRRRR", "RSFRBR", "SSRRRR")


@pytest.fixture(scope="module")
def on_meta(tiny_directory: Path) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_directory))
    return model


def size_of(model: torch.nn.Module) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def test_layers_are_spread_in_order_and_all_else_lies_on_the_first_device(on_meta: torch.nn.Module) -> None:
    total = size_of(on_meta)
    places = spread_layers(on_meta, torch.float32, [("cuda:0", total), ("cuda:1", total)], "tiny")
    layers = [places.pop(f"model.language_model.layers.{number}") for number in range(LAYERS)]
    assert layers == sorted(layers) and set(layers) == {"cuda:0", "cuda:1"}
    assert set(places.values()) == {"cuda:0"}
    stored = {name for name, _ in (*on_meta.named_parameters(), *on_meta.named_buffers())}
    named = {name for name in stored if any(name == each or name.startswith(f"{each}.") for each in places)}
    assert all("language_model.layers" in name for name in stored - named)
    layer = size_of(on_meta.get_submodule("model.language_model.layers.0"))
    assert abs(layers.count("cuda:1") * layer - total / 2) <= layer / 2
    counts = Counter(_balance([100] * 80, 300, [1 << 30] * 8) or ())
    filled = [100 * counts[number] + 300 * (number == 0) for number in range(8)]
    assert all(abs(each - sum(filled) / 8) <= 100 for each in filled)


def test_devices_of_different_size_are_filled_as_far_as_they_have_room(on_meta: torch.nn.Module) -> None:
    total = size_of(on_meta)
    layer = size_of(on_meta.get_submodule("model.language_model.layers.0"))
    small = int((total - 6 * layer + 1.5 * layer) / 0.9)  # room for what is beside the layers, and one of them
    places = spread_layers(on_meta, torch.float32, [("cuda:0", small), ("cuda:1", total * 2)], "tiny")
    layers = [places[f"model.language_model.layers.{number}"] for number in range(LAYERS)]
    assert layers == ["cuda:0"] + ["cuda:1"] * 5


def test_a_model_larger_than_the_gpus_is_refused_with_what_would_do(on_meta: torch.nn.Module) -> None:
    total = size_of(on_meta)
    for gpus, said in ((1, "worker's 1 GPU has"), (2, "worker's 2 GPUs have")):
        rooms = [(f"cuda:{number}", int(total / 2.7)) for number in range(gpus)]
        with pytest.raises(ModelError, match=rf"{said} room .* set cluster.gpus_per_worker to 4 or more, all of one"):
            spread_layers(on_meta, torch.float32, rooms, "tiny")
    half = spread_layers(on_meta, torch.bfloat16, [(f"cuda:{n}", int(total / 2.7)) for n in range(2)], "tiny")
    assert set(half.values()) == {"cuda:0", "cuda:1"}


def test_quantised_weights_take_what_they_take_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = quantised.save(tmp_path, "fp8-blocks")
    stored = {name: each.nbytes for name, each in load_file(directory / "model.safetensors").items()}
    total = sum(stored.values())
    # What it would find on a GPU that computes in FP8: elsewhere it unpacks the weights.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, **device: None)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    rooms = [(f"cuda:{number}", int(total / 2 / 0.8)) for number in range(2)]
    with pytest.raises(ModelError, match="in bfloat16"):
        spread_layers(model, torch.bfloat16, rooms, "tiny")
    held = quantised_bytes(model, config, torch.bfloat16)
    for number in range(LAYERS):
        prefix = f"model.language_model.layers.{number}"
        of_layer = sum(held(f"{prefix}.{name}", each) for name, each in model.get_submodule(prefix).named_parameters())
        assert of_layer == sum(
            size for name, size in stored.items() if re.search(rf"language_.*layers.{number}\.", name)
        )
    assert set(spread_layers(model, torch.bfloat16, rooms, "tiny", held).values()) == {"cuda:0", "cuda:1"}
    with pytest.raises(ModelError, match="as they are quantised"):
        spread_layers(model, torch.bfloat16, [("cuda:0", total // 2)], "tiny", held)


def test_workers_share_a_gpu_or_have_whole_ones() -> None:
    assert ClusterSettings(gpus_per_worker=0.5) and ClusterSettings(gpus_per_worker=4)
    with pytest.raises(ClusterError, match=r"must be a part of one GPU or a whole number, not 1\.5"):
        ClusterSettings(gpus_per_worker=1.5)


def test_without_so_many_gpus_it_is_said(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="is to be spread over 4 GPUs, torch sees 2"):
        load_model(ModelSource(str(tiny_directory)), device="cuda", gpus=4)


def test_packed_weights_are_not_refused_by_the_size_of_plain_ones(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("workers.models.loading.memory_bytes", lambda _: 1000)
    source, config = ModelSource(str(tiny_directory)), AutoConfig.from_pretrained(tiny_directory)
    config.quantization_config = {"quant_method": "fp8"}
    assert _over_gpus(source, config, 1) == {"": "cuda:0"}
    for unpacked in ({"quant_method": "compressed-tensors"}, None):  # these are as large as they are counted
        config.quantization_config = unpacked
        with pytest.raises(ModelError, match="its weights take"):
            _over_gpus(source, config, 1)


def test_a_model_that_cannot_be_built_is_said_in_one_line(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("workers.models.loading.memory_bytes", lambda _: 1 << 40)
    config = AutoConfig.from_pretrained(tiny_directory)
    config.text_config.hidden_act = "no_such_function"
    with pytest.raises(ModelError, match=r"cannot be loaded: .*no_such_function"):
        _over_gpus(ModelSource(str(tiny_directory)), config, 1)


@pytest.fixture(scope="module")
def whole(tiny_directory: Path) -> LoadedModel:
    return load_model(ModelSource(str(tiny_directory), device="cpu"))


def on_disk(directory: Path, on_meta: torch.nn.Module) -> LoadedModel:
    """Every second layer is read from its file at each call."""
    places = spread_layers(on_meta, torch.float32, [("cpu", 1 << 30)], "tiny")
    places |= {f"model.language_model.layers.{number}": "disk" for number in (1, 3, 5)}
    return load_model(ModelSource(str(directory), device="cpu"), device_map=places)


def off_the_device(directory: Path, _: torch.nn.Module) -> LoadedModel:
    """The layers' weights are kept elsewhere in main memory, and moved to the device for each call."""
    loaded = load_model(ModelSource(str(directory), device="cpu"))
    for layer in locate(loaded.model).layers:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    loaded.model.hf_device_map = {"": "cpu"}
    return replace(loaded, spread=Spread(loaded.model))


PLACES = Places()


def on_two_devices(directory: Path, on_meta: torch.nn.Module) -> LoadedModel:
    """The last layers are on another device, whose tensors cannot be mixed with the first one's."""
    devices = spread_layers(on_meta, torch.float32, [("cpu:0", 1 << 30), ("cpu:1", 1 << 30)], "tiny")
    with two_devices(PLACES):
        loaded = load_model(ModelSource(str(directory), device="cpu"), device_map=devices)
        layers = locate(loaded.model).layers
        found = [str(layer.mlp.down_proj.weight.device) for layer in layers]
        assert found == ["cpu:0"] * 2 + ["cpu:1"] * 4
        assert loaded.devices == (torch.device("cpu:0"), torch.device("cpu:1"))
    return loaded


@pytest.fixture(scope="module", params=[on_disk, pytest.param(off_the_device, marks=pytest.mark.slow), on_two_devices])
def parts(request: pytest.FixtureRequest, tiny_directory: Path, on_meta: torch.nn.Module) -> LoadedModel:
    loaded: LoadedModel = request.param(tiny_directory, on_meta)
    return loaded


@pytest.fixture
def both(whole: LoadedModel, parts: LoadedModel) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    apart = sum(each.is_meta for each in parts.model.parameters())
    with two_devices(PLACES) if not apart else nullcontext():
        yield whole, parts
    assert sum(each.is_meta for each in parts.model.parameters()) == apart  # nothing was loaded for good


def test_the_devices_of_these_tests_cannot_be_mixed(whole: LoadedModel, tiny_directory: Path) -> None:
    with two_devices(PLACES):
        first, second = torch.ones(3), torch.ones(3, device="cpu:1")
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            first + second
        assert (first.to(second.device) + second).device == second.device == (second * 2).double().device
        layer = locate(whole.model).layers[0].mlp
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            layer(torch.ones(1, 2, 48, device="cpu:1"))


def prompt(loaded: LoadedModel, task: Task) -> dict[str, Tensor]:
    batch = prepare_batch(loaded, task, list(task.search[:3]))
    assert batch.inputs is not None
    inputs: dict[str, Tensor] = dict(to_device(batch.inputs, loaded.device, loaded.model.dtype))
    return inputs


@pytest.mark.parametrize("plan", PLANS)
def test_plans_give_the_same_logits_and_tokens(
    both: tuple[LoadedModel, LoadedModel], small_task: Task, plan: str
) -> None:
    found = []
    for loaded in both:
        inputs = prompt(loaded, small_task)
        with torch.inference_mode(), apply(loaded.model, SkipPlan.parse(plan)):
            logits = loaded.model(**inputs).logits
            tokens = loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        found.append((logits, tokens))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("compensation", ["none", "linear tokens=256", "linear tokens=256 scope=projection"])
def test_evaluations_are_the_same_on_both_paths(
    both: tuple[LoadedModel, LoadedModel], small_task: Task, compensation: str
) -> None:
    spec = small_task.spec.changed(metric="token_f1", answer=small_task.spec.answer.changed(max_new_tokens=4))
    generator = random.Random(0)
    plans = tuple({"".join(generator.choice("RRRFBS") for _ in range(LAYERS)) for _ in range(8)} - {"S" * LAYERS})
    plans = tuple(plan for plan in plans if compensation == "none" or plan[0] != "S")
    scores = []
    for loaded in both:
        task = replace(
            small_task, spec=spec, search=tuple(replace(s, answers=("red blue",)) for s in small_task.search)
        )
        dispatch = EvaluationDispatch(PlainEvaluator(loaded, task), memory_bytes=1 << 28)
        for path in ("fast", "plain") if compensation == "none" else ("fast",):
            request = EvaluatePlans(plans, "search", 8, path=path, compensation=compensation)  # type: ignore[arg-type]
            found = dispatch.evaluate(request).results
            scores.append([each.scores for each in found])  # type: ignore[union-attr]
    assert all(each == scores[0] for each in scores)


@pytest.mark.parametrize("recipe", ["linear tokens=256", "linear tokens=256 scope=projection"])
def test_maps_are_fitted_and_applied_alike(
    both: tuple[LoadedModel, LoadedModel], small_task: Task, recipe: str
) -> None:
    plan, found = "RRSRSR", []
    for loaded in both:
        compensator = Compensator(loaded, small_task)
        fitted = compensator.fit(FitCompensation(plan, recipe))
        maps = compensator.maps(SkipPlan.parse(plan), recipe, None)
        with torch.inference_mode(), apply(loaded.model, SkipPlan.parse(plan), maps):
            logits = loaded.model(**prompt(loaded, small_task)).logits
        with torch.inference_mode(), apply(loaded.model, SkipPlan.parse(plan)):
            plain = loaded.model(**prompt(loaded, small_task)).logits
        assert not torch.equal(plain, logits)
        found.append((fitted.content, logits))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_layers_are_measured_alike(both: tuple[LoadedModel, LoadedModel], small_task: Task) -> None:
    first, second = (
        measure_redundancy(loaded, small_task, tuple(KINDS), shard=0, shards=1, n_samples=4, batch_size=2)
        for loaded in both
    )
    assert first.kinds.keys() == second.kinds.keys()
    for kind in first.kinds:
        for part in ("added", "gathered"):
            for name, value in getattr(first.kinds[kind], part).items():
                np.testing.assert_array_equal(value, getattr(second.kinds[kind], part)[name], err_msg=f"{kind} {name}")


def test_guards_see_the_same_features(both: tuple[LoadedModel, LoadedModel], small_task: Task) -> None:
    first, second = (task_features(loaded, small_task, small_task.search[:3], (1, 4))[0] for loaded in both)
    assert all(torch.equal(first[layer], second[layer]) for layer in (1, 4))


def test_requests_do_the_same_work_and_every_layer_is_timed(
    both: tuple[LoadedModel, LoadedModel], small_task: Task
) -> None:
    found = []
    for loaded in both:
        request = prepare_request(loaded, small_task, Workload(batch_size=1, new_tokens=3))
        with apply(loaded.model, SkipPlan.parse("RSRRBR")):
            output = run_request(loaded, request)
            with RequestTimer.watching(loaded, "model.language_model.layers") as timer:
                times = timer.time(lambda: run_request(loaded, request))  # noqa: B023
        assert len(times.layers) == 5 and all(len(calls) == 3 and min(calls) > 0 for calls in times.layers)
        found.append((output.sequences, cache_bytes(cache_of(output))))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] > 0


def test_states_stay_where_they_are_while_time_is_measured(tiny_directory: Path, on_meta: torch.nn.Module) -> None:
    loaded = on_two_devices(tiny_directory, on_meta)
    ids = torch.arange(10, 30)[None]
    with two_devices(PLACES), torch.inference_mode():
        before = PLACES.copies
        answer = loaded.model(input_ids=ids).logits
        between = PLACES.copies
        with loaded.states_left_in_place():
            same = loaded.model(input_ids=ids).logits
        assert torch.equal(answer, same)
        # Four layers of the second device get their states from the first one and hand them back, or two moves do.
        assert (between - before) - (PLACES.copies - between) == 4 + 4 - 2


def test_latency_is_compared_and_profiled(
    tiny_directory: Path, on_meta: torch.nn.Module, small_task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process.lock_apart(monkeypatch, tmp_path)
    loaded = on_disk(tiny_directory, on_meta)
    workload = Workload(batch_size=1, new_tokens=2)
    request = CompareLatency("RSRRSR", workload, precision=1.0, max_seconds=0.1)
    compared = compare_latency(loaded, small_task, request, None)
    assert compared.dense_kv_cache_bytes * 4 == compared.kv_cache_bytes * 6
    profile = profile_latency(loaded, small_task, actions="RS", repeats=1, workload=workload)
    assert len(profile.prefill_seconds["R"]) == LAYERS and min(profile.prefill_seconds["R"]) > 0
