"""Evaluate plans on the fast path: the scores of the plain path, from few layer executions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from workers.evaluation.plain import NO_TARGET, PlainEvaluator, excluded_samples
from workers.layerwise.decoder import Decoder, NotExactError
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluation, Evaluations
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample

from .answers import AnswerScorer, require_plain_decoding
from .chunks import ChunkCache
from .draft import Drafter
from .packing import Packer
from .prompts import PromptReader
from .scoring import PlanScorer, ScoringRun, option_drafts, target_drafts
from .sharing import DEFAULT_MEMORY_BYTES, SharedEvaluator, mixed_plan

CHECKED_SAMPLES = 12
"""Samples on which the fast path is compared with the plain one before it is used."""


class FastEvaluator(SharedEvaluator[Sample]):
    """Evaluate many plans of one model on one task, sharing what they have in common (:class:`SharedEvaluator`).

    Raises:
        NotExactError: the model or the task is none for which this is exact.
    """

    def __init__(
        self, plain: PlainEvaluator, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, chunk_tokens: int | None = None
    ) -> None:
        self.plain, self.task = plain, plain.task
        loaded, spec, targets = plain.loaded, plain.task.spec, plain.targets
        if spec.answer.kind == "free" and targets is None:
            raise NotExactError("its answers are free text, which is generated")
        if targets is not None or not spec.is_choice:
            require_plain_decoding(loaded.model)
        decoder, tokenizer = Decoder(loaded.model), loaded.processor.tokenizer
        packer = Packer(decoder, loaded.device)
        self.drafter = Drafter(tokenizer, spec.answer.max_new_tokens)
        self._scorer = AnswerScorer(
            spec,
            lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
            stable=not getattr(tokenizer, "clean_up_tokenization_spaces", False),
        )
        if targets is not None:
            drafts = target_drafts(targets)
        elif spec.is_choice:
            drafts = option_drafts(loaded, spec)
        else:
            drafts = lambda sample: (self.drafter.forced(sample),)  # noqa: E731
        reader = PromptReader(loaded, plain.task, decoder)
        super().__init__(
            loaded,
            plain.compensator,
            decoder,
            ChunkCache(reader.read, packer, drafts, budget=memory_bytes // 2),
            PlanScorer(plain, decoder, packer, self.drafter, self._scorer),
            memory_bytes=memory_bytes,
            chunk_tokens=chunk_tokens,
        )

    def evaluate_all(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request; one that cannot be scored does not stop the others.

        Raises:
            TaskError: no such split.
            NotExactError: the prompts cannot be shared.
        """
        started = time.perf_counter()
        samples = self.task.split(request.split)[request.start : request.n_samples]
        scoring, maps, failures = self.score_all(request, samples)
        for plan in scoring.plans:
            scoring.outcomes[plan.text].failed.update(self._without_target(samples))
            self._ask_plain(plan, scoring, maps[plan.text])
        found = {plan.text: self._evaluation(plan, request, scoring, started) for plan in scoring.plans}
        return Evaluations(tuple(failures.get(text) or found[text] for text in request.plans))

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
        plans = (dense, mixed_plan(self.decoder.descriptor))
        expected = {dense.text: answers, plans[1].text: self.plain.answer(plans[1], chosen)}
        # The model's own answers are the right ones here, so that every one of them is compared token by token.
        texts = expected[dense.text].texts
        own = [replace(s, answers=(texts.get(s.id) or "-",) * len(s.answers)) for s in chosen]  # one an annotator
        self.use_maps_of(NO_COMPENSATION)
        self.size_chunks(own)
        scoring = ScoringRun(plans, own)
        self.score(scoring, f"check {split}")
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

    def _without_target(self, samples: Sequence[Sample]) -> dict[str, str]:
        targets = self.plain.targets
        return {} if targets is None else {s.id: NO_TARGET for s in samples if targets[s.id] is None}

    def _ask_plain(self, plan: SkipPlan, scoring: ScoringRun[Sample], maps: Maps | None) -> None:
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

    def _evaluation(
        self, plan: SkipPlan, request: EvaluatePlans, scoring: ScoringRun[Sample], started: float
    ) -> Evaluation:
        outcome = scoring.outcomes[plan.text]
        scores = {
            sample.id: outcome.scores.get(index) or self._nothing(sample)
            for index, sample in enumerate(scoring.samples, start=scoring.start)
        }
        return self.evaluation(
            plan,
            request,
            scoring,
            scores,
            secondary=self.plain.secondary,
            excluded=excluded_samples(plan, outcome.failed),
            started=started,
        )
