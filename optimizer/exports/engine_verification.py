"""``verify-export`` in an engine: what it answers when it serves an export, against the live model under the plan.

An engine computes with kernels of its own, so its numbers differ in their last digits. That is bounded: at every
position up to the first token that differs, the log-probabilities that the engine reports are compared with the live
model's. A token that differs is explained where the live model's two logits are tied by the rule of
``workers.models.ties``; everything else is a difference.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from optimizer.exports import fresh_process
from optimizer.exports.document import PlanDocument
from optimizer.exports.interface import ExportFault, plan_in
from workers.engines.interface import ChatReply, ChatRequest, DraftCounts, Engine, Serving
from workers.messages import ModelSource
from workers.runtime import SkipPlan

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.loading import LoadedModel
    from workers.runtime.folding import Maps
    from workers.tasks import Sample, Task, TaskSpec

LOGPROB_TOLERANCE = 1e-4
"""Largest allowed difference of log-probabilities as a share of the largest logit, both computing in float32."""
ROUNDING: Mapping[str, float] = MappingProxyType({"llama.cpp": 1e-2})
"""The same for engines that compute parts in less, by name: llama.cpp cuts images into patches in float16."""
TOP_LOGPROBS = 5
LEAST_LOGPROB = -100.0
"""Below this a log-probability says no more than that a token is out of the question."""

_BLANKS = "".join(map(chr, range(33)))
"""The space, and the control characters before it."""

Outcome = Literal["equal", "near tie", "other prompt", "different"]


@dataclass(frozen=True)
class LiveAnswer:
    """The live model's answer: its prompt, tokens, and the logits ``[steps, vocabulary]`` in float32 behind them."""

    text: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: Tensor
    ends: frozenset[int] = frozenset()
    """Tokens that end an answer."""


@dataclass(frozen=True)
class ServedAnswer:
    """One sample's answers, and how they differ."""

    live: str
    served: str
    outcome: Outcome
    detail: str = ""
    logprob_difference: float = 0.0
    """The largest over its positions up to the first other token, as a share of the largest logit."""


