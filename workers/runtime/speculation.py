"""Lossless generation with a plan: the model under the plan drafts, the dense model decides every token."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers import StoppingCriteriaList, StopStringCriteria

from .descriptor import UnsupportedFamilyError
from .draft_length import DraftLengths, Round
from .drafter import Drafting, bytes_beside, drafting_model
from .families import APPLIED, layer_kinds
from .folding import Maps
from .locate import DecoderStack, locate
from .plan import PlanError, SkipPlan
from .speculation_loop import Counts, Decoding, Lengths, Settings

REFUSED = ("assistant_model", "assistant_tokenizer", "custom_generate", "synced_gpus")


@dataclass(frozen=True)
class SpeculationStatistics:
    """What the calls of one speculation did. Tokens are those of all rows that had not ended, except in ``rounds``."""

    rounds: int = 0
    """Drafts with their verification, each of a whole batch."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens that the dense model kept."""
    plain_steps: int = 0
    """Steps of the dense model alone, each of a whole batch, behind the prompt's own."""
    tokens: int = 0
    """Generated tokens."""
    extra_bytes: int = 0
    """Bytes beside the dense model and its cache: folded weights, and the most keys and values that a draft held."""


class Speculation:
    """A model that generates as without the plan, faster where the plan drafts well; a context manager.

    ``generate`` takes what the model's own takes and gives what that gives: the same tokens under greedy decoding, the
    same distribution under sampling, with its logits processors and stopping criteria. In a batch all rows advance by
    the tokens that are kept in every row: each position is decided on sequences of one length, as in plain decoding.
    """

    def __init__(self, model: nn.Module, plan: SkipPlan, maps: Maps | None, draft_length: int | None) -> None:
        if draft_length is not None and draft_length < 1:
            raise PlanError(f"draft_length is {draft_length}: a draft has at least one token; None adapts the length")
        stack = locate(model)
        _require_settable_state(stack)
        self.plan = plan
        self._model = model
        self._drafter: nn.Module | None = drafting_model(model, plan, maps)
        self._weights = bytes_beside(model, self._drafter)
        self._draft_length = draft_length
        self._layers = stack.layers
        self._lock = threading.Lock()
        self._lengths: dict[int, DraftLengths] = defaultdict(DraftLengths)
        """By batch size, which decides what a draft costs and how often all rows keep it."""
        self.reset_statistics()

    def __enter__(self) -> Speculation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drafter = None

    @property
    def statistics(self) -> SpeculationStatistics:
        """What the calls since the start, or the last :meth:`reset_statistics`, did."""
        return self._statistics

    def reset_statistics(self) -> None:
        """Count from zero again; what was learnt about drafting stays."""
        self._statistics = SpeculationStatistics(extra_bytes=self._weights)

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Any:
        """Return what ``model.generate`` returns for these arguments, ids ``[batch, tokens]`` or its output object.

        Raises :class:`PlanError` for beams, assistants, ``use_cache=False``, outputs of attentions and hidden states
        and caches of earlier calls, and :class:`~workers.runtime.descriptor.UnsupportedFamilyError` when the model's
        cache cannot be set back.
        """
        if self._drafter is None:
            raise PlanError("this speculation has ended: call speculate() again")
        applied = self._layers.__dict__.get(APPLIED)
        if applied is not None:
            raise PlanError(f"the plan {applied.plan.text} is applied to this model: leave apply() before generating")
        for name in REFUSED:
            if arguments.get(name) is not None:
                raise PlanError(f"speculate() decides how tokens are drafted: leave {name} out")
        self._take_stop_strings(arguments)
        arguments["custom_generate"] = _loop(self, self._drafter, arguments.get("streamer"))
        given = () if inputs is None else (inputs,)
        return self._model.generate(*given, **arguments)  # type: ignore[operator]

    def _take_stop_strings(self, arguments: dict[str, Any]) -> None:
        """Make the criterion for stop strings here: transformers has no tokenizer for it beside another loop."""
        configs = [arguments.get("generation_config"), self._model.generation_config]
        configured = (getattr(each, "stop_strings", None) for each in configs)
        strings = arguments.get("stop_strings", next((each for each in configured if each is not None), None))
        tokenizer = arguments.pop("tokenizer", None)
        if strings is None:
            return
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer= to generate")
        arguments["stop_strings"] = None  # takes the place of those in any configuration
        criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or ())
        arguments["stopping_criteria"] = StoppingCriteriaList(
            [*criteria, StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)]
        )

    def _drafter_of(self, model: nn.Module, drafter: nn.Module) -> nn.Module:
        """Return the drafter of the part that decodes: in some families the language model inside."""
        path = next(name for name, module in self._model.named_modules() if module is model)
        return drafter.get_submodule(path)

    def _lengths_for(self, batch: int) -> Lengths:
        if self._draft_length is not None:
            return _Constant(self._draft_length)
        with self._lock:
            return self._lengths[batch].request()

    def _count(self, counts: Counts) -> None:
        with self._lock:
            before = self._statistics
            self._statistics = SpeculationStatistics(
                rounds=before.rounds + counts.rounds,
                drafted=before.drafted + counts.drafted,
                accepted=before.accepted + counts.accepted,
                plain_steps=before.plain_steps + counts.plain_steps,
                tokens=before.tokens + counts.tokens,
                extra_bytes=max(before.extra_bytes, self._weights + counts.cache_bytes),
            )


