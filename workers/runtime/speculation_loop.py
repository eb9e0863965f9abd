"""The decoding loop of speculation: drafts, their verification by the dense model, and what ``generate`` returns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .cache_rollback import Rollback
from .draft_length import Round
from .drafter import Drafting
from .plan import PlanError

CACHE_NAMES = ("cache", "past_key_values")
"""What a model calls the KV cache: the first since transformers 5.24."""
NOT_CARRIED = ("logits", "loss", "attentions", "hidden_states")
"""Outputs of a pass that no later pass needs."""


class Lengths(Protocol):
    """Chooses one request's draft lengths, and learns from what comes of them (``draft_length.RequestLengths``)."""

    def choose(self, left: int) -> int: ...
    def worth_going_on(self, confidences: Sequence[float]) -> bool: ...
    def observe_plain(self, seconds: float) -> None: ...
    def observe_round(self, seen: Round) -> None: ...
    def observe_answer(self, tokens: int) -> None: ...


@dataclass
class Counts:
    """What one call of ``generate`` did, in tokens of all rows that had not ended."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_steps: int = 0
    tokens: int = 0
    cache_bytes: int = 0
    """Most bytes of keys and values while a draft was made."""


class Clock:
    """Seconds of work on a device, to compare passes by.

    On the CPU they are this thread's own, so that passes are not compared by what else the machine was doing.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.now = time.thread_time if device.type == "cpu" else time.perf_counter
        """This moment for the host; a step that begins and ends with the device idle lies between two of them."""

    def mark(self) -> Any:
        """Return this moment in the device's work: an event on CUDA, which does not wait for it."""
        if not self._cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks, whose work is done."""
        return float(start.elapsed_time(end) / 1000 if self._cuda else end - start)


@dataclass(frozen=True)
class Settings:
    """What ``generate`` has prepared for its decoding loop."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: Any
    streamer: Any

    def refuse_unsupported(self, inputs: dict[str, Any]) -> None:
        """Raise :class:`PlanError` for what speculation does not give."""
        mode = self.config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise PlanError(f"speculate() decodes greedily or samples; {mode.value} is not supported")
        if not inputs.get("use_cache", True):
            raise PlanError("speculate() needs the KV cache: leave use_cache=False out")
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name, False):
                raise PlanError(f"speculate() does not return {name.removeprefix('output_')}: leave {name} out")