@dataclass(frozen=True)
class Accuracy:
    """A share of samples with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EngineVerification:
    """Outcome of a verification in an engine."""

    format: str
    plan: str
    files: int
    engine: str
    version: str
    versions: dict[str, str]
    answers: dict[str, ServedAnswer]
    accuracy: Accuracy
    live_accuracy: Accuracy
    tolerance: float = LOGPROB_TOLERANCE
    drafts: DraftCounts | None = None
    """Where the engine served the dense model with the export as its drafter."""

    def having(self, *outcomes: Outcome) -> dict[str, ServedAnswer]:
        """Pick the samples with these outcomes."""
        return {sample: answer for sample, answer in self.answers.items() if answer.outcome in outcomes}

    @property
    def largest_logprob_difference(self) -> float:
        """Over all samples, as a share of the largest logit."""
        return max(answer.logprob_difference for answer in self.answers.values())

    @property
    def passed(self) -> bool:
        """No difference beyond near ties, and log-probabilities within the tolerance."""
        return not self.having("other prompt", "different") and self.largest_logprob_difference <= self.tolerance


@dataclass(frozen=True)
class Served:
    """An export, and the plan with its maps under which the live model is to answer as the engine does."""

    directory: Path
    document: PlanDocument
    plan: SkipPlan
    maps: Maps | None
    drafts: bool = False
    """Whether the export drafts for the dense model, which is then served beside it."""


def verify_in_engine(
    subject: Served, engine: Engine, source: ModelSource, questions: tuple[Task, int]
) -> EngineVerification:
    """Serve an export and compare answers to the first held-out samples of a task with the live model's.

    ``questions`` is the task, and how many samples of it. Both compute in float32. Raises ExportFault for what an
    engine cannot be asked, EngineError and EngineLost as the engine does.
    """
    plan = subject.document
    task, count = questions
    installed = engine.installed()
    coded = plan_in(subject.directory)
    if coded is not None and (foreign := sorted(set(coded.text) - set(installed.letters))):
        raise ExportFault(
            f"{engine.name} as it is installed does not serve {', '.join(foreign)} of plan {plan.plan}"
            + ("; install this version's skipplan-vllm beside it" if engine.name == "vllm" else "")
        )
    samples = task.held_out[:count]
    if task.spec.is_choice:
        raise ExportFault(
            f"task {task.name} has the model choose among options by their likelihood, for which engines are not "
            "asked; --task names one that generates"
        )
    from workers.serving.requests import chat_request

    loaded = _load(source)
    serving = _serving(loaded, task, samples)
    options = {"max_tokens": task.spec.answer.max_new_tokens, "top_logprobs": TOP_LOGPROBS}
    requests = [chat_request(task, sample, **options) for sample in samples]
    replies, drafts = _ask(engine, subject, loaded, serving, requests)
    rounding = ROUNDING.get(engine.name, 0.0)
    answers = {
        sample.id: compare(live, reply, rounding)
        for sample, live, reply in zip(
            samples, _live_answers(loaded, subject.plan, subject.maps, task, samples), replies, strict=True
        )
    }
    confidence = plan.figures.confidence
    return EngineVerification(
        format=plan.export.format if plan.export else "",
        plan=plan.plan,
        files=len(plan.export.files) if plan.export else 0,
        engine=engine.name,
        version=installed.version,
        versions=installed.versions,
        answers=answers,
        accuracy=_accuracy(task, samples, {key: each.served for key, each in answers.items()}, confidence),
        live_accuracy=_accuracy(task, samples, {key: each.live for key, each in answers.items()}, confidence),
        tolerance=max(LOGPROB_TOLERANCE, rounding),
        drafts=drafts,
    )


def _load(source: ModelSource) -> LoadedModel:
    from workers.models.loading import load_model
    from workers.models.prompts import has_chat_template

    loaded = load_model(replace(source, dtype="float32"), device="cpu")
    if not has_chat_template(loaded.processor):
        raise ExportFault(f"model {source.path} has no chat template, and engines are asked by chat; give it one")
    return loaded


def _serving(loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> Serving:
    """Room for one request of these samples at a time, so that a model of long contexts asks for no more memory."""
    import torch

    from workers.models.prompts import build_inputs
    from workers.serving.requests import LEAST_CACHE_BYTES, context_of

    lengths = [
        build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()])["input_ids"].shape[1]
        for sample in samples
    ]
    config = loaded.model.config.get_text_config(decoder=True)
    context = context_of(config, max(lengths) + task.spec.answer.max_new_tokens)
    # Keys and values of all heads in float32, and a quarter more: an upper bound where heads are shared.
    cache = 10 * config.num_hidden_layers * config.hidden_size * context
    cache_bytes = max(LEAST_CACHE_BYTES, cache)
    return Serving(
        context_tokens=context,
        concurrency=1,
        threads=torch.get_num_threads(),
        kv_cache_bytes=cache_bytes,
        compiled=False,
    )


def _ask(
    engine: Engine, subject: Served, dense: LoadedModel, serving: Serving, requests: Sequence[ChatRequest]
) -> tuple[list[ChatReply], DraftCounts | None]:
    """Ask the engine that serves the export, or the dense model with the export as its drafter."""
    from workers.serving.checkpoint import write_served_checkpoint

    with ExitStack() as stack:
        directory = subject.directory
        if subject.drafts:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="skipplan-dense-"))
            directory = Path(scratch, "dense")
            write_served_checkpoint(dense, subject.plan, directory)
            serving = replace(serving, drafter=subject.directory, kv_cache_bytes=2 * (serving.kv_cache_bytes or 0))
        server = stack.enter_context(engine.serve(directory, serving))
        return server.ask_all(requests), server.drafts() if subject.drafts else None


def _live_answers(
    loaded: LoadedModel, plan: SkipPlan, maps: Maps | None, task: Task, samples: Sequence[Sample]
) -> Iterator[LiveAnswer]:
    """Ask the live model under the plan and its maps, one sample at a time."""
    from workers.models.prompts import build_inputs
    from workers.models.ties import end_tokens
    from workers.runtime import apply

    ends = end_tokens(loaded.model)
    with apply(loaded.model, plan, maps):
        for sample in samples:
            inputs = build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()])
            text, tokens, logits = fresh_process.generate_with_logits(
                loaded.model, loaded.processor, inputs, task.spec.answer.max_new_tokens
            )
            yield LiveAnswer(text, tuple(inputs["input_ids"][0].tolist()), tuple(tokens), logits, ends)


def compare(live: LiveAnswer, reply: ChatReply, rounding: float = 0.0) -> ServedAnswer:
    """Compare one answer of the live model with the engine's, whose logits may be off by that share of the largest."""
    served = reply.text.strip()
    if reply.prompt_token_ids is not None and reply.prompt_token_ids != live.prompt:
        pairs = enumerate(zip(live.prompt, reply.prompt_token_ids, strict=False))
        at = next((number for number, (own, other) in pairs if own != other), "its end")
        lengths = f"{len(reply.prompt_token_ids)} tokens, the live model's {len(live.prompt)}"
        detail = f"the engine's prompt has {lengths}; they differ at {at}"
        return ServedAnswer(live.text, served, "other prompt", detail)
    if reply.prompt_token_ids is None and reply.prompt_tokens not in (0, len(live.prompt)):
        detail = f"the engine's prompt has {reply.prompt_tokens} tokens, the live model's {len(live.prompt)}"
        return ServedAnswer(live.text, served, "other prompt", detail)
    tokens = reply.token_ids or ()
    steps = list(zip(live.tokens, tokens, strict=False))
    same = next((step for step, (own, other) in enumerate(steps) if own != other), len(steps))
    difference = _logprob_difference(live.logits, reply, min(same + 1, len(steps)))
    if _whole(served) == _whole(live.text):
        return ServedAnswer(live.text, served, "equal", logprob_difference=difference)
    if same == len(steps) < len(live.tokens) and reply.finish_reason == "stop":
        # The engine ended its answer, by a token that it does not always report.
        ends = [end for end in live.ends if end != live.tokens[same]]
        if ends:
            steps.append((live.tokens[same], max(ends, key=lambda end: float(live.logits[same][end]))))
    if same == len(steps):
        return ServedAnswer(live.text, served, "different", "the tokens do not say where", difference)
    own, other = steps[same]
    outcome, detail = _first_difference(live.logits[same], own, other, same, rounding)
    return ServedAnswer(live.text, served, outcome, detail, difference)


