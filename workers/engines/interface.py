"""Interface of an engine: what serves a directory, and how the server is asked.

An engine is found by its name in ``ENGINES``; the entry point group ``skipplan.engines`` adds one from another package.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from workers.registry import Registry


@dataclass(frozen=True)
class Serving:
    """How a directory is served. An engine raises EngineError for what it cannot do."""

    dtype: str = "float32"
    """A torch dtype's name, or ``"auto"``: the checkpoint's own."""
    context_tokens: int | None = None
    """Tokens of the longest request, prompt and answer; None: what the model allows."""
    concurrency: int = 16
    """Requests that are computed at once; more wait."""
    images: int = 1
    """Images of one request, at most."""
    threads: int | None = None
    """Cores to compute on; None: the engine's own choice."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None: the engine's own choice."""
    compiled: bool = True
    """Whether an engine that can compile the model does; it starts sooner without, and computes slower."""
    prefix_caching: bool = False
    """Whether a prompt that begins as an earlier one did may take over what was computed for that."""
    drafter: Path | None = None
    """Directory of a ``drafter`` export, which drafts for the model that is served."""
    draft_length: int = 3
    """Tokens that it drafts at a time."""
    port: int = 0
    """On the loopback address; 0: a free one."""
    start_timeout_seconds: float = 900.0
    request_timeout_seconds: float = 600.0
    options: tuple[str, ...] = ()
    """Further options of the engine's own command line."""


@dataclass(frozen=True)
class ChatRequest:
    """One turn of a user: images, then text. Decoded greedily."""

    text: str
    images: tuple[bytes, ...] = ()
    """Files, such as PNG."""
    max_tokens: int = 16
    exactly: bool = False
    """Whether all ``max_tokens`` are generated, whatever ends an answer."""
    top_logprobs: int = 0
    """How many of the most likely tokens are reported at each position."""


@dataclass(frozen=True)
class Token:
    """A generated token with its log-probability; ``id`` is None where the engine does not say it."""

    id: int | None
    text: str
    logprob: float
    most_likely: tuple[Token, ...] = ()
    """The most likely tokens at its position."""


@dataclass(frozen=True)
class ChatReply:
    """An answer, and when its parts came: seconds since the request was sent."""

    text: str
    finish_reason: str
    prompt_tokens: int
    """Of the prompt as the engine computes it, images included; 0 where the engine does not say it."""
    new_tokens: int
    seconds: float
    """Until the answer was whole."""
    arrivals: tuple[float, ...] = ()
    """Of every part that brought tokens; the first is the time to first token."""
    token_ids: tuple[int, ...] | None = None
    """The generated tokens; None where the engine does not say them."""
    prompt_token_ids: tuple[int, ...] | None = None
    """The prompt as the engine computes it, images included; None where the engine does not say it."""
    tokens: tuple[Token, ...] = ()
    """The generated tokens with their log-probabilities, where ``top_logprobs`` asked for them."""

    @property
    def first_token_seconds(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] if self.arrivals else self.seconds

    @property
    def seconds_per_token(self) -> float:
        """Mean seconds of each further token; NaN where there was one alone."""
        further = self.new_tokens - 1
        return (self.arrivals[-1] - self.arrivals[0]) / further if self.arrivals and further > 0 else float("nan")


@dataclass(frozen=True)
class DraftCounts:
    """Count the drafts of an engine's drafter, and their tokens, since the server's start."""

    drafts: int
    drafted: int
    """Tokens of all drafts."""
    accepted: int
    """Of those, the ones that the served model kept."""


class Server(Protocol):
    """A running engine with one model. Several threads may ask at once."""

    engine: str
    version: str

    def ask(self, request: ChatRequest) -> ChatReply:
        """Ask one request. Raises EngineError where it is refused, EngineLost where the engine does not answer."""

    def ask_all(self, requests: Sequence[ChatRequest], concurrency: int = 1) -> list[ChatReply]:
        """Ask many, so many at once; replies come in the requests' order."""

    def kv_cache_tokens(self) -> int | None:
        """Tokens that fit into ``Serving.kv_cache_bytes``; None where the engine does not say it, or takes no such."""

    def drafts(self) -> DraftCounts | None:
        """Count what the drafter of ``Serving.drafter`` did; None where the engine does not say it."""

    def pause(self) -> None:
        """Halt the server's processes, so that they take no processor time from what is measured meanwhile."""

    def resume(self) -> None:
        """Let a halted server go on; nothing where it is not halted."""


@dataclass(frozen=True)
class Installed:
    """Describe an installed engine: its version, its program, and the versions of what it computes with."""

    version: str
    program: str
    versions: dict[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Kinds of device that it computes on."""
    letters: str = "RS"
    """Actions of plans that it serves; others than run and skip are named by ``skip_plan`` of ``config.json``."""


class Engine(Protocol):
    """One engine. ``export_format`` names the export format whose directories it serves."""

    name: str
    export_format: str

    def installed(self) -> Installed:
        """Find the engine.

        Raises EngineAbsent saying how to get it where it is not there, EngineError where what a variable names is not
        it.
        """

    def serve(self, directory: Path, serving: Serving) -> AbstractContextManager[Server]:
        """Start a server; it has ended when the block has, and never outlives this process.

        Raises EngineError when the engine is not there or does not take the settings, EngineLost when it does not
        start or ends by itself.
        """


ENGINES: Registry[Engine] = Registry(
    "skipplan.engines",
    {
        "vllm": "workers.engines.vllm:ENGINE",
        "llama.cpp": "workers.engines.llama_cpp:ENGINE",
        "openvino": "workers.engines.openvino:ENGINE",
    },
)
