"""Everything around the tokens is as in plain decoding: ends, lengths, processors, criteria, streamers, caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.generation.streamers import BaseStreamer

from workers.models.ties import tie_bound
from workers.runtime import PlanError, SkipPlan, UnsupportedFamilyError, apply, speculate
from workers.runtime.drafter import draft_cache

VOCABULARY, PAD, LAYERS = 31, 0, 4
PLANS = [SkipPlan.parse(text) for text in ("RRRR", "RRSR", "SSSR")]
"""Drafts that are always right, at times, and hardly ever."""


def weighted(model: PreTrainedModel, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sizes(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "bos_token_id": None,
        **changes,
    }


MODEL = weighted(LlamaForCausalLM(LlamaConfig(**sizes())))
IDS = torch.tensor([[0, 0, 5, 9, 3], [7, 11, 2, 8, 4], [0, 1, 1, 22, 30]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != PAD).long()}
GREEDY = {"do_sample": False, "max_new_tokens": 16}

every_plan = pytest.mark.parametrize("plan", PLANS, ids=str)


def same(plan: SkipPlan, model: Any = MODEL, length: int | None = 4, **arguments: Any) -> Any:
    """Compare `generate` with and without speculation; gives what both gave."""
    arguments = {**INPUTS, **GREEDY, **arguments}
    expected = model.generate(**arguments)
    with speculate(model, plan, draft_length=length) as speculation:
        found = speculation.generate(**arguments)
    assert found.tolist() == expected.tolist()
    return expected


@every_plan
def test_end_tokens_inside_a_draft(plan: SkipPlan) -> None:
    """Rows end at different places, are padded behind, and the answer is as long as the longest."""
    answers = MODEL.generate(**INPUTS, **GREEDY)[:, IDS.shape[1] :]
    ends = sorted({int(answers[0, 3]), int(answers[1, 6]), int(answers[2, 12])})
    found = same(plan, eos_token_id=ends)
    lengths = [int((row != PAD).sum()) for row in found[:, IDS.shape[1] :]]
    assert len(set(lengths)) > 1
    for row in range(len(IDS)):
        same(
            plan,
            input_ids=IDS[row : row + 1],
            attention_mask=INPUTS["attention_mask"][row : row + 1],
            eos_token_id=ends,
        )
    same(plan, eos_token_id=[int(answers[0, 0]), int(answers[1, 0]), int(answers[2, 0])])  # at once


@every_plan
@pytest.mark.parametrize("length", [1, 2, 40])
def test_maximum_lengths_and_drafts_longer_than_what_is_left(plan: SkipPlan, length: int) -> None:
    for count in (1, 2, 3, 5):
        assert same(plan, length=length, max_new_tokens=count).shape[1] == IDS.shape[1] + count
    same(plan, length=length, max_new_tokens=None, max_length=IDS.shape[1] + 2)


@every_plan
def test_rows_that_a_criterion_ends_go_on_without_padding(plan: SkipPlan) -> None:
    """Without an end token, plain decoding writes on in rows that have ended until all have."""

    class Odd(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return input_ids[:, -1] % 3 == 1

    assert same(plan, stopping_criteria=StoppingCriteriaList([Odd()])).shape[1] < IDS.shape[1] + 16


@every_plan
def test_processors_and_criteria_see_what_they_see_in_plain_decoding(plan: SkipPlan) -> None:
    class Seen(LogitsProcessor):
        def __init__(self) -> None:
            self.seen: list[list[list[int]]] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append(input_ids.tolist())
            return scores

    class Asked(StoppingCriteria):
        def __init__(self) -> None:
            self.seen: list[list[list[int]]] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.seen.append(input_ids.tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    class Drifting(LogitsProcessor):
        """Remembers its calls: one too many, or one out of order, and every later token is another."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            return scores + torch.arange(VOCABULARY).roll(self.calls * 7) / 4

    watched: list[list[Any]] = []
    for generate in (MODEL.generate, speculate(MODEL, plan, draft_length=4).generate):
        processor, criterion = Seen(), Asked()
        tokens = generate(
            **INPUTS,
            **GREEDY,
            logits_processor=LogitsProcessorList([processor, Drifting()]),
            stopping_criteria=StoppingCriteriaList([criterion]),
            eos_token_id=3,
        )
        watched.append([tokens.tolist(), processor.seen, criterion.seen])
    assert watched[0] == watched[1]


