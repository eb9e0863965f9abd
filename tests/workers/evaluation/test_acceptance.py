"""Acceptance: what greedy speculation makes of an agreement, and the evaluations that find the agreement."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from math import fsum
from typing import Any

import pytest
import torch

from workers.compensation.recipe import Recipe
from workers.evaluation.acceptance import (
    DRAFT_LENGTHS,
    STATISTICS,
    count_rounds,
    rounds_by_length,
    scores_of_agreement,
)
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import NO_TARGET, PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.messages import AnswerDense, EvaluatePlans, Evaluation
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.runtime import apply
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample, Task

END = -1
LAYERS = 6
LIMIT = 20


def speculate(answer: list[int], drafted_right: list[bool], draft_length: int, limit: int) -> tuple[int, int]:
    """Run two models token by token: dense says ``answer`` and then the end token, the drafter errs where told."""

    def dense(prefix: list[int]) -> int:
        assert prefix == answer[: len(prefix)]
        return answer[len(prefix)] if len(prefix) < len(answer) else END

    def drafter(prefix: list[int]) -> int:
        if prefix != answer[: len(prefix)] or not drafted_right[len(prefix)]:
            return 10_000 + len(prefix)  # no token of dense's; once it went astray it stays there
        return dense(prefix)

    said = [dense([])]  # by the pass over the prompt
    rounds = drafted = 0
    while said[-1] != END and len(said) < limit:
        draft: list[int] = []
        while len(draft) < min(draft_length, limit - len(said) - 1) and END not in draft:
            draft.append(drafter(said + draft))
        rounds, drafted = rounds + 1, drafted + len(draft)
        for token in draft:
            if dense(said) != token:
                break
            said.append(token)
            if token == END:
                break
        if said[-1] != END:
            said.append(dense(said))
    assert said == [*answer, END][:limit]
    return rounds, drafted


@pytest.mark.parametrize("limit", [2, 3, 6, 9])
def test_rounds_are_those_of_two_models_that_speculate(limit: int) -> None:
    for length in range(1, limit + 1):  # an answer as long as the limit has no end token
        positions = min(length + 1, limit)
        for agrees in itertools.product([True, False], repeat=min(positions, 7)):
            pattern = [*agrees, *[True] * positions][:positions]
            for draft_length in (1, 2, 3, 8):
                counted = count_rounds(pattern[1:], draft_length, limit)
                expected = speculate(list(range(length)), [*pattern, True], draft_length, limit)
                assert (counted.rounds, counted.drafted) == expected, (length, pattern, draft_length)


def test_longer_drafts_need_no_more_rounds_and_every_round_gives_a_token() -> None:
    generator = random.Random(0)
    for _ in range(300):
        agrees = [generator.random() < 0.8 for _ in range(generator.randint(1, 60))]
        scores = dict(zip(("acceptance", *STATISTICS), scores_of_agreement(agrees, 61), strict=True))
        rounds = [scores[f"rounds_{length}"] for length in DRAFT_LENGTHS]
        assert scores["acceptance"] == pytest.approx(agrees.count(True) / len(agrees))
        assert scores["tokens"] == len(agrees) - 1
        assert rounds == sorted(rounds, reverse=True)
        assert all(each <= scores["tokens"] for each in rounds)
        assert all(scores[f"drafted_{length}"] <= length * scores[f"rounds_{length}"] for length in DRAFT_LENGTHS)


def test_independent_agreement_gives_the_expected_rounds() -> None:
    """Leviathan et al. (2211.17192), equation 1: (1 - a^(k+1)) / (1 - a) tokens a round."""
    generator = random.Random(1)
    agrees = [True, *(generator.random() < 0.7 for _ in range(200_000))]
    means = dict(zip(STATISTICS, scores_of_agreement(agrees, len(agrees) + 1)[1:], strict=True))
    for length, (rounds, _) in zip(DRAFT_LENGTHS, rounds_by_length(means), strict=True):
        assert 1 / rounds == pytest.approx((1 - 0.7 ** (length + 1)) / 0.3, rel=0.01)


# Evaluations ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(small_task: Task) -> Task:
    """Ask the easy-VQA samples for long free answers."""
    answer = small_task.spec.answer.changed(kind="free", max_new_tokens=LIMIT)
    return replace(small_task, spec=small_task.spec.changed(answer=answer), search=small_task.search[:7])


Answers = dict[str, tuple[int, ...]]


def inputs_of(tiny: LoadedModel, task: Task, sample: Sample) -> dict[str, Any]:
    inputs = prepare_batch(tiny, task, [sample]).inputs
    assert inputs is not None
    return to_device(inputs, tiny.device, tiny.model.dtype)


def reference_agreement(
    tiny: LoadedModel, task: Task, plan: str, answers: Answers, maps: Maps | None = None
) -> list[float]:
    """Read the argmax of a forward pass over the prompt, and of one over the answer behind it, under the plan."""
    shares = []
    with torch.inference_mode(), apply(tiny.model, SkipPlan.parse(plan), maps):
        for sample in task.search:
            answer = torch.tensor([answers[sample.id]])
            prompt = tiny.model(**inputs_of(tiny, task, sample), use_cache=True)
            rest = tiny.model(input_ids=answer[:, :-1], past_key_values=prompt.past_key_values)
            likeliest = torch.cat([prompt.logits[0, -1:], rest.logits[0]]).argmax(-1)
            shares.append(float((likeliest == answer[0]).float().mean()))
    return shares


PLANS = ("RRRRRR", "RRSRRR", "RRSSRR", "RFRRBR", "SRRRRR")


@pytest.fixture(scope="module", autouse=True)
def some_answers_end(tiny: LoadedModel) -> Iterator[None]:
    """Let a token that the random model likes end its answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.model.generation_config, "eos_token_id", 194)
        yield