def _whole(text: str) -> str:
    """Leave out a last character of which the answer's length cut a part off, and what engines hold back with it."""
    return text.strip().rstrip("\ufffd" + _BLANKS)


def _first_difference(logits: Tensor, own: int, other: int, step: int, rounding: float) -> tuple[Outcome, str]:
    """Judge the first token that differs by the live model's logits ``[vocabulary]`` there."""
    from workers.models.ties import tie_bound

    gap, bound = float(logits[own] - logits[other]), float(tie_bound(logits.max(), logits.dtype))
    bound = max(bound, 2 * rounding * float(logits.abs().max()))
    said = f"at token {step} the live model's logits of the two are {gap:.1e} apart (tied within {bound:.1e})"
    return ("near tie" if gap <= bound else "different"), said


def _logprob_difference(logits: Tensor, reply: ChatReply, steps: int) -> float:
    """Largest difference of reported log-probabilities over the first steps, as a share of the largest logit."""
    largest = 0.0
    for step in range(min(steps, len(reply.tokens))):
        live = logits[step].log_softmax(-1)
        scale = max(1.0, float(logits[step].abs().max()))
        for token in (reply.tokens[step], *reply.tokens[step].most_likely):
            if token.id is not None and not token.logprob <= LEAST_LOGPROB:  # NaN is compared
                difference = abs(float(live[token.id]) - token.logprob)
                largest = max(largest, math.inf if math.isnan(difference) else difference / scale)
    return largest


def _accuracy(task: Task, samples: Sequence[Sample], answers: Mapping[str, str], confidence: float) -> Accuracy:
    from optimizer.statistics.intervals import effective_sample_size, wilson_interval
    from workers.tasks.scoring import score_answer

    specs = {sample.id: _spec(task, sample) for sample in samples}
    samples = [sample for sample in samples if not specs[sample.id].is_choice]  # which are not scored as texts
    if not samples:
        raise ExportFault(f"task {task.name}: none of the samples asked is scored as a text; ask more with --samples")
    scores = [score_answer(specs[sample.id], sample, answers[sample.id])[0] for sample in samples]
    share = math.fsum(scores) / len(scores)
    size = effective_sample_size(scores, [sample.image_key for sample in samples])
    interval = wilson_interval(share, size, confidence)
    return Accuracy(share, interval.low, interval.high)


def _spec(task: Task, sample: Sample) -> TaskSpec:
    """Return what a sample is scored by: that of its part, where several tasks are joined."""
    own = next((part for part in task.parts if sample.id.startswith(f"{part.name}/")), task)
    return own.spec
