"""A plan as a drafter, timed beside dense on the tiny model, its answers held against dense's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import in_process
import pytest
import torch

from workers.errors import MeasurementError
from workers.evaluation.acceptance import LONGEST_SCORED_DRAFT
from workers.evaluation.plain import PlainEvaluator
from workers.latency.measure import profile_latency
from workers.messages import AnswerDense, CheckSpeculation, CompareSpeculation, EvaluatePlans, Workload
from workers.models.loading import LoadedModel
from workers.runtime import speculate
from workers.runtime.plan import PlanError
from workers.speculation import compare
from workers.speculation.compare import check_speculation, compare_speculation
from workers.speculation.passes import verify_seconds
from workers.tasks import Task

LIMIT = 12
PLAN = "RRSRRR"


@pytest.fixture(scope="module", autouse=True)
def own_lock_and_end(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        in_process.lock_apart(patch, tmp_path_factory.getbasetemp())
        patch.setattr(tiny.model.generation_config, "eos_token_id", 194)  # which the random model likes
        yield


@pytest.fixture(scope="module")
def task(small_task: Task) -> Task:
    answer = small_task.spec.answer.changed(kind="free", max_new_tokens=LIMIT)
    return replace(small_task, spec=small_task.spec.changed(answer=answer), held_out=small_task.held_out[:9])


@pytest.fixture(scope="module")
def evaluator(tiny: LoadedModel, task: Task) -> PlainEvaluator:
    return PlainEvaluator(tiny, task, batch_size=4)


@pytest.fixture(scope="module")
def targets(evaluator: PlainEvaluator) -> tuple[tuple[int, ...] | None, ...]:
    return evaluator.answer_dense(AnswerDense("held_out", 0, 9)).tokens


def asked(**fields: object) -> CompareSpeculation:
    return replace(CompareSpeculation(PLAN, Workload(1, LIMIT), max_seconds=0.5), **fields)  # type: ignore[arg-type]


def test_pairs_answer_alike_and_acceptance_is_that_of_the_evaluation(
    evaluator: PlainEvaluator, targets: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of so small a model a draft takes longer than it saves: lengths that adapt would hardly ever draft.
    monkeypatch.setattr(compare, "speculate", partial(speculate, draft_length=3))
    found = compare_speculation(evaluator, asked(max_seconds=3), None)
    pairs = found.latency.pairs
    assert len(found.exactness.prompts) == min(pairs, 9) >= 5 and not found.exactness.different
    assert found.rounds > pairs and 0 < found.accepted < found.drafted
    assert found.extra_bytes > 0
    assert found.latency.kv_cache_bytes == found.latency.dense_kv_cache_bytes + found.extra_bytes  # no maps
    assert found.latency.speedup_low <= found.latency.speedup <= found.latency.speedup_high
    request = EvaluatePlans((PLAN,), "held_out", targets=targets)
    (whole,) = (
        evaluator.with_targets({s.id: each for s, each in zip(evaluator.task.held_out, targets, strict=True)})
        .evaluate_all(request)
        .results
    )
    by_prompt = [
        whole.scores[(compare.WARM_UP_REQUESTS + number) % 9] for number in range(min(pairs, compare.READ_PROMPTS))
    ]
    assert found.acceptance == pytest.approx(sum(by_prompt) / len(by_prompt))


def test_several_prompts_a_request_and_prompts_of_text(evaluator: PlainEvaluator) -> None:
    batches = compare_speculation(evaluator, asked(workload=Workload(3, LIMIT)), None)
    assert len(batches.exactness.prompts) == min(3 * batches.latency.pairs, 9) and not batches.exactness.different
    text = "\n\n".join(
        f"{number} what shape is green? is there a red circle in the image? yes no" for number in range(3)
    )
    beside = compare_speculation(evaluator, asked(text=text), None)
    assert beside.latency.pairs > 3 == len(beside.exactness.prompts) and not beside.exactness.different
    with pytest.raises(MeasurementError, match="no paragraph"):
        compare_speculation(evaluator, asked(text="too short"), None)


def test_prompts_are_made_anew_and_none_is_kept() -> None:
    class Inputs(dict): ...

    made: list[weakref.ref[Inputs]] = []

    def prompts() -> Iterator[compare.Prompt]:
        for name in ("a", "b"):
            inputs = Inputs()
            made.append(weakref.ref(inputs))
            yield compare.Prompt((name,), inputs, lambda row: {})

    asked = compare._over_and_over(prompts)
    assert [next(asked).names for _ in range(5)] == [("a",), ("b",), ("a",), ("b",), ("a",)]
    gc.collect()
    assert [each() is None for each in made[:4]] == [True] * 4


def test_a_wrong_answer_is_named_and_a_near_tie_is_none(
    evaluator: PlainEvaluator, targets: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = CheckSpeculation(PLAN, 0, 9, targets)
    assert check_speculation(evaluator, request, None) == compare.Exactness(
        tuple(each.id for each in evaluator.task.held_out)
    )
    changed = targets[4][0], (targets[4][1] + 1) % 300, *targets[4][2:]
    other = replace(request, targets=(None, *targets[1:4], changed, *targets[5:]))
    found = check_speculation(evaluator, other, None)
    assert (len(found.prompts), found.different) == (8, (evaluator.task.held_out[4].id,))
    monkeypatch.setattr(compare, "tie_bound", lambda top, dtype: torch.full_like(top, 1e6))
    found = check_speculation(evaluator, other, None)
    assert (found.near_ties, found.different) == ((evaluator.task.held_out[4].id,), ())


def test_an_answer_that_goes_on_is_different(evaluator: PlainEvaluator, targets: tuple[tuple[int, ...], ...]) -> None:
    shorter = replace(CheckSpeculation(PLAN, 0, 1, targets[:1]), targets=(targets[0][:-1],))
    assert check_speculation(evaluator, shorter, None).different == (evaluator.task.held_out[0].id,)


def test_freezing_plans_are_refused(evaluator: PlainEvaluator) -> None:
    with pytest.raises(PlanError, match="saves nothing"):
        compare_speculation(evaluator, replace(asked(), plan="RRFRRR"), None)


def test_every_width_takes_at_least_a_step(tiny: LoadedModel, task: Task) -> None:
    profile = profile_latency(tiny, task, repeats=1, workload=Workload(1, LIMIT))
    seconds = verify_seconds(tiny, task, profile, 2)
    assert len(seconds) == LONGEST_SCORED_DRAFT + 1
    assert seconds[0] == pytest.approx(profile.dense_decode_seconds)
    assert min(seconds) == seconds[0]
