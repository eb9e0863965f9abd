"""Plans on passages of general text, by both paths, against forward calls and sums by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import tiny_video_families
import torch
from transformers import Lfm2Config, LlavaForConditionalGeneration

from workers.compensation import store
from workers.compensation.compensator import Compensator
from workers.errors import TaskError
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.passages import MOST_TOKENS, PassageEvaluator
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast_passages import FastPassageEvaluator
from workers.layerwise.decoder import NotExactError
from workers.layerwise.trie import Execute, Node, build_trie
from workers.messages import EvaluatePlans, Evaluation, EvaluationFailure, FitCompensation, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply
from workers.runtime.locate import locate
from workers.tasks import Passage, Task, TextTask

DENSE, PLANS = "RRRRRR", ("RRRRRR", "RSRRRR", "RSRRSR", "RRSSRR", "RSRRRB", "RSFRRB")
WORDS = ("is", "there", "a", "red", "circle", "in", "the image", "what", "shape is", "green", "yes", "no", "triangle")


def text_of(words: int) -> str:
    return " ".join(WORDS[number * number % 7 + number % 6] for number in range(words))


@pytest.fixture(scope="module")
def passages() -> TextTask:
    """Short enough for the tiny model's 256 positions, apart from one of each split."""
    cut = TextTask.of("".join(f"{number} " for number in range(4000)))
    own = tuple(Passage(f"text-{number}", text_of(20 + 11 * number)) for number in range(9))
    return replace(cut, search=own, held_out=own[::-1])


def predictable(loaded: LoadedModel, count: int, *, seed: int) -> tuple[int, ...]:
    """Tokens of which about every second is the one that the dense model finds likeliest: no text is like that here."""
    generator = torch.Generator().manual_seed(seed)
    ids = [10]
    with torch.no_grad():
        while len(ids) < count:
            likeliest = int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            other = int(torch.randint(10, 300, (), generator=generator))
            ids.append(likeliest if float(torch.rand((), generator=generator)) < 0.5 else other)
    return tuple(ids)


@pytest.fixture(scope="module")
def tokens(tiny: LoadedModel, passages: TextTask) -> dict[str, tuple[int, ...]]:
    return {each.id: predictable(tiny, 10 + 9 * number, seed=number) for number, each in enumerate(passages.search)}


@pytest.fixture
def plain(
    tiny: LoadedModel, small_task: Task, passages: TextTask, tokens: dict[str, tuple[int, ...]]
) -> PassageEvaluator:
    evaluator = PassageEvaluator(tiny, passages, Compensator(tiny, small_task))
    evaluator._tokens.update(tokens)
    return evaluator


@pytest.fixture
def fast(plain: PassageEvaluator) -> FastPassageEvaluator:
    evaluator = FastPassageEvaluator(plain, chunk_tokens=700)
    evaluator.check("search")
    return evaluator


def evaluations(results: Any) -> list[Evaluation]:
    assert all(isinstance(result, Evaluation) for result in results.results), results
    return list(results.results)


