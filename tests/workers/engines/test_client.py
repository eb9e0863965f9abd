"""What is read from a server's answers, and what is said when it refuses, falls silent or dies."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

from optimizer.testing import check_engine
from workers.engines.interface import ChatRequest, Serving, Token
from workers.errors import EngineError, EngineLost

REQUEST = ChatRequest("what?", (b"one", b"two"), max_tokens=4, top_logprobs=2)


def test_an_engine_of_ones_own_keeps_the_contract(tmp_path: Path) -> None:
    check_engine(ScriptedEngine(), tmp_path, [b"image"])


def test_an_answer_is_put_together_from_its_parts() -> None:
    with ScriptedEngine().serve(Path(), Serving()) as server:
        reply = server.ask(REQUEST)
        many = server.ask_all([ChatRequest("?", max_tokens=n) for n in (3, 1, 2)], concurrency=3)
    assert (reply.text, reply.finish_reason) == ("2 imagesa b c", "length")
    assert (reply.prompt_tokens, reply.new_tokens, reply.token_ids) == (3, 4, (0, 1, 2, 3))
    likely = (Token(1, "a", -0.1), Token(1, "a", -1.1))
    assert reply.tokens[1] == Token(1, "a", -0.1, likely)
    assert len(reply.arrivals) == 4 and reply.first_token_seconds == reply.arrivals[0]
    assert reply.seconds_per_token == pytest.approx((reply.arrivals[3] - reply.arrivals[0]) / 3)
    assert 0.01 < reply.seconds_per_token < 0.5  # the program waits 0.02 between two parts
    assert [each.text for each in many] == ["0 imagesa b", "0 images", "0 imagesa"]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("refuses", EngineError, r"scripted refuses the request: At most 0 image\(s\) may be provided;"),
        ("refuses later", EngineError, "scripted refuses the request: out of blocks;"),
        ("silent", EngineLost, "scripted did not answer within 0.5 s;"),
        ("dies", EngineLost, r"scripted ended \(exit code 7\) while it was asked;"),
    ],
)
def test_a_server_that_fails_is_named_in_one_line(fault: str, kind: type[EngineError], message: str) -> None:
    with (
        pytest.raises(kind, match=f"^{message} its whole log: ") as caught,
        ScriptedEngine(fault).serve(Path(), Serving(request_timeout_seconds=0.5)) as server,
    ):
        server.ask_all([REQUEST, REQUEST], concurrency=2)
    assert type(caught.value) is kind
    Path(str(caught.value).rpartition(" ")[2]).unlink()


def test_a_server_that_is_paused_goes_on_whenever_it_is_resumed() -> None:
    with ScriptedEngine().serve(Path(), Serving()) as server:
        for _ in range(30):
            server.pause()
            server.resume()
        server.pause()
        server.resume()
        assert server.ask(ChatRequest("?", max_tokens=1)).new_tokens == 1
        server.pause()  # and it ends with its block all the same
