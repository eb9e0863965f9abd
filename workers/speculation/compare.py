"""Measure what drafting with a plan gains, and whether the answers are the dense model's.

Dense and speculation answer the same prompts in turns, each to its end. Both are asked the way a caller asks, and what
they generate is compared token by token.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.device import lock as device_lock
from workers.device.memory import peak_bytes
from workers.errors import MeasurementError
from workers.evaluation.plain import PlainEvaluator, read_agreement
from workers.latency.measure import LATE_PAIRS, PAIRS_PER_LOOK, median_interval
from workers.latency.request import cache_bytes, cache_of, device_name, prepare_request, run_request
from workers.messages import (
    CheckSpeculation,
    CompareSpeculation,
    Exactness,
    LatencyComparison,
    SpeculationComparison,
    Workload,
)
from workers.models.forced import force
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.models.ties import tie_bound
from workers.runtime import apply, speculate
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.runtime.speculation import Speculation
from workers.tasks import Sample, Task

from .request import answers_of, generate, timed

WARM_UP_REQUESTS = 4
"""Requests before the timed ones, from which a speculation learns how much to draft."""
READ_PROMPTS = 64
"""Prompts on which acceptance is read."""
PARAGRAPH_TOKENS = 48
"""Tokens of a paragraph's beginning that make a prompt."""


@dataclass(frozen=True)
class Prompt:
    """One request's prompts: names of the rows, and what the model takes for all of them and for each alone."""

    names: tuple[str, ...]
    inputs: dict[str, Any]
    alone: Callable[[int], dict[str, Any]]


@dataclass
class Pairs:
    """Times of dense and of speculation on the same prompts, one entry a pair."""

    dense: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    dense_decoding: list[float] = field(default_factory=list)
    """Behind the first token, of pairs whose answers have more than that."""
    drafted_decoding: list[float] = field(default_factory=list)
    tokens: int = 0
    """Behind the first ones, of one row: all rows take as long."""


# Comparison ----------------------------------------------------------------------------------------------------------


def compare_speculation(
    evaluator: PlainEvaluator, request: CompareSpeculation, maps: Maps | None
) -> SpeculationComparison:
    """Time generation with drafts against dense, as ``compare_latency`` times a plan, and compare the answers.

    Raises:
        PlanError: the model cannot take the plan, or has other actions than run and skip.
        UnsupportedFamilyError: the model's cache cannot be set back.
        MeasurementError: there are no prompts, or other workers do not leave the device.
    """
    loaded, task = evaluator.loaded, request.task or evaluator.task
    plan, failed = SkipPlan.parse(request.plan), dict[str, str]()
    if request.text is None:
        prompts = partial(_task_prompts, loaded, task, request.workload, failed)
    else:
        prompts = partial(_text_prompts, loaded, request.text)
    with speculate(loaded.model, plan, maps) as speculation:
        folded = speculation.statistics.extra_bytes
        with device_lock.timing(*loaded.devices):
            caches = _memory(loaded, evaluator.task, request.workload, speculation)
            pairs, asked, exact = _time_pairs(loaded, _over_and_over(prompts), request, speculation)
    own = speculation.statistics
    generator = np.random.default_rng(request.seed)
    ratios = [first / second for first, second in zip(pairs.dense, pairs.drafted, strict=True)]
    decoding = [first / second for first, second in zip(pairs.dense_decoding, pairs.drafted_decoding, strict=True)]
    low, high = median_interval(ratios, request.confidence, generator)
    decoding_low, decoding_high = median_interval(decoding or [1.0], request.confidence, generator)
    return SpeculationComparison(
        latency=LatencyComparison(
            plan=plan.text,
            device=device_name(*loaded.devices),
            workload=request.workload,
            dense_latency_seconds=statistics.median(pairs.dense),
            latency_seconds=statistics.median(pairs.drafted),
            speedup=statistics.median(ratios),
            speedup_low=low,
            speedup_high=high,
            pairs=len(ratios),
            dense_kv_cache_bytes=caches.dense,
            kv_cache_bytes=caches.dense + own.extra_bytes - folded,
            dense_peak_bytes=caches.dense_peak,
            peak_bytes=caches.peak,
            failed_samples=failed if request.task is None and request.text is None else {},
        ),
        decoding_speedup=statistics.median(decoding or [1.0]),
        decoding_speedup_low=decoding_low,
        decoding_speedup_high=decoding_high,
        dense_seconds_per_token=math.fsum(pairs.dense_decoding) / max(1, pairs.tokens),
        seconds_per_token=math.fsum(pairs.drafted_decoding) / max(1, pairs.tokens),
        acceptance=_acceptance(loaded, plan, maps, asked),
        tokens=own.tokens,
        rounds=own.rounds,
        drafted=own.drafted,
        accepted=own.accepted,
        plain_steps=own.plain_steps,
        extra_bytes=own.extra_bytes,
        exactness=exact,
    )


