"""Score many plans on packed samples within a memory budget, sharing what the plans have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from workers.compensation.compensator import Compensator
from workers.compensation.recipe import CompensationError, Recipe
from workers.compensation.trie_maps import TrieMaps
from workers.device.memory import is_out_of_memory
from workers.evaluation.divergence import distributions
from workers.evaluation.plain import summarise
from workers.latency.request import device_name
from workers.layerwise.decoder import Decoder
from workers.layerwise.trie import build_trie
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluation, EvaluationFailure
from workers.models.loading import LoadedModel
from workers.runtime.descriptor import FamilyDescriptor, validate
from workers.runtime.folding import Maps, folded
from workers.runtime.plan import Action, PlanError, SkipPlan
from workers.tasks import Passage, Sample
from workers.text import describe_error

from . import sizing
from .chunks import ChunkCache, SampleChunks
from .packing import MOST_POSITIONS, Chunk, Packer
from .scoring import ScoringRun
from .state_cache import StateCache
from .walk import Walker

Item = TypeVar("Item", bound=Sample | Passage)

DEFAULT_MEMORY_BYTES = 2 << 30

MOST_CHUNKS = 8
"""Chunks that are walked beside each other, so that their logits are taken together."""


class Scorer(Protocol[Item]):
    """Reads scores from the final states of plans."""

    def score(
        self, walker: Walker, plans: Sequence[SkipPlan], chunks: Sequence[Chunk], scoring: ScoringRun[Item]
    ) -> None:
        """Record in ``scoring`` what chunks, whose dense distributions are known, score under plans."""


class SharedEvaluator(Generic[Item]):
    """Walk the trie of plans over the chunks of a split, and let a scorer read the states where plans end.

    ``memory_bytes`` bounds what is kept between layer executions: prompts, masks, hidden states. ``chunk_tokens`` is
    the size of the chunks to begin with, by default what :meth:`size_chunks` finds; halved for good when memory runs
    out.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        compensator: Compensator,
        decoder: Decoder,
        chunks: ChunkCache[Item],
        scorer: Scorer[Item],
        *,
        memory_bytes: int,
        chunk_tokens: int | None,
    ) -> None:
        self.loaded, self.compensator, self.decoder = loaded, compensator, decoder
        self.chunks, self._scorer_of_chunks = chunks, scorer
        self.chunk_tokens = chunk_tokens or sizing.SMALLEST
        self._size_is_open = chunk_tokens is None
        self._memory, self._most_chunks = memory_bytes, MOST_CHUNKS
        self._packer = Packer(decoder, loaded.device)
        self.states = StateCache(memory_bytes // 2)
        self._trie_maps: TrieMaps | None = None
        self.walker = Walker(decoder, self.states)

    @property
    def _device(self) -> sizing.Device:
        loaded = self.loaded
        return sizing.Device(
            loaded.fingerprint, str(loaded.model.dtype), device_name(*loaded.devices), torch.get_num_threads()
        )

    def size_chunks(self, samples: Sequence[Item]) -> None:
        """Find how many tokens go through a layer together, unless that was given.

        The first layers run on the samples' prompts, repeated.
        """
        if not self._size_is_open:
            return
        self._size_is_open = False
        with torch.inference_mode():
            part = next(iter(self.chunks.of("size", samples, 0, self.chunk_tokens)))
            rows = [row for chunk in part.chunks for row in chunk.rows]
            if not rows:
                return
            states = self.decoder.num_layers * part.chunks[0].nbytes / part.chunks[0].tokens  # bytes for each token
            width = max(row.length for row in rows)

            def run(tokens: int) -> None:
                repeated = [rows[number % len(rows)] for number in range(max(1, tokens // width))]
                context = self._packer.chunk(("size", tokens), repeated).context
                for layer in range(min(4, self.decoder.num_layers)):
                    self.decoder.run(layer, context.hidden, context.arguments[layer])

            self.chunk_tokens = sizing.chunk_tokens(self._device, run, largest=int(self._memory / 4 / states))

    def score_all(
        self, request: EvaluatePlans, samples: Sequence[Item]
    ) -> tuple[ScoringRun[Item], dict[str, Maps | None], dict[str, EvaluationFailure]]:
        """Score the plans of a request that can be run; return also their maps, and why the others cannot."""
        plans, maps, failures = self._readable(request)
        self.walker.tally.by_plan.clear()
        given = any(request.artifacts)  # maps as they were kept are folded into the weights, as in an export
        self.use_maps_of(NO_COMPENSATION if given else request.compensation)
        own = {text: each for text, each in maps.items() if each is not None} if given else {}
        scoring = ScoringRun(tuple(plans), samples, request.start, own)
        self.score(scoring, request.split)
        return scoring, maps, failures

    def _readable(
        self, request: EvaluatePlans
    ) -> tuple[list[SkipPlan], dict[str, Maps | None], dict[str, EvaluationFailure]]:
        """Return the plans that can be run, their maps, and why the others cannot."""
        plans, maps, failures = [], {}, {}
        for text in request.plans:
            try:
                plan = SkipPlan.parse(text)
                validate(plan, self.decoder.descriptor)
                maps[text] = self.compensator.maps(plan, request.compensation, request.artifact_of(text))
                plans.append(plan)
            except (PlanError, CompensationError) as error:
                failures[text] = EvaluationFailure(text, describe_error(error, PlanError))
        return plans, maps, failures

    def use_maps_of(self, compensation: str) -> None:
        """Map states by a recipe's maps from now on; states that other maps made are forgotten."""
        self.walker.maps = None
        if compensation == NO_COMPENSATION:
            return
        if self._trie_maps is None or self._trie_maps.compensation != compensation:
            self.states.clear()
            self._trie_maps = TrieMaps(self.decoder, self.compensator.shared(Recipe.parse(compensation)))
        self.walker.maps = self._trie_maps

    def score(self, scoring: ScoringRun[Item], split: str) -> None:
        """Score plans chunk by chunk; what memory is too short for is left as unfinished."""
        with torch.inference_mode():
            for part in self.chunks.of(split, scoring.samples, scoring.start, self.chunk_tokens):
                for outcome in scoring.outcomes.values():
                    outcome.failed.update(part.failed)
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

    def _fits(self, chunks: Sequence[Chunk], scoring: ScoringRun[Item]) -> bool:
        """Score chunks under all plans; False when memory is too short for them."""
        try:
            for chunk in chunks:
                if chunk.dense is None:
                    ((_, states),) = self.walker.ends(build_trie([SkipPlan.dense(self.decoder.num_layers)]), chunk)
                    chunk.dense = distributions(self.decoder, states)
            self.states.budget = max(0, self._memory - self.chunks.nbytes)  # dense answers count, too
            shared = [plan for plan in scoring.plans if plan.text not in scoring.folded]
            self._scorer_of_chunks.score(self.walker, shared, chunks, scoring)
            for plan in scoring.plans:
                if plan.text in scoring.folded:  # other weights: no state is shared with other plans
                    alone = Walker(self.decoder, StateCache(self.states.budget), self.walker.tally)
                    with folded(self.decoder.stack, plan, scoring.folded[plan.text]):
                        self._scorer_of_chunks.score(alone, [plan], chunks, scoring)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _make_room(self) -> None:
        self.states.clear()
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, part: SampleChunks, chunk: Chunk, scoring: ScoringRun[Item]) -> tuple[Chunk, ...]:
        """Two halves of a chunk that memory is too short for; the questions of a single row are asked one by one."""
        self._make_room()
        self.chunk_tokens = max(1, min(self.chunk_tokens, chunk.tokens // 2))
        sizing.remember(self._device, self.chunk_tokens)
        halves = self.chunks.halve(part, chunk)
        if not halves:
            for outcome in scoring.outcomes.values():
                outcome.unfinished.update(branch.sample for branch in chunk.samples)
        return halves

    def evaluation(
        self,
        plan: SkipPlan,
        request: EvaluatePlans,
        scoring: ScoringRun[Item],
        scores: Mapping[str, Sequence[float]],
        *,
        secondary: Sequence[str] = (),
        excluded: Collection[str] = (),
        started: float,
    ) -> Evaluation:
        """Return a plan's scores as a reply: by sample the score and the secondary ones; ``excluded`` are marked."""
        outcome, samples = scoring.outcomes[plan.text], scoring.samples
        indices = range(scoring.start, scoring.start + len(samples))
        lost = [
            sample.id
            for index, sample in zip(indices, samples, strict=True)
            if index not in outcome.scores and sample.id not in outcome.failed
        ]
        if lost and not outcome.broken:
            raise RuntimeError(f"plan {plan} has no score on sample {lost[0]} ({len(lost)} in all), and no reason why")
        executed = round(self.walker.tally.by_plan.get(plan.text, 0.0))
        needed = round(plan.executions * (len(samples) - len(outcome.failed)))
        return Evaluation(
            plan=plan.text,
            split=request.split,
            sample_ids=tuple(sample.id for sample in samples),
            **summarise(secondary, scores, frozenset(excluded)),
            failed_samples=outcome.failed,
            seconds=(time.perf_counter() - started) / len(scoring.plans),
            compensation=request.compensation,
            kl=tuple(outcome.kl.get(index, math.nan) for index in indices),
            layer_executions=executed,
            layer_executions_saved=max(0, needed - executed),
            path="fast",
            near_ties=len(outcome.tied),
        )


def mixed_plan(descriptor: FamilyDescriptor) -> SkipPlan:
    """Return a plan with every action somewhere, as far as the model has layers that can take them."""
    plan = SkipPlan.dense(descriptor.num_layers)
    whole = [action for action in Action if action is not Action.RUN and not action.row.leaves_out]
    for number, action in enumerate(whole, start=1):
        layer = number * descriptor.num_layers // (len(whole) + 1)
        plan = _where_possible(plan, layer, action, descriptor) or plan
    for partial in (action for action in Action if action.row.leaves_out):
        running = reversed(plan.layers(Action.RUN))
        changed = (_where_possible(plan, layer, partial, descriptor) for layer in running)
        plan = next((each for each in changed if each is not None), plan)
    return plan


def _where_possible(plan: SkipPlan, layer: int, action: Action, descriptor: FamilyDescriptor) -> SkipPlan | None:
    changed = plan.with_action(layer, action)
    try:
        validate(changed, descriptor)
    except PlanError:
        return None
    return changed
