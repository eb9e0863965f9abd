"""Pack the questions about an image into one row: a tree of tokens behind one copy of the prompt's beginning.

Questions, each with the draft that is fed behind it, share the tokens that they begin with. A token sees the prefix and
the tokens before it in its own question, and its position is its index there, so every question is computed exactly as
it would be alone. Rows of similar length make a chunk, so that little of it is padding.

Shapes: *rows* are the packed sequences of a chunk, *tokens* the slots of a row with its padding, *positions* the
answer positions of all rows in the order of their branches, *hidden* the model's width. A row holds one image's prefix
(``ImagePrompts.prefix``) and its *branches*: a sample's question with one draft. Integer indices count from 0 within a
row; a *node* is a token of the tree, numbered from 0 behind the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.evaluation.divergence import DenseDistributions
from workers.layerwise.decoder import SLIDING, Decoder
from workers.runtime.token_rows import TokenRows, TokenSplit

from .draft import Draft
from .prompts import ImagePrompts

LONGEST_BRANCHES = 512
"""Tokens of questions in one row; more of them make another row, since attention grows with the square."""


MOST_POSITIONS = 2048
"""Answer positions of what is walked together, unless one row has more: their logits are held at once."""


@dataclass(frozen=True)
class Branch:
    """A sample's tokens after the prefix: its question, and the draft that is fed behind it."""

    sample: int
    question: tuple[int, ...]
    draft: Draft

    @property
    def tokens(self) -> tuple[int, ...]:
        """Question and draft."""
        return (*self.question, *self.draft.fed)


@dataclass(frozen=True)
class TokenTree:
    """Tree of token sequences whose common beginnings are held once.

    ``tokens[i]`` is the token at node i and ``parents[i]`` the node before it (-1: none), which has a smaller number;
    ``paths`` gives every sequence's nodes.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenTree:
        """Build the tree of sequences of token ids."""
        nodes: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        paths = []
        for sequence in sequences:
            node, path = -1, []
            for token in sequence:
                if (node, token) not in nodes:
                    nodes[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = nodes[node, token]
                path.append(node)
            paths.append(tuple(path))
        return cls(tuple(tokens), tuple(parents), tuple(paths))

    def depths(self) -> list[int]:
        """Tokens that stand before each node's."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def sees(self) -> Tensor:
        """Which nodes each node sees, bool ``[nodes, nodes]``: itself and those before it in its sequences."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


@dataclass(frozen=True)
class Row:
    """One packed sequence: an image's prefix and some of its branches."""

    image: ImagePrompts
    branches: tuple[Branch, ...]

    @cached_property
    def tree(self) -> TokenTree:
        """The tokens behind the prefix."""
        return TokenTree.of([branch.tokens for branch in self.branches])

    @property
    def length(self) -> int:
        """Tokens of the row, padding left out."""
        return len(self.image.prefix) + len(self.tree.tokens)


@dataclass
class Context:
    """Layer arguments beside hidden states, for one geometry of packed rows."""

    arguments: tuple[dict[str, Any], ...]
    """Per layer, by name."""
    hidden: Tensor
    """The first layer's input, ``[rows, tokens, hidden]``."""
    vision: TokenSplit | None
    """Text rows and vision rows."""
    real: Tensor
    """Tokens that are no padding, bool ``[rows, tokens]``."""
    is_vision: Tensor
    """bool ``[rows, tokens]``."""
    masks_without_vision: dict[int, Tensor] = field(default_factory=dict)

    def without_vision(self, arguments: dict[str, Any], mask_name: str) -> dict[str, Any]:
        """Return a layer's arguments with a mask that hides vision tokens from all others."""
        mask = arguments[mask_name]
        if id(mask) not in self.masks_without_vision:
            least = torch.finfo(mask.dtype).min
            self.masks_without_vision[id(mask)] = mask.masked_fill(self.is_vision[:, None, None, :], least)
        return {**arguments, mask_name: self.masks_without_vision[id(mask)]}