def check_speculation(evaluator: PlainEvaluator, request: CheckSpeculation, maps: Maps | None) -> Exactness:
    """Generate with drafts, one sample at a time, and compare with the dense model's answers.

    In a batch all rows go on by what every row keeps, so that large ones would hardly draft.

    Raises:
        PlanError: the model cannot take the plan, or has other actions than run and skip.
        UnsupportedFamilyError: the model's cache cannot be set back.
    """
    loaded, task = evaluator.loaded, evaluator.task
    found = Exactness()
    with speculate(loaded.model, SkipPlan.parse(request.plan), maps) as speculation:
        for sample, target in zip(task.held_out[request.start : request.stop], request.targets, strict=True):
            if target is None:
                continue
            inputs = _inputs_of(loaded, task, sample)
            sequences = generate(loaded, speculation, inputs, max_new_tokens=task.spec.answer.max_new_tokens)
            (answer,) = answers_of(loaded, sequences, inputs)
            found = found.joined(
                _compared(loaded, sample.id, partial(_inputs_of, loaded, task, sample), target, answer)
            )
    return found


@dataclass(frozen=True)
class _Memory:
    dense: int
    dense_peak: int | None
    peak: int | None


def _memory(loaded: LoadedModel, task: Task, workload: Workload, speculation: Speculation) -> _Memory:
    """Measure the dense model's cache, and the most memory of a request of each."""
    request = prepare_request(loaded, task, workload)
    tokens = {"min_new_tokens": workload.new_tokens, "max_new_tokens": workload.new_tokens}
    with torch.inference_mode():
        dense = cache_bytes(cache_of(run_request(loaded, request)))
        dense_peak = peak_bytes(lambda: run_request(loaded, request), *loaded.devices)
        generate(loaded, speculation, request.inputs, **tokens)
        peak = peak_bytes(lambda: generate(loaded, speculation, request.inputs, **tokens), *loaded.devices)
    return _Memory(dense, dense_peak, peak)


def _time_pairs(
    loaded: LoadedModel, prompts: Iterator[Prompt], request: CompareSpeculation, speculation: Speculation
) -> tuple[Pairs, list[tuple[Prompt, list[tuple[int, ...]]]], Exactness]:
    """Time pairs until the request speed-up's interval is narrow enough, or time is up.

    Returns the times, the first prompts with dense's answers, and how exact the answers were.
    """
    pairs, exact = Pairs(), Exactness()
    asked: list[tuple[Prompt, list[tuple[int, ...]]]] = []
    generator = np.random.default_rng(request.seed)
    tokens = {"max_new_tokens": request.workload.new_tokens}
    for prompt in itertools.islice(prompts, WARM_UP_REQUESTS):
        for model in (loaded.model, speculation):
            timed(loaded, model, prompt.inputs, **tokens)
    speculation.reset_statistics()
    deadline = time.perf_counter() + request.max_seconds
    for prompt in prompts:
        found = {}
        for takes_dense in (True, False) if len(pairs.dense) % 2 == 0 else (False, True):
            found[takes_dense] = timed(loaded, loaded.model if takes_dense else speculation, prompt.inputs, **tokens)
        pairs.dense.append(found[True].seconds)
        pairs.drafted.append(found[False].seconds)
        longest = max(map(len, found[True].answers))
        if longest > 1:
            pairs.dense_decoding.append(found[True].decoding)
            pairs.drafted_decoding.append(found[False].decoding)
            pairs.tokens += longest - 1
        if len(asked) * len(prompt.names) < READ_PROMPTS:
            asked.append((prompt, found[True].answers))
        for row, name in enumerate(prompt.names):
            own = partial(prompt.alone, row)
            exact = exact.joined(_compared(loaded, name, own, found[True].answers[row], found[False].answers[row]))
        count, late = len(pairs.dense), time.perf_counter() > deadline
        if count < (LATE_PAIRS if late else PAIRS_PER_LOOK) or (count % PAIRS_PER_LOOK and not late):
            continue
        ratios = [first / second for first, second in zip(pairs.dense, pairs.drafted, strict=True)]
        low, high = median_interval(ratios, request.confidence, generator)
        if late or high - low <= request.precision * statistics.median(ratios):
            break
    return pairs, asked, exact


