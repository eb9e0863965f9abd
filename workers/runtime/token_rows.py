"""Splitting a batch of sequences into text rows and vision rows, and putting them together again.

Samples of a batch may have different numbers of text tokens. Their rows then form a rectangle that is padded by
repeating a row; padding is never written back, and attention masks it out as a key.

Shapes: ``batch`` samples of ``length`` tokens each, of which ``rows`` are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Some rows of every sample of a batch of ``batch`` sequences of ``length`` tokens.

    ``index`` holds the original positions, ``[batch, rows]``, ascending within a sample, padding after them;
    ``valid`` marks what is not padding, ``None`` when nothing is. ``shared`` is the one row of ``index``, ``[rows]``,
    when all samples have the same positions, which makes gathering a plain selection.
    """

    batch: int
    length: int
    index: Tensor
    valid: Tensor | None
    shared: Tensor | None
    source: Tensor
    """Where the valid rows are in the flattened rectangle, ``[sum of counts]``."""
    target: Tensor
    """Where they are in the flattened batch, ``[sum of counts]``."""

    @classmethod
    def from_mask(cls, mask: Tensor) -> TokenRows:
        """Return the rows that ``mask`` (bool, ``[batch, length]``) selects; at least one column wide."""
        batch, length = mask.shape
        counts = mask.sum(1)
        width = max(int(counts.max()), 1)
        # Selected positions first, in order: a stable sort of "not selected".
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :width]
        column = torch.arange(width, device=mask.device)
        valid = column[None, :] < counts[:, None]
        last = (counts - 1).clamp(min=0)
        order = torch.where(valid, order, order.gather(1, last[:, None]))
        all_valid = bool(valid.all())
        same = batch == 1 or (all_valid and bool((order == order[:1]).all()))
        flat_valid = valid.flatten()
        offsets = torch.arange(batch, device=mask.device)[:, None] * length
        return cls(
            batch=batch,
            length=length,
            index=order,
            valid=None if all_valid else valid,
            shared=order[0] if same else None,
            source=flat_valid.nonzero().flatten(),
            target=(order + offsets).flatten()[flat_valid],
        )

    @property
    def width(self) -> int:
        """Rows per sample, padding included."""
        return self.index.shape[1]

    def take(self, tensor: Tensor, token_dim: int, batch_dim: int | None) -> Tensor:
        """Return the rows of ``tensor`` along ``token_dim``; its ``batch_dim`` may be 1 (broadcast) or missing.

        A tensor that broadcasts over the batch comes back broadcast where all samples share their rows, else with one
        entry per sample. Without a batch dimension and with rows that differ, one is put in front.
        """
        if self.shared is not None:
            return tensor.index_select(token_dim, self.shared.to(tensor.device))
        if batch_dim is None:
            if tensor.dim() + token_dim != 0 and token_dim != 0:
                raise ValueError("a tensor without a batch dimension must have its tokens first to be split")
            tensor, batch_dim, token_dim = tensor[None], 0, 1
        shape = [1] * tensor.dim()
        shape[batch_dim], shape[token_dim] = self.batch, self.width
        expanded = list(tensor.shape)
        expanded[batch_dim] = self.batch
        return torch.take_along_dim(tensor.expand(expanded), self.index.to(tensor.device).view(shape), token_dim)

    def put(self, into: Tensor, rows: Tensor) -> Tensor:
        """Return a copy of ``into``, ``[..., batch, length, hidden]``, with the valid ``rows`` in their places."""
        flat = into.flatten(-3, -2).clone()
        values = rows.flatten(-3, -2).to(flat.device, flat.dtype)
        if self.valid is not None:
            values = values.index_select(-2, self.source.to(flat.device))
        flat.index_copy_(flat.dim() - 2, self.target.to(flat.device), values)
        return flat.reshape(into.shape)


@dataclass(frozen=True)
class TokenSplit:
    """A prompt's text rows and vision rows; together they are all rows."""

    text: TokenRows
    vision: TokenRows

    @classmethod
    def from_vision_mask(cls, vision: Tensor) -> TokenSplit | None:
        """Split by ``vision`` (bool, ``[batch, length]``); ``None`` when there is no vision token."""
        if vision.dim() != 2:
            raise ValueError(f"a vision mask has shape [batch, tokens], got {list(vision.shape)}")
        vision = vision.bool()
        if not bool(vision.any()):
            return None
        return cls(text=TokenRows.from_mask(~vision), vision=TokenRows.from_mask(vision))

    def of_last(self, length: int) -> TokenSplit | None:
        """Return the split of the last ``length`` tokens only."""
        vision = torch.zeros(self.text.batch * self.text.length, dtype=torch.bool, device=self.vision.target.device)
        vision[self.vision.target] = True
        return TokenSplit.from_vision_mask(vision.view(self.text.batch, self.text.length)[:, -length:])

    def merge_along_tokens(self, text: Tensor, vision: Tensor) -> Tensor:
        """Keys or values of both parts, ``[batch, heads, rows, size]``, in original order, ``[..., length, size]``."""
        shape = (self.text.batch, self.text.length, text.shape[1], text.shape[3])
        merged = text.new_empty((shape[0] * shape[1], *shape[2:]))
        for rows, part in ((self.text, text), (self.vision, vision)):
            values = part.transpose(1, 2).flatten(0, 1)
            if rows.valid is not None:
                values = values.index_select(0, rows.source.to(values.device))
            merged.index_copy_(0, rows.target.to(merged.device), values)
        return merged.view(shape).transpose(1, 2)
