"""What a thousand evaluations leave in memory."""

from __future__ import annotations

import ctypes
import gc
import random
from dataclasses import replace
from pathlib import Path

import pytest
from test_fast_evaluation import evaluations, random_plans

from workers.compensation.recipe import Recipe
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.messages import EvaluatePlans
from workers.models.loading import LoadedModel
from workers.tasks import Task

LAYERS = 6
BUDGET = 1_500_000
TOLERANCE = 3 << 20


def resident_bytes() -> int:
    """The process's resident set without the freed pages that the C library keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["none", "linear tokens=128"])
def test_a_thousand_evaluations_keep_no_more_than_two_hundred(
    tiny: LoadedModel, small_task: Task, compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PlainEvaluator(tiny, replace(small_task, search=small_task.search[:4]), cache_bytes=BUDGET)
    fast = FastEvaluator(plain, memory_bytes=BUDGET, chunk_tokens=512)
    fast.check("search")
    if compensation != "none":  # fits keep states and maps of their own
        monkeypatch.setattr("workers.compensation.shared.MAPS_BUDGET", BUDGET)
        plain.compensator.shared(Recipe.parse(compensation))._budget = BUDGET
    # Once for the masks that bypassed layers take, made when they are first needed.
    fast.evaluate_all(EvaluatePlans(("RRRRRB",), "search"))
    kept: list[int] = []
    for layer in fast.decoder.layers:
        layer.register_forward_hook(lambda *_: kept.append(fast.chunks.nbytes + fast.states.nbytes))
    plans = list(random_plans(LAYERS, 1000, seed=7))
    random.Random(0).shuffle(plans)
    resident = {}
    for done in range(25, 1001, 25):
        request = EvaluatePlans(tuple(plans[done - 25 : done]), "search", compensation=compensation)
        evaluations(fast.evaluate_all(request))
        if done in (200, 1000):
            resident[done] = resident_bytes()
            assert max(kept) <= BUDGET
            kept.clear()
    assert resident[1000] - resident[200] <= TOLERANCE