def by_hand(loaded: LoadedModel, tokens: Sequence[int], plan: str, maps: Any = None) -> tuple[float, float]:
    """The share of predicted tokens, and the divergence over the whole vocabulary, from forward calls of the model."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        dense = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
        with apply(loaded.model, SkipPlan.parse(plan), maps):
            own = loaded.model(input_ids=ids).logits[0].double().log_softmax(-1)
    following = ids[0, 1:]
    right = sum(int(own[place].argmax()) == int(token) for place, token in enumerate(following))
    kl = (dense[:-1].exp() * (dense[:-1] - own[:-1])).sum(-1)
    return right / len(following), float(kl.mean())


def assert_as_by_hand(
    plain: PassageEvaluator, found: Evaluation, passages: Sequence[Passage], maps: Any = None
) -> None:
    assert found.sample_ids == tuple(each.id for each in passages) and found.secondary == {} and not found.near_ties
    assert found.kl is not None and found.failed_samples == {}
    for passage, score, kl in zip(passages, found.scores, found.kl, strict=True):
        expected = by_hand(plain.loaded, plain.tokens(passage), found.plan, maps)
        assert score == pytest.approx(expected[0], abs=1e-9)
        assert kl == pytest.approx(expected[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_both_paths_measure_what_forward_calls_give(
    tiny: LoadedModel, plain: PassageEvaluator, passages: TextTask, path: str
) -> None:
    dispatch = EvaluationDispatch(plain, memory_bytes=1 << 28)
    result = dispatch.evaluate(EvaluatePlans(PLANS, "search", path=path))
    found = evaluations(result)
    for each in found:
        assert_as_by_hand(plain, each, passages.search)
        assert each.path == path and each.split == "search"
    assert len({each.scores for each in found}) > 3 and max(found[0].kl or ()) < 1e-6
    assert result.note == ""


@pytest.mark.parametrize("compensation", ["linear tokens=256", "linear tokens=256 drift=yes"])
def test_maps_are_those_that_are_folded_into_the_weights(
    tiny: LoadedModel, plain: PassageEvaluator, fast: FastPassageEvaluator, passages: TextTask, compensation: str
) -> None:
    request = EvaluatePlans(PLANS, "held_out", 4, compensation=compensation)
    for evaluator in (fast, plain):
        for each in evaluations(evaluator.evaluate_all(request)):
            maps = plain.compensator.maps(SkipPlan.parse(each.plan), compensation)
            assert_as_by_hand(plain, each, passages.held_out[:4], maps)
            assert each.compensation == compensation
    uncompensated = evaluations(fast.evaluate_all(replace(request, compensation="none")))
    for each in uncompensated:  # states that maps made are not taken for those without
        assert_as_by_hand(plain, each, passages.held_out[:4])


def test_kept_maps_are_folded(
    tiny: LoadedModel, plain: PassageEvaluator, fast: FastPassageEvaluator, passages: TextTask, tmp_path: Path
) -> None:
    recipe = "linear tokens=128"
    artifacts = tuple(
        store.put(str(tmp_path), plain.compensator.fit(FitCompensation(plan, recipe)).content) for plan in PLANS[1:3]
    )
    other = Compensator(tiny, plain.compensator.task)
    reader = PassageEvaluator(tiny, passages, other)
    reader._tokens.update(plain._tokens)
    evaluator = FastPassageEvaluator(reader, chunk_tokens=700)
    request = EvaluatePlans(PLANS[1:3], "search", 4, compensation=recipe, artifacts=artifacts)
    for each in evaluations(evaluator.evaluate_all(request)):
        maps = plain.compensator.maps(SkipPlan.parse(each.plan), recipe)
        assert_as_by_hand(plain, each, passages.search[:4], maps)
    assert other._calibration is None  # nothing was fitted


def test_a_part_of_a_split_scores_as_in_the_whole(plain: PassageEvaluator, fast: FastPassageEvaluator) -> None:
    whole = evaluations(fast.evaluate_all(EvaluatePlans(PLANS[:3], "search")))
    for evaluator in (fast, plain):
        part = evaluations(evaluator.evaluate_all(EvaluatePlans(PLANS[:3], "search", 6, start=2)))
        for one, all_of_it in zip(part, whole, strict=True):
            assert one.sample_ids == all_of_it.sample_ids[2:6]
            assert one.scores == all_of_it.scores[2:6]
            assert one.kl == pytest.approx(all_of_it.kl[2:6], abs=1e-6)  # type: ignore[index]


def edges(node: Node) -> int:
    return sum(1 for each in node.walk() if each.path)


def test_executions_are_those_of_the_trie_and_of_each_plan_alone(
    plain: PassageEvaluator, fast: FastPassageEvaluator
) -> None:
    fast.evaluate_all(EvaluatePlans((DENSE,), "search"))
    fast.states.clear()
    found = evaluations(fast.evaluate_all(EvaluatePlans(PLANS, "search")))
    parsed = [SkipPlan.parse(plan) for plan in PLANS]
    alike = {plan.replace("F", "R").replace("B", "R") for plan in PLANS}  # there are no vision tokens to treat apart
    spent = [each.layer_executions for each in found]
    assert len(alike) == 4 and sum(spent) == 9 * edges(build_trie(map(SkipPlan.parse, alike)))
    mapped = evaluations(fast.evaluate_all(EvaluatePlans(PLANS, "search", compensation="linear tokens=64")))
    maps = build_trie(parsed, maps=True)  # maps are fitted to prompts with images
    assert sum(each.layer_executions for each in mapped) == 9 * sum(
        isinstance(each.step, Execute) for each in maps.walk() if each.path
    )
    for each, plan in zip(found, parsed, strict=True):
        assert each.layer_executions + each.layer_executions_saved == 9 * len(plan.kept)
    slow = evaluations(plain.evaluate_all(EvaluatePlans(PLANS, "search")))
    assert [each.layer_executions for each in slow] == [9 * len(plan.kept) for plan in parsed]


def test_a_passage_is_cut_to_the_model_s_positions_and_begins_as_its_tokenizer_begins(
    tiny: LoadedModel, plain: PassageEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Passage("long", text_of(2000))
    whole = tiny.processor.tokenizer(long.text)["input_ids"]
    assert plain.tokens(long) == tuple(whole[:256]) and len(whole) > 600
    monkeypatch.setattr(tiny.model.config.text_config, "max_position_embeddings", 4096)
    assert plain.tokens(replace(long, id="longer")) == tuple(whole[:MOST_TOKENS])
    image = Passage("image", "yes <image> no")
    assert tiny.processor.image_token_id not in plain.tokens(image)  # it would stand for an image that is not there
    monkeypatch.setattr(
        type(tiny.processor.tokenizer),
        "__call__",
        lambda self, text, add_special_tokens=True, **_: {"input_ids": [2] * add_special_tokens + [7] * len(text)},
    )
    assert plain.tokens(Passage("begun", "abc")) == (2, 7, 7, 7)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_passages_that_cannot_be_scored_are_marked(
    tiny_directory: Path, small_task: Task, passages: TextTask, path: str
) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = loaded.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[word] = float("inf")
    own = [Passage(f"text-{number}", "what shape is green? " * 6) for number in range(6)]
    own[2], own[4] = Passage("text-2", "is there a triangle in it?"), Passage("text-4", "")
    task = replace(passages, search=tuple(own))
    dispatch = EvaluationDispatch(PassageEvaluator(loaded, task, Compensator(loaded, small_task)), memory_bytes=1 << 28)
    for each in evaluations(dispatch.evaluate(EvaluatePlans((DENSE, "RRSRRR"), "search", path=path))):
        assert each.failed_samples == {
            "text-2": "the logits hold NaN",
            "text-4": "it has fewer than two tokens, so nothing can be predicted",
        }
        assert each.kl is not None
        for values in (each.scores, each.kl):
            assert [math.isnan(value) for value in values] == [False, False, True, False, True, False]


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_plan_whose_own_logits_hold_nan_has_no_scores(
    tiny_directory: Path, small_task: Task, passages: TextTask, path: str
) -> None:
    """Left out, such passages would make the plan look better than it is."""
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))
    task = replace(passages, search=tuple(Passage(f"text-{n}", "what shape is green? " * 6) for n in range(4)))
    dispatch = EvaluationDispatch(PassageEvaluator(loaded, task, Compensator(loaded, small_task)), memory_bytes=1 << 28)
    dense = evaluations(dispatch.evaluate(EvaluatePlans((DENSE,), "search", path=path)))
    assert not dense[0].failed_samples
    fourth = locate(loaded.model).layers[3]
    seen = fourth.register_forward_hook(lambda module, args, output: output * math.nan)
    found = dispatch.evaluate(EvaluatePlans(("RRSRRR", "RRRSRR"), "search", path=path)).results
    seen.remove()
    broken, good = found
    assert isinstance(broken, EvaluationFailure) and "logits hold NaN where the dense model's do not" in broken.reason
    assert isinstance(good, Evaluation) and not good.failed_samples


def test_plans_that_the_model_cannot_take_stop_no_others(plain: PassageEvaluator, fast: FastPassageEvaluator) -> None:
    for evaluator in (fast, plain):
        bad, good, unread = evaluator.evaluate_all(EvaluatePlans(("RRR", DENSE, "RRXRRR"), "search", 2)).results
        assert isinstance(bad, EvaluationFailure) and isinstance(unread, EvaluationFailure)
        assert isinstance(good, Evaluation) and "6 decoder layers" in bad.reason


def test_lack_of_memory_halves_the_chunks_and_leaves_the_longest_to_the_plain_path(
    plain: PassageEvaluator, fast: FastPassageEvaluator
) -> None:
    request = EvaluatePlans(PLANS[:4], "search")
    expected = evaluations(fast.evaluate_all(request))
    small = FastPassageEvaluator(plain, chunk_tokens=1400)

    def run_out(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[0] > 1 or (arguments[0].shape[1] > 90 and packed):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    packed, whole = True, plain.scores

    def alone(*given: Any) -> Any:
        nonlocal packed
        packed = False
        try:
            return whole(*given)
        finally:
            packed = True

    plain.scores = alone  # type: ignore[method-assign]
    handle = small.decoder.layers[1].mlp.register_forward_pre_hook(run_out)
    found = evaluations(small.evaluate_all(request))
    handle.remove()
    assert small.chunk_tokens < 200
    for one, other in zip(found, expected, strict=True):
        assert one.scores == other.scores and one.failed_samples == {}
        assert one.kl == pytest.approx(other.kl, abs=1e-6)


def test_logits_taken_in_pieces_are_the_same(
    tiny: LoadedModel, plain: PassageEvaluator, passages: TextTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = tiny.model.config.text_config.vocab_size
    monkeypatch.setattr("workers.evaluation.divergence.LOGITS_BYTES", 7 * 4 * vocabulary)
    seen: list[int] = []
    fast = FastPassageEvaluator(plain, chunk_tokens=700)
    logits = fast.decoder.logits
    monkeypatch.setattr(fast.decoder, "logits", lambda rows: (seen.append(len(rows)), logits(rows))[1])
    for evaluator in (fast, plain):
        for each in evaluations(evaluator.evaluate_all(EvaluatePlans(PLANS[:3], "search"))):
            assert_as_by_hand(plain, each, passages.search)
    assert max(seen) == 7


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "qwen2_5_vl"])
def test_sliding_windows_and_rotary_positions_of_several_axes_are_shared_exactly(
    family: str, tmp_path: Path, small_task: Task, passages: TextTask
) -> None:
    loaded = load_model(ModelSource(str(tiny_video_families.save(tmp_path / family, family)), device="cpu"))
    PlainEvaluator(loaded, small_task).answer(SkipPlan.dense(6), small_task.search[:2])  # leaves positions behind
    evaluator = PassageEvaluator(loaded, passages, Compensator(loaded, small_task))
    result = EvaluationDispatch(evaluator, memory_bytes=1 << 28).evaluate(EvaluatePlans(PLANS[::2], "search", 5))
    assert result.note == ""
    for each in evaluations(result):
        assert each.path == "fast"
        assert_as_by_hand(evaluator, each, passages.search[:5])


@pytest.mark.parametrize("compensation", ["none", "linear tokens=64"])
def test_layers_that_cannot_be_called_alone_are_scored_plainly_with_the_reason(
    compensation: str, tmp_path: Path, small_task: Task, passages: TextTask
) -> None:
    """Convolutions over tokens beside attention."""
    processor = tiny_llava.build_processor()
    config = tiny_llava.build_model(processor).config
    text = {"vocab_size": len(processor.tokenizer), "num_hidden_layers": 6, "conv_L_cache": 3}
    config.text_config = Lfm2Config(**tiny_llava.SIZES, **text, layer_types=["conv", "full_attention"] * 3)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(ModelSource(str(tmp_path), device="cpu"))
    evaluator = PassageEvaluator(loaded, passages, Compensator(loaded, small_task))
    dispatch = EvaluationDispatch(evaluator, memory_bytes=1 << 28)
    request = EvaluatePlans((DENSE, "RRSRRR"), "search", 3, compensation=compensation)
    result = dispatch.evaluate(request)
    assert result.note.startswith("evaluations share no work: layer 0 cannot be given some rows of a sequence")
    for each in evaluations(result):
        assert each.path == "plain"
        maps = evaluator.compensator.maps(SkipPlan.parse(each.plan), compensation)
        assert_as_by_hand(evaluator, each, passages.search[:3], maps)
    with pytest.raises(NotExactError, match="fast is not exact here, use auto or plain: layer 0"):
        dispatch.evaluate(replace(request, path="fast"))


def test_a_model_that_takes_no_text_without_an_image_says_so(
    tiny_directory: Path, small_task: Task, passages: TextTask
) -> None:
    loaded = load_model(ModelSource(str(tiny_directory), device="cpu"))

    def demand(module: object, args: object, kwargs: dict[str, object]) -> None:
        if kwargs.get("pixel_values") is None:
            raise ValueError("where is the image?")

    loaded.model.register_forward_pre_hook(demand, with_kwargs=True)
    evaluator = PassageEvaluator(loaded, passages, Compensator(loaded, small_task))
    result = EvaluationDispatch(evaluator, memory_bytes=1 << 28).evaluate(EvaluatePlans(PLANS[:2], "search", 3))
    assert "the model does not take text without an image" in result.note
    for each in result.results:
        assert isinstance(each, EvaluationFailure) and "where is the image?" in each.reason


def test_text_is_not_scored_by_acceptance(plain: PassageEvaluator) -> None:
    dispatch = EvaluationDispatch(plain, memory_bytes=1 << 28)
    with pytest.raises(TaskError, match="text: general text has no answers"):
        dispatch.evaluate(EvaluatePlans((DENSE,), "search", 1, targets=((1,),)))
    with pytest.raises(TaskError, match="no split 'test'"):
        dispatch.evaluate(EvaluatePlans((DENSE,), "test"))
