"""Ask a server that speaks OpenAI's chat completions, as vLLM and llama-server do."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2

from workers.engines import supervisor
from workers.engines.interface import ChatReply, ChatRequest, DraftCounts, Token
from workers.engines.process import EngineProcess
from workers.errors import EngineError, EngineLost
from workers.text import one_line

_DRAFT_COUNTER = re.compile(r"^\w+:spec_decode_num_(\w+)_total(?:\{.*\})? (\S+)$", re.M)
_DEATH_SECONDS = 5.0
_RESUME_SECONDS, _POLL_SECONDS = 30.0, 0.2
"""How long a program that no longer answers may take to be seen dead."""


@dataclass
class _Parts:
    """Collect the parts of a streamed answer and the times at which they came."""

    started: float
    text: str = ""
    finish_reason: str = ""
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    tokens: list[Token] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)

    def take(self, part: dict[str, Any]) -> None:
        """Add one part of the stream."""
        if part.get("prompt_token_ids"):
            self.prompt_token_ids = tuple(part["prompt_token_ids"])
        self.usage = part.get("usage") or self.usage
        for choice in part.get("choices", ()):
            text = (choice.get("delta") or {}).get("content") or ""
            ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("content") or []
            if text or ids or logprobs:
                self.arrivals.append(time.perf_counter() - self.started)
            self.text += text
            if ids:
                self.token_ids = [*(self.token_ids or ()), *ids]
            self.tokens += [_token(entry) for entry in logprobs]
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def reply(self) -> ChatReply:
        """Return the whole answer."""
        ids = self.token_ids
        if ids is None and self.tokens and all(token.id is not None for token in self.tokens):
            ids = [token.id for token in self.tokens if token.id is not None]
        return ChatReply(
            text=self.text,
            finish_reason=self.finish_reason,
            prompt_tokens=self.usage.get("prompt_tokens", 0),
            new_tokens=self.usage.get("completion_tokens", len(self.arrivals)),
            seconds=time.perf_counter() - self.started,
            arrivals=tuple(self.arrivals),
            token_ids=None if ids is None else tuple(ids),
            prompt_token_ids=self.prompt_token_ids,
            tokens=tuple(self.tokens),
        )


class ChatServer:
    """A running engine that is asked over HTTP. Engines with words of their own override ``body``."""

    def __init__(self, version: str, process: EngineProcess, address: str, model: str, timeout_seconds: float) -> None:
        self.engine, self.version, self.model = process.engine, version, model
        self._process, self._timeout = process, timeout_seconds
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.Client(base_url=address, timeout=timeout_seconds, limits=limits, trust_env=False)

    def ready(self) -> bool:
        """Whether the server answers, and is the one that was started: the port may have gone to another program."""
        try:
            answer = self.client.get("/v1/models", timeout=5.0)
            return answer.status_code == httpx2.codes.OK and any(
                entry.get("id") == self.model for entry in answer.json().get("data", ())
            )
        except (httpx2.HTTPError, ValueError):
            return False

    def body(self, request: ChatRequest) -> dict[str, Any]:
        """Return the request in the server's words."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}}
            for image in request.images
        ]
        content.append({"type": "text", "text": request.text})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "seed": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.exactly:
            body["ignore_eos"] = True
        if request.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return body

    def ask(self, request: ChatRequest) -> ChatReply:
        """Ask one request. Raises EngineError where it is refused, EngineLost where the engine does not answer."""
        if self.client.is_closed:
            raise EngineLost(f"{self.engine} has been ended")
        body = self.body(request)
        parts = _Parts(time.perf_counter())
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != httpx2.codes.OK:
                    answer.read()
                    raise EngineError(f"{self.engine} refuses the request: {_reason(answer.text)}")
                for part in _events(answer):
                    if "error" in part:
                        raise EngineError(f"{self.engine} refuses the request: {_reason(json.dumps(part))}")
                    parts.take(part)
        except httpx2.TimeoutException:
            raise EngineLost(f"{self.engine} did not answer within {self._timeout:g} s") from None
        except httpx2.HTTPError as error:
            code = self._process.ended(within_seconds=_DEATH_SECONDS)
            what = f"ended (exit code {code})" if code is not None else f"broke off: {one_line(error)}"
            raise EngineLost(f"{self.engine} {what} while it was asked") from None
        return parts.reply()

    def ask_all(self, requests: Sequence[ChatRequest], concurrency: int = 1) -> list[ChatReply]:
        """Ask many, so many at once; replies come in the requests' order."""
        with ThreadPoolExecutor(concurrency) as threads:
            futures = [threads.submit(self.ask, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def pause(self) -> None:
        """Halt the server's processes."""
        self._process.tell(supervisor.HALT)

    def resume(self) -> None:
        """Let them go on, and wait until the server answers."""
        deadline = time.monotonic() + _RESUME_SECONDS
        self._process.tell(supervisor.GO_ON)
        while not self.ready():
            if time.monotonic() > deadline or self._process.ended(within_seconds=_POLL_SECONDS) is not None:
                raise EngineLost(f"{self.engine} does not go on")

    def kv_cache_tokens(self) -> int | None:
        """Tokens whose keys and values fit; None: this engine does not say."""
        return None

    def drafts(self) -> DraftCounts | None:
        """Read the counters by the names that vLLM and llama-server share."""
        found = dict(_DRAFT_COUNTER.findall(self.client.get("/metrics").text))
        if not found.keys() >= {"drafts", "draft_tokens", "accepted_tokens"}:
            return None
        return DraftCounts(*(int(float(found[name])) for name in ("drafts", "draft_tokens", "accepted_tokens")))


def _events(answer: httpx2.Response) -> Iterator[dict[str, Any]]:
    """Read the parts of a stream of server-sent events."""
    for line in answer.iter_lines():
        name, _, data = line.partition(":")
        data = data.strip()
        if name == "error" and data:  # llama-server's way of ending a stream
            yield {"error": json.loads(data)}
        elif name == "data" and data == "[DONE]":
            return
        elif name == "data" and data:
            part: dict[str, Any] = json.loads(data)
            yield part
    raise httpx2.RemoteProtocolError("the stream ended in the middle of an answer")


def _token(entry: dict[str, Any]) -> Token:
    text = str(entry.get("token", ""))
    number = entry.get("id")
    if number is None and text.startswith("token_id:"):  # how vLLM says ids
        number = int(text.removeprefix("token_id:"))
    most_likely = tuple(_token(each) for each in entry.get("top_logprobs") or ())
    return Token(number, text, float(entry.get("logprob", float("nan"))), most_likely)


def _reason(body: str) -> str:
    """Return the message of an error's body."""
    try:
        content = json.loads(body)
        found = content.get("error", content)
        return one_line(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        return one_line(body)[:500] or "no message"