@dataclass(eq=False)
class Chunk:
    """Packed rows that go through the layers together, and where the answers are in them.

    ``answer_rows`` and ``answer_columns`` (``[positions]`` each) say where every answer position is. ``spans`` gives
    for each of ``samples`` (branches, that is) the first and one past the last of its answer positions.
    """

    key: tuple[Any, ...]
    rows: tuple[Row, ...]
    context: Context
    samples: tuple[Branch, ...]
    answer_rows: Tensor
    answer_columns: Tensor
    spans: tuple[tuple[int, int], ...]
    answer_split: TokenSplit
    """Answer positions (and what fills their rectangle) apart from all others."""
    dense: DenseDistributions | None = None
    """The dense model's distributions at the answer positions, once they are known."""

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.context.hidden.shape[0] * self.context.hidden.shape[1]

    @cached_property
    def n_samples(self) -> int:
        """Number of samples; one with several options has several branches."""
        return len({branch.sample for branch in self.samples})

    @property
    def nbytes(self) -> int:
        """Memory of one hidden state of the chunk, in bytes."""
        return self.context.hidden.nbytes

    @property
    def nbytes_of_everything(self) -> int:
        """Memory of the chunk itself: embeddings, masks, rotary embeddings, what else layers are given."""
        held = [*self.context.arguments, self.context.hidden, self.context.masks_without_vision]
        tensors = {id(tensor): tensor.nbytes for tensor in tensors_of(held)}
        images = {id(row.image): row.image.nbytes for row in self.rows}
        return sum(tensors.values()) + sum(images.values()) + (self.dense.nbytes if self.dense else 0)


def make_rows(images: Sequence[ImagePrompts], drafts: Callable[[int], Sequence[Draft]]) -> list[Row]:
    """Pack the questions of each image; ``drafts`` gives the drafts for the sample at an index.

    Those of one sample stay in one row.
    """
    rows = []
    for image in images:
        pending: list[Branch] = []
        length = 0
        for sample, question in zip(image.samples, image.questions, strict=True):
            branches = [Branch(sample, question, draft) for draft in drafts(sample)]
            size = len(question) + sum(len(branch.draft.fed) for branch in branches)
            if pending and length + size > LONGEST_BRANCHES:
                rows.append(Row(image, tuple(pending)))
                pending, length = [], 0
            pending += branches
            length += size
        rows.append(Row(image, tuple(pending)))
    return rows


def cut(rows: Sequence[Row], tokens: int) -> list[tuple[Row, ...]]:
    """Group rows of similar length, each group at most ``tokens`` with its padding (or one row)."""
    groups: list[tuple[Row, ...]] = []
    current: list[Row] = []
    positions = 0
    for row in sorted(rows, key=lambda row: (row.length, row.branches[0].sample)):
        own = sum(len(branch.draft.fed) + 1 for branch in row.branches)
        if current and ((len(current) + 1) * row.length > tokens or positions + own > MOST_POSITIONS):
            groups.append(tuple(current))
            current, positions = [], 0
        current.append(row)
        positions += own
    if current:
        groups.append(tuple(current))
    return groups