class Decoding:
    """One request: the sequences so far, the dense model's cache, and the inputs of its next pass."""

    def __init__(self, model: Any, drafting: Drafting, lengths: Lengths, settings: Settings, sequence: Tensor) -> None:
        self._model, self._drafting, self._lengths, self._settings = model, drafting, lengths, settings
        self.counts = Counts()
        self.sequence = sequence
        self._prompt = sequence
        self._inputs: list[dict[str, Any]] = []
        self._sample = bool(settings.config.do_sample)
        ends = [each.eos_token_id for each in settings.criteria if hasattr(each, "eos_token_id")]
        self._ends = bool(ends)
        # Elsewhere than on the CPU, a look at what is drafted would wait for the device after every token.
        if sequence.device.type == "cpu":
            drafting.watch(torch.cat(ends).cpu() if ends else None, lengths.worth_going_on)
        pad = settings.config._pad_token_tensor
        self._pad: Any = None if pad is None else pad.to(sequence.device)
        self._unfinished = torch.ones(len(sequence), dtype=torch.long, device=sequence.device)
        self._alive = len(sequence)
        keep = settings.config.return_dict_in_generate
        self._scores: tuple[Tensor, ...] | None = () if keep and settings.config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if keep and settings.config.output_logits else None
        self._clock = Clock(sequence.device)

    # The whole request --------------------------------------------------------------------------------------------

    def run(self, inputs: dict[str, Any]) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate until the stopping criteria end every row. ``inputs`` are the model inputs for the prompt."""
        if any(_length_of(inputs.get(name)) for name in CACHE_NAMES):
            raise PlanError("speculate() takes no cache of an earlier call: give the whole prompt")
        outputs = self._model._prefill(self._prompt, self._settings.config, inputs)
        self._begin(outputs)
        logits = outputs.logits[:, -1:]
        self._carried = _Carried((name, value) for name, value in outputs.items() if name not in NOT_CARRIED)
        del outputs
        self._inputs = [self._grown(inputs)]
        self._take(logits, None, [])
        with self._model._optimize_model_for_decode(), self._drafting.decoding():
            while self._alive:
                length = self._lengths.choose(self._longest() - self.sequence.shape[1])
                if length:
                    self._round(length)
                else:
                    self._plain_step()
        return self._finish()

    def _begin(self, outputs: Any) -> None:
        """Take over the cache of the prompt. Raises where it cannot be set back."""
        self._cache = next((outputs[name] for name in CACHE_NAMES if name in outputs), None)
        # The last token of the longest answer is never stored.
        longest = self._longest() - 1 - self._prompt.shape[1] + _length_of(self._cache)
        self._rollback = Rollback(self._cache, longest)

    def _longest(self) -> int:
        longest = self._settings.criteria.max_length
        return int(self._settings.config.max_length if longest is None else longest)

    # Passes -------------------------------------------------------------------------------------------------------

    def _ahead(self, tokens: int) -> dict[str, Any]:
        """Return the model inputs for the sequence and ``tokens`` more."""
        while len(self._inputs) <= tokens:
            self._inputs.append(self._grown(self._inputs[-1]))
        return self._inputs[tokens]

    def _advance(self, tokens: int) -> None:
        """Go on to the inputs of the sequence that is ``tokens`` longer."""
        self._ahead(tokens)
        del self._inputs[:tokens]

    def _grown(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return model inputs for one more token: each family's own method knows how, for one at a time."""
        grown: dict[str, Any] = self._model._update_model_kwargs_for_generation(
            self._carried, dict(inputs), is_encoder_decoder=False
        )
        return grown

    def _pass(self, drafts: Tensor) -> Tensor:
        """Run the last token and the drafts ``[batch, n]`` through the dense model.

        Returns logits ``[batch, n + 1, vocabulary]``.
        """
        width = drafts.shape[1] + 1
        prepared = self._model.prepare_inputs_for_generation(
            torch.cat([self.sequence, drafts], dim=-1), next_sequence_length=width, **self._ahead(width - 1)
        )
        if "logits_to_keep" in prepared:
            prepared["logits_to_keep"] = width
        self._rollback.before_pass()
        outputs = self._model(**prepared, return_dict=True)
        self._rollback.after_pass()
        logits: Tensor = outputs.logits[:, -width:]
        return logits

    def _plain_step(self) -> None:
        start = self._clock.now()
        self._take(self._pass(self.sequence[:, :0]), None, [])
        self._rollback.remove(0)
        self._advance(1)
        self.counts.plain_steps += 1
        self._lengths.observe_plain(self._clock.now() - start)

    def _round(self, length: int) -> None:
        start, draft_start = self._clock.now(), self._clock.mark()
        drafts, distributions, confidences = self._drafting.draft(self.sequence, length, self._cache, self._ahead)
        draft_end = self._clock.mark()
        length = drafts.shape[1]
        before, rows = self.sequence.shape[1], self._alive
        accepted, of_rows = self._take(self._pass(drafts), drafts, distributions)
        taken = self.sequence.shape[1] - before
        self._rollback.remove(length + 1 - taken)
        self._advance(taken)
        self.counts.rounds += 1
        self.counts.drafted += length * rows
        self.counts.accepted += of_rows
        self.counts.cache_bytes = max(self.counts.cache_bytes, self._drafting.cache_bytes)
        # Taking tokens has waited for the device: all the work is done, and in both measures of time.
        drafting = self._clock.between(draft_start, draft_end)
        verifying = self._clock.now() - start - drafting
        self._lengths.observe_round(
            Round(length, min(taken, length), accepted, taken, drafting, verifying, tuple(confidences))
        )

    # Tokens -------------------------------------------------------------------------------------------------------

    def _take(self, logits: Tensor, drafts: Tensor | None, distributions: list[Tensor]) -> tuple[int, int]:
        """Append the tokens that ``logits`` ``[batch, n, vocabulary]`` decide, up to the first refused draft.

        Each is processed, chosen, streamed and put to the stopping criteria as in plain decoding, on the sequence
        before it and nothing else. Returns at how many positions every row kept its draft, and how many drafted tokens
        were kept in all, rows that had ended not counted.
        """
        accepted = of_rows = 0
        drafted = 0 if drafts is None else drafts.shape[1]
        for position in range(logits.shape[1]):
            raw = logits[:, position].to(copy=True, dtype=torch.float32, device=self.sequence.device)
            scores = self._settings.processors(self.sequence, raw)
            if self._scores is not None:
                self._scores += (scores,)
            if self._logits is not None:
                self._logits += (raw,)
            self.counts.tokens += self._alive
            if drafts is None or position == drafted:
                self._append(self._choose(scores, None, None)[0], None)
                break
            drawn_from = distributions[position] if distributions else None
            refused, kept = self._append(*self._choose(scores, drafts[:, position], drawn_from))
            of_rows += kept
            accepted += not refused
            if refused or not self._alive:
                break
        return accepted, of_rows

    def _choose(self, scores: Tensor, draft: Tensor | None, drawn_from: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the next tokens ``[batch]`` and where they are the drafted ones, ``None`` without a draft."""
        if not self._sample:
            tokens = scores.argmax(dim=-1)
            return tokens, None if draft is None else tokens == draft
        chances = scores.softmax(dim=-1)
        if draft is None:
            return torch.multinomial(chances, num_samples=1).squeeze(1), None
        assert drawn_from is not None
        # Speculative sampling (2211.17192, algorithm 1; 2302.01318, algorithm 2).
        own = chances.gather(1, draft[:, None]).squeeze(1)
        drafted = drawn_from.gather(1, draft[:, None]).squeeze(1)
        kept = torch.rand_like(own) * drafted < own
        rest = (chances - drawn_from).clamp(min=0)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, chances)
        instead = torch.multinomial(rest, num_samples=1).squeeze(1)
        return torch.where(kept, draft, instead), kept

    def _append(self, tokens: Tensor, kept: Tensor | None) -> tuple[int, int]:
        """Append tokens ``[batch]``. Returns how many rows refused their draft, and how many kept it."""
        unfinished = self._unfinished
        if self._ends:  # rows that have ended get padding, whatever was drafted for them
            tokens = tokens * unfinished + self._pad * (1 - unfinished)
        self.sequence = torch.cat([self.sequence, tokens[:, None]], dim=-1)
        if self._settings.streamer is not None:
            self._settings.streamer.put(tokens.cpu())
        self._unfinished = unfinished & ~self._settings.criteria(self.sequence, self._scores)
        if kept is None:
            self._alive = int(self._unfinished.sum())
            return 0, 0
        refused = ~kept & unfinished.bool() if self._ends else ~kept
        counted = torch.stack([self._unfinished.sum(), refused.sum(), (kept & unfinished.bool()).sum()])
        self._alive, refusals, kept_rows = counted.tolist()  # the one wait for the device in a position
        return refusals, kept_rows

    def _finish(self) -> Tensor | GenerateDecoderOnlyOutput:
        self._rollback.end()
        self._lengths.observe_answer(self.sequence.shape[1] - self._prompt.shape[1])
        if self._settings.streamer is not None:
            self._settings.streamer.end()
        if not self._settings.config.return_dict_in_generate:
            return self.sequence
        names = {each.name for each in fields(GenerateDecoderOnlyOutput)}
        cache = {"cache" if "cache" in names else "past_key_values": self._cache}
        return GenerateDecoderOnlyOutput(sequences=self.sequence, scores=self._scores, logits=self._logits, **cache)


class _Carried(dict[str, Any]):
    """Outputs of a pass that model inputs take over, by key or as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def _length_of(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