class _Constant:
    """A draft length that stays."""

    def __init__(self, length: int) -> None:
        self._length = length

    def choose(self, left: int) -> int:
        """Return the length, or what is left but the token that the dense model adds."""
        return max(min(self._length, left - 1), 0)

    def worth_going_on(self, confidences: Sequence[float]) -> bool:
        """Draft on."""
        return True

    def observe_plain(self, seconds: float) -> None: ...

    def observe_round(self, seen: Round) -> None: ...

    def observe_answer(self, tokens: int) -> None: ...


def _require_settable_state(stack: DecoderStack) -> None:
    """Raise :class:`UnsupportedFamilyError` for recurrent layers; a request's cache tells about all others."""
    for index, kind in enumerate(layer_kinds(stack)):
        if kind == "linear_attention" or kind.startswith("hybrid"):
            raise UnsupportedFamilyError(
                f"layer {index} of the {stack.family} model is {kind}: its recurrent state cannot be set back after a "
                "draft, and drafting needs layers of attention over a KV cache"
            )


def _loop(speculation: Speculation, drafter: nn.Module, streamer: Any) -> Any:
    """Return the decoding loop that ``generate`` calls with everything prepared."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        settings = Settings(logits_processor, stopping_criteria, generation_config, streamer)
        settings.refuse_unsupported(model_kwargs)
        kept, sample = speculation.plan.kept, bool(generation_config.do_sample)
        drafting = Drafting(speculation._drafter_of(model, drafter), kept, logits_processor, sample=sample)
        decoding = Decoding(model, drafting, speculation._lengths_for(len(input_ids)), settings, input_ids)
        try:
            return decoding.run(model_kwargs)
        finally:
            speculation._count(decoding.counts)

    return decode


def speculate(
    model: nn.Module, plan: SkipPlan, maps: Maps | None = None, draft_length: int | None = None
) -> Speculation:
    """Return a context manager whose ``generate`` gives the dense model's answers, drafted by the model under ``plan``.

    Use it as ``with speculate(model, plan) as speculation: speculation.generate(**inputs)``.

    The drafter shares all weights with ``model``, which stays as it is; ``maps`` (:mod:`workers.runtime.folding`) are
    folded into copies of their projections. ``draft_length`` tokens are drafted at a time; ``None`` adapts the number
    to the observed acceptance and speed, down to plain decoding. Raises :class:`PlanError` when the model cannot take
    the plan for good, or the plan has other actions than run and skip.
    """
    return Speculation(model, plan, maps, draft_length)
