"""Choosing on the fast path: the plain path's scores, sample by sample."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from choice_tasks import WORDS, as_choices, log_likelihood_by_hand
from test_fast_evaluation import edges, evaluations, random_plans

from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.layerwise.decoder import NotExactError
from workers.layerwise.trie import build_trie
from workers.messages import EvaluatePlans, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.models.multiple_choice import option_tokens
from workers.models.prompts import build_inputs
from workers.runtime import apply
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample, Task, load_spec, load_task
from workers.tasks.images import ImageFile

LAYERS = 6
DENSE = "R" * LAYERS


@pytest.fixture(scope="module")
def choices(small_task: Task) -> Task:
    return as_choices(replace(small_task, search=small_task.search[:48]))


@pytest.fixture
def plain(tiny: LoadedModel, choices: Task) -> PlainEvaluator:
    return PlainEvaluator(tiny, choices)


@pytest.fixture
def fast(plain: PlainEvaluator) -> FastEvaluator:
    evaluator = FastEvaluator(plain, chunk_tokens=700)
    evaluator.check("search")
    return evaluator


@pytest.mark.parametrize("compensation", ["none", "linear tokens=256"])
def test_random_plans_score_the_same_on_every_sample(
    plain: PlainEvaluator, fast: FastEvaluator, compensation: str
) -> None:
    request = EvaluatePlans(random_plans(LAYERS, 10, seed=1), "search", 20, compensation=compensation)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in slow]
    assert [each.secondary for each in quick] == [each.secondary for each in slow]
    assert {each.path for each in quick} == {"fast"}
    assert len({each.scores for each in quick}) > 6  # else the comparison would show little


def test_a_layer_execution_is_a_sample_not_an_option(fast: FastEvaluator) -> None:
    plans = random_plans(LAYERS, 9, seed=2)
    fast.evaluate_all(EvaluatePlans((DENSE,), "search", 16))
    fast.states.clear()
    results = evaluations(fast.evaluate_all(EvaluatePlans(plans, "search", 16)))
    spent = sum(each.layer_executions for each in results)
    assert spent == 16 * edges(build_trie(SkipPlan.parse(plan) for plan in plans))


def test_divergence_is_the_mean_over_the_options_positions(
    tiny: LoadedModel, choices: Task, fast: FastEvaluator
) -> None:
    plan = SkipPlan.parse("RRSRRR")
    (result,) = evaluations(fast.evaluate_all(EvaluatePlans((plan.text,), "search", 8)))
    assert result.kl is not None
    for sample, found in zip(choices.search[:8], result.kl, strict=True):
        dense, changed = (log_probabilities(tiny, choices, sample, each) for each in (SkipPlan.dense(LAYERS), plan))
        expected = [float((d.exp() * (d - changed[place])).sum()) for place, d in dense.items()]
        assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-5)


def log_probabilities(
    loaded: LoadedModel, task: Task, sample: Sample, plan: SkipPlan
) -> dict[tuple[int, ...], torch.Tensor]:
    """By what is fed of an option so far, the next token's distribution, by a forward call for each."""
    tokens = option_tokens(loaded.processor, task.spec, sample)
    found = {}
    for fed in {option[:length] for option in tokens for length in range(len(option))}:
        inputs = dict(build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()]))
        inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([fed], dtype=torch.long)), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode(), apply(loaded.model, plan):
            found[fed] = loaded.model(**inputs).logits[0, -1].double().log_softmax(-1)
    return found


