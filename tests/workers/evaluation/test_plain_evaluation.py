from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from workers.device.memory import is_out_of_memory
from workers.errors import TaskError
from workers.evaluation.plain import PlainEvaluator
from workers.messages import ModelSource
from workers.models import inputs
from workers.models.loading import LoadedModel, load_model
from workers.runtime.plan import PlanError, SkipPlan
from workers.tasks import Sample, Task
from workers.tasks.images import ImageFile

DENSE = SkipPlan.parse("RRRRRR")
SKIPPING = SkipPlan.parse("RSRSSR")


def without_layers(directory: Path, kept: list[int]) -> Any:
    """The model with only the kept layers, made from its files without the runtime."""
    full = AutoModelForImageTextToText.from_pretrained(directory).state_dict()
    config = AutoConfig.from_pretrained(directory)
    config.text_config.num_hidden_layers = len(kept)
    model = AutoModelForImageTextToText.from_config(config)
    prefix = "model.language_model.layers."
    renamed = {name: tensor for name, tensor in full.items() if not name.startswith(prefix)}
    for new, old in enumerate(kept):
        own = f"{prefix}{old}."
        renamed |= {f"{prefix}{new}.{n.removeprefix(own)}": t for n, t in full.items() if n.startswith(own)}
    model.load_state_dict(renamed)
    return model.eval()


def answer_alone(model: Any, directory: Path, task: Task, sample: Sample) -> str:
    """What a user would do by hand: one generate call a sample, no padding, no batch."""
    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image", "image": sample.image.open()}, {"type": "text", "text": sample.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=task.spec.answer.max_new_tokens)
    text: str = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.fixture
def loaded(tiny_directory: Path) -> LoadedModel:
    return load_model(ModelSource(str(tiny_directory), device="cpu"))


@pytest.fixture(scope="module")
def long_answers(small_task: Task) -> Task:
    spec = small_task.spec.changed(answer=small_task.spec.answer.changed(max_new_tokens=8))
    return replace(small_task, spec=spec.changed(secondary=("token_f1",)))


@pytest.mark.parametrize("plan", [DENSE, SKIPPING])
def test_answers_equal_one_generate_call_a_sample(
    tiny: LoadedModel, tiny_directory: Path, long_answers: Task, plan: SkipPlan
) -> None:
    kept = [layer for layer, letter in enumerate(plan.text) if letter == "R"]
    reference = without_layers(tiny_directory, kept)
    samples = long_answers.search[:24]
    answers = PlainEvaluator(tiny, long_answers, batch_size=5).answer(plan, samples)
    expected = {s.id: answer_alone(reference, tiny_directory, long_answers, s) for s in samples}
    assert answers.failed == {}
    assert answers.texts == expected
    assert len(set(expected.values())) > 4  # else the comparison would show little


def test_scores_follow_the_samples_in_their_order(tiny: LoadedModel, long_answers: Task) -> None:
    evaluator = PlainEvaluator(tiny, long_answers, batch_size=7)
    samples = long_answers.search[:20]
    texts = evaluator.answer(DENSE, samples).texts
    # Every third sample gets the model's own answer as the right one.
    marked = [replace(s, answers=(texts[s.id] if n % 3 == 0 else "zebra",)) for n, s in enumerate(samples)]
    task = replace(long_answers, search=tuple(marked))
    result = PlainEvaluator(tiny, task, batch_size=7).evaluate(DENSE, "search", 10)
    assert result.scores == (1, 0, 0, 1, 0, 0, 1, 0, 0, 1)
    assert result.sample_ids == tuple(sample.id for sample in marked[:10])
    assert (result.n_samples, result.accuracy, result.plan) == (10, pytest.approx(0.4), "RRRRRR")
    assert result.secondary == {"token_f1": pytest.approx(0.4)}
    assert result.seconds > 0


def test_the_same_plan_twice_gives_the_same_result(tiny: LoadedModel, long_answers: Task) -> None:
    evaluator = PlainEvaluator(tiny, long_answers)
    first, other, second = (evaluator.evaluate(plan, "search", 16) for plan in (DENSE, SKIPPING, DENSE))
    assert replace(first, seconds=0) == replace(second, seconds=0)
    assert evaluator.answer(SKIPPING, long_answers.search[:16]) != evaluator.answer(DENSE, long_answers.search[:16])
    assert other.plan == SKIPPING.text


def test_the_input_cache_stays_within_its_bound(tiny: LoadedModel, long_answers: Task) -> None:
    unbounded = PlainEvaluator(tiny, long_answers, batch_size=4)
    unbounded.evaluate(DENSE, "search", 4)
    one_batch = unbounded.prepared.held
    bounded = PlainEvaluator(tiny, long_answers, batch_size=4, cache_bytes=int(2.5 * one_batch))
    assert replace(bounded.evaluate(DENSE, "search", 40), seconds=0) == replace(
        unbounded.evaluate(DENSE, "search", 40), seconds=0
    )
    assert 0 < bounded.prepared.held <= bounded.prepared.budget < unbounded.prepared.held


