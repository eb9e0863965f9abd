"""Continue greedy decoding for answers that left the draft but may still be correct, reusing cached keys and values.

What was fed before stands where it stood, so that its keys and values at every layer serve the new tokens as well:
those of the questions, which plans that begin alike share, and those of tokens that an earlier pass has fed. The new
tokens alone go through the layers. All of a chunk's open answers are decoded at once, by a token in every pass, or by
several where a draft of how an answer goes on is right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from workers.layerwise.decoder import Keys
from workers.runtime.token_rows import TokenRows

from .draft import Draft
from .packing import Branch, Chunk, Context, Packer, Row

Drafts = Mapping[int, Sequence[Draft]]
"""By index of the sample in the split, how its open answer may go on."""

Answer = tuple[int, tuple[int, ...]]
"""Place of a sample, and the first tokens of an answer to it."""


@dataclass(frozen=True)
class Continuation:
    """Some rows of some chunks with more tokens behind their questions, of which the ``new`` ones are computed.

    ``sources`` are those chunks, each with the numbers of its rows. ``positions`` are where the model says what comes
    next, each of them once; ``reading`` goes through them branch by branch: ``spans`` gives for each of ``branches``
    the first of its readings and one past the last. Places are those of tokens in the flattened rows.
    """

    context: Context
    """Of all tokens of the rows."""
    sources: tuple[tuple[Chunk, Tensor], ...]
    new: TokenRows
    fed: Mapping[Answer, int]
    """Numbers of the tokens behind the questions, by the answers that end with them."""
    fed_indices: Tensor
    """Their indices."""
    carried: tuple[Tensor, Tensor]
    """Places of the tokens that the pass before has fed already, and their numbers there."""
    branches: tuple[Branch, ...]
    positions: Tensor
    """Among the new tokens, ``[positions]``."""
    reading: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, packer: Packer, chunks: Sequence[Chunk], drafts: Drafts, before: Continuation | None) -> Continuation:
        """Extend the rows that hold open answers by ``drafts``; ``before`` is the pass before, if there was one."""
        rows, sources = _rows(chunks, drafts)
        extended = packer.chunk(("continuation",), [Row(row.image, (*row.branches, *more)) for row, more in rows])
        height, width = extended.context.hidden.shape[:2]
        indices = (extended.answer_rows * width + extended.answer_columns).tolist()
        own = [
            (branch, indices[first:last])
            for branch, (first, last) in zip(extended.samples, extended.spans, strict=True)
            if branch.draft.known
        ]
        read = [at[branch.draft.known :] for branch, at in own]
        asked = {index: number for number, index in enumerate(dict.fromkeys(chain.from_iterable(read)))}
        fed = {
            (branch.sample, branch.draft.fed[:length]): index
            for branch, at in own
            for length, index in enumerate(at)
            if index % width >= rows[index // width][0].length
        }
        earlier = {} if before is None else before.fed
        # What is asked for is computed, even where another draft has fed the same token before.
        carried = {index: earlier[answer] for answer, index in fed.items() if answer in earlier and index not in asked}
        device = extended.context.hidden.device
        computed = torch.zeros(height * width, dtype=torch.bool)
        computed[[*asked, *fed.values()]] = True
        computed[[*carried]] = False
        new = TokenRows.from_mask(computed.view(height, width).to(device))
        number_of = dict(zip(new.target.tolist(), new.source.tolist(), strict=True))
        return cls(
            context=extended.context,
            sources=tuple((chunk, torch.tensor(numbers, device=device)) for chunk, numbers in sources.items()),
            new=new,
            fed={answer: number for number, answer in enumerate(fed)},
            fed_indices=torch.tensor([*fed.values()], device=device, dtype=torch.long),
            carried=(
                torch.tensor([*carried], device=device, dtype=torch.long),
                torch.tensor([*carried.values()], device=device, dtype=torch.long),
            ),
            branches=tuple(branch for branch, _ in own),
            positions=torch.tensor([number_of[index] for index in asked], device=device),
            reading=tuple(asked[index] for index in chain.from_iterable(read)),
            spans=tuple(pairwise(accumulate((len(at) for at in read), initial=0))),
        )

    @property
    def hidden(self) -> Tensor:
        """The first layer's input, ``[rows, new tokens, hidden]``."""
        return self.new.take(self.context.hidden, token_dim=1, batch_dim=0)

    def known(self, of_chunks: Sequence[Keys], before: Keys | None) -> Keys:
        """Keys and values of all tokens of the rows, ``[indices, heads, size]`` each, zero for the new ones.

        ``of_chunks`` are the chunks' own keys and values, ``before`` (``[tokens, heads, size]`` each) those that
        :meth:`kept` gave in the pass before.
        """
        keys = self._known([each.keys for each in of_chunks], None if before is None else before.keys)
        return Keys(keys, self._known([each.values for each in of_chunks], None if before is None else before.values))

    def _known(self, of_chunks: Sequence[Tensor], before: Tensor | None) -> Tensor:
        heads, size = of_chunks[0].shape[1], of_chunks[0].shape[3]
        known = of_chunks[0].new_zeros(self.new.batch, self.new.length, heads, size)
        first = 0
        for (_, rows), states in zip(self.sources, of_chunks, strict=True):
            width = min(self.new.length, states.shape[2])
            known[first : first + len(rows), :width] = states[rows, :, :width].transpose(1, 2)
            first += len(rows)
        known = known.flatten(0, 1)
        if before is not None:
            indices, numbers = self.carried
            known[indices] = before[numbers]
        return known

    def kept(self, seen: Keys) -> Keys:
        """Select what another pass may use of a layer's keys and values, ``[indices, heads, size]`` each."""
        return Keys(seen.keys[self.fed_indices], seen.values[self.fed_indices])

    def answers_in(self, states: Tensor) -> Tensor:
        """``[positions, hidden]`` out of ``[rows, new tokens, hidden]``."""
        return states.flatten(0, 1)[self.positions]


def _rows(chunks: Sequence[Chunk], drafts: Drafts) -> tuple[list[tuple[Row, list[Branch]]], dict[Chunk, list[int]]]:
    """Return the rows that hold open answers, each with the branches that it gets, and their numbers in the chunks.

    A row with more to be answered than others is there several times, so that little of the rest is padding.
    """
    found = [
        (chunk, number, [branch for branch in row.branches if branch.sample in drafts])
        for chunk in chunks
        for number, row in enumerate(chunk.rows)
    ]
    most = math.ceil(len(drafts) / sum(bool(asked) for _, _, asked in found))
    rows: list[tuple[Row, list[Branch]]] = []
    numbers: dict[Chunk, list[int]] = {}
    for chunk, number, asked in found:
        for first in range(0, len(asked), most):
            numbers.setdefault(chunk, []).append(number)
            more = [replace(b, draft=draft) for b in asked[first : first + most] for draft in drafts[b.sample]]
            rows.append((chunk.rows[number], more))
    return rows, numbers
