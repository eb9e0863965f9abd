"""The pieces of ``make gpu``: each checks or measures one thing on a GPU, in minutes, and returns figures.

    PYTHONPATH=.:tests/helpers:tests/benchmarks python tests/benchmarks/gpu_pieces.py NAME --device cuda --directory DIR

``--device cpu --tiny`` runs the same code on small shapes. A check that fails raises; its piece is then not done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluation_engine
import tiny_llava
import tiny_video_families
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from workers.cluster.pool import WorkerPool
from workers.cluster.settings import ClusterSettings
from workers.errors import WorkersError
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.latency.measure import compare_latency, profile_latency
from workers.latency.request import RequestTimer, prepare_request, run_request
from workers.layerwise.decoder import NotExactError
from workers.messages import (
    CompareLatency,
    EvaluatePlans,
    Evaluation,
    Evaluations,
    Failure,
    LatencyComparison,
    ModelSource,
    Workload,
)
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
from workers.runtime.families import describe
from workers.tasks import Task, load_spec, load_task

PROJECT = Path(__file__).resolve().parents[2]
JOBS = ("smollm2-plain", "smollm2", "smollm2-one-point", "smollm2-lossless", "scenes", "scenes-lossless")
GIB = 1 << 30


class Absent(Exception):
    """What a piece needs is not on this machine."""


@dataclass(frozen=True)
class Place:
    """Where a piece runs, how large, and where its files lie."""

    device: str
    tiny: bool
    directory: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def model(self) -> str:
        """The model of the checks: the bundled one, or one of six layers."""
        if not self.tiny:
            return "llava-12"
        path = self.directory / "tiny"
        return str(path if path.exists() else tiny_llava.save(path))

    def task(self, *, calibration: int = 8, search: int = 24, held_out: int = 8) -> Task:
        sizes = {"calibration": calibration, "search": search, "held_out": held_out}
        return load_task(load_spec("easy-vqa").with_splits(**sizes, unit="samples"))

    def load(self, dtype: str = "float32", **fields: Any) -> LoadedModel:
        return load_model(ModelSource(self.model(), device=self.device, dtype=dtype, **fields))


def mixed(loaded: LoadedModel) -> SkipPlan:
    """A plan with every action that the model's layers may take."""
    letters = "RRFBS"
    allowed = describe(loaded.model).allowed
    wanted = [letters[layer % len(letters)] for layer in range(len(allowed))]
    able = ["".join(action.letter for action in choices) for choices in allowed]
    return SkipPlan.parse("".join(w if w in has else "R" for w, has in zip(wanted, able, strict=True)))


def agree(loaded: LoadedModel, task: Task, samples: int, **options: Any) -> dict[str, Any]:
    """Score two plans on both paths; raise where a score differs."""
    plain = PlainEvaluator(loaded, task)
    fast = FastEvaluator(plain, **options)
    plans = (SkipPlan.dense(describe(loaded.model).num_layers).text, mixed(loaded).text)
    request = EvaluatePlans(plans, "search", samples)
    one, other = (evaluator.evaluate_all(request).results for evaluator in (plain, fast))
    ties = 0
    for alone, shared in zip(one, other, strict=True):
        assert isinstance(alone, Evaluation) and isinstance(shared, Evaluation), (alone, shared)
        assert alone.scores == shared.scores, f"plan {alone.plan}: the two paths score differently"
        ties += shared.near_ties
    return {"plans": len(plans), "samples": samples, "scores_differ": 0, "near_ties": ties, "chunk": fast.chunk_tokens}


# Checks -------------------------------------------------------------------------------------------------------------


