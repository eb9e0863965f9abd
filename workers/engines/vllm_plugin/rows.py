"""Split a step's rows into text and vision tokens, and describe text rows to attention as sequences of their own.

A step of vLLM holds the new tokens of several requests one behind the other: ``query_start``, ``[requests + 1]``, says
where each begins, ``seq_lens``, ``[requests]``, how many tokens of it there are with those of earlier steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a step: ``vision_mask`` is bool ``[tokens]`` on the CPU, the others index its rows."""

    vision_mask: Tensor
    text: Tensor
    vision: Tensor

    @classmethod
    def of(cls, vision_mask: Tensor, tokens: int, device: torch.device) -> Rows:
        """Split ``tokens`` rows; those behind the end of the mask are padding, which is as good as text."""
        mask = torch.zeros(tokens, dtype=torch.bool)
        mask[: len(vision_mask)] = vision_mask.cpu()
        text, vision = (~mask).nonzero().flatten(), mask.nonzero().flatten()
        return cls(mask, text.to(device), vision.to(device))


@dataclass(frozen=True)
class Queries:
    """Text rows as attention's queries: sequences that end where their last query is.

    ``query_start`` is int32 ``[sequences + 1]`` into the text rows, ``seq_lens`` int32 ``[sequences]``, ``request``
    the request whose cache each sequence reads, int64 ``[sequences]``.
    """

    query_start: Tensor
    seq_lens: Tensor
    request: Tensor

    @property
    def longest_query(self) -> int:
        return int((self.query_start[1:] - self.query_start[:-1]).max())


def text_runs(vision_mask: Tensor, query_start: Tensor, seq_lens: Tensor) -> Queries:
    """Give every uninterrupted run of text rows a sequence that ends with it, so that a causal mask is its own.

    The keys are those of all tokens. There must be a text row.
    """
    text = (~vision_mask[: int(query_start[-1])]).nonzero().flatten()
    request = torch.searchsorted(query_start[1:].long().contiguous(), text, right=True)
    ends_run = (text[1:] != text[:-1] + 1) | (request[1:] != request[:-1])
    ends = torch.cat([ends_run.nonzero().flatten() + 1, torch.tensor([len(text)])])
    last, of_request = text[ends - 1], request[ends - 1]
    behind = query_start[1:].long()[of_request] - 1 - last  # rows of the request behind the run
    return Queries(
        query_start=torch.cat([torch.zeros(1, dtype=torch.long), ends]).int(),
        seq_lens=(seq_lens.long()[of_request] - behind).int(),
        request=of_request,
    )


def text_only(vision_mask: Tensor, query_start: Tensor, text_before: Tensor) -> tuple[Queries, Tensor]:
    """Give every request's text rows a sequence of text alone, behind ``text_before`` ones, ``[requests]``.

    Also gives each text row's index in that sequence, ``[text rows]``. There must be a text row.
    """
    text = (~vision_mask[: int(query_start[-1])]).nonzero().flatten()
    request = torch.searchsorted(query_start[1:].long().contiguous(), text, right=True)
    counts = torch.bincount(request, minlength=len(text_before))
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    index = torch.arange(len(text)) - first[request] + text_before[request]
    present = counts.nonzero().flatten()
    queries = Queries(
        query_start=torch.cat([first[:1], counts[present].cumsum(0)]).int(),
        seq_lens=(text_before + counts)[present].int(),
        request=present,
    )
    return queries, index


class VisionSlots:
    """Remember of every slot of a paged KV cache whether its token is a vision token.

    A slot is written when its token is computed, in whichever step, so the flags are right for every token that a
    block table reaches.
    """

    def __init__(self) -> None:
        self._flags = torch.zeros(0, dtype=torch.bool)

    def write(self, slots: Tensor, vision_mask: Tensor) -> None:
        """Note the tokens of a step: ``slots``, ``[tokens]``, and bool ``[tokens]``."""
        needed = int(slots.max()) + 1
        if needed > len(self._flags):
            self._flags = torch.cat([self._flags, torch.zeros(needed, dtype=torch.bool)])
        self._flags[slots] = vision_mask

    def text_among(self, lengths: Tensor, block_table: Tensor, block_size: int) -> Tensor:
        """Count the text tokens among the first ``lengths`` of each request, ``[requests]``."""
        counts = torch.zeros(len(lengths), dtype=torch.long)
        for request, length in enumerate(lengths.tolist()):
            slots = slots_of(torch.arange(length), block_table[request], block_size)
            counts[request] = length - int(self._flags[slots].sum())
        return counts


def slots_of(indices: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Give the slots of ``indices`` in a sequence whose ``blocks`` are given, ``[blocks]`` or ``[indices, blocks]``."""
    block = indices // block_size
    own = blocks[block] if blocks.dim() == 1 else blocks.gather(1, block[:, None])[:, 0]
    return own.long() * block_size + indices % block_size