@every_plan
@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[4], [9, 3]]},
        {"min_new_tokens": 9, "eos_token_id": list(range(10, 31))},
        {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [7]},
        {"sequence_bias": [[[5], 4.0], [[6, 7], 9.0]]},
        {"forced_eos_token_id": 6, "eos_token_id": 6},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 8},
        {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 3 + row) % 31, (len(ids) + row) % 31]},
        {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 4.0}},
        {"prefill_chunk_size": 2},
        {"inputs_embeds": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_generation_arguments(plan: SkipPlan, arguments: dict[str, Any]) -> None:
    if "inputs_embeds" in arguments:
        embeddings = MODEL.get_input_embeddings()(IDS)
        same(plan, input_ids=None, inputs_embeds=embeddings)
    else:
        same(plan, **arguments)


@every_plan
def test_stop_strings_and_time(plan: SkipPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDE"
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=letters[PAD])
    answers = MODEL.generate(**INPUTS, **GREEDY)[:, IDS.shape[1] :].tolist()
    strings = ["".join(letters[token] for token in answers[row][at : at + 2]) for row, at in ((0, 2), (1, 5), (2, 4))]
    found = same(plan, stop_strings=strings, tokenizer=fast)
    assert found.shape[1] < IDS.shape[1] + 16
    with speculate(MODEL, plan) as speculation, pytest.raises(ValueError, match="tokenizer="):
        speculation.generate(**INPUTS, stop_strings=strings)
    config = GenerationConfig(**GREEDY, stop_strings=strings)
    assert same(plan, generation_config=config, tokenizer=fast).tolist() == found.tolist()
    monkeypatch.setattr(MODEL.generation_config, "stop_strings", strings)
    assert same(plan, tokenizer=fast).tolist() == found.tolist()
    assert same(plan, stop_strings=None).shape[1] > found.shape[1]
    monkeypatch.undo()
    assert same(plan, max_time=1e-9).shape[1] == IDS.shape[1] + 1


@every_plan
def test_a_streamer_gets_the_same_pieces(plan: SkipPlan) -> None:
    class Pieces(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    pieces = []
    for generate in (MODEL.generate, speculate(MODEL, plan, draft_length=3).generate):
        streamer = Pieces()
        generate(**INPUTS, **GREEDY, streamer=streamer)
        pieces.append(streamer.got)
    assert pieces[0] == pieces[1]


@every_plan
def test_the_output_object_and_the_cache_in_it(plan: SkipPlan) -> None:
    settings = {**INPUTS, **GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = MODEL.generate(**settings, repetition_penalty=1.3)
    with speculate(MODEL, plan, draft_length=5) as speculation:
        found = speculation.generate(**settings, repetition_penalty=1.3)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == 16
        assert torch.allclose(torch.stack(found[name]), torch.stack(expected[name]), atol=1e-4)
    caches = [next(each[name] for name in ("cache", "past_key_values") if name in each) for each in (expected, found)]
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4) and torch.allclose(one.values, other.values, atol=1e-4)


def mistral(window: int) -> Any:
    return weighted(MistralForCausalLM(MistralConfig(**sizes(sliding_window=window))))


@every_plan
def test_sliding_windows_and_static_caches(plan: SkipPlan) -> None:
    for window in (4, 9, 64):
        model = mistral(window)
        same(plan, model=model)
        same(plan, model=model, length=None)
        output = {}
        for name, generate in (("dense", model.generate), ("plan", speculate(model, plan, draft_length=3).generate)):
            output[name] = generate(**INPUTS, **GREEDY, return_dict_in_generate=True)
        caches = [next(each[k] for k in ("cache", "past_key_values") if k in each) for each in output.values()]
        for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert one.keys.shape[-2] == other.keys.shape[-2] and not other.record_past
    same(plan, cache_implementation="static")
    same(plan, cache_implementation="static", length=None, eos_token_id=4)
    same(plan, model=mistral(64), cache_implementation="static")
    with (
        speculate(mistral(9), plan, draft_length=3) as speculation,
        pytest.raises(UnsupportedFamilyError, match="layer 0 keeps its state in a StaticSlidingWindowLayer"),
    ):
        speculation.generate(**INPUTS, **GREEDY, cache_implementation="static")


def test_a_seed_gives_shapes_and_answers_of_every_return() -> None:
    torch.manual_seed(5)
    with speculate(MODEL, PLANS[1], draft_length=3) as speculation:
        found = speculation.generate(**INPUTS, do_sample=True, num_return_sequences=4, max_new_tokens=7)
        torch.manual_seed(5)
        again = speculation.generate(**INPUTS, do_sample=True, num_return_sequences=4, max_new_tokens=7)
    assert found.shape == (12, IDS.shape[1] + 7)
    assert found.tolist() == again.tolist()
    assert found[:, : IDS.shape[1]].tolist() == IDS.repeat_interleave(4, dim=0).tolist()
    assert len({tuple(row) for row in found.tolist()}) > 3


@every_plan
def test_an_interrupt_in_the_middle_leaves_model_and_speculation_usable(plan: SkipPlan) -> None:
    class Interrupt(LogitsProcessor):
        def __init__(self, after: int) -> None:
            self.left = after

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return scores

    weights = [each.clone() for each in MODEL.parameters()]
    attributes = {name: sorted(module.__dict__) for name, module in MODEL.named_modules()}
    expected = MODEL.generate(**INPUTS, **GREEDY)
    with speculate(MODEL, plan, draft_length=4) as speculation:
        for after in (1, 2, 4, 7):
            with pytest.raises(KeyboardInterrupt):
                speculation.generate(**INPUTS, **GREEDY, logits_processor=LogitsProcessorList([Interrupt(after)]))
            assert speculation.generate(**INPUTS, **GREEDY).tolist() == expected.tolist()
    assert MODEL.generate(**INPUTS, **GREEDY).tolist() == expected.tolist()
    assert all(torch.equal(one, other) for one, other in zip(weights, MODEL.parameters(), strict=True))
    assert attributes == {name: sorted(module.__dict__) for name, module in MODEL.named_modules()}


def test_threads_share_a_speculation_and_the_live_model() -> None:
    expected = {
        count: MODEL.generate(**INPUTS, do_sample=False, max_new_tokens=count).tolist() for count in (9, 14, 23)
    }
    wrong: list[Any] = []
    with speculate(MODEL, PLANS[1]) as speculation:

        def ask(generate: Callable[..., Tensor], count: int) -> None:
            for _ in range(4):
                found = generate(**INPUTS, do_sample=False, max_new_tokens=count).tolist()
                if found != expected[count]:
                    wrong.append(found)

        threads = [
            threading.Thread(target=ask, args=(generate, count))
            for count in expected
            for generate in (speculation.generate, MODEL.generate)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert speculation.statistics.tokens == 4 * len(IDS) * sum(expected)


def test_a_plan_on_the_live_model_is_refused() -> None:
    with (
        speculate(MODEL, PLANS[1], draft_length=3) as speculation,
        apply(MODEL, SkipPlan.parse("RRRS")),
        pytest.raises(PlanError, match="the plan RRRS is applied"),
    ):
        speculation.generate(**INPUTS, **GREEDY)


def test_bfloat16_differs_at_near_ties_alone() -> None:
    model = weighted(LlamaForCausalLM(LlamaConfig(**sizes()))).to(torch.bfloat16)
    torch.manual_seed(3)
    ids = torch.randint(1, VOCABULARY, (64, 6))
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    expected = model.generate(**arguments, return_dict_in_generate=True, output_scores=True)
    differing = 0
    for length in (1, 4):
        with speculate(model, PLANS[1], draft_length=length) as speculation:
            found = speculation.generate(**arguments)
        for row in (found != expected.sequences).any(dim=1).nonzero().flatten().tolist():
            place = int((found[row] != expected.sequences[row]).nonzero()[0])
            scores = expected.scores[place - ids.shape[1]][row].float()
            lead = scores[expected.sequences[row, place]] - scores[found[row, place]]
            assert lead <= tie_bound(scores.max(), torch.bfloat16)
            differing += 1
    assert differing < 2 * len(ids) / 2


@pytest.mark.skipif(not hasattr(cache_utils, "StaticIndexedLayer"), reason="this transformers has no such layer")
def test_a_draft_leaves_every_part_of_a_static_cache_as_it_was() -> None:
    layer = cache_utils.StaticIndexedLayer(max_cache_len=8)
    states = torch.randn(1, 2, 3, 4)
    layer.update(states, states)
    layer.update_indexer(torch.randn(1, 3, 4))
    cache = cache_utils.Cache(layers=[layer])
    own = draft_cache(cache, (0,)).layers[0]
    own.update(states, states)
    own.update_indexer(torch.randn(1, 3, 4))
    assert [int(each.indexer_cumulative_length) for each in (layer, own)] == [3, 6]
    assert [int(each.cumulative_length) for each in (layer, own)] == [3, 6]
