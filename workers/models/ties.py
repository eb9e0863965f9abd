"""Find ties: two logits so close that the shape of a batch may change their order.

A model's logits for a prompt depend, in their last digits, on what else is computed with it: on the batch, its padding,
the number of threads. Where the most likely token leads by less than that, greedy decoding is decided by chance. Every
evaluation path therefore takes the answer to such a sample from one computation: the prompt alone, without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

UNITS_IN_THE_LAST_PLACE = 4
FLOAT32_NOISE = 5e-5
"""In float32, sums over many layers leave more noise than the logits' own last place; relative to the larger logit.

Several times what tests/benchmarks/logit_noise.py finds.
"""


def tie_bound(top: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from the largest logits ``top`` within which others are tied, for a model in ``dtype``.

    Logits below 1 are taken as 1, since noise does not shrink with them.
    """
    scale = top.abs().clamp(min=1.0)
    if dtype in (torch.float32, torch.float64):
        return FLOAT32_NOISE * scale
    # The last place of a number x is between eps / 2 and eps times x.
    return UNITS_IN_THE_LAST_PLACE * torch.finfo(dtype).eps / 2 * scale


def decides_ties(dtype: torch.dtype) -> bool:
    """Whether ties are rare enough to be decided apart, one by one: half precision has one in most long answers."""
    return dtype in (torch.float32, torch.float64)


class AnswerWatch(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Record which rows of a batch had NaN among their logits, and which met a tie; change nothing.

    ``ends`` are the tokens that end an answer; what is generated in a row after one of them does not count.
    """

    def __init__(self, rows: int, prompt_length: int, ends: frozenset[int], dtype: torch.dtype) -> None:
        self.nan = torch.zeros(rows, dtype=torch.bool)
        self.tied = torch.zeros(rows, dtype=torch.bool)
        self._prompt_length, self._ends, self._dtype = prompt_length, ends, dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at ``scores`` ``[batch, vocabulary]``."""
        self.nan = self.nan.to(scores.device) | scores.isnan().any(dim=-1)
        top = scores.float().topk(2, dim=-1).values
        ends = torch.tensor(sorted(self._ends), device=input_ids.device, dtype=input_ids.dtype)
        answering = ~torch.isin(input_ids[:, self._prompt_length :], ends).any(dim=-1)
        tied = top[:, 0] - top[:, 1] <= tie_bound(top[:, 0], self._dtype)
        self.tied = self.tied.to(scores.device) | (tied & answering)
        return scores


def end_tokens(model: object) -> frozenset[int]:
    """Return the tokens that end a generated answer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends) if isinstance(ends, list | tuple) else frozenset((int(ends),))
