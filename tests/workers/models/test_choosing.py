"""Choosing by log-likelihood on the plain path, against one forward call for each option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch
from choice_tasks import as_choices, log_likelihood_by_hand

from workers.compensation.calibration import calibrate
from workers.errors import TaskError
from workers.evaluation.plain import PlainEvaluator
from workers.messages import ModelSource
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, load_model
from workers.models.multiple_choice import Choice, Likelihood, chosen_tokens, option_tokens
from workers.runtime import apply
from workers.runtime.plan import SkipPlan
from workers.tasks import Task
from workers.tasks.images import ImageFile

DENSE = SkipPlan.parse("RRRRRR")
PLANS = (DENSE, SkipPlan.parse("RSRSSR"), SkipPlan.parse("RFRRBR"))


@pytest.fixture(scope="module")
def choices(small_task: Task) -> Task:
    return as_choices(small_task)


@pytest.fixture
def loaded(tiny_directory: Path) -> LoadedModel:
    return load_model(ModelSource(str(tiny_directory), device="cpu"))


@pytest.mark.parametrize("plan", PLANS)
def test_likelihoods_are_those_of_one_call_an_option(tiny: LoadedModel, choices: Task, plan: SkipPlan) -> None:
    samples = choices.search[:12]
    answers = PlainEvaluator(tiny, choices, batch_size=7).answer(plan, samples)
    assert answers.failed == {}
    with apply(tiny.model, plan):
        for sample in samples:
            expected = [log_likelihood_by_hand(tiny.model, tiny, sample, option) for option in sample.choices]
            assert [each.total for each in answers.likelihoods[sample.id]] == pytest.approx(expected, abs=1e-3)
            assert answers.texts[sample.id] == sample.choices[expected.index(max(expected))]


def test_scores_follow_from_the_likelihoods(tiny: LoadedModel, choices: Task) -> None:
    samples = choices.search[:24]
    result = PlainEvaluator(tiny, choices).evaluate(DENSE, "search", 24)
    by_sum, by_length = [], []
    for sample in samples:
        totals = [log_likelihood_by_hand(tiny.model, tiny, sample, option) for option in sample.choices]
        lengths = [len(option.encode("utf-8")) for option in sample.choices]
        right = sample.choices.index(sample.answers[0])
        by_sum.append(float(max(range(len(totals)), key=totals.__getitem__) == right))
        by_length.append(float(max(range(len(totals)), key=lambda n: totals[n] / lengths[n]) == right))
    assert result.scores == tuple(by_sum)
    assert result.secondary == {"multiple_choice_per_byte": pytest.approx(sum(by_length) / 24)}
    assert 0 < sum(by_sum) < 24 and by_sum != by_length  # else the comparison would show little


def test_generation_settings_do_not_matter(loaded: LoadedModel, choices: Task) -> None:
    expected = PlainEvaluator(loaded, choices).answer(DENSE, choices.search[:6]).likelihoods
    loaded.model.generation_config.repetition_penalty = 3.0
    loaded.model.generation_config.min_new_tokens = 2
    assert PlainEvaluator(loaded, choices).answer(DENSE, choices.search[:6]).likelihoods == expected


def test_the_separator_stands_between_prompt_and_option(tiny: LoadedModel, choices: Task) -> None:
    def tokens(separator: str | None) -> tuple[tuple[int, ...], ...]:
        answer = choices.spec.answer.changed(separator=separator)
        return option_tokens(tiny.processor, choices.spec.changed(answer=answer), choices.search[0])

    def alone(separator: str) -> tuple[tuple[int, ...], ...]:
        tokenizer = tiny.processor.tokenizer
        return tuple(tuple(tokenizer(separator + option)["input_ids"]) for option in choices.search[0].choices)

    assert tokens(None) == tokens(" ") == alone(" ")  # the prompt ends with "ASSISTANT:"
    assert tokens("") == alone("") != tokens(" ")
    assert tokens("\n") == alone("\n")


def test_no_separator_behind_white_space(tmp_path: Path, choices: Task) -> None:
    template = tiny_llava.CHAT_TEMPLATE.replace(" ASSISTANT:", "\nASSISTANT\n")
    loaded = load_model(ModelSource(str(tiny_llava.save(tmp_path, chat_template=template)), device="cpu"))
    sample = choices.search[0]
    expected = tuple(tuple(loaded.processor.tokenizer(option)["input_ids"]) for option in sample.choices)
    assert option_tokens(loaded.processor, choices.spec, sample) == expected


def test_models_without_a_chat_template_choose_too(tmp_path: Path, choices: Task) -> None:
    loaded = load_model(ModelSource(str(tiny_llava.save(tmp_path, chat_template=None)), device="cpu"))
    answers = PlainEvaluator(loaded, choices, batch_size=5).answer(DENSE, choices.search[:8])
    alone = PlainEvaluator(loaded, choices, batch_size=5).answer_alone(DENSE, choices.search[:8])
    assert answers.texts == alone.texts and len(answers.texts) == 8


@pytest.mark.parametrize(
    ("totals", "noise", "metric", "chosen", "tied"),
    [
        ((-1.0, -2.0), 0.1, "multiple_choice", "ab", ()),
        ((-1.0, -1.1), 0.1, "multiple_choice", "ab", ("abcd",)),
        ((-1.0, -1.0), 0.0, "multiple_choice", "ab", ("abcd",)),  # equal: the first
        ((-1.0, -1.5), 0.1, "multiple_choice_per_byte", "abcd", ()),
        ((-1.0, -1.9), 0.1, "multiple_choice_per_byte", "abcd", ("ab",)),
    ],
)
def test_the_option_worth_most(
    totals: Sequence[float], noise: float, metric: str, chosen: str, tied: tuple[str, ...]
) -> None:
    choice = Choice.of(metric, ("ab", "abcd"), [Likelihood(total, noise) for total in totals])
    assert (choice.option, choice.tied) == (chosen, tied)


def test_ties_are_asked_again_alone(tiny: LoadedModel, choices: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where neither option is right, nothing is open.
    samples = [
        replace(each, choices=("red", "green"), answers=("red" if place % 2 else "blue",))
        for place, each in enumerate(choices.search[:6])
    ]
    monkeypatch.setattr("workers.models.multiple_choice.tie_bound", lambda top, dtype: torch.full_like(top, 1e6))
    asked: list[int] = []
    handle = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers = PlainEvaluator(tiny, choices).answer(DENSE, samples)
    handle.remove()
    assert answers.tied == {each.id for each in samples[1::2]}
    assert asked[0] == 12 and asked.count(1) >= 2 * 3


def test_a_corrupt_image_fails_its_samples_alone(tiny: LoadedModel, choices: Task, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    samples = list(choices.search[:9])
    expected = PlainEvaluator(tiny, choices).evaluate(DENSE, "search", 9)
    samples[3] = replace(samples[3], image=ImageFile(str(broken)))
    result = PlainEvaluator(tiny, replace(choices, search=tuple(samples))).evaluate(DENSE, "search")
    assert list(result.failed_samples) == [samples[3].id]
    assert "broken.png cannot be decoded" in result.failed_samples[samples[3].id]
    assert str(result.scores) == str((*expected.scores[:3], float("nan"), *expected.scores[4:]))


def test_nan_fails_the_sample_that_has_it(loaded: LoadedModel, choices: Task) -> None:
    samples = choices.search[:5]
    clean = PlainEvaluator(loaded, choices).answer(DENSE, samples)
    row = len(samples[0].choices) + 1  # the second sample's second option

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[row, -1, 7] = float("nan")
        return output

    handle = loaded.model.lm_head.register_forward_hook(poison)
    answers = PlainEvaluator(loaded, choices).answer(DENSE, samples)
    handle.remove()
    assert answers.failed == {samples[1].id: "the logits hold NaN"}
    assert answers.texts == {key: text for key, text in clean.texts.items() if key != samples[1].id}


@pytest.mark.parametrize("largest", [3, 0])
def test_out_of_memory_halves_the_batch(loaded: LoadedModel, choices: Task, largest: int) -> None:
    def run_out(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    samples = choices.search[:6]
    expected = PlainEvaluator(loaded, choices).answer(DENSE, samples)
    handle = loaded.model.register_forward_pre_hook(run_out, with_kwargs=True)
    answers = PlainEvaluator(loaded, choices, batch_size=8).answer(DENSE, samples)
    handle.remove()
    if largest:
        assert answers.texts == expected.texts and answers.failed == {}
    else:
        assert answers.texts == {} and set(answers.failed.values()) == {"out of memory at batch size 1"}
        assert len(answers.failed) == 6


def test_an_option_without_tokens(tiny: LoadedModel, choices: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = replace(choices.search[0], choices=("red", ""))
    spec = choices.spec.changed(answer=choices.spec.answer.changed(separator=""))
    with pytest.raises(TaskError, match="the option '' has no tokens"):
        option_tokens(tiny.processor, spec, sample)
    answers = PlainEvaluator(tiny, replace(choices, spec=spec)).answer(DENSE, [sample, choices.search[1]])
    assert list(answers.failed) == [sample.id] and list(answers.texts) == [choices.search[1].id]


def test_calibration_feeds_the_option_that_the_dense_model_chooses(tiny: LoadedModel, choices: Task) -> None:
    sample = choices.calibration[0]
    totals = [log_likelihood_by_hand(tiny.model, tiny, sample, option) for option in sample.choices]
    best = sample.choices[totals.index(max(totals))]
    tokens = tuple(tiny.processor.tokenizer(" " + best)["input_ids"])
    assert chosen_tokens(tiny, choices, sample) == (tokens, "")
    prompt = prepare_batch(tiny, choices, [sample]).inputs
    assert prompt is not None
    found = calibrate(tiny, choices, tokens=1)
    assert found.samples[0] == sample.id
    assert found.tokens == prompt["input_ids"].shape[1] + len(tokens) - 1
