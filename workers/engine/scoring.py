"""What is read at the ends of plans: scores, divergences, and how answers that are open go on.

Chunks are walked beside each other. What stands at a plan's end is few tokens in each of them, and matrix products of
few tokens are slow: logits are taken, and open answers decoded on, for all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from workers.layerwise.decoder import Decoder, Keys
from workers.layerwise.trie import build_trie
from workers.models.loading import LoadedModel
from workers.models.ties import end_tokens
from workers.runtime.plan import SkipPlan
from workers.tasks import TaskSpec

from .answers import Choices, Scorer, Verdict, furthest, judge
from .continuation import Extension
from .draft import Guesser
from .options import Worth, mean_divergence
from .packing import Branch, Chunk, Packer
from .requests import Asked, Outcome
from .walk import Walker

Spans = Sequence[tuple[int, int]]


class Judge:
    """Scores plans on packed samples."""

    def __init__(
        self,
        spec: TaskSpec,
        decoder: Decoder,
        packer: Packer,
        guesser: Guesser,
        scorer: Scorer,
        loaded: LoadedModel,
    ) -> None:
        self._spec, self._decoder, self._packer = spec, decoder, packer
        self._guesser, self._scorer = guesser, scorer
        self._dtype, self._ends = loaded.model.dtype, end_tokens(loaded.model)

    def score(self, walker: Walker, plans: Sequence[SkipPlan], chunks: Sequence[Chunk], asked: Asked) -> None:
        """Take note in ``asked`` of what chunks (whose dense answers are known) score under plans."""
        repairs = walker.repairs
        trie = build_trie(plans, repairs=repairs is not None, drift=repairs is not None and repairs.drift)
        branches = [branch for chunk in chunks for branch in chunk.samples]
        sizes = [len(chunk.answer_rows) for chunk in chunks]
        spans = [
            (first + before, last + before)
            for chunk, before in zip(chunks, accumulate(sizes, initial=0), strict=False)
            for first, last in chunk.spans
        ]
        for ends in zip(*(walker.ends(trie, chunk) for chunk in chunks), strict=True):
            (node, _), *_ = ends
            logits = self._decoder.logits(torch.cat([states for _, states in ends]))
            for chunk, own in zip(chunks, torch.split(logits, sizes), strict=True):
                assert chunk.dense is not None
                divergence = mean_divergence(chunk, chunk.dense.divergence(own))
                worth = Worth.of(chunk, own, self._dtype) if self._spec.is_choice else None
                for plan in node.plans:
                    asked.outcomes[plan].kl.update(divergence)
                    if worth is not None:
                        worth.judge(self._spec, asked, asked.outcomes[plan])
            if self._spec.is_choice:
                continue
            choices = Choices.of(logits, self._dtype)
            for plan in node.plans:
                outcome = asked.outcomes[plan]
                still_open = self._settle(branches, spans, choices, asked, outcome)
                walker.keeps_keys = bool(still_open)  # plans that follow each other are alike
                extension: Extension | None = None
                fed: list[Keys] = []
                while still_open:
                    guesses = self._guesser.going_on(still_open)
                    extension = Extension.of(self._packer, chunks, guesses, extension)
                    states, fed = walker.extended(node, extension, fed)
                    more = Choices.of(self._decoder.logits(states), self._dtype).at(extension.reading)
                    still_open = self._settle(extension.branches, extension.spans, more, asked, outcome)
        walker.forget_keys()

    def _settle(
        self, branches: Sequence[Branch], spans: Spans, choices: Choices, asked: Asked, outcome: Outcome
    ) -> dict[int, tuple[int, ...]]:
        """Take note of what is known of the branches' answers now; gives those that are open still, as far as known."""
        verdicts: dict[int, list[Verdict]] = {}
        for branch, span in zip(branches, spans, strict=True):
            verdicts.setdefault(branch.sample, []).append(judge(choices, span, branch.guess, self._ends))
        still_open = {}
        for place, each in verdicts.items():
            verdict = furthest(each)
            if verdict.ended:
                self._guesser.remember(verdict.tokens)
            scores = self._scorer.settled(asked.sample(place), verdict, self._guesser.limit, self._ends)
            if verdict.not_a_number:
                outcome.alone.add(place)
            elif scores is not None:
                outcome.scores[place] = scores
            elif verdict.rivals != ():
                outcome.tied.add(place)
                outcome.alone.add(place)
            else:
                still_open[place] = verdict.tokens
        return still_open
