"""Count the answers that speculation gives differently from the dense model: none but those decided by a near tie.

    PYTHONPATH=. python tests/benchmarks/speculation_exactness.py llava-12 RRRRSSRSRSRR --count 500 --threads 2
    PYTHONPATH=. python tests/benchmarks/speculation_exactness.py smollm2-30 PLAN --task easy-vqa --new-tokens 48

The dense model's `generate` and `speculate(...).generate` answer the same batches of held-out samples greedily. An
answer that differs is a tie where the two tokens' logits, at the first position that differs, are no further apart
than workers/models/ties.py says the shape of a batch may move them; anything else is counted as different, and the
exit code is 1. With `--new-tokens` answers go on to that length, whatever the task says. Every batch adds a line to
`--output`; a run that is started again goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.messages import ModelSource
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, load_model
from workers.models.prompts import to_device
from workers.models.ties import tie_bound
from workers.runtime import SkipPlan, speculate
from workers.runtime.speculation import Speculation
from workers.tasks import Task, load_spec, load_task


def held_out(name: str, count: int) -> Task:
    """The task with ``count`` held-out samples."""
    spec = load_spec(name)
    splits = spec.splits.model_copy(update={"held_out": count, "unit": "samples"})
    return load_task(spec.model_copy(update={"splits": splits}))


def compare(loaded: LoadedModel, speculation: Speculation, inputs: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Both answers to one batch: how many are equal, near ties and different, and how long either took."""
    started = time.perf_counter()
    dense = loaded.model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    between = time.perf_counter()
    found = speculation.generate(**inputs, **settings)
    seconds = (between - started, time.perf_counter() - between)
    expected = dense.sequences
    width = max(expected.shape[1], found.shape[1])
    padded = [torch.nn.functional.pad(each, (0, width - each.shape[1]), value=-1) for each in (expected, found)]
    differing = (padded[0] != padded[1]).any(dim=1).nonzero().flatten().tolist()
    prompt = expected.shape[1] - len(dense.scores)
    ties = sum(is_tie(loaded, dense.scores, padded, row, prompt) for row in differing)
    return len(expected) - len(differing), ties, len(differing) - ties, seconds


def is_tie(loaded: LoadedModel, scores: tuple[Tensor, ...], both: list[Tensor], row: int, prompt: int) -> bool:
    """Whether the first token that differs was decided by less than the shape of a batch may change."""
    first = int((both[0][row] != both[1][row]).nonzero()[0])
    tokens = [int(each[row, first]) for each in both]
    if min(tokens) < 0 or first - prompt >= len(scores):
        return False
    own = scores[first - prompt][row].float()
    return bool((own[tokens[0]] - own[tokens[1]]).abs() <= tie_bound(own.max(), loaded.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a directory")
    parser.add_argument("plan")
    parser.add_argument("--task", default="scenes")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--draft-length", type=int, help="tokens drafted at a time; left out, the length adapts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("speculation_exactness.jsonl"))
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    loaded = load_model(ModelSource(arguments.model, dtype=arguments.dtype), device=arguments.device)
    task = held_out(arguments.task, arguments.count)
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": loaded.processor.tokenizer.pad_token_id}
    longest = arguments.new_tokens or task.spec.answer.max_new_tokens
    settings["max_new_tokens"] = longest
    if arguments.new_tokens:
        settings["min_new_tokens"] = longest
    done = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    with (
        torch.inference_mode(),
        speculate(loaded.model, SkipPlan.parse(arguments.plan), draft_length=arguments.draft_length) as speculation,
    ):
        for first in range(len(done) * arguments.batch_size, arguments.count, arguments.batch_size):
            batch = prepare_batch(loaded, task, task.held_out[first : first + arguments.batch_size])
            assert batch.inputs is not None and not batch.failed, batch.failed
            inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
            equal, ties, different, seconds = compare(loaded, speculation, inputs, settings)
            record = {"equal": equal, "ties": ties, "different": different, "seconds": seconds}
            done.append(record | {"samples": [sample.id for sample in batch.samples]} if ties or different else record)
            with arguments.output.open("a") as output:
                output.write(json.dumps(done[-1]) + "\n")
        counts = speculation.statistics
    totals = {name: sum(each[name] for each in done) for name in ("equal", "ties", "different")}
    dense, found = (sum(each["seconds"][side] for each in done) for side in (0, 1))
    print(json.dumps(totals | {"dense_seconds": round(dense, 1), "speculation_seconds": round(found, 1)}))
    print(counts)
    sys.exit(bool(totals["different"]))


if __name__ == "__main__":
    main()
