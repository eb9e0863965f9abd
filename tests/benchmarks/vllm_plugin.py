"""Prefill time of plans in vLLM with the plug-in: the random-weight LLaVA of ``runtime_prefill.py``.

    SKIPPLAN_VLLM_PYTHON=vllm/bin/python PYTHONPATH=.:tests/helpers python tests/benchmarks/vllm_plugin.py --rounds 9

The plug-in must be installed beside vLLM. All models are loaded at once, and every round times each of them on one
prompt of 576 vision tokens, in an order drawn anew; ratios to dense are taken within a round. Times are those of a
request for one token, in processor time: image, decoder, sampling and vLLM's own work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = "what shape is green? yes no USER: triangle blue "


def write(directory: Path) -> None:
    """Write the dense model, and configurations of the plans beside links to its weights."""
    import runtime_prefill
    import tiny_llava

    processor = tiny_llava.build_processor()
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    model = runtime_prefill.build()
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    dense = directory / "dense"
    model.save_pretrained(dense)
    processor.save_pretrained(dense)
    layers = runtime_prefill.LAYERS
    half = range(1, layers, 2)
    plans: dict[str, dict[str, Any]] = {
        "half frozen": {"skip_plan": "RF" * (layers // 2)},
        "half without attention": {"per_layer_config": {str(layer): {"skip": ["attention"]} for layer in half}},
        "half without MLP": {"per_layer_config": {str(layer): {"skip": ["mlp"]} for layer in half}},
        "half bypassed": {"skip_plan": "RB" * (layers // 2)},
    }
    for name, fields in plans.items():
        other = directory / name
        other.mkdir()
        for file in dense.iterdir():
            if file.name != "config.json":
                (other / file.name).symlink_to(file)
        config = json.loads((dense / "config.json").read_text())
        text = config["text_config"]
        (text if "per_layer_config" in fields else config).update(fields)
        (other / "config.json").write_text(json.dumps(config))


def measure(directory: Path, rounds: int) -> None:
    """Load every model in this process, which holds vLLM, and print their ratios."""
    import statistics

    from PIL import Image
    from vllm import LLM, SamplingParams

    options = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 1}
    names = sorted(path.name for path in directory.iterdir())
    models = {
        name: LLM(str(directory / name), dtype="float32", enable_prefix_caching=False, **options) for name in names
    }
    sampling = SamplingParams(temperature=0, max_tokens=1)
    picture = Image.effect_noise((336, 336), 90).convert("RGB")
    draw = random.Random(0)

    def seconds(name: str) -> float:
        request = {"prompt": TEXT + "<image>" + TEXT, "multi_modal_data": {"image": picture}}
        started = time.process_time()
        models[name].generate([request], sampling, use_tqdm=False)
        return time.process_time() - started

    for name in names:
        seconds(name)
    took: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in draw.sample(names, len(names)):
            took[name].append(seconds(name))
    print(f"RESULT dense: {statistics.median(took['dense']):.2f} s of processor time")
    for name in names:
        ratios = [own / dense for own, dense in zip(took[name], took["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        blocks = models[name].llm_engine.vllm_config.cache_config.num_gpu_blocks
        print(f"RESULT {name}: {middle:.3f} of dense ({low:.3f} .. {high:.3f}, n={rounds}), {blocks} cache blocks")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--inside", type=Path, help="set by the script itself, in vLLM's interpreter")
    options = arguments.parse_args()
    if options.inside:
        measure(options.inside, options.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0"  # one thread: threads that wait for another one count as busy
        environment["PYTHONPATH"] = os.environ.get("SKIPPLAN_VLLM_PATH", "")
        command = [os.environ["SKIPPLAN_VLLM_PYTHON"], __file__, "--inside", folder, "--rounds", str(options.rounds)]
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        print("\n".join(line.removeprefix("RESULT ") for line in ran.stdout.splitlines() if line.startswith("RESULT ")))


if __name__ == "__main__":
    main()
