"""Fit linear probes of the dense model's answer on the state at the answer position.

The paper's functional redundancy compares the best predictors from X_{l-1} and X_l, its informational one conditional
uncertainty. Both are estimated here from one family of predictors, multinomial logistic regression with a quadratic
penalty, fitted on one half of the samples and judged on the other (ours; usable information as in Xu et al. 2020,
"A Theory of Usable Information under Computational Constraints", where no discretisation is needed).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from workers.messages import KindSums

from .sums import Floats
from .table import LayerMeasurement

PENALTY = 1e-2
"""Of the squared weights, for states scaled to unit mean square, beside the mean log loss."""

STEPS = 200
PROBE_SAMPLES = 512
"""Samples whose states are kept at most, over all shards, so that memory does not grow with the split."""


def probe_rows(sums: KindSums, layers: int) -> Iterator[LayerMeasurement]:
    """Rows from ``states`` ``[samples, layers + 1, hidden]``, ``answers`` (token ids) and ``folds`` (0 or 1).

    Nothing where all answers are the same, or a fold holds too few samples: there is nothing to predict then.
    """
    if not len(sums.gathered["states"]):
        return
    states = sums.gathered["states"].astype(np.float64)
    answers = np.unique(sums.gathered["answers"], return_inverse=True)[1]
    folds = sums.gathered["folds"].astype(int)
    if answers.max() == 0 or min(np.bincount(folds, minlength=2)) < 4:
        return
    log_loss, brier = held_out_losses(states, answers, folds)
    prior = _prior_losses(answers, folds)
    samples = len(answers)
    for layer in range(layers):
        for name, values in (
            ("functional_gap", brier[:, layer] - brier[:, layer + 1]),
            ("information_gap", log_loss[:, layer] - log_loss[:, layer + 1]),
            ("usable_information", prior - log_loss[:, layer + 1]),
        ):
            error = float(values.std(ddof=1) / np.sqrt(samples))
            yield LayerMeasurement(name, "last", layer, float(values.mean()), error, samples)


def held_out_losses(states: Floats, answers: NDArray[np.intp], folds: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Log loss (nats) and Brier score of every sample at every depth, both ``[samples, layers + 1]``.

    Each half of the samples is judged by probes fitted on the other.
    """
    classes = int(answers.max()) + 1
    log_loss = np.zeros(states.shape[:2])
    brier = np.zeros(states.shape[:2])
    for fold in (0, 1):
        train, test = folds != fold, folds == fold
        for depth in range(states.shape[1]):
            probabilities = _fit_and_predict(states[train, depth], answers[train], states[test, depth], classes)
            truth = np.eye(classes)[answers[test]]
            log_loss[test, depth] = -np.log((probabilities * truth).sum(1))
            brier[test, depth] = ((probabilities - truth) ** 2).sum(1)
    return log_loss, brier


def _fit_and_predict(train: Floats, answers: NDArray[np.intp], test: Floats, classes: int) -> Floats:
    """Class probabilities ``[test samples, classes]`` of a probe fitted by accelerated gradient descent.

    A penalised linear probe only sees the span of its training states, so both are rotated into it first: at most as
    many dimensions as samples, whatever the model's width.
    """
    mean = train.mean(0)
    centred = train - mean
    scale = np.sqrt((centred**2).sum(1).mean()) or 1.0
    left, singular, right = np.linalg.svd(centred / scale, full_matrices=False)
    features, truth = left * singular, np.eye(classes)[answers]
    # The log loss's curvature is at most half the features' largest mean square (Boehning 1992).
    step = 1.0 / (0.5 * singular[0] ** 2 / len(train) + 0.25 + PENALTY)
    weights = np.zeros((features.shape[1], classes))
    bias = np.log(truth.mean(0) + 1e-3)
    ahead, ahead_bias, momentum = weights, bias, 1.0
    for _ in range(STEPS):
        residual = (_softmax(features @ ahead + ahead_bias) - truth) / len(train)
        new = ahead - step * (features.T @ residual + PENALTY * ahead)
        new_bias = ahead_bias - step * residual.sum(0)
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - weights)
        ahead_bias = new_bias + (momentum - 1) / following * (new_bias - bias)
        weights, bias, momentum = new, new_bias, following
    return _smoothed(_softmax((test - mean) / scale @ right.T @ weights + bias), classes)


def _softmax(scores: Floats) -> Floats:
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    total: Floats = shifted / shifted.sum(1, keepdims=True)
    return total


def _smoothed(probabilities: Floats, classes: int) -> Floats:
    """Mixed with a thousandth of the uniform distribution: an answer unseen in training has a finite loss."""
    return 0.999 * probabilities + 0.001 / classes


def _prior_losses(answers: NDArray[np.intp], folds: NDArray[np.intp]) -> Floats:
    """Log loss of the answers' frequencies in the other half, ``[samples]``: the loss without any state."""
    classes = int(answers.max()) + 1
    losses = np.zeros(len(answers))
    for fold in (0, 1):
        shares = np.bincount(answers[folds != fold], minlength=classes) / (folds != fold).sum()
        losses[folds == fold] = -np.log(_smoothed(shares[None], classes)[0, answers[folds == fold]])
    return losses
