"""Answers that go another way than guessed and could still score: what a plan answered is fed behind its questions.

What was fed before stands where it stood, so that its keys and values at every layer, which plans that begin alike
share, serve the new tokens as well: these alone go through the layers. It is greedy decoding for all of a
chunk's open answers at once, a word of them in every pass, or several where a guess of how they go on is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from workers.runtime.token_rows import TokenSplit

from .decoder import Keys
from .guesses import Guess
from .packing import Branch, Chunk, Context, Packer, Row, split_of

OpenAnswers = Mapping[int, tuple[int, ...]]
"""By place of the sample in the split, the tokens that a plan has answered so far."""


@dataclass(frozen=True)
class Extension:
    """Some rows of some chunks with more words behind their questions.

    ``parts`` are those chunks, each with the numbers of its rows. ``positions`` are where the model says what comes
    next, each of them once; ``reading`` goes through them branch by branch: ``spans`` gives for each of ``branches``
    the first of its readings and one past the last.
    """

    context: Context
    parts: tuple[tuple[Chunk, Tensor], ...]
    new: Tensor
    """Which tokens are to be computed, bool ``[rows, tokens]``."""
    split: TokenSplit
    """The same, as rows apart from all others."""
    branches: tuple[Branch, ...]
    positions: tuple[Tensor, Tensor]
    """Rows (of the extension) and columns, ``[positions]`` each."""
    reading: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        packer: Packer,
        chunks: Sequence[Chunk],
        answers: OpenAnswers,
        going_on: Callable[[tuple[int, ...]], Sequence[Guess]],
    ) -> Extension:
        """Extend the rows that hold open ``answers``; ``going_on`` guesses what follows them."""
        found = [
            (chunk, number, [branch for branch in row.branches if branch.sample in answers])
            for chunk in chunks
            for number, row in enumerate(chunk.rows)
        ]
        most = math.ceil(len(answers) / sum(bool(asked) for _, _, asked in found))
        numbers: dict[Chunk, list[int]] = {}
        rows: list[tuple[Row, list[Branch]]] = []
        for chunk, number, asked in found:
            # A row with more to be answered than others is there several times, so that little of the rest is padding.
            for first in range(0, len(asked), most):
                numbers.setdefault(chunk, []).append(number)
                more = [replace(b, guess=g) for b in asked[first : first + most] for g in going_on(answers[b.sample])]
                rows.append((chunk.rows[number], more))
        extended = packer.chunk(("extension",), [Row(row.image, (*row.branches, *more)) for row, more in rows])
        device = extended.context.hidden.device
        new = torch.zeros(extended.context.hidden.shape[:2], dtype=torch.bool, device=device)
        for place, (row, _) in enumerate(rows):
            new[place, row.length : extended.rows[place].length] = True
        own = [number for number, branch in enumerate(extended.samples) if branch.guess.known]
        branches = tuple(extended.samples[number] for number in own)
        unknown = [
            range(extended.spans[number][0] + branch.guess.known, extended.spans[number][1])
            for number, branch in zip(own, branches, strict=True)
        ]
        read = [place for span in unknown for place in span]
        read_at = list(zip(extended.answer_rows[read].tolist(), extended.answer_columns[read].tolist(), strict=True))
        places = {place: number for number, place in enumerate(dict.fromkeys(read_at))}
        at = torch.tensor(list(places), device=device).unbind(1)
        new[at] = True  # those that another question has fed already are computed again
        return cls(
            context=extended.context,
            parts=tuple((chunk, torch.tensor(own, device=device)) for chunk, own in numbers.items()),
            new=new,
            split=split_of(new),
            branches=branches,
            positions=(at[0], at[1]),
            reading=tuple(places[place] for place in read_at),
            spans=tuple(pairwise((0, *accumulate(len(span) for span in unknown)))),
        )

    def known(self, of_parts: Sequence[Keys]) -> Keys:
        """What a layer's attention sees of each part's chunk, where its tokens stand in the extension."""
        return Keys(
            torch.cat([self._moved(rows, each.keys) for (_, rows), each in zip(self.parts, of_parts, strict=True)]),
            torch.cat([self._moved(rows, each.values) for (_, rows), each in zip(self.parts, of_parts, strict=True)]),
        )

    def _moved(self, rows: Tensor, states: Tensor) -> Tensor:
        width = self.new.shape[1]
        moved = states[rows, :, :width]
        return functional.pad(moved, (0, 0, 0, width - moved.shape[2]))

    def answers_in(self, states: Tensor) -> Tensor:
        """``[positions, hidden]`` out of ``[rows, tokens, hidden]``."""
        return states[self.positions]