def test_a_corrupt_image_fails_its_samples_alone(tiny: LoadedModel, long_answers: Task, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    samples = list(long_answers.search[:9])
    texts = PlainEvaluator(tiny, long_answers).answer(DENSE, samples).texts
    samples = [replace(sample, answers=(texts[sample.id],)) for sample in samples]
    samples[3] = replace(samples[3], image=ImageFile(str(broken)))
    result = PlainEvaluator(tiny, replace(long_answers, search=tuple(samples))).evaluate(DENSE, "search")
    assert list(result.failed_samples) == [samples[3].id]
    assert "broken.png cannot be decoded" in result.failed_samples[samples[3].id]
    assert math.isnan(result.scores[3]) and (*result.scores[:3], *result.scores[4:]) == (1,) * 8
    assert result.accuracy == 1


def test_a_sample_that_the_processor_refuses_fails_alone(
    tiny: LoadedModel, long_answers: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(
        long_answers, search=long_answers.search[:9], spec=long_answers.spec.changed(secondary=("token_f1",))
    )
    refused = task.search[3]
    real = inputs.build_inputs

    def build(processor: Any, spec: Any, samples: Any, images: Any) -> Any:
        if refused in samples:
            raise ValueError("Image features and image tokens do not match")
        return real(processor, spec, samples, images)

    monkeypatch.setattr(inputs, "build_inputs", build)
    result = PlainEvaluator(tiny, task).evaluate(DENSE, "search")
    monkeypatch.undo()
    without = replace(task, search=(*task.search[:3], *task.search[4:]))
    expected = PlainEvaluator(tiny, without).evaluate(DENSE, "search")
    assert result.failed_samples == {
        refused.id: "the model's processor refuses it: ValueError: Image features and image tokens do not match"
    }
    assert (*result.scores[:3], *result.scores[4:]) == expected.scores and math.isnan(result.scores[3])
    assert result.secondary == expected.secondary and result.accuracy == expected.accuracy


def test_a_processor_that_refuses_only_the_batch_is_no_samples_fault(
    tiny: LoadedModel, long_answers: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = inputs.build_inputs

    def build(processor: Any, spec: Any, samples: Any, images: Any) -> Any:
        if len(samples) > 1:
            raise ValueError("no batches")
        return real(processor, spec, samples, images)

    monkeypatch.setattr(inputs, "build_inputs", build)
    with pytest.raises(ValueError, match="no batches"):
        inputs.prepare_batch(tiny, long_answers, long_answers.search[:3])


def test_nan_under_a_plan_is_its_wrong_answer(loaded: LoadedModel, long_answers: Task) -> None:
    layer = loaded.model.model.language_model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: output * float("nan"))
    evaluator = PlainEvaluator(loaded, replace(long_answers, search=long_answers.search[:3]))
    dense, plan, around = (
        evaluator.evaluate(SkipPlan.parse(text), "search") for text in ("RRRRRR", "RRSRRR", "RSRRRR")
    )
    handle.remove()
    assert all(map(math.isnan, dense.scores)) and math.isnan(dense.accuracy)
    assert plan.scores == (0, 0, 0) and plan.accuracy == 0 and len(plan.failed_samples) == 3
    assert around.failed_samples == {}


def test_nan_logits_fail_the_sample_that_has_them(loaded: LoadedModel, long_answers: Task) -> None:
    def poison_third_row(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[2, -1, 7] = float("nan")
        return output

    samples = long_answers.search[:5]
    clean = PlainEvaluator(loaded, long_answers).answer(DENSE, samples)
    handle = loaded.model.lm_head.register_forward_hook(poison_third_row)
    answers = PlainEvaluator(loaded, long_answers).answer(DENSE, samples)
    handle.remove()
    assert answers.failed == {samples[2].id: "the logits hold NaN"}
    assert answers.texts == {key: text for key, text in clean.texts.items() if key != samples[2].id}


@pytest.mark.parametrize("largest", [3, 1, 0])
def test_out_of_memory_halves_the_batch_for_good(loaded: LoadedModel, long_answers: Task, largest: int) -> None:
    sizes: list[int] = []

    def run_out(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:  # the prefill
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > largest:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    samples = long_answers.search[:16]
    expected = PlainEvaluator(loaded, long_answers).answer(DENSE, samples)
    handle = loaded.model.register_forward_pre_hook(run_out, with_kwargs=True)
    evaluator = PlainEvaluator(loaded, long_answers, batch_size=8)
    answers = evaluator.answer(DENSE, samples)
    handle.remove()
    if largest == 0:
        assert answers.texts == {}
        assert set(answers.failed.values()) == {"out of memory at batch size 1"} and len(answers.failed) == 16
    else:
        assert answers == expected
        # 8, 4, 2 or 1 in the first chunk; never above what fitted from then on.
        assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) <= 2
    assert evaluator.batch_size == {3: 2, 1: 1, 0: 1}[largest]


def test_other_errors_are_not_taken_for_lack_of_memory(loaded: LoadedModel, long_answers: Task) -> None:
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes"))
    assert not is_out_of_memory(ValueError("out of memory"))

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    handle = loaded.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        PlainEvaluator(loaded, long_answers).answer(DENSE, long_answers.search[:2])
    handle.remove()


def test_wrong_splits_and_plans_are_refused(tiny: LoadedModel, long_answers: Task) -> None:
    evaluator = PlainEvaluator(tiny, long_answers)
    with pytest.raises(TaskError, match="no split 'test'; there are calibration, search, held_out"):
        evaluator.evaluate(DENSE, "test")
    with pytest.raises(PlanError, match="5 layers"):
        evaluator.evaluate(SkipPlan.parse("RRRRR"), "search")


def test_settings_that_change_the_form_of_an_answer_do_not_change_the_answer(
    tiny: LoadedModel, small_task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, evaluator = SkipPlan.parse("RRRSRR"), PlainEvaluator(tiny, small_task)
    expected = evaluator.answer(plan, small_task.search)
    monkeypatch.setattr(tiny.model.generation_config, "return_dict_in_generate", True)
    monkeypatch.setattr(tiny.model.generation_config, "output_scores", True)
    assert evaluator.answer(plan, small_task.search) == expected
