"""Contract of engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from optimizer.registries import EXPORT_FORMATS
from optimizer.testing.require import require
from workers.engines.interface import ChatRequest, Engine, Server, Serving
from workers.errors import EngineError

TOKENS = 5
CACHE_BYTES = 2**28


def check_engine(engine: Engine, directory: Path | None = None, images: Sequence[bytes] = ()) -> None:
    """Check an engine, and with ``directory``, an export that it serves, how its server answers about ``images``.

    - It has a name and names the export format that it serves.
    - Where it is not installed, EngineError says so in one line.
    - A server answers greedily: the same request gets the same answer, alone and beside others.
    - ``max_tokens`` bounds an answer, ``exactly`` reaches the bound; parts come in order of time.
    - Log-probabilities are given where they are asked for, the most likely token first.
    - A server that was paused goes on when it is resumed.
    - When the block has ended, the server does not answer.
    """
    require(bool(engine.name) and engine.name == engine.name.strip().lower(), "the name is in lower case")
    require(engine.export_format in EXPORT_FORMATS, "it serves a registered export format")
    try:
        require(bool(engine.installed().version), "an engine that is there has a version")
    except EngineError as error:
        require("\n" not in str(error), "what is missing is said in one line")
        require(directory is None, f"the engine is there when a directory is to be served ({error})")
    if directory is None:
        return
    small = Serving(concurrency=2, images=max(1, len(images)), kv_cache_bytes=CACHE_BYTES, compiled=False)
    with engine.serve(directory, small) as server:
        _check_server(server, tuple(images))
    try:
        server.ask(ChatRequest("still there?", max_tokens=1))
    except EngineError:
        return
    require(False, "a server has ended with its block")


def _check_server(server: Server, images: tuple[bytes, ...]) -> None:
    request = ChatRequest("what is this?", images, max_tokens=TOKENS, exactly=True, top_logprobs=2)
    alone = server.ask(request)
    beside = server.ask_all([request, ChatRequest("and this?", images, max_tokens=1), request], concurrency=2)
    require(len(beside) == 3 and beside[1].new_tokens == 1, "replies come in the requests' order")
    require(alone.text == beside[0].text == beside[2].text, "the same request gets the same answer, alone or not")
    require(alone.new_tokens == TOKENS, "an answer of an exact length has it")
    require(0 < len(alone.arrivals) <= TOKENS, "parts of an answer arrive one after another, a token each or more")
    require(all(first <= second for first, second in pairwise((0.0, *alone.arrivals))), "arrivals are in order of time")
    require(alone.arrivals[-1] <= alone.seconds, "the answer is whole after its last part")
    require(len(alone.tokens) == TOKENS, "every token has a log-probability where that is asked for")
    # Of an answer that may end: where an end is ruled out, it may be the most likely one.
    for token in server.ask(replace(request, exactly=False)).tokens:
        require(token.logprob <= 0 and len(token.most_likely) >= 2, "as many of the most likely tokens as asked for")
        require(token.logprob >= max(each.logprob for each in token.most_likely) - 1e-6, "the most likely one is taken")
    server.pause()
    server.resume()
    require(server.ask(ChatRequest("again?", images, max_tokens=1)).tokens == (), "no log-probabilities unasked")