def placement(place: Place) -> dict[str, Any]:
    """Weights, inputs and cache lie on the device that ``auto`` names, and scores are those of the plain path."""
    source = ModelSource(place.model(), device="auto" if place.on_gpu else "cpu", dtype="float32")
    loaded = load_model(source)
    devices = {each.device.type for each in (*loaded.model.parameters(), *loaded.model.buffers())}
    assert devices == {place.device}, devices
    request = prepare_request(loaded, place.task(), Workload(1, 2))
    assert {each.device.type for each in request.inputs.values() if isinstance(each, torch.Tensor)} == {place.device}
    return {"parameters": loaded.parameters, "device": str(loaded.device), **agree(loaded, place.task(), 24)}


def timings(place: Place) -> dict[str, Any]:
    """Parts that events time add up to less than the request; dense against itself is level; skipping is not slower."""
    loaded, task = place.load(), place.task()
    descriptor = describe(loaded.model)
    request = prepare_request(loaded, task, Workload(1, 4))
    for _ in range(3):
        run_request(loaded, request)
    shares = []
    for _ in range(10):  # an event lasts for one request
        with RequestTimer.watching(loaded, descriptor.stack_path) as timer:
            times = timer.time(lambda: run_request(loaded, request))
        shares.append(sum(map(sum, times.layers)) / times.total)
    assert all(0 < share < 1.02 for share in shares), shares
    profile = profile_latency(loaded, task, repeats=5, workload=Workload(1, 4))
    dense = SkipPlan.dense(descriptor.num_layers)
    seconds = 2.0 if place.tiny else 30.0
    level = compare_latency(loaded, task, CompareLatency(dense.text, Workload(1, 4), max_seconds=seconds))
    half = SkipPlan.skipping(descriptor.num_layers, range(descriptor.num_layers // 2, descriptor.num_layers - 1))
    faster = compare_latency(loaded, task, CompareLatency(half.text, Workload(1, 4), max_seconds=seconds))
    if place.on_gpu:
        assert 0.97 < level.speedup < 1.03, level
        assert faster.speedup > 1.05, faster
        assert faster.peak_bytes is not None and faster.dense_peak_bytes is not None
    return {
        "layers_share_of_request": statistics.median(shares),
        "profile_relative_error": profile.relative_error,
        "dense_against_dense": level.speedup,
        "half_skipped": faster.speedup,
        "peak_bytes": faster.peak_bytes,
    }


def half_precision(place: Place) -> dict[str, Any]:
    """Scores of both paths are equal in float16 and bfloat16, ties included."""
    samples = 24 if place.tiny else 128
    found = {}
    for dtype in ("bfloat16", "float16"):
        found[dtype] = agree(place.load(dtype), place.task(search=samples), samples)["near_ties"]
    return {"samples": samples, **{f"near_ties_{dtype}": count for dtype, count in found.items()}}


def attention(place: Place) -> dict[str, Any]:
    """SDPA and eager give equal scores; flash attention runs where it is installed, else is one line."""
    scores = {}
    for kind in ("sdpa", "eager"):
        loaded = place.load(attention=kind)
        request = EvaluatePlans((mixed(loaded).text,), "search", 24)
        (result,) = PlainEvaluator(loaded, place.task()).evaluate_all(request).results
        assert isinstance(result, Evaluation)
        scores[kind] = result.scores
    assert scores["sdpa"] == scores["eager"]
    try:
        loaded = place.load("bfloat16", attention="flash_attention_2")
        try:
            FastEvaluator(PlainEvaluator(loaded, place.task())).check("search")
            flash = "shared evaluation"
        except NotExactError as error:
            flash = f"plain evaluation: {error}"
    except WorkersError as error:
        flash = str(error)
        assert "\n" not in flash
    return {"sdpa_equals_eager": True, "flash_attention_2": flash}


def memory(place: Place) -> dict[str, Any]:
    """With little memory left chunks are halved until they fit, and the scores are the same."""
    loaded, task = place.load(), place.task(search=64)
    enough = agree(loaded, task, 64)
    kept: list[torch.Tensor] = []
    if place.on_gpu:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        room = 700 << 20
        kept.append(torch.empty(max(0, free - room), dtype=torch.uint8, device="cuda"))
    short = agree(loaded, task, 64, memory_bytes=64 << 20, chunk_tokens=1 << 20)
    return {
        "chunk_tokens": enough["chunk"],
        "chunk_tokens_when_short": short["chunk"],
        "held_bytes": sum(map(len, kept)),
    }


def workers(place: Place) -> dict[str, Any]:
    """Two workers share the device: they name it alike, and measurements wait for each other."""
    gpus = 0.5 if place.on_gpu else 0.0
    settings = ClusterSettings(workers=2, cpus_per_worker=0.5, gpus_per_worker=gpus)
    with WorkerPool(settings, ModelSource(place.model(), device=place.device, dtype="float32"), place.task()) as pool:
        devices = sorted({info.device_id for info in pool.info})
        layers = pool.info[0].num_layers
        plan = SkipPlan.skipping(layers, [layers - 2]).text
        timed = CompareLatency(plan, Workload(1, 2), precision=0.5, max_seconds=1.0)
        requests = [EvaluatePlans((plan,), "search", 24), timed, EvaluatePlans((plan,), "search", 24), timed]
        replies = [reply for _, reply in sorted(pool.run(requests), key=lambda pair: pair[0])]
    assert len(devices) == 1, devices
    failures = [reply.reason for reply in replies if isinstance(reply, Failure)]
    assert not failures, failures
    assert isinstance(replies[0], Evaluations) and isinstance(replies[1], LatencyComparison)
    return {"device_id": devices[0], "mig": _mig()}


def _mig() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout
    instances = re.findall(r"MIG .*?UUID: (MIG-[^)]+)", listed)
    return f"{len(instances)} instances" if instances else "off"


# Measurements -------------------------------------------------------------------------------------------------------


def _write_llava(place: Place, path: Path) -> None:
    """LLaVA-1.5-7B's shape; the tokenizer is small, so that none has to be there."""
    if place.tiny:
        tiny_llava.save(path)
        return
    processor = tiny_llava.build_processor()
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=processor.image_token_id, image_seq_length=576
    )
    processor.save_pretrained(path)
    _save(place, config, path)


def _write_qwen(place: Place, path: Path) -> None:
    """Qwen2.5-VL-7B's shape; an image has about 300 tokens."""
    tiny_video_families.save(path, "qwen2_5_vl")
    if place.tiny:
        return
    config = AutoConfig.from_pretrained(path)
    text, vision = config.text_config, config.vision_config
    for name, value in {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "layer_types": ["full_attention"] * 28,
        "initializer_range": 0.02,
    }.items():
        setattr(text, name, value)
    text.rope_parameters["mrope_section"] = [16, 24, 24]
    for name, value in {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }.items():
        setattr(vision, name, value)
    settings = json.loads((path / "preprocessor_config.json").read_text())
    pixels = 300 * 28 * 28
    settings |= {"patch_size": 14, "min_pixels": pixels, "max_pixels": pixels}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "model.safetensors").unlink()
    _save(place, config, path)


