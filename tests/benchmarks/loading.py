"""Memory and time that workers take to load one model on one machine, and the time of its fingerprint.

    python tests/benchmarks/loading.py                          # two workers, float32 and bfloat16, about two minutes
    python tests/benchmarks/loading.py --workers 8 --gigabytes 1

Random weights in bfloat16, made once in ``--directory``. Memory is the sum over the workers of their proportional set
size (`Pss` of /proc/PID/smaps_rollup: a page that n processes have mapped counts 1/n in each, so the sum counts every
page once, those of the page cache that are mapped included), less what the interpreters had before they began to load;
read every 0.1 s, the largest sum. Every weight is read once, so that all of it is mapped. `anonymous` is the part that
the system cannot take back by dropping pages of files. Each round begins with what the last one left on disk
(converted files included) unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
MIB = 1 << 20


def build(directory: Path, gigabytes: float) -> None:
    import tiny_llava
    import torch

    hidden = 2048 if gigabytes >= 0.5 else 512
    per_layer = 2 * hidden * hidden * (3 + 12)  # bytes: attention with half as many key heads, and a gated MLP
    tiny_llava.LAYERS = max(1, round(gigabytes * 1e9 / per_layer))
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 16}
    processor = tiny_llava.build_processor()
    torch.set_default_dtype(torch.bfloat16)
    model = tiny_llava.build_model(processor, sizes=sizes | {"num_key_value_heads": 8})
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def memory(process: int | str, field: str) -> int:
    """Bytes of a field of a process's mappings."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def worker(directory: str, dtype: str, together: Any, found: Any) -> None:
    from workers.messages import ModelSource
    from workers.models.loading import load_model

    together.wait()
    before = memory("self", "Pss")
    together.wait()
    began = time.monotonic()
    loaded = load_model(ModelSource(directory, dtype=dtype, device="cpu"), measuring=True)
    seconds = time.monotonic() - began
    for tensor in loaded.model.parameters():
        tensor.detach().max()
    weights = sum(tensor.nbytes for tensor in loaded.model.parameters())
    together.wait()
    found.put((seconds, before, weights, memory("self", "Anonymous")))
    together.wait()


def measure(directory: Path, dtype: str, workers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    together, found = context.Barrier(workers + 1), context.Queue()
    given = (str(directory), dtype, together, found)
    processes = [context.Process(target=worker, args=given) for _ in range(workers)]
    for process in processes:
        process.start()
    together.wait()
    together.wait()
    peak = 0
    while together.n_waiting < workers:
        peak = max(peak, sum(memory(process.pid or 0, "Pss") for process in processes))
        time.sleep(0.1)
    peak = max(peak, sum(memory(process.pid or 0, "Pss") for process in processes))
    together.wait()
    results = [found.get() for _ in processes]
    together.wait()
    for process in processes:
        process.join()
    weights = results[0][2]
    return {
        "dtype": dtype,
        "workers": workers,
        "weights_mib": round(weights / MIB),
        "peak_mib": round((peak - sum(each[1] for each in results)) / MIB),
        "anonymous_mib": round(sum(each[3] for each in results) / MIB),
        "peak_in_models": round((peak - sum(each[1] for each in results)) / weights, 2),
        "load_seconds": [round(each[0], 2) for each in results],
    }


def fingerprints(directory: Path, times: int) -> list[float]:
    from workers.models.checkpoint import fingerprint_checkpoint

    seconds = []
    for _ in range(times):
        began = time.monotonic()
        fingerprint_checkpoint(directory)
        seconds.append(round(time.monotonic() - began, 4))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "skipplan-loading")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--fresh", action="store_true", help="without hashes and converted files of before")
    options = parser.parse_args()
    model = options.directory / f"model-{options.gigabytes:g}"
    if not (model / "tokenizer.json").exists():
        build(model, options.gigabytes)
    if options.fresh:
        scratch = options.directory / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.environ |= {"SKIPPLAN_CACHE": str(scratch), "TMPDIR": str(scratch)}
        tempfile.tempdir = None
    print(json.dumps({"fingerprint_seconds": fingerprints(model, 3)}))
    for dtype in options.dtype:
        print(json.dumps(measure(model, dtype, options.workers)), flush=True)


if __name__ == "__main__":
    main()