@pytest.fixture(scope="module")
def answers(tiny: LoadedModel, task: Task) -> Answers:
    """Generate by transformers alone, one sample at a time."""
    found = {}
    for sample in task.search:
        moved = inputs_of(tiny, task, sample)
        sequence = tiny.model.generate(**moved, do_sample=False, max_new_tokens=LIMIT)
        found[sample.id] = tuple(sequence[0, moved["input_ids"].shape[1] :].tolist())
    return found


@pytest.fixture
def request_of(tiny: LoadedModel, task: Task) -> EvaluatePlans:
    own = PlainEvaluator(tiny, task, batch_size=3).answer_dense(AnswerDense("search", 0, len(task.search)))
    return EvaluatePlans(PLANS, "search", targets=own.tokens)


def evaluated(dispatch: EvaluationDispatch, request: EvaluatePlans) -> list[Evaluation]:
    results = dispatch.evaluate(request).results
    assert all(isinstance(each, Evaluation) for each in results), results
    return list(results)  # type: ignore[arg-type]


def test_targets_are_what_generate_gives_with_the_end_token(
    request_of: EvaluatePlans, task: Task, answers: Answers
) -> None:
    expected = [answers[sample.id] for sample in task.search]
    assert list(request_of.targets) == expected
    assert len({len(each) for each in expected}) > 1  # some end by the end token


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_acceptance_is_the_argmax_of_a_forward_pass(
    tiny: LoadedModel,
    task: Task,
    request_of: EvaluatePlans,
    answers: Answers,
    path: str,
) -> None:
    dispatch = EvaluationDispatch(PlainEvaluator(tiny, task, batch_size=3), memory_bytes=1 << 30)
    found = evaluated(dispatch, replace(request_of, path=path))
    for each in found:
        assert each.path == path
        assert each.scores == pytest.approx(reference_agreement(tiny, task, each.plan, answers))
    assert found[0].scores == (1.0,) * len(task.search)
    assert 0 < found[1].accuracy < 1
    tokens = fsum(len(own or ()) - 1 for own in request_of.targets) / len(task.search)
    assert found[0].secondary["tokens"] == pytest.approx(tokens)


def test_both_paths_count_the_same_rounds_in_parts_as_in_one(
    tiny: LoadedModel, task: Task, request_of: EvaluatePlans
) -> None:
    plain = PlainEvaluator(tiny, task, batch_size=3)
    dispatch = EvaluationDispatch(plain, memory_bytes=1 << 30)
    fast, slow = (evaluated(dispatch, replace(request_of, path=path)) for path in ("fast", "plain"))
    assert [each.secondary for each in fast] == [each.secondary for each in slow]
    parts = [
        evaluated(dispatch, replace(request_of, start=start, n_samples=end, targets=request_of.targets[start:end]))
        for start, end in ((0, 3), (3, 7))
    ]
    for number, whole in enumerate(fast):
        assert (*parts[0][number].scores, *parts[1][number].scores) == whole.scores


def test_maps_are_in_the_drafter(tiny: LoadedModel, task: Task, request_of: EvaluatePlans, answers: Answers) -> None:
    plain = PlainEvaluator(tiny, task)
    recipe = Recipe.parse("linear tokens=600").text
    maps = plain.compensator.maps(SkipPlan.parse("RRSSRR"), recipe, None)
    dispatch = EvaluationDispatch(plain, memory_bytes=1 << 30)
    request = replace(request_of, plans=("RRSSRR",), compensation=recipe)
    for path in ("fast", "plain"):
        (found,) = evaluated(dispatch, replace(request, path=path))
        assert found.scores == pytest.approx(reference_agreement(tiny, task, "RRSSRR", answers, maps))


def test_a_sample_without_a_target_is_left_out(tiny: LoadedModel, task: Task, request_of: EvaluatePlans) -> None:
    dispatch = EvaluationDispatch(PlainEvaluator(tiny, task), memory_bytes=1 << 30)
    whole = evaluated(dispatch, request_of)
    request = replace(request_of, targets=(None, *request_of.targets[1:]))
    for path in ("fast", "plain"):
        for each, full in zip(evaluated(dispatch, replace(request, path=path)), whole, strict=True):
            assert each.failed_samples == {task.search[0].id: NO_TARGET}
            assert each.scores[0] != each.scores[0]
            assert each.scores[1:] == full.scores[1:]


def test_free_answers_are_still_refused_without_targets(tiny: LoadedModel, task: Task) -> None:
    with pytest.raises(Exception, match="free text"):
        FastEvaluator(PlainEvaluator(tiny, task))
