"""Measure the KL divergence of a plan's answers from the dense model's, on the latter's most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.layerwise.decoder import Decoder

TOP = 512
"""Tokens of the dense model's distribution that are kept apart at each position; the rest counts as one."""


LOGITS_BYTES = 256 << 20
"""What the logits of the positions that are looked at together may take in float32."""


@dataclass(frozen=True)
class DenseDistributions:
    """The dense model's distributions at a chunk's answer positions.

    ``tokens`` and ``log_probabilities`` are ``[positions, k]``, ``log_rest`` (``[positions]``) is the logarithm of the
    probability of all other tokens.
    """

    tokens: Tensor
    log_probabilities: Tensor
    log_rest: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> DenseDistributions:
        """Keep the most likely tokens of ``logits``, ``[positions, vocabulary]``."""
        log_probabilities = logits.log_softmax(-1)
        top, tokens = log_probabilities.topk(min(TOP, logits.shape[-1]), dim=-1)
        return cls(tokens.to(torch.int32), top, _log_rest(top))

    @classmethod
    def joined(cls, parts: Sequence[DenseDistributions]) -> DenseDistributions:
        """Put those of several positions behind each other."""
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.log_probabilities for part in parts]),
            torch.cat([part.log_rest for part in parts]),
        )

    def at(self, positions: slice) -> DenseDistributions:
        """Select some positions."""
        return DenseDistributions(self.tokens[positions], self.log_probabilities[positions], self.log_rest[positions])

    @property
    def nbytes(self) -> int:
        """Memory of the tensors."""
        return self.tokens.nbytes + self.log_probabilities.nbytes + self.log_rest.nbytes

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(dense || plan) ``[positions]``, in nats, of distributions over the k tokens and the rest as one.

        It is a lower bound of the divergence over the whole vocabulary (joining outcomes can only lower it), and
        never negative.
        """
        own = logits.log_softmax(-1).gather(1, self.tokens.long())
        dense = self.log_probabilities
        terms = (dense.exp() * (dense - own)).sum(-1)
        rest = self.log_rest.exp() * (self.log_rest - _log_rest(own))
        return (terms + torch.where(self.log_rest.exp() > 0, rest, 0.0)).clamp(min=0.0)


def pieces(positions: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of positions whose logits are few enough to be held at once."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))
    for first in range(0, positions, step):
        yield slice(first, min(first + step, positions))


def distributions(decoder: Decoder, states: Tensor) -> DenseDistributions:
    """Return the distributions at positions with final states ``[positions, hidden]``."""
    return DenseDistributions.joined(
        [DenseDistributions.of(decoder.logits(states[piece])) for piece in pieces(len(states), decoder.vocabulary)]
    )


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the rest of probability 1, at least the smallest number that float32 tells from nothing."""
    left = -torch.expm1(log_probabilities.double().logsumexp(-1))
    return left.clamp(min=1e-12).log().float()
