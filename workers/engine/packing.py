"""Packed sequences: the questions about an image after one copy of it, with a block mask and restarted positions.

Each question, with the answer that is forced on it, is a branch. A branch sees the prefix and itself, never another
branch, and its positions start where the prefix ends, so it is computed exactly as it would be alone. Rows of similar
length make a chunk, so that little of it is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workers.runtime.token_rows import TokenRows, TokenSplit

from .decoder import SLIDING, Decoder
from .prompts import ImagePrompts

LONGEST_BRANCHES = 512
"""Tokens of questions in one row; more of them make another row, since attention grows with the square."""

PREFIX, PADDING = -1, -2


@dataclass(frozen=True)
class Branch:
    """A sample's words after the prefix: its question, and the answer tokens forced on it."""

    sample: int
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All of them."""
        return (*self.question, *self.answer)


@dataclass(frozen=True)
class Row:
    """One packed sequence: an image's prefix and some of its branches."""

    image: ImagePrompts
    branches: tuple[Branch, ...]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.image.prefix) + sum(len(branch.tokens) for branch in self.branches)


@dataclass
class Context:
    """What layers are given beside hidden states, for one geometry of packed rows."""

    arguments: tuple[dict[str, Any], ...]
    """Per layer."""
    hidden: Tensor
    """What the first layer is given, ``[rows, tokens, hidden]``."""
    vision: TokenSplit | None
    """Text rows and vision rows."""
    branch: Tensor
    """``[rows, tokens]``: which branch a token belongs to, or PREFIX, or PADDING."""
    place: Tensor
    """``[rows, tokens]``: a token's place in its own prompt."""
    is_vision: Tensor
    """bool ``[rows, tokens]``."""
    _text_masks: dict[int, Tensor] = field(default_factory=dict)

    @property
    def real(self) -> Tensor:
        """What is no padding, bool ``[rows, tokens]``."""
        return self.branch != PADDING

    def without_vision(self, arguments: dict[str, Any], mask_name: str) -> dict[str, Any]:
        """A layer's arguments with a mask that hides vision tokens from all others."""
        mask = arguments[mask_name]
        if id(mask) not in self._text_masks:
            hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            self._text_masks[id(mask)] = mask.masked_fill(self.is_vision[:, None, None, :], hidden)
        return {**arguments, mask_name: self._text_masks[id(mask)]}


