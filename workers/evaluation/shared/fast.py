"""Evaluate plans on the fast path: the scores of the plain path, from few layer executions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from workers.compensation.recipe import CompensationError, Recipe
from workers.compensation.trie_maps import TrieMaps
from workers.device.memory import is_out_of_memory
from workers.evaluation.plain import NO_TARGET, PlainEvaluator, excluded_samples, summarise
from workers.latency.request import device_name
from workers.layerwise.decoder import Decoder, NotExactError
from workers.layerwise.trie import build_trie
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluation, EvaluationFailure, Evaluations
from workers.runtime.descriptor import FamilyDescriptor, validate
from workers.runtime.folding import Maps, folded
from workers.runtime.plan import Action, PlanError, SkipPlan
from workers.tasks import Sample
from workers.tasks.metrics import METRICS
from workers.text import describe_error

from . import sizing
from .answers import AnswerScorer, require_plain_decoding
from .chunks import ChunkCache, SampleChunks
from .divergence import DenseDistributions
from .draft import Drafter
from .packing import MOST_POSITIONS, Chunk, Packer
from .prompts import PromptReader
from .scoring import PlanScorer, ScoringRun, option_drafts, target_drafts
from .state_cache import StateCache
from .walk import Walker

DEFAULT_MEMORY_BYTES = 2 << 30


MOST_CHUNKS = 8
"""Chunks that are walked beside each other, so that their logits are taken together."""

CHECKED_SAMPLES = 12
"""Samples on which the fast path is compared with the plain one before it is used."""


class FastEvaluator:
    """Evaluate many plans of one model on one task, sharing what they have in common.

    ``memory_bytes`` bounds what is kept between layer executions: prompts, masks, hidden states. ``chunk_tokens`` is
    the size of the chunks to begin with, by default what :meth:`check` finds; halved for good when memory runs out.

    Raises:
        NotExactError: the model or the task is none for which this is exact.
    """

    def __init__(
        self, plain: PlainEvaluator, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, chunk_tokens: int | None = None
    ) -> None:
        self.plain, self.loaded, self.task = plain, plain.loaded, plain.task
        spec, targets = self.task.spec, plain.targets
        if spec.answer.kind == "free" and targets is None:
            raise NotExactError("its answers are free text, which is generated")
        if targets is not None or not spec.is_choice:
            require_plain_decoding(self.loaded.model)
        self.decoder = Decoder(self.loaded.model)
        self.chunk_tokens = chunk_tokens or sizing.SMALLEST
        self._size_is_open = chunk_tokens is None
        self._memory, self._most_chunks = memory_bytes, MOST_CHUNKS
        tokenizer = self.loaded.processor.tokenizer
        self.drafter = Drafter(tokenizer, spec.answer.max_new_tokens)
        self._scorer = AnswerScorer(
            spec,
            lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            METRICS,
            stable=not getattr(tokenizer, "clean_up_tokenization_spaces", False),
        )
        if targets is not None:
            drafts = target_drafts(targets)
        elif spec.is_choice:
            drafts = option_drafts(self.loaded, spec)
        else:
            drafts = lambda sample: (self.drafter.forced(sample),)  # noqa: E731
        reader = PromptReader(self.loaded, self.task, self.decoder)
        self._packer = Packer(self.decoder, self.loaded.device)
        self._plan_scorer = PlanScorer(plain, self.decoder, self._packer, self.drafter, self._scorer)
        self.chunks = ChunkCache(self.decoder, reader, self._packer, drafts, budget=memory_bytes // 2)
        self.states = StateCache(memory_bytes // 2)
        self._trie_maps: TrieMaps | None = None
        self.walker = Walker(self.decoder, self.states)

    def evaluate_all(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request; one that cannot be scored does not stop the others.

        Raises:
            TaskError: no such split.
            NotExactError: the prompts cannot be shared.
        """
        started = time.perf_counter()
        samples = self.task.split(request.split)[request.start : request.n_samples]
        plans, maps, failures = self._readable(request)
        self.walker.tally.by_plan.clear()
        given = any(request.artifacts)  # maps as they were kept are folded into the weights, as in an export
        self._use_maps_of(NO_COMPENSATION if given else request.compensation)
        own = {text: each for text, each in maps.items() if each is not None} if given else {}
        scoring = ScoringRun(tuple(plans), samples, request.start, own)
        self._score(scoring, request.split)
        for plan in plans:
            self._ask_plain(plan, scoring, maps.get(plan.text))
        seconds = (time.perf_counter() - started) / max(1, len(plans))
        results = tuple(
            failures.get(text) or self._evaluation(text, request, scoring, seconds) for text in request.plans
        )
        return Evaluations(results)

    def check(self, split: str) -> None:
        """Learn how the model spells answers, and compare with the plain path on a few samples and plans.

        Raises:
            NotExactError: a sample's score differs.
        """
        samples = self.task.split(split)
        if self.plain.targets is not None:
            samples = tuple(sample for sample in samples if self.plain.targets.get(sample.id) is not None)
            if not samples:
                return
        indices = sorted({number * (len(samples) - 1) // CHECKED_SAMPLES for number in range(CHECKED_SAMPLES + 1)})
        chosen = [samples[index] for index in indices]
        dense = SkipPlan.dense(self.decoder.num_layers)
        answers = self.plain.answer(dense, chosen)
        for sample in chosen:
            if sample.id in answers.tokens:
                self.drafter.learn(answers.texts[sample.id], answers.tokens[sample.id])
        plans = (dense, _mixed(self.decoder.descriptor))
        expected = {dense.text: answers, plans[1].text: self.plain.answer(plans[1], chosen)}
        # The model's own answers are the right ones here, so that every one of them is compared token by token.
        texts = expected[dense.text].texts
        own = [replace(s, answers=(texts.get(s.id) or "-",) * len(s.answers)) for s in chosen]  # one an annotator
        self._use_maps_of(NO_COMPENSATION)
        if self._size_is_open:
            self._size_is_open = False
            self.chunk_tokens = self._find_size(own)
        scoring = ScoringRun(plans, own)
        self._score(scoring, f"check {split}")
        for plan in plans:
            for index, sample in enumerate(own):
                outcome, answers = scoring.outcomes[plan.text], expected[plan.text]
                found = outcome.scores.get(index)
                if found is None or sample.id in answers.failed or index in outcome.tied:
                    continue
                scores = self.plain.scores(sample, answers)
                if found != scores:
                    raise NotExactError(
                        f"under the plan {plan} sample {sample.id} scores {found[0]:g} when work is shared and "
                        f"{scores[0]:g} by itself"
                    )

    @property
    def _device(self) -> sizing.Device:
        loaded = self.loaded
        return sizing.Device(
            loaded.fingerprint, str(loaded.model.dtype), device_name(loaded.device), torch.get_num_threads()
        )

    def _find_size(self, samples: Sequence[Sample]) -> int:
        """How many tokens go through a layer together, by running the first layer on the samples' prompts, repeated."""
        with torch.inference_mode():
            part = next(iter(self.chunks.of("size", samples, 0, self.chunk_tokens)))
            rows = [row for chunk in part.chunks for row in chunk.rows]
            if not rows:
                return self.chunk_tokens
            states = self.decoder.num_layers * part.chunks[0].nbytes / part.chunks[0].tokens  # bytes for each token
            width = max(row.length for row in rows)

            def run(tokens: int) -> None:
                repeated = [rows[number % len(rows)] for number in range(max(1, tokens // width))]
                context = self._packer.chunk(("size", tokens), repeated).context
                for layer in range(min(4, self.decoder.num_layers)):
                    self.decoder.run(layer, context.hidden, context.arguments[layer])

            return sizing.chunk_tokens(self._device, run, largest=int(self._memory / 4 / states))

    def _readable(
        self, request: EvaluatePlans
    ) -> tuple[list[SkipPlan], dict[str, Maps | None], dict[str, EvaluationFailure]]:
        """Return the plans that can be run, their maps, and why the others cannot."""
        plans, maps, failures = [], {}, {}
        for text in request.plans:
            try:
                plan = SkipPlan.parse(text)
                validate(plan, self.decoder.descriptor)
                artifact = request.artifact_of(text)
                maps[text] = self.plain.compensator.maps(plan, request.compensation, artifact)
                plans.append(plan)
            except (PlanError, CompensationError) as error:
                failures[text] = EvaluationFailure(text, describe_error(error, PlanError))
        return plans, maps, failures

    def _use_maps_of(self, compensation: str) -> None:
        """Map states by a recipe's maps from now on; states that other maps made are forgotten."""
        self.walker.maps = None
        if compensation == NO_COMPENSATION:
            return
        if self._trie_maps is None or self._trie_maps.compensation != compensation:
            self.states.clear()
            self._trie_maps = TrieMaps(self.decoder, self.plain.compensator.shared(Recipe.parse(compensation)))
        self.walker.maps = self._trie_maps

    def _score(self, scoring: ScoringRun, split: str) -> None:
        with torch.inference_mode():
            for part in self.chunks.of(split, scoring.samples, scoring.start, self.chunk_tokens):
                for outcome in scoring.outcomes.values():
                    outcome.failed.update(part.failed)
                    outcome.failed.update(self._without_target(scoring.samples))
                waiting = list(part.chunks)
                while waiting:
                    self.states.budget = max(0, self._memory - self.chunks.nbytes)
                    group = self._group(waiting)
                    if self._fits(group, scoring):
                        waiting = waiting[len(group) :]
                    elif len(group) > 1:
                        self._most_chunks = 1
                        self._make_room()
                    else:
                        waiting = [*self._halve(part, group[0], scoring), *waiting[1:]]

    def _without_target(self, samples: Sequence[Sample]) -> dict[str, str]:
        targets = self.plain.targets
        return {} if targets is None else {s.id: NO_TARGET for s in samples if targets[s.id] is None}

    def _group(self, waiting: Sequence[Chunk]) -> Sequence[Chunk]:
        """Return the chunks to walk beside each other: as many as the states of a plan leave room for."""
        room = self.states.budget // 2
        group = 1
        while group < min(self._most_chunks, len(waiting)):
            together = waiting[: group + 1]
            states = self.decoder.num_layers * sum(chunk.nbytes for chunk in together)
            if states > room or sum(len(chunk.answer_rows) for chunk in together) > MOST_POSITIONS:
                break
            group += 1
        return waiting[:group]

    def _fits(self, chunks: Sequence[Chunk], scoring: ScoringRun) -> bool:
        """Score chunks under all plans; False when memory is too short for them."""
        try:
            for chunk in chunks:
                if chunk.dense is None:
                    ((_, states),) = self.walker.ends(build_trie([SkipPlan.dense(self.decoder.num_layers)]), chunk)
                    chunk.dense = DenseDistributions.of(self.decoder.logits(states))
            self.states.budget = max(0, self._memory - self.chunks.nbytes)  # dense answers count, too
            shared = [plan for plan in scoring.plans if plan.text not in scoring.folded]
            self._plan_scorer.score(self.walker, shared, chunks, scoring)
            for plan in scoring.plans:
                if plan.text in scoring.folded:  # other weights: no state is shared with other plans
                    alone = Walker(self.decoder, StateCache(self.states.budget), self.walker.tally)
                    with folded(self.decoder.stack, plan, scoring.folded[plan.text]):
                        self._plan_scorer.score(alone, [plan], chunks, scoring)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _make_room(self) -> None:
        self.states.clear()
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, part: SampleChunks, chunk: Chunk, scoring: ScoringRun) -> tuple[Chunk, ...]:
        """Two halves of a chunk that memory is too short for; the questions of a single row are asked one by one."""
        self._make_room()
        self.chunk_tokens = max(1, min(self.chunk_tokens, chunk.tokens // 2))
        sizing.remember(self._device, self.chunk_tokens)
        halves = self.chunks.halve(part, chunk)
        if not halves:
            for outcome in scoring.outcomes.values():
                outcome.unfinished.update(branch.sample for branch in chunk.samples)
        return halves

    def _ask_plain(self, plan: SkipPlan, scoring: ScoringRun, maps: Maps | None) -> None:
        outcome = scoring.outcomes[plan.text]
        for indices, ask in (
            (sorted(outcome.alone), self.plain.answer_alone),
            (sorted(outcome.unfinished - outcome.alone), self.plain.answer),
        ):
            if not indices:
                continue
            samples = scoring.of(indices)
            answers = ask(plan, samples, maps)
            outcome.failed.update(answers.failed)
            outcome.tied.update(p for p, sample in zip(indices, samples, strict=True) if sample.id in answers.tied)
            for index, sample in zip(indices, samples, strict=True):
                if sample.id not in answers.failed:
                    outcome.scores[index] = self.plain.scores(sample, answers)

    def _nothing(self, sample: Sample) -> tuple[float, ...]:
        """Scores of a sample without an answer."""
        return self._scorer.nothing if self.plain.targets is None else self.plain.agreement_scores(sample, None)

    def _evaluation(self, text: str, request: EvaluatePlans, scoring: ScoringRun, seconds: float) -> Evaluation:
        outcome, samples = scoring.outcomes[text], scoring.samples
        indices = range(scoring.start, scoring.start + len(samples))
        scores = {
            sample.id: outcome.scores.get(index) or self._nothing(sample)
            for index, sample in zip(indices, samples, strict=True)
        }
        executed = self.walker.tally.by_plan.get(text, 0)
        needed = len(SkipPlan.parse(text).kept) * (len(samples) - len(outcome.failed))
        return Evaluation(
            plan=text,
            split=request.split,
            sample_ids=tuple(sample.id for sample in samples),
            **summarise(self.plain.secondary, scores, excluded_samples(SkipPlan.parse(text), outcome.failed)),
            failed_samples=outcome.failed,
            seconds=seconds,
            compensation=request.compensation,
            kl=tuple(outcome.kl.get(index, math.nan) for index in indices),
            layer_executions=executed,
            layer_executions_saved=max(0, needed - executed),
            path="fast",
            near_ties=len(outcome.tied),
        )


def _mixed(descriptor: FamilyDescriptor) -> SkipPlan:
    """Return a plan with every action somewhere, as far as the model can take them, that leaves most layers running."""
    plan = SkipPlan.dense(descriptor.num_layers)
    wanted = [action for action in Action if action is not Action.RUN]
    for number, action in enumerate(wanted, start=1):
        layer = number * descriptor.num_layers // (len(wanted) + 1)
        changed = plan.with_action(layer, action)
        try:
            validate(changed, descriptor)
        except PlanError:
            continue
        plan = changed
    return plan