def test_ties_are_decided_by_the_plain_path_alone(
    tiny: LoadedModel, choices: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.models.multiple_choice.tie_bound", lambda top, dtype: torch.full_like(top, 0.4))
    plain = PlainEvaluator(tiny, choices)
    fast = FastEvaluator(plain, chunk_tokens=700)
    fast.check("search")
    request = EvaluatePlans((DENSE, "RRSRRR"), "search", 20)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    for one, other in zip(quick, slow, strict=True):
        assert one.scores == other.scores
        assert 0 < one.near_ties == other.near_ties < 20


def test_options_of_a_sample_stay_together_however_many(tiny: LoadedModel, choices: Task) -> None:
    """More words than a row takes, and chunks smaller than a row."""
    many = tuple(f"{first} {second}" for first in WORDS for second in WORDS)
    samples = [replace(each, choices=many, answers=(many[number],)) for number, each in enumerate(choices.search[:4])]
    plain = PlainEvaluator(tiny, replace(choices, search=tuple(samples)))
    request = EvaluatePlans((DENSE, "RSRRRR"), "search")
    quick = evaluations(FastEvaluator(plain, chunk_tokens=100).evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in evaluations(plain.evaluate_all(request))]


def test_a_corrupt_image_fails_its_samples_alone(tiny: LoadedModel, choices: Task, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    samples = list(choices.search[:12])
    samples[3] = replace(samples[3], image=ImageFile(str(broken)), image_key="broken")
    plain = PlainEvaluator(tiny, replace(choices, search=tuple(samples)))
    request = EvaluatePlans((DENSE, "RRSRRR"), "search")
    quick = evaluations(FastEvaluator(plain).evaluate_all(request))
    for one, other in zip(quick, evaluations(plain.evaluate_all(request)), strict=True):
        assert one.failed_samples == other.failed_samples and list(one.failed_samples) == [samples[3].id]
        assert "broken.png cannot be decoded" in one.failed_samples[samples[3].id]
        assert str(one.scores) == str(other.scores) and math.isnan(one.scores[3])
        assert one.kl is not None and math.isnan(one.kl[3])


def test_nan_fails_the_samples_that_have_it_and_no_others(tiny_directory: Path, choices: Task) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = loaded.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[word] = float("nan")
    samples = [
        replace(each, question="triangle?" if number % 5 == 2 else "what is it?", choices=("red", "green"))
        for number, each in enumerate(choices.search[:15])
    ]
    plain = PlainEvaluator(loaded, replace(choices, search=tuple(samples)))
    request = EvaluatePlans((DENSE, "RRRSRR"), "search")
    quick, slow = evaluations(FastEvaluator(plain).evaluate_all(request)), evaluations(plain.evaluate_all(request))
    for one, other in zip(quick, slow, strict=True):
        assert one.failed_samples == other.failed_samples
        assert one.failed_samples == {each.id: "the logits hold NaN" for each in samples[2::5]}
        assert str(one.scores) == str(other.scores)


def test_lack_of_memory_halves_the_chunks(plain: PlainEvaluator, fast: FastEvaluator) -> None:
    request = EvaluatePlans(random_plans(LAYERS, 5, seed=4), "search", 24)
    expected = evaluations(fast.evaluate_all(request))
    small = FastEvaluator(plain, chunk_tokens=1400)

    def run_out(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].shape
        if rows[0] > 1 and rows[0] * rows[1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = small.decoder.layers[1].mlp.register_forward_pre_hook(run_out)
    found = evaluations(small.evaluate_all(request))
    handle.remove()
    assert [each.scores for each in found] == [each.scores for each in expected]
    assert small.chunk_tokens < 1400


@pytest.mark.parametrize("kind", ["choice", "short"])
def test_what_does_not_fit_packed_is_left_to_the_plain_path(
    tiny_directory: Path, choices: Task, small_task: Task, kind: str
) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    task = choices if kind == "choice" else replace(small_task, search=small_task.search[:48])
    plain = PlainEvaluator(loaded, task)
    fast = FastEvaluator(plain, chunk_tokens=700)
    request = EvaluatePlans((DENSE, "RRRSRR"), "search", 16)
    expected = evaluations(plain.evaluate_all(request))

    def run_out(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[1] > 60:  # longer than any prompt, shorter than an image's packed questions
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    fast.decoder.layers[1].mlp.register_forward_pre_hook(run_out)
    found = evaluations(fast.evaluate_all(request))
    assert [each.scores for each in found] == [each.scores for each in expected]
    assert [each.failed_samples for each in found] == [{}, {}]
    assert fast.chunk_tokens < 200


def test_generation_settings_that_change_logits_are_no_hindrance(tiny_directory: Path, choices: Task) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    loaded.model.generation_config.repetition_penalty = 1.3
    evaluators = EvaluationDispatch(PlainEvaluator(loaded, choices), memory_bytes=1 << 28)
    request = EvaluatePlans((DENSE, "RRRSRR"), "search", 12)
    quick, slow = (evaluations(evaluators.evaluate(replace(request, path=path))) for path in ("fast", "plain"))
    assert [each.scores for each in quick] == [each.scores for each in slow]


def test_an_option_without_tokens_is_left_to_the_plain_path(tiny: LoadedModel, choices: Task) -> None:
    spec = choices.spec.changed(answer=choices.spec.answer.changed(separator=""))
    search = (replace(choices.search[0], choices=("red", "")), *choices.search[1:20])
    evaluators = EvaluationDispatch(
        PlainEvaluator(tiny, replace(choices, spec=spec, search=search)), memory_bytes=1 << 28
    )
    result = evaluators.evaluate(EvaluatePlans((DENSE,), "search", 4))
    assert "the option '' has no tokens" in result.note
    assert list(evaluations(result)[0].failed_samples) == [search[0].id]
    with pytest.raises(NotExactError, match="no tokens"):
        evaluators.evaluate(EvaluatePlans((DENSE,), "search", 4, path="fast"))


@pytest.mark.slow
def test_the_bundled_model_chooses_the_same_on_every_sample() -> None:
    loaded = load_model(ModelSource("llava-12", device="cpu", dtype="float32"))
    task = as_choices(load_task(load_spec("easy-vqa")), seed=3)
    plain = PlainEvaluator(loaded, task)
    fast = FastEvaluator(plain)
    fast.check("search")
    request = EvaluatePlans(random_plans(12, 12, seed=5, letters="RRRRRRRRFBSS"), "search", 64)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in slow]
    assert [each.secondary for each in quick] == [each.secondary for each in slow]
    dense = evaluations(fast.evaluate_all(EvaluatePlans(("R" * 12,), "search", 64)))[0]
    for sample, score in zip(task.search[:32], dense.scores, strict=False):
        totals = [log_likelihood_by_hand(loaded.model, loaded, sample, option) for option in sample.choices]
        assert score == float(sample.choices[totals.index(max(totals))] in sample.answers)
