"""Evaluate plans on passages of general text, sharing what the plans have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workers.errors import MeasurementError
from workers.evaluation.divergence import DenseDistributions, pieces
from workers.evaluation.passages import TOO_SHORT, PassageEvaluator, PassageScores
from workers.layerwise.decoder import Decoder, NotExactError
from workers.layerwise.trie import build_trie
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluation, EvaluationFailure, Evaluations
from workers.runtime.plan import Action, SkipPlan
from workers.tasks import Passage

from .chunks import ChunkCache
from .draft import Draft
from .packing import Chunk, Packer
from .prompts import ImagePrompts, text_prompt
from .scoring import ScoringRun
from .sharing import DEFAULT_MEMORY_BYTES, SharedEvaluator, mixed_plan
from .walk import Walker

CHECKED_PASSAGES = 4
"""Passages on which the fast path is compared with the plain one before it is used."""


class FastPassageEvaluator(SharedEvaluator[Passage]):
    """Evaluate many plans of one model on general text: what :class:`PassageEvaluator` measures, from less work.

    Raises:
        NotExactError: the model is none for which this is exact.
    """

    def __init__(
        self, plain: PassageEvaluator, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, chunk_tokens: int | None = None
    ) -> None:
        self.plain = plain
        decoder = Decoder(plain.loaded.model)
        chunks = ChunkCache(
            self._read,
            Packer(decoder, plain.loaded.device),
            lambda each: passage_drafts(plain.tokens(each)),
            budget=memory_bytes // 2,
        )
        super().__init__(
            plain.loaded,
            plain.compensator,
            decoder,
            chunks,
            PassageScorer(decoder),
            memory_bytes=memory_bytes,
            chunk_tokens=chunk_tokens,
        )

    def _read(self, passages: Sequence[tuple[int, Passage]], failed: dict[str, str]) -> list[ImagePrompts]:
        found = []
        for index, passage in passages:
            tokens = self.plain.tokens(passage)
            if len(tokens) < 2:
                failed[passage.id] = TOO_SHORT
            else:
                found.append(text_prompt(self.decoder, tokens, index))
        return found

    def evaluate_all(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request; one that cannot be scored does not stop the others.

        Raises:
            TaskError: no such split.
            NotExactError: the model is given more than text alone tells.
        """
        started = time.perf_counter()
        passages = self.plain.task.split(request.split)[request.start : request.n_samples]
        scoring, maps, failures = self.score_all(request, passages)
        for plan in scoring.plans:
            outcome = scoring.outcomes[plan.text]
            unfinished = sorted(outcome.unfinished)
            scores = self.plain.scores(plan, scoring.of(unfinished), maps[plan.text])
            outcome.failed.update(scores.failed)
            outcome.broken = outcome.broken or scores.broken
            for index in unfinished:
                name = scoring.sample(index).id
                if name in scores.shares:
                    outcome.scores[index], outcome.kl[index] = (scores.shares[name],), scores.kl[name]
        found: dict[str, Evaluation | EvaluationFailure] = {
            plan.text: self._evaluation(plan, request, scoring, started) for plan in scoring.plans
        }
        broken = {text: each.broken for text, each in scoring.outcomes.items() if each.broken}
        found |= {text: EvaluationFailure(text, reason) for text, reason in broken.items()}
        return Evaluations(tuple(failures.get(text) or found[text] for text in request.plans))

    def _evaluation(
        self, plan: SkipPlan, request: EvaluatePlans, scoring: ScoringRun[Passage], started: float
    ) -> Evaluation:
        outcome = scoring.outcomes[plan.text]
        scores = {
            each.id: outcome.scores.get(index, (0.0,)) for index, each in enumerate(scoring.samples, scoring.start)
        }
        return self.evaluation(plan, request, scoring, scores, excluded=outcome.failed, started=started)

    def check(self, split: str) -> None:
        """Compare with the plain path on a few passages, under the dense and a mixed plan.

        Divergences from the plain path's dense distributions are compared, so that dense is compared with dense.

        Raises:
            NotExactError: a passage's divergence differs by more than rounding, or the model takes no text.
        """
        passages = self.plain.task.split(split)[:CHECKED_PASSAGES]
        plans = (SkipPlan.dense(self.decoder.num_layers), mixed_plan(self.decoder.descriptor))
        try:
            expected = {plan: self.plain.scores(plan, passages) for plan in plans}
        except MeasurementError as error:
            raise NotExactError(str(error)) from error
        self.use_maps_of(NO_COMPENSATION)
        self.size_chunks(passages)
        name = f"check {split}"
        with torch.inference_mode():
            for part in self.chunks.of(name, passages, 0, self.chunk_tokens):
                for chunk in part.chunks:
                    dense = [self.plain.dense(passages[branch.sample]) for branch in chunk.samples]
                    chunk.dense = DenseDistributions.joined(dense)
        scoring = ScoringRun(plans, passages)
        self.score(scoring, name)
        exact = self.loaded.model.dtype in (torch.float32, torch.float64)
        for plan in plans:
            found = scoring.outcomes[plan.text].kl
            for index, passage in enumerate(passages):
                own = expected[plan].kl.get(passage.id)
                if own is None or index not in found:
                    continue
                if abs(found[index] - own) > (1e-3 + 1e-3 * own if exact else 2e-2 + 5e-2 * own):
                    raise NotExactError(
                        f"under the plan {plan} passage {passage.id} diverges by {found[index]:.4g} nats a token when "
                        f"work is shared and by {own:.4g} by itself"
                    )