class Packer:
    """Lay rows out as tensors, with the layer arguments that the decoder makes for them."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder, self._device = decoder, device

    def chunk(self, key: tuple[Any, ...], rows: Sequence[Row]) -> Chunk:
        """Lay out one group of rows."""
        width = max(row.length for row in rows)
        laid = [self._lay_out(row, width) for row in rows]
        embeddings = torch.stack([one.embeddings for one in laid])
        positions = torch.stack([one.positions for one in laid], dim=-2)
        real, vision = torch.stack([one.real for one in laid]), torch.stack([one.vision for one in laid])
        indices, seen = torch.stack([one.indices for one in laid]), torch.stack([one.seen for one in laid])
        answers = [(number, path) for number, one in enumerate(laid) for path in one.answers]
        rows_index = torch.tensor([number for number, path in answers for _ in path], device=self._device)
        columns_index = torch.tensor([column for _, path in answers for column in path], device=self._device)
        ends = list(accumulate(len(path) for _, path in answers))
        return Chunk(
            key=key,
            rows=tuple(rows),
            context=self._context(embeddings, positions, indices, seen, real, vision),
            samples=tuple(branch for row in rows for branch in row.branches),
            answer_rows=rows_index,
            answer_columns=columns_index,
            spans=tuple(pairwise((0, *ends))),
            answer_split=split_of(_marked(real.shape, rows_index, columns_index)),
        )

    def _lay_out(self, row: Row, width: int) -> _LaidOut:
        image, tree, device = row.image, row.tree, self._device
        shared, own = len(image.prefix), row.length
        own_tokens = self._decoder.embed(torch.tensor(tree.tokens, device=device))
        depths = torch.tensor(tree.depths(), device=device)
        positions = image.positions.new_zeros((*image.positions.shape[:-1], width))
        positions[..., :shared] = image.positions
        positions[..., shared:own] = image.next_position + depths.to(positions.dtype)
        indices = torch.zeros(width, dtype=torch.long, device=device)
        indices[:shared] = torch.arange(shared, device=device)
        indices[shared:own] = shared + depths
        seen = torch.eye(width, dtype=torch.bool, device=device)  # padding sees itself, so that no row is empty
        seen[:shared, :shared] = image.pattern
        seen[shared:own, :shared] = True
        seen[shared:own, shared:own] = tree.sees().to(device)
        return _LaidOut(
            embeddings=functional.pad(torch.cat((image.prefix.to(device), own_tokens)), (0, 0, 0, width - own)),
            positions=positions,
            indices=indices,
            seen=seen,
            real=torch.arange(width, device=device) < own,
            vision=functional.pad(image.vision, (0, width - shared)),
            answers=tuple(
                tuple(shared + node for node in path[len(branch.question) - 1 :])
                for branch, path in zip(row.branches, tree.paths, strict=True)
            ),
        )

    def _context(
        self, embeddings: Tensor, positions: Tensor, indices: Tensor, seen: Tensor, real: Tensor, vision: Tensor
    ) -> Context:
        recording = self._decoder.dry_run(embeddings, positions)
        masks = {
            kind: self._mask(seen, indices, self._window(kind), embeddings.dtype) for kind in set(self._decoder.kinds)
        }
        arguments = tuple(
            {**given, self._decoder.mask_name: masks[kind]}
            for given, kind in zip(recording.layers, self._decoder.kinds, strict=True)
        )
        return Context(arguments, recording.hidden, TokenSplit.from_vision_mask(vision), real, vision)

    def _window(self, kind: str) -> int | None:
        return int(self._decoder.stack.text_config.sliding_window) if kind == SLIDING else None

    def _mask(self, seen: Tensor, indices: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[rows, 1, tokens, tokens]``: numbers to add, which torch's kernels take faster than bool masks."""
        if window is not None:
            seen = seen & (indices[:, :, None] - indices[:, None, :] < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


@dataclass(frozen=True)
class _LaidOut:
    embeddings: Tensor
    positions: Tensor
    indices: Tensor
    seen: Tensor
    real: Tensor
    vision: Tensor
    answers: tuple[tuple[int, ...], ...]
    """Per branch the columns of its answer positions."""


def split_of(chosen: Tensor) -> TokenSplit:
    """Return the tokens that ``chosen`` (bool, ``[rows, tokens]``) marks apart from all others."""
    return TokenSplit(text=TokenRows.from_mask(chosen), vision=TokenRows.from_mask(~chosen))


def _marked(shape: Sequence[int], rows: Tensor, columns: Tensor) -> Tensor:
    chosen = torch.zeros(tuple(shape), dtype=torch.bool, device=rows.device)
    chosen[rows, columns] = True
    return chosen