# Prompts -------------------------------------------------------------------------------------------------------------


def _over_and_over(prompts: Callable[[], Iterator[Prompt]]) -> Iterator[Prompt]:
    """Yield prompts from the first to the last, again and again, each made anew: none stays on the device."""
    while True:
        yield from prompts()


def _task_prompts(loaded: LoadedModel, task: Task, workload: Workload, failed: dict[str, str]) -> Iterator[Prompt]:
    """Yield held-out samples in order, as many a request as the workload says; ``failed`` gets those that fail."""
    waiting: list[Sample] = []
    asked = False
    for sample in task.held_out:
        prepared = prepare_batch(loaded, task, [sample])
        failed.update(prepared.failed)
        waiting += prepared.samples
        if len(waiting) < workload.batch_size:
            continue
        batch = prepare_batch(loaded, task, waiting)
        assert batch.inputs is not None
        alone = [partial(_inputs_of, loaded, task, each) for each in waiting]
        yield Prompt(
            tuple(each.id for each in waiting),
            to_device(batch.inputs, loaded.device, loaded.model.dtype),
            lambda row, alone=alone: alone[row](),  # type: ignore[misc]
        )
        waiting, asked = [], True
    if not asked:
        raise MeasurementError(f"task {task.name} has fewer usable held-out samples than {workload.batch_size}")


def _inputs_of(loaded: LoadedModel, task: Task, sample: Sample) -> dict[str, Any]:
    inputs = prepare_batch(loaded, task, [sample]).inputs
    assert inputs is not None
    return to_device(inputs, loaded.device, loaded.model.dtype)


def _text_prompts(loaded: LoadedModel, text: str) -> Iterator[Prompt]:
    """Yield the beginnings of the paragraphs of a text, one a request, without an image."""
    asked = False
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text), start=1):
        ids = loaded.processor.tokenizer(" ".join(paragraph.split()))["input_ids"][:PARAGRAPH_TOKENS]
        if len(ids) < PARAGRAPH_TOKENS // 4:
            continue
        tokens = torch.tensor([ids], device=loaded.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        yield Prompt((f"paragraph {number}",), inputs, lambda row, inputs=inputs: inputs)  # type: ignore[misc]
        asked = True
    if not asked:
        raise MeasurementError(f"the text has no paragraph of {PARAGRAPH_TOKENS // 4} tokens to begin a prompt with")


# Answers --------------------------------------------------------------------------------------------------------------


def _compared(
    loaded: LoadedModel,
    name: str,
    alone: Callable[[], dict[str, Any]],
    dense: Sequence[int],
    drafted: Sequence[int],
) -> Exactness:
    """Compare two answers to a prompt. Where they part, the dense model is asked about it ``alone``."""
    if tuple(dense) == tuple(drafted):
        return Exactness((name,))
    parting = next(
        (at for at, pair in enumerate(zip(dense, drafted, strict=False)) if pair[0] != pair[1]),
        min(len(dense), len(drafted)),
    )
    both_go_on = parting < min(len(dense), len(drafted))
    if both_go_on and _is_near_tie(loaded, alone(), dense[: parting + 1], drafted[parting]):
        return Exactness((name,), near_ties=(name,))
    return Exactness((name,), different=(name,))


def _is_near_tie(loaded: LoadedModel, inputs: Mapping[str, Any], answer: Sequence[int], other: int) -> bool:
    """Whether rounding decides between the last token of ``answer`` and the ``other`` one, by the rule of ``ties``."""
    near = False

    def read(step: int, following: list[int], logits: Tensor, scores: Tensor) -> None:
        nonlocal near
        if step == len(answer) - 1:
            own = scores[0].float()
            top = own.max()
            bound = tie_bound(top, loaded.model.dtype)
            near = bool(top - own[answer[-1]] <= bound) and bool(top - own[other] <= bound)

    with torch.inference_mode():
        force(loaded.model, inputs, [answer], loaded.processor.tokenizer.pad_token_id, read)
    return near


def _acceptance(
    loaded: LoadedModel, plan: SkipPlan, maps: Maps | None, asked: Sequence[tuple[Prompt, list[tuple[int, ...]]]]
) -> float:
    """Mean share of the positions of dense's answers where the plan's next token is dense's."""
    shares = []
    with torch.inference_mode(), apply(loaded.model, plan, maps):
        for prompt, answers in asked:
            own = read_agreement(loaded, prompt.inputs, answers)
            shares += [sum(each.agrees) / len(each.agrees) for each in own]
    return statistics.fmean(shares)
