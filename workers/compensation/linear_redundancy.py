"""Measure linear redundancy: how much of a later state no linear map of a layer's MLP output can explain.

For layers k < j the share of X_j's energy, every token divided by its root mean square, that is left by the best
X_j ~ (X_k - M_k) + M_k T: functional redundancy with the predictor class that can be folded into the weights. Where it
is small, the layers between can go once T is folded in. All pairs come from one pass over the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from workers.messages import GapShare
from workers.models.loading import LoadedModel
from workers.runtime.folding import ActedOn, fold_site
from workers.runtime.locate import locate

from .calibration import Calibration
from .sums import GapSums, solve
from .weighting import inverse_mean_square

FEWEST_TOKENS = 2048
TOKENS_PER_DIMENSION = 3
"""Tokens that the shares are estimated on: this many a hidden dimension, and at least so many."""


def tokens_for(hidden: int) -> int:
    """Calibration tokens for a model of this width."""
    return max(FEWEST_TOKENS, TOKENS_PER_DIMENSION * hidden)


def linear_redundancy(loaded: LoadedModel, calibration: Calibration, *, ridge: float) -> tuple[GapShare, ...]:
    """Return the unexplained shares of all pairs (kept layer, last skipped layer); layers that hold no map have none.

    Products within a batch are in float32: the shares are predictions, which need no more than a few digits.
    """
    outputs = _outputs(loaded, calibration)
    return tuple(share for layer in sorted(outputs) for share in _shares_of(layer, outputs[layer], calibration, ridge))


def _outputs(loaded: LoadedModel, calibration: Calibration) -> dict[int, list[Tensor]]:
    """M of every layer that can hold a map, by batch, ``[kept, hidden]``, from one dense pass."""
    stack = locate(loaded.model)
    shares = calibration.holders["mlp"].shares
    sites = {layer: fold_site(stack, layer) for layer in shares}
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    for batch in calibration.batches:
        with ExitStack() as entered, torch.inference_mode():
            watched = {layer: entered.enter_context(ActedOn(site.outputs)) for layer, site in sites.items()}
            stack.owner(*batch.args, **batch.kwargs)
            for layer, each in watched.items():
                outputs[layer].append(each.take().to(batch.kept.device)[batch.kept] * shares[layer])
    return outputs


def _shares_of(layer: int, outputs: list[Tensor], calibration: Calibration, ridge: float) -> Iterator[GapShare]:
    batches = calibration.batches
    for end in range(layer + 1, len(batches[0].targets)):
        parts = []
        for output, batch in zip(outputs, batches, strict=True):
            target = batch.targets[end]
            residual = batch.wanted(layer, end) - batch.targets[layer].double()
            weights = inverse_mean_square(target)
            parts.append(GapSums.of(output, residual, target, weights, products=torch.float32))
        sums = GapSums.merge(parts)
        yield GapShare(layer, end, sums.plain_share, solve(sums, ridge=ridge).unexplained)
