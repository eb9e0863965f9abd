"""How an engine's answer is compared with the live model's, on logits written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, log
from pathlib import Path

import pytest
import torch
from export_builders import document
from scripted_engine import ScriptedEngine

from optimizer.errors import UsageFault
from optimizer.exports.engine_verification import LiveAnswer, Served, compare, verify_in_engine
from workers.engines.interface import ChatReply, Token
from workers.messages import ModelSource
from workers.runtime import SkipPlan
from workers.tasks import load_task

# Two steps over a vocabulary of three; probabilities 1/2, 1/4, 1/4 and 1/8, 1/8, 3/4; the largest logit is 10.
LOGITS = torch.tensor([[10.0, 10 - log(2), 10 - log(2)], [10 - log(6), 10 - log(6), 10.0]])
LIVE = LiveAnswer("a c", (5, 6, 6, 7), (0, 2), LOGITS)
HALF, QUARTER, EIGHTH = -log(2), -log(4), -log(8)


def reply(text: str = "a c", ids: tuple[int, ...] = (0, 2), shift: float = 0.0) -> ChatReply:
    first = Token(0, "a", HALF, (Token(0, "a", HALF), Token(1, "b", QUARTER + shift)))
    second = Token(ids[1], "c", log(3 / 4) if ids[1] == 2 else EIGHTH)
    return ChatReply(text, "stop", 4, 2, 0.1, token_ids=ids, prompt_token_ids=LIVE.prompt, tokens=(first, second))


def test_equal_answers_are_bounded_by_their_log_probabilities() -> None:
    found = compare(LIVE, reply(" a c "))
    assert (found.outcome, found.served) == ("equal", "a c")
    assert found.logprob_difference < 1e-6
    assert compare(LIVE, reply(shift=0.02)).logprob_difference == pytest.approx(0.002, rel=1e-3)  # of the largest, 10
    assert compare(LIVE, reply(shift=float("nan"))).logprob_difference == inf


def test_another_token_is_a_near_tie_only_where_the_live_logits_are_tied() -> None:
    found = compare(LIVE, reply("a b", (0, 1)))
    assert (
        found.outcome == "different"
        and "at token 1 the live model's logits of the two are 1.8e+00 apart" in found.detail
    )
    tied = LOGITS.clone()
    tied[1, 1] = 10 - 4e-4  # within 5e-5 of 10
    assert compare(replace(LIVE, logits=tied), reply("a b", (0, 1))).outcome == "near tie"
    tied[1, 1] = 10 - 6e-4
    assert compare(replace(LIVE, logits=tied), reply("a b", (0, 1))).outcome == "different"


def test_an_engine_that_computes_in_less_than_float32_may_choose_between_logits_so_far_apart() -> None:
    tied = LOGITS.clone()
    tied[1, 1] = 10 - 0.19  # within two times a hundredth of 10
    assert compare(replace(LIVE, logits=tied), reply("a b", (0, 1)), rounding=1e-2).outcome == "near tie"
    tied[1, 1] = 10 - 0.21
    assert compare(replace(LIVE, logits=tied), reply("a b", (0, 1)), rounding=1e-2).outcome == "different"


def test_nothing_is_compared_beyond_the_first_other_token() -> None:
    other = replace(reply("b c", (1, 2)), tokens=(Token(1, "b", QUARTER), Token(2, "c", -9.0)))
    assert compare(LIVE, other).logprob_difference < 1e-6


def test_another_prompt_fails_whatever_is_answered() -> None:
    longer = replace(reply(), prompt_token_ids=(5, 6, 6, 6, 7))
    found = compare(LIVE, longer)
    assert found.outcome == "other prompt" and "5 tokens, the live model's 4; they differ at 3" in found.detail
    assert compare(LIVE, replace(reply(), prompt_token_ids=None)).outcome == "equal"


def test_an_end_that_the_engine_does_not_report_is_its_last_token() -> None:
    ended = replace(reply("a", (0, 2)), token_ids=(0,), tokens=reply().tokens[:1])
    assert compare(LIVE, ended).outcome == "different"
    tied = LOGITS.clone()
    tied[1, 1] = 10 - 4e-4
    assert compare(replace(LIVE, logits=tied, ends=frozenset({1})), ended).outcome == "near tie"
    assert compare(replace(LIVE, logits=tied, ends=frozenset({0})), ended).outcome == "different"


def test_a_prompt_of_another_length_is_another_prompt_where_the_engine_does_not_say_its_tokens() -> None:
    silent = replace(reply(), prompt_token_ids=None)
    assert compare(LIVE, silent).outcome == "equal"
    found = compare(LIVE, replace(silent, prompt_tokens=5))
    assert found.outcome == "other prompt" and found.detail == "the engine's prompt has 5 tokens, the live model's 4"
    assert compare(LIVE, replace(silent, prompt_tokens=0)).outcome == "equal"  # it does not say that either


def test_a_character_cut_at_the_end_is_no_difference() -> None:
    assert compare(replace(LIVE, text="a c \ufffd"), reply("a c")).outcome == "equal"
    assert compare(replace(LIVE, text="a \ufffd\r\ufffd"), reply("a \ufffd")).outcome == "equal"
    assert compare(replace(LIVE, text="a c\x0c\x1f\ufffd"), reply("a c")).outcome == "equal"
    assert compare(replace(LIVE, text="a \ufffd c"), reply("a c")).outcome == "different"


def test_another_text_of_the_same_tokens_is_a_difference() -> None:
    assert compare(LIVE, reply("a  c")).outcome == "different"
    assert compare(LIVE, replace(reply("x"), token_ids=None, tokens=())).outcome == "different"


def test_a_plan_that_the_installed_engine_does_not_serve_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"skip_plan": "RFQR"}))
    subject = Served(tmp_path, document("RFQSR"), SkipPlan.parse("RFQSR"), None)
    with pytest.raises(UsageFault, match="scripted as it is installed does not serve F, Q of plan RFQSR"):
        verify_in_engine(subject, ScriptedEngine(), ModelSource("absent"), (load_task("easy-vqa"), 1))