def on_text(plan: SkipPlan) -> SkipPlan:
    """Return the plan that does the same to prompts without vision tokens, and treats none apart."""
    return SkipPlan(tuple(Action.RUN if action.row.vision_only else action for action in plan))


def passage_drafts(tokens: Sequence[int]) -> tuple[Draft, ...]:
    """Return what is read of a passage behind its first token: all of it, of which the last token need not be fed."""
    return (Draft(tuple(tokens[1:]), len(tokens) - 1),)


class PassageScorer:
    """Score plans on packed passages.

    Without maps, which are fitted to prompts with images, plans that do the same to text are walked as one.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def score(
        self, walker: Walker, plans: Sequence[SkipPlan], chunks: Sequence[Chunk], scoring: ScoringRun[Passage]
    ) -> None:
        """Record in ``scoring`` what chunks, whose dense distributions are known, score under plans."""
        maps = walker.maps
        alike: dict[str, list[str]] = {}
        for plan in plans:
            alike.setdefault((on_text(plan) if maps is None else plan).text, []).append(plan.text)
        walked = map(SkipPlan.parse, alike)
        trie = build_trie(walked, maps=maps is not None, drift=maps is not None and maps.drift)
        for chunk in chunks:
            for node, states in walker.ends(trie, chunk):
                scores = PassageScores()
                for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
                    assert chunk.dense is not None
                    passage = scoring.sample(branch.sample).id
                    dense = chunk.dense.at(slice(first, last))
                    scores.add(passage, self._logits(states[first:last]), branch.draft.tokens, dense)
                for text in (each for own in node.plans for each in alike[own]):
                    outcome = scoring.outcomes[text]
                    outcome.failed.update(scores.failed)
                    outcome.broken = outcome.broken or scores.broken
                    for branch in chunk.samples:
                        passage = scoring.sample(branch.sample).id
                        if passage in scores.shares:
                            outcome.scores[branch.sample] = (scores.shares[passage],)
                            outcome.kl[branch.sample] = scores.kl[passage]
        executions = walker.tally.by_plan
        for own, texts in alike.items():
            if own not in texts:
                executions[texts[0]] = executions.get(texts[0], 0) + executions.pop(own, 0)

    def _logits(self, states: Tensor) -> Iterator[Tensor]:
        for piece in pieces(len(states), self._decoder.vocabulary):
            yield self._decoder.logits(states[piece])
