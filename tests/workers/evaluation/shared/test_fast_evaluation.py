"""The fast path against the plain one, sample by sample."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_video_families
import torch

from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared import prompts
from workers.evaluation.shared.continuation import Continuation
from workers.evaluation.shared.fast import FastEvaluator
from workers.layerwise.decoder import Keys, NotExactError
from workers.layerwise.trie import Execute, Node, build_trie
from workers.messages import EvaluatePlans, Evaluation, EvaluationFailure, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime.plan import SkipPlan
from workers.tasks import Task, load_spec, load_task
from workers.tasks.images import ImageFile

LAYERS = 6


def random_plans(layers: int, count: int, *, seed: int, letters: str = "RRRRFBS") -> tuple[str, ...]:
    generator = random.Random(seed)
    plans: set[str] = {"R" * layers, "S" * (layers - 1) + "B", "B" * layers, "F" * layers, "R" + "S" * (layers - 1)}
    while len(plans) < count:
        plan = "".join(generator.choice(letters) for _ in range(layers))
        if set(plan) != {"S"}:
            plans.add(plan)
    return tuple(sorted(plans))


def evaluations(results: Any) -> list[Evaluation]:
    assert all(isinstance(result, Evaluation) for result in results.results), results
    return list(results.results)


def answered_by(model: LoadedModel, task: Task) -> Task:
    """Every second sample gets what the dense model answers as the right answer, so that scores are not all zero."""
    samples = task.search[:48]
    texts = PlainEvaluator(model, task).answer(SkipPlan.dense(LAYERS), samples).texts
    search = tuple(
        replace(sample, answers=(texts[sample.id] if number % 2 and texts[sample.id] else "red",))
        for number, sample in enumerate(samples)
    )
    return replace(task, search=search)


@pytest.fixture(scope="module")
def answered(tiny: LoadedModel, small_task: Task) -> Task:
    return answered_by(tiny, small_task)


@pytest.fixture
def plain(tiny: LoadedModel, answered: Task) -> PlainEvaluator:
    return PlainEvaluator(tiny, answered)


@pytest.fixture
def fast(plain: PlainEvaluator) -> FastEvaluator:
    evaluator = FastEvaluator(plain, chunk_tokens=700)
    evaluator.check("search")
    return evaluator


@pytest.mark.parametrize(("letters", "count", "different"), [("RRRRFBS", 30, 6), ("RRRRRRRRRRAMQPFBS", 30, 3)])
def test_random_plans_score_the_same_on_every_sample(
    plain: PlainEvaluator, fast: FastEvaluator, letters: str, count: int, different: int
) -> None:
    plans = random_plans(LAYERS, count, seed=1, letters=letters)
    request = EvaluatePlans(plans, "search", 24)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in slow]
    assert [each.sample_ids for each in quick] == [each.sample_ids for each in slow]
    assert [each.plan for each in quick] == list(plans)
    assert len({each.scores for each in quick}) > different  # else the comparison would show little


def test_every_sample_is_scored_whatever_parts_of_the_split_were_asked_before(
    plain: PlainEvaluator, fast: FastEvaluator
) -> None:
    generator = random.Random(4)
    plans = random_plans(LAYERS, 30, seed=4)
    slow = {each.plan: each.scores for each in evaluations(plain.evaluate_all(EvaluatePlans(plans, "search", 48)))}
    for number, plan in enumerate(plans):
        start, end = ((0, 24), (0, 8), (0, 24), (0, 24), sorted(generator.sample(range(48), 2)))[number % 5]
        (found,) = evaluations(fast.evaluate_all(EvaluatePlans((plan,), "search", end, start=start)))
        assert found.scores == slow[plan][start:end], f"{start} to {end}"
        assert found.kl is not None and not any(map(math.isnan, found.kl))


def test_a_sample_without_a_score_and_without_a_reason_is_an_error(
    fast: FastEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fast.chunks.of
    monkeypatch.setattr(fast.chunks, "of", lambda split, samples, *rest: whole(split, samples[:-2], *rest))
    with pytest.raises(RuntimeError, match=r"plan RRSRRR has no score on sample .* \(2 in all\)"):
        fast.evaluate_all(EvaluatePlans(("RRSRRR",), "search", 8))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_that_a_model_keeps_of_earlier_prompts_do_no_harm(
    family: str, tmp_path: Path, small_task: Task
) -> None:
    """Multimodal-rotary models add what they keep of their last batch to the positions of whatever comes next."""
    directory = tiny_video_families.save(tmp_path / family, family)
    model = load_model(ModelSource(str(directory), device="cpu"))
    plain = PlainEvaluator(model, answered_by(model, small_task))
    fast = FastEvaluator(plain, chunk_tokens=700)
    fast.check("search")
    request = EvaluatePlans(("RRRRRR", "RRRSRR", "RSSSSR", "SRRRRS"), "search", 8)
    slow = evaluations(plain.evaluate_all(request))
    for size in (8, 7):  # sizes that do not divide each other, nor what the fast path runs at a time
        plain.answer(SkipPlan.dense(LAYERS), plain.task.search[:size])
        quick = evaluations(fast.evaluate_all(request))
        assert [each.scores for each in quick] == [each.scores for each in slow]
    assert {each.scores for each in slow} == {(0.0,) * 8, (0.0, 1.0) * 4}


@pytest.mark.parametrize("annotators", [4, 5, 10])
def test_answers_of_several_annotators_score_the_same(tiny: LoadedModel, answered: Task, annotators: int) -> None:
    spec = answered.spec.changed(metric="vqa_accuracy", secondary=("exact_match",))
    search = tuple(  # two to ten of the annotators agree, so that there are scores between 0 and 1
        replace(s, answers=s.answers * min(2 + number % 9, annotators) + ("-",) * (annotators - 2 - number % 9))
        for number, s in enumerate(answered.search[:24])
    )
    plain = PlainEvaluator(tiny, replace(answered, spec=spec, search=search))
    fast = FastEvaluator(plain, chunk_tokens=700)
    fast.check("search")
    request = EvaluatePlans(random_plans(LAYERS, 8, seed=6), "search", 24)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in slow]
    assert [each.secondary for each in quick] == [each.secondary for each in slow]
    assert any(0 < score < 1 for each in quick for score in each.scores)


@pytest.mark.parametrize("compensation", ["none", "linear tokens=256"])
def test_open_answers_are_decoded_on_without_the_plain_path(
    tiny: LoadedModel, answered: Task, compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under token F1 every answer can still score, so all are decoded to their end.
    spec = answered.spec.changed(metric="token_f1", answer=answered.spec.answer.changed(max_new_tokens=5))
    again = [(one, replace(one, id=f"{one.id} again", answers=("red",))) for one in answered.search[:12]]
    task = replace(answered, spec=spec, search=tuple(one for pair in again for one in pair))  # the same words are fed
    letters = "RRRRRRFBSAMQP" if compensation == "none" else "RRRRFBS"
    plans = random_plans(LAYERS, 8, seed=4, letters=letters)
    request = EvaluatePlans(plans, "search", 24, compensation=compensation)
    expected = evaluations(PlainEvaluator(tiny, task).evaluate_all(request))
    plain = PlainEvaluator(tiny, task)
    fast = FastEvaluator(plain, chunk_tokens=700)
    fast.check("search")
    monkeypatch.setattr(plain, "answer", lambda *_: pytest.fail("the plain path was asked"))
    found = evaluations(fast.evaluate_all(request))
    assert [each.scores for each in found] == [each.scores for each in expected]
    assert len({score for each in found for score in each.scores}) > 2


def test_every_token_of_an_open_answer_is_computed_once(
    tiny: LoadedModel, answered: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = answered.spec.changed(metric="token_f1", answer=answered.spec.answer.changed(max_new_tokens=5))
    fast = FastEvaluator(PlainEvaluator(tiny, replace(answered, spec=spec)), chunk_tokens=700)
    fast.check("search")
    monkeypatch.setattr("workers.evaluation.shared.draft.FREE_TOKENS", 0)  # nothing is tried out
    passes: list[tuple[int, int, set[int]]] = []
    continued = fast.walker.continued

    def watched(node: Node, continuation: Continuation, before: Sequence[Keys]) -> tuple[torch.Tensor, list[Keys]]:
        computed = int(continuation.new.target.numel())
        known = {branch.draft.known for branch in continuation.branches}
        passes.append((computed, len(continuation.branches), known))
        return continued(node, continuation, before)

    monkeypatch.setattr(fast.walker, "continued", watched)
    evaluations(fast.evaluate_all(EvaluatePlans(random_plans(LAYERS, 6, seed=5), "search", 24)))
    assert max(max(known) for _, _, known in passes) == 4  # the last word of five is not fed
    assert all(computed == open_answers for computed, open_answers, _ in passes)


def edges(root: Node) -> float:
    """Layer executions that a trie takes for each sample."""
    steps = (node.step for node in root.walk() if node.path)
    return sum(SHARES.get(step.action.letter, 1) for step in steps if isinstance(step, Execute))


SHARES = {"A": 2 / 3, "M": 1 / 3, "S": 0}
"""Of a layer execution, by letter; all others are whole ones."""


def test_every_layer_of_the_trie_is_executed_once(fast: FastEvaluator) -> None:
    plans = random_plans(LAYERS, 20, seed=2, letters="RRRRAMQPFBS")
    fast.evaluate_all(EvaluatePlans(("R" * LAYERS,), "search", 16))
    fast.states.clear()
    before = fast.walker.tally.executions
    results = evaluations(fast.evaluate_all(EvaluatePlans(plans, "search", 16)))
    spent = fast.walker.tally.executions - before
    assert spent == pytest.approx(16 * edges(build_trie(SkipPlan.parse(plan) for plan in plans)))
    assert sum(each.layer_executions for each in results) == pytest.approx(spent, abs=len(plans) / 2)
    needed = [16 * sum(SHARES.get(letter, 1) for letter in plan) for plan in plans]
    for each, own in zip(results, needed, strict=True):
        assert each.layer_executions + each.layer_executions_saved == pytest.approx(own, abs=0.5)
    assert sum(each.layer_executions_saved for each in results) > 0


def test_states_of_earlier_requests_are_used_again(fast: FastEvaluator) -> None:
    fast.evaluate_all(EvaluatePlans(("R" * LAYERS, "RRRRSR"), "search", 24))
    before = fast.walker.tally.executions
    fast.evaluate_all(EvaluatePlans(("RRRSRR",), "search", 24))
    assert fast.walker.tally.executions - before == 2 * 24


@pytest.mark.parametrize("budget", [0, 400_000])
def test_a_small_memory_budget_costs_executions_not_correctness(
    plain: PlainEvaluator, fast: FastEvaluator, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = EvaluatePlans(random_plans(LAYERS, 9, seed=3), "search", 16)
    expected = evaluations(fast.evaluate_all(request))
    small = FastEvaluator(plain, memory_bytes=budget, chunk_tokens=700)
    small.check("search")
    held: list[int] = []
    put = small.states.put
    monkeypatch.setattr(small.states, "put", lambda *args, **how: (put(*args, **how), held.append(small.states.nbytes)))
    found = evaluations(small.evaluate_all(request))
    assert [each.scores for each in found] == [each.scores for each in expected]
    assert max(held) <= max(budget, 0)
    assert sum(each.layer_executions for each in found) >= sum(each.layer_executions for each in expected)


def test_a_prefix_and_its_continuation_make_the_whole(fast: FastEvaluator) -> None:
    plans = ("RRSRFR", "RBRRRR")
    whole = evaluations(fast.evaluate_all(EvaluatePlans(plans, "search", 40)))
    first = evaluations(fast.evaluate_all(EvaluatePlans(plans, "search", 17)))
    rest = evaluations(fast.evaluate_all(EvaluatePlans(plans, "search", 40, start=17)))
    for all_of_it, beginning, end in zip(whole, first, rest, strict=True):
        assert all_of_it.scores == beginning.scores + end.scores
        assert beginning.kl is not None and end.kl is not None
        assert all_of_it.kl == pytest.approx(beginning.kl + end.kl, abs=1e-4)


def test_divergence_is_that_of_the_whole_distributions(tiny: LoadedModel, answered: Task, fast: FastEvaluator) -> None:
    """The vocabulary is smaller than the number of tokens kept, so nothing is joined."""
    plan = SkipPlan.parse("RRSRRR")
    dense, changed = (self_forced_log_probabilities(tiny, answered, fast, each) for each in (SkipPlan.dense(6), plan))
    expected = [float((d.exp() * (d - c)).sum(-1).mean()) for d, c in zip(dense, changed, strict=True)]
    (result,) = evaluations(fast.evaluate_all(EvaluatePlans((plan.text,), "search", 12)))
    assert result.kl == pytest.approx(expected, rel=1e-3, abs=1e-5)
    (same,) = evaluations(fast.evaluate_all(EvaluatePlans(("R" * LAYERS,), "search", 12)))
    assert same.kl == pytest.approx([0.0] * 12, abs=1e-5)


def self_forced_log_probabilities(
    loaded: LoadedModel, task: Task, fast: FastEvaluator, plan: SkipPlan
) -> list[torch.Tensor]:
    """Per sample the distributions at its answer positions, by an ordinary forward call for each sample alone."""
    from workers.models.prompts import build_inputs, to_device
    from workers.runtime import apply

    found = []
    for sample in task.search[:12]:
        inputs = to_device(
            build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()]), loaded.device, torch.float32
        )
        fed = torch.tensor([fast.drafter.forced(sample).fed], dtype=torch.long)
        inputs["input_ids"] = torch.cat((inputs["input_ids"], fed), dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode(), apply(loaded.model, plan):
            logits = loaded.model(**inputs).logits[0, -fed.shape[1] - 1 :]
        found.append(logits.double().log_softmax(-1))
    return found


def test_a_corrupt_image_fails_its_samples_alone(tiny: LoadedModel, answered: Task, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    samples = list(answered.search[:20])
    samples[3] = replace(samples[3], image=ImageFile(str(broken)), image_key="broken")
    task = replace(answered, search=tuple(samples))
    fast = FastEvaluator(PlainEvaluator(tiny, task))
    (result,) = evaluations(fast.evaluate_all(EvaluatePlans(("RRRRRR",), "search")))
    assert list(result.failed_samples) == [samples[3].id]
    assert "broken.png cannot be decoded" in result.failed_samples[samples[3].id]
    (expected,) = evaluations(PlainEvaluator(tiny, answered).evaluate_all(EvaluatePlans(("RRRRRR",), "search", 20)))
    assert str(result.scores) == str((*expected.scores[:3], math.nan, *expected.scores[4:]))
    assert result.kl is not None and result.kl[3] != result.kl[3]  # NaN


@pytest.fixture
def poisoned(tiny_directory: Path) -> Iterator[LoadedModel]:
    """A model of which layer 2 gives NaN whenever a certain word is in its prompt."""
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = loaded.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    embedding = loaded.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[word] = float("nan")
    return loaded


def test_nan_fails_the_samples_that_have_it_and_no_others(poisoned: LoadedModel, answered: Task) -> None:
    samples = [
        replace(sample, question="triangle?" if number % 5 == 2 else sample.question)
        for number, sample in enumerate(answered.search[:20])
    ]
    task = replace(answered, search=tuple(samples))
    plain = PlainEvaluator(poisoned, task)
    request = EvaluatePlans(("RRRRRR", "RRRSRR", "FRRRRR"), "search")
    quick = evaluations(FastEvaluator(plain).evaluate_all(request))
    slow = evaluations(plain.evaluate_all(request))
    for one, other in zip(quick, slow, strict=True):
        assert set(one.failed_samples) == set(other.failed_samples)
        assert {sample.id for sample in samples[2::5]} <= set(one.failed_samples) < {sample.id for sample in samples}
        assert set(one.failed_samples.values()) == {"the logits hold NaN"}
        assert str(one.scores) == str(other.scores)
    marked = [each.id for each, score in zip(samples, quick[0].scores, strict=True) if math.isnan(score)]
    assert marked == [each.id for each in samples if each.id in quick[0].failed_samples]
    assert not any(map(math.isnan, quick[1].scores))  # a plan's NaN is its wrong answer


def test_a_sample_that_the_processor_refuses_fails_alone(
    tiny: LoadedModel, answered: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = answered.search[:20]
    refused = next(b for a, b in pairwise(samples) if a.image_key == b.image_key)  # beside another of its image
    task = replace(answered, search=samples)
    fast = FastEvaluator(PlainEvaluator(tiny, task))
    real = prompts.build_inputs

    def build(processor: Any, spec: Any, asked: Any, images: Any) -> Any:
        if refused in asked:
            raise ValueError("no features")
        return real(processor, spec, asked, images)

    monkeypatch.setattr(prompts, "build_inputs", build)
    (result,) = evaluations(fast.evaluate_all(EvaluatePlans(("RRRRRR",), "search")))
    (expected,) = evaluations(PlainEvaluator(tiny, answered).evaluate_all(EvaluatePlans(("RRRRRR",), "search", 20)))
    assert result.failed_samples == {refused.id: "the model's processor refuses it: ValueError: no features"}
    place = samples.index(refused)
    assert str(result.scores) == str((*expected.scores[:place], math.nan, *expected.scores[place + 1 :]))


def test_a_prompt_longer_than_the_models_positions_fails_alone_on_both_paths(
    tiny: LoadedModel, answered: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = answered.search[:20]
    lengths = {}
    for each in samples:
        inputs = prompts.build_inputs(tiny.processor, answered.spec, [each], [each.image.open()])
        lengths[each.id] = inputs["input_ids"].shape[1] + answered.spec.answer.max_new_tokens
    longest = max(lengths.values()) - 1
    long = {each for each, tokens in lengths.items() if tokens > longest}
    assert 0 < len(long) < len(samples)
    monkeypatch.setattr(tiny.model.config.get_text_config(), "max_position_embeddings", longest)
    request, task = EvaluatePlans(("RRSRRR",), "search"), replace(answered, search=samples)
    (quick,) = evaluations(FastEvaluator(PlainEvaluator(tiny, task)).evaluate_all(request))
    (slow,) = evaluations(PlainEvaluator(tiny, task).evaluate_all(request))
    for result in (quick, slow):
        assert set(result.failed_samples) == long
        assert all(f"do not fit into the model's {longest} positions" in why for why in result.failed_samples.values())
    assert str(quick.scores) == str(slow.scores)


def test_lack_of_memory_halves_the_chunks(plain: PlainEvaluator, fast: FastEvaluator) -> None:
    request = EvaluatePlans(random_plans(LAYERS, 7, seed=4), "search", 24)
    expected = evaluations(fast.evaluate_all(request))
    small = FastEvaluator(plain, chunk_tokens=1400)
    small.check("search")
    largest = 500

    def run_out(module: Any, arguments: Any) -> None:
        rows = arguments[0].shape
        if rows[0] > 1 and rows[0] * rows[1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = small.decoder.layers[1].mlp.register_forward_pre_hook(run_out)
    found = evaluations(small.evaluate_all(request))
    handle.remove()
    assert [each.scores for each in found] == [each.scores for each in expected]
    assert small.chunk_tokens < 700


def test_a_plan_that_cannot_be_run_does_not_stop_the_others(fast: FastEvaluator) -> None:
    results = fast.evaluate_all(EvaluatePlans(("RRR", "RRRRRR", "SSSSSS", "RXRRRR"), "search", 8)).results
    assert [type(result) for result in results] == [EvaluationFailure, Evaluation, EvaluationFailure, EvaluationFailure]
    assert "3 layers" in str(results[0]) and "skips every layer" in str(results[2]) and "'X'" in str(results[3])


def test_free_text_and_changed_logits_go_the_plain_path(tiny_directory: Path, answered: Task) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    spec = answered.spec
    free = replace(answered, spec=spec.changed(answer=spec.answer.changed(kind="free")))
    request = EvaluatePlans(("RRRRRR",), "search", 6)
    result = EvaluationDispatch(PlainEvaluator(loaded, free), memory_bytes=1 << 28).evaluate(request)
    assert "free text" in result.note and evaluations(result)[0].path == "plain"
    with pytest.raises(NotExactError, match=r"evaluation: fast is not exact here.*free text"):
        EvaluationDispatch(PlainEvaluator(loaded, free), memory_bytes=1 << 28).evaluate(replace(request, path="fast"))
    loaded.model.generation_config.repetition_penalty = 1.3
    result = EvaluationDispatch(PlainEvaluator(loaded, answered), memory_bytes=1 << 28).evaluate(request)
    assert "repetition_penalty = 1.3" in result.note


def test_paths_are_taken_as_asked(tiny: LoadedModel, answered: Task) -> None:
    evaluators = EvaluationDispatch(PlainEvaluator(tiny, answered), memory_bytes=1 << 28)
    paths = {
        path: evaluations(evaluators.evaluate(EvaluatePlans(("RRRRRR",), "search", 6, path=path)))[0].path
        for path in ("auto", "fast", "plain")
    }
    assert paths == {"auto": "fast", "fast": "fast", "plain": "plain"}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["search", "held_out"])
@pytest.mark.parametrize(("dtype", "plans", "samples"), [("float32", 16, 128), ("bfloat16", 8, 32)])
def test_the_bundled_model_scores_the_same_on_every_sample(dtype: str, plans: int, samples: int, split: str) -> None:
    loaded = load_model(ModelSource("llava-12", device="cpu", dtype=dtype))
    plain = PlainEvaluator(loaded, load_task(load_spec("easy-vqa")))
    fast = FastEvaluator(plain)
    fast.check(split)
    request = EvaluatePlans(random_plans(12, plans, seed=5, letters="RRRRRRRRFBSS"), split, samples)
    quick, slow = evaluations(fast.evaluate_all(request)), evaluations(plain.evaluate_all(request))
    assert [each.scores for each in quick] == [each.scores for each in slow]
    assert len({each.scores for each in quick}) > 4  # else the comparison would show little