def _save(place: Place, config: Any, path: Path) -> None:
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="4GB")


SHAPES: dict[str, Callable[[Place, Path], None]] = {"llava-7b": _write_llava, "qwen2.5-vl-7b": _write_qwen}


def _shaped(place: Place, shape: str) -> tuple[LoadedModel, float]:
    """Load a model of a shape, written to disk once; also the seconds of loading."""
    path = place.directory / f"{shape}{'-tiny' if place.tiny else ''}"
    if not (path / "written").exists():
        shutil.rmtree(path, ignore_errors=True)
        SHAPES[shape](place, path)
        (path / "written").touch()
        if place.on_gpu:
            torch.cuda.empty_cache()
    began = time.perf_counter()
    loaded = load_model(ModelSource(str(path), device=place.device, dtype="float32" if place.tiny else "bfloat16"))
    return loaded, time.perf_counter() - began


def prefill(place: Place, shape: str) -> dict[str, Any]:
    """Load, memory, and the prefill of plans over dense's, in pairs whose order alternates."""
    loaded, seconds = _shaped(place, shape)
    held = torch.cuda.memory_allocated() if place.on_gpu else sum(p.nbytes for p in loaded.model.parameters())
    layers = describe(loaded.model).num_layers
    task, rounds = place.task(), 3 if place.tiny else 25
    figures = {"load_seconds": seconds, "model_bytes": held, "parameters": loaded.parameters, "rounds": rounds}
    for name, letter in (("frozen", "F"), ("bypassed", "B"), ("skipped", "S")):
        plan = SkipPlan.parse(("R" + letter) * (layers // 2) + "R" * (layers % 2))
        limit = 1.0 if place.tiny else 40.0
        request = CompareLatency(plan.text, Workload(1, 1), precision=0.005, max_seconds=limit)
        found = compare_latency(loaded, task, request)
        figures |= {
            f"half_{name}": found.speedup,
            f"half_{name}_low": found.speedup_low,
            f"half_{name}_high": found.speedup_high,
            f"half_{name}_pairs": found.pairs,
            "dense_seconds": found.dense_latency_seconds,
        }
    figures["prompt_tokens"] = prepare_request(loaded, task, Workload(1, 1)).prompt_tokens
    with apply(loaded.model, mixed(loaded)):
        pass
    return figures


def shared_evaluation(place: Place, shape: str) -> dict[str, Any]:
    """Seconds of 16 plans on the plain path over those on the fast one, and the scores that differ."""
    loaded, _ = _shaped(place, shape)
    samples, count = (8, 4) if place.tiny else (96, 16)
    task = place.task(search=max(samples, 24))
    plain = PlainEvaluator(loaded, task)
    fast = FastEvaluator(plain, memory_bytes=(1 if place.tiny else 16) * GIB)
    layers = describe(loaded.model).num_layers
    parent = SkipPlan.skipping(layers, range(layers // 2, layers - 1, max(2, layers // 4)))
    plans = evaluation_engine.brood(parent, count, "RFBS" if "B" in mixed(loaded).text else "RS", random.Random(0))
    try:
        fast.check("search")
    except NotExactError as error:
        return {"not_exact": str(error)}
    quick = evaluation_engine.run(fast, plans, "search", samples)
    few = plans[:2]
    slow = evaluation_engine.run(plain, few, "search", samples)
    scale = sum(len(plan.kept) for plan in plans) / sum(len(plan.kept) for plan in few)
    different = sum(
        a != b
        for name, own in slow.results.items()
        for a, b in zip(own.scores, quick.results[name].scores, strict=True)
    )
    peak = torch.cuda.max_memory_allocated() if place.on_gpu else None
    return {
        "plans": count,
        "samples": samples,
        "fast_seconds": quick.seconds,
        "plain_seconds_scaled": slow.seconds * scale,
        "ratio": slow.seconds * scale / quick.seconds,
        "scores_differ": different,
        "peak_bytes": peak,
        "chunk_tokens": fast.chunk_tokens,
    }


def engine_ratio(place: Place, plans: str) -> dict[str, Any]:
    """One set of plans of ``evaluation_engine.py`` at 512 samples."""
    model, samples = ("smollm2-30", 512) if not place.tiny else (place.model(), 8)
    options = ["--sets", plans, "--samples", str(samples), "--plain", "2", "--model", model, "--dtype", "float32"]
    if place.tiny:
        options += ["--skipped", "1", "--actions", "RFBS"]  # of RS alone six layers have too few plans
    script = PROJECT / "tests/benchmarks/evaluation_engine.py"
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no reason").splitlines()[-1])
    ratio = re.search(r"wall-clock ratio ([\d.]+)", done.stdout)
    fewer = re.search(r"layer executions ([\d.]+) times fewer; (\d+) of (\d+) scores differ", done.stdout)
    assert ratio is not None and fewer is not None, done.stdout
    return {
        "samples": samples,
        "ratio": float(ratio[1]),
        "layer_executions_fewer": float(fewer[1]),
        "scores_differ": int(fewer[2]),
        "scores_compared": int(fewer[3]),
    }


TINY_JOB = """\
model: {path: PATH, dtype: float32, device: cpu}
task: easy-vqa
constraint: {max_accuracy_drop: 1.0, min_dense_accuracy: 0.0}
search: {trials: 4, finalists: 1, latency_model: layers, seeds: none}
splits: {calibration: 4, search: 8, held_out: 8, unit: samples}
workload: {new_tokens: 1}
latency: {precision: 0.5, max_seconds: 0.2}
cluster: {workers: 1}
"""


def job(place: Place, name: str) -> dict[str, Any]:
    """A job of the README; stopped by the time limit, it goes on when it is run again."""
    place.directory.mkdir(parents=True, exist_ok=True)
    path = PROJECT / f"configs/{name}.yaml"
    if place.tiny:
        path = place.directory / "job.yaml"
        path.write_text(TINY_JOB.replace("PATH", place.model()))
    command = [sys.executable, "-m", "optimizer.cli.main", "--database", f"sqlite:///{place.directory / 'jobs.db'}"]
    began = time.monotonic()
    done = subprocess.run([*command, "run", str(path), "--json"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError((done.stderr.strip() or "no reason").splitlines()[-1])
    result = json.loads(done.stdout)
    best = next((plan for plan in result["plans"] if plan["id"] == result["best"]), None)
    shown = ("plan", "accuracy", "difference", "difference_low", "speedup", "speedup_low", "speedup_high", "device")
    figures = {} if best is None else {key: best[key] for key in shown if key in best}
    return {"last_part_seconds": time.monotonic() - began, "plans": len(result["plans"]), **figures}


def vllm(place: Place) -> dict[str, Any]:
    """Ratios of ``vllm_plugin.py`` in the environment that SKIPPLAN_VLLM_PYTHON names."""
    if not os.environ.get("SKIPPLAN_VLLM_PYTHON"):
        raise Absent("SKIPPLAN_VLLM_PYTHON names no environment with vLLM and the plug-in")
    script = PROJECT / "tests/benchmarks/vllm_plugin.py"
    done = subprocess.run([sys.executable, str(script), "--rounds", "5"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no reason").splitlines()[-1])
    return {"printed": done.stdout.strip().splitlines()}


def pieces() -> dict[str, Callable[[Place], dict[str, Any]]]:
    """All pieces by name: checks first, then what is measured, the longest last."""
    found: dict[str, Callable[[Place], dict[str, Any]]] = {
        "check placement": placement,
        "check timings": timings,
        "check half precision": half_precision,
        "check attention": attention,
        "check memory": memory,
        "check workers": workers,
    }
    for shape in SHAPES:
        found[f"prefill {shape}"] = lambda place, shape=shape: prefill(place, shape)  # type: ignore[misc]
        found[f"evaluation {shape}"] = lambda place, shape=shape: shared_evaluation(place, shape)  # type: ignore[misc]
    for plans in ("i", "ii", "iii"):
        found[f"engine {plans}"] = lambda place, plans=plans: engine_ratio(place, plans)  # type: ignore[misc]
    found["vllm"] = vllm
    for name in JOBS:
        found[f"job {name}"] = lambda place, name=name: job(place, name)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*pieces()])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    place = Place(options.device, options.tiny, options.directory)
    try:
        print(json.dumps({"state": "done", "figures": pieces()[options.name](place)}))
    except Absent as reason:
        print(json.dumps({"state": "absent", "reason": str(reason)}))


if __name__ == "__main__":
    main()