@dataclass
class Chunk:
    """Packed rows that go through the layers together, and where the answers are in them.

    ``answers`` names, for every answer position, its row and column: ``[positions]`` each. ``spans`` gives for each of
    ``samples`` the first and one past the last of its answer positions.
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

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.context.hidden.shape[0] * self.context.hidden.shape[1]

    @property
    def padding(self) -> int:
        """Tokens that are padding."""
        return int((self.context.branch == PADDING).sum())

    @property
    def nbytes(self) -> int:
        """Memory of one state."""
        return self.context.hidden.nbytes

    @property
    def nbytes_of_everything(self) -> int:
        """Memory of the chunk itself: embeddings, masks, rotary embeddings, what else layers are given."""
        tensors = {id(tensor): tensor.nbytes for tensor in tensors_of([*self.context.arguments, self.context.hidden])}
        images = {id(row.image): row.image.nbytes for row in self.rows}
        return sum(tensors.values()) + sum(images.values())


def make_rows(images: Sequence[ImagePrompts], forced: Callable[[int], tuple[int, ...]]) -> list[Row]:
    """Pack the questions of each image; ``forced`` gives the answer tokens to feed for the sample at a place."""
    rows = []
    for image in images:
        pending: list[Branch] = []
        length = 0
        for sample, question in zip(image.samples, image.questions, strict=True):
            branch = Branch(sample, question, forced(sample))
            if pending and length + len(branch.tokens) > LONGEST_BRANCHES:
                rows.append(Row(image, tuple(pending)))
                pending, length = [], 0
            pending.append(branch)
            length += len(branch.tokens)
        rows.append(Row(image, tuple(pending)))
    return rows


def cut(rows: Sequence[Row], tokens: int) -> list[tuple[Row, ...]]:
    """Group rows of similar length, each group at most ``tokens`` with its padding (or one row)."""
    groups: list[tuple[Row, ...]] = []
    current: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.length, row.branches[0].sample)):
        if current and (len(current) + 1) * row.length > tokens:
            groups.append(tuple(current))
            current = []
        current.append(row)
    if current:
        groups.append(tuple(current))
    return groups


class Packer:
    """Lays rows out as tensors and asks the decoder what it hands to its layers for them."""

    def __init__(self, decoder: Decoder, embed: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._decoder, self._embed, self._device = decoder, embed, device

    def chunk(self, key: tuple[Any, ...], rows: Sequence[Row]) -> Chunk:
        """Lay out one group of rows."""
        width = max(row.length for row in rows)
        laid = [self._lay_out(row, width) for row in rows]
        embeddings = torch.stack([one.embeddings for one in laid])
        positions = torch.stack([one.positions for one in laid], dim=-2)
        branch, place = torch.stack([one.branch for one in laid]), torch.stack([one.place for one in laid])
        vision = torch.stack([one.vision for one in laid])
        pattern = torch.stack([one.pattern for one in laid])
        context = self._context(embeddings, positions, branch, place, pattern, vision)
        answer_rows = [number for number, one in enumerate(laid) for span in one.answers for _ in range(*span)]
        answer_columns = [column for one in laid for span in one.answers for column in range(*span)]
        spans, start = [], 0
        for one in laid:
            for first, last in one.answers:
                spans.append((start, start + last - first))
                start += last - first
        rows_index = torch.tensor(answer_rows, device=self._device)
        columns_index = torch.tensor(answer_columns, device=self._device)
        return Chunk(
            key=key,
            rows=tuple(rows),
            context=context,
            samples=tuple(branch for row in rows for branch in row.branches),
            answer_rows=rows_index,
            answer_columns=columns_index,
            spans=tuple(spans),
            answer_split=_split_of(branch.shape, rows_index, columns_index),
        )

    def _lay_out(self, row: Row, width: int) -> _LaidOut:
        image, device = row.image, self._device
        shared, own = len(image.prefix), row.length
        words = torch.tensor([token for branch in row.branches for token in branch.tokens], device=device)
        embeddings = functional.pad(torch.cat((image.prefix.to(device), self._embed(words))), (0, 0, 0, width - own))
        branch = torch.full((width,), PADDING, device=device)
        place = torch.zeros(width, dtype=torch.long, device=device)
        branch[:shared], place[:shared] = PREFIX, torch.arange(shared, device=device)
        positions = image.positions.new_zeros((*image.positions.shape[:-1], width))
        positions[..., :shared] = image.positions
        answers, at = [], shared
        for number, one in enumerate(row.branches):
            length = len(one.tokens)
            steps = torch.arange(length, device=device)
            branch[at : at + length] = number
            place[at : at + length] = shared + steps
            positions[..., at : at + length] = image.next_position + steps.to(positions.dtype)
            answers.append((at + len(one.question) - 1, at + length))
            at += length
        vision = functional.pad(image.vision, (0, width - shared))
        pattern = functional.pad(image.pattern, (0, width - shared, 0, width - shared))
        return _LaidOut(embeddings, positions, branch, place, vision, pattern, tuple(answers))

    def _context(
        self,
        embeddings: Tensor,
        positions: Tensor,
        branch: Tensor,
        place: Tensor,
        pattern: Tensor,
        vision: Tensor,
    ) -> Context:
        recording = self._decoder.dry_run(embeddings, positions)
        masks = {
            kind: self._mask(branch, place, pattern, self._window(kind), embeddings.dtype)
            for kind in set(self._decoder.kinds)
        }
        arguments = tuple(
            {**given, self._decoder.mask_name: masks[kind]}
            for given, kind in zip(recording.layers, self._decoder.kinds, strict=True)
        )
        split = TokenSplit.from_vision_mask(vision)
        return Context(arguments, recording.hidden, split, branch, place, vision)

    def _window(self, kind: str) -> int | None:
        return int(self._decoder.stack.text_config.sliding_window) if kind == SLIDING else None

    def _mask(self, branch: Tensor, place: Tensor, pattern: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """``[rows, 1, tokens, tokens]``: bool, or numbers to add where attention is eager."""
        prefix = branch == PREFIX
        same = branch[:, :, None] == branch[:, None, :]
        before = place[:, None, :] <= place[:, :, None]
        seen = ((same & ~prefix[:, None, :]) | prefix[:, None, :]) & before & ~prefix[:, :, None]
        seen = seen | pattern
        if window is not None:
            seen &= (place[:, :, None] - place[:, None, :]) < window
        # Padding sees itself, so that no row of the mask is empty.
        padding = branch == PADDING
        seen = torch.where(padding[:, :, None], torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device), seen)
        if not self._decoder.eager:
            return seen[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)[
            :, None
        ]


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
    branch: Tensor
    place: Tensor
    vision: Tensor
    pattern: Tensor
    answers: tuple[tuple[int, int], ...]
    """Per branch the first and one past the last column of its answer positions."""


def _split_of(shape: Sequence[int], rows: Tensor, columns: Tensor) -> TokenSplit:
    chosen = torch.zeros(tuple(shape), dtype=torch.bool, device=rows.device)
    chosen[rows, columns] = True
    return TokenSplit(text=TokenRows.from_mask(chosen), vision=TokenRows.from_mask(~chosen))


__all__ = ["Branch", "Chunk", "Context", "Packer", "Row", "cut", "make_rows"]
