"""Speculative sampling draws from the dense model's own distribution, whatever the drafter's is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from workers.runtime import SkipPlan, speculate

VOCABULARY, END, PAD = 6, 5, 0
DRAWS, BATCH = 6000, 500
TOKENS = 3
PROMPT = torch.tensor([[1, 3, 2]])


def build() -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            eos_token_id=END,
            bos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


MODEL = build()


def expected(settings: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The chance of every answer of three tokens, from the dense model's full passes and the warpers' definitions.

    Nothing of `generate` is used. Behind the end token comes padding.
    """
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        longer: dict[tuple[int, ...], float] = {}
        for answer, chance in chances.items():
            if END in answer:
                longer[(*answer, PAD)] = chance
                continue
            row = torch.cat([PROMPT[0], torch.tensor(answer, dtype=torch.long)])
            with torch.no_grad():
                logits = MODEL(input_ids=row[None]).logits[0, -1].double()
            for token, share in enumerate(warped(logits, row, len(answer), settings).tolist()):
                if share > 0:
                    longer[(*answer, token)] = chance * share
        chances = longer
    return chances


def warped(logits: Tensor, row: Tensor, generated: int, settings: dict[str, Any]) -> Tensor:
    if "repetition_penalty" in settings:
        penalty = settings["repetition_penalty"]
        for token in set(row.tolist()):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    if "bad_words_ids" in settings:
        for (token,) in settings["bad_words_ids"]:
            logits[token] = -torch.inf
    if generated < settings.get("min_new_tokens", 0):
        logits[END] = -torch.inf
    logits = logits / settings.get("temperature", 1.0)
    if settings.get("top_k"):
        logits[logits < logits.topk(settings["top_k"]).values[-1]] = -torch.inf
    shares = logits.softmax(-1)
    if settings.get("top_p", 1.0) < 1.0:
        order = shares.argsort(descending=True)
        before = shares[order].cumsum(0) - shares[order]
        shares[order[before >= settings["top_p"]]] = 0
        shares = shares / shares.sum()
    return shares


SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3, "temperature": 1.5},
    "top_p": {"top_p": 0.7},
    "penalty": {"repetition_penalty": 1.8, "temperature": 1.2},
    "min and bad": {"min_new_tokens": 2, "bad_words_ids": [[1]]},
}


def drawn(generate: Any, settings: dict[str, Any], repeated: bool) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS // BATCH):
        answers = generate(
            input_ids=PROMPT if repeated else PROMPT.repeat(BATCH, 1),
            attention_mask=torch.ones_like(PROMPT if repeated else PROMPT.repeat(BATCH, 1)),
            num_return_sequences=BATCH if repeated else 1,
            max_new_tokens=TOKENS,
            do_sample=True,
            **{"top_k": 0, "top_p": 1.0, **settings},
        )[:, PROMPT.shape[1] :]
        answers = torch.nn.functional.pad(answers, (0, TOKENS - answers.shape[1]), value=PAD)
        found.update(map(tuple, answers.tolist()))
    return found


def p_value(found: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Pearson's test over the joint distribution of the tokens; rare answers are one class."""
    assert found.keys() <= chances.keys(), "an answer that cannot be"
    total = sum(found.values())
    often = [answer for answer, chance in chances.items() if chance * total >= 5]
    observed = [found[answer] for answer in often]
    predicted = [chances[answer] * total for answer in often]
    rest = total - sum(predicted)
    if rest > 1:
        observed.append(total - sum(observed))
        predicted.append(rest)
    scale = sum(observed) / sum(predicted)
    return float(chisquare(observed, [each * scale for each in predicted]).pvalue)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_joint_distribution_is_that_of_the_dense_model(name: str) -> None:
    settings = SETTINGS[name]
    chances = expected(settings)
    assert abs(sum(chances.values()) - 1) < 1e-6
    torch.manual_seed(0)
    with speculate(MODEL, SkipPlan.parse("RSS"), draft_length=2) as speculation:
        found = drawn(speculation.generate, settings, repeated=name == "plain")
    counted = speculation.statistics
    assert 0 < counted.accepted < counted.drafted
    assert p_value(found, chances) > 1e-3


def test_the_test_sees_a_drafter_whose_drafts_are_all_kept() -> None:
    """The drafter's own distribution, which a wrong acceptance would give, is told apart by the same test."""
    from workers.runtime import apply

    torch.manual_seed(0)
    with apply(MODEL, SkipPlan.parse("RSS")):
        found = drawn(MODEL.generate, {}, repeated=False)
    assert p_value(found, expected({})) < 1e-6


@pytest.mark.parametrize("length", [2, None])
def test_small_batches_have_the_distribution_too(length: int | None) -> None:
    """In few rows whole drafts are kept at times, with a token of the dense model behind them.

    Lengths that adapt depend on what was drafted before, and must not change what comes next.
    """
    chances = expected({})
    torch.manual_seed(0)
    found: Counter[tuple[int, ...]] = Counter()
    with speculate(MODEL, SkipPlan.parse("RRS"), draft_length=length) as speculation:
        for _ in range(300):
            answers = speculation.generate(
                input_ids=PROMPT.repeat(4, 1),
                attention_mask=torch.ones(4, 3, dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=True,
                top_k=0,
            )[:, 3:]
            answers = torch.nn.functional.pad(answers, (0, TOKENS - answers.shape[1]), value=PAD)
            found.update(map(tuple, answers.tolist()))
    assert p_value(found, chances) > 1e-3
