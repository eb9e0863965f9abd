"""Collect running sums of every kind that is measured on the dense pass's hidden states."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from workers.layerwise.hooks import Hooks, hidden_of
from workers.messages import TOKEN_GROUPS, KindSums
from workers.runtime.locate import DecoderStack
from workers.runtime.sublayers import NotSeparableError, block_of

from .batches import Batch
from .kinds import GROUPS, HISTOGRAM_EDGES, PARTS, TAIL_THRESHOLDS
from .probes import PROBE_SAMPLES
from .sums import Floats, ratio_sums, sample_sums

CKA_TOKENS = 256
"""Tokens of a batch, evenly spaced, that a minibatch estimate of HSIC is made from."""


class StatesCollector(Protocol):
    """See every batch's hidden states once; hold no more than one batch's share of them."""

    def begin(self, batch: Batch) -> None:
        """Start a batch."""
        ...

    def layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Take a layer's input and output, float32 ``[batch, tokens, hidden]``."""
        ...

    def end(self, logits: Tensor) -> None:
        """End a batch; ``logits`` ``[batch, vocabulary]`` are those of the answer's first token."""
        ...

    def sums(self) -> KindSums:
        """Return the sums so far."""
        ...


def array(tensor: Tensor) -> Floats:
    """Return a tensor as float64 on the CPU."""
    values: Floats = tensor.double().cpu().numpy()
    return values


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """d(before, after) per token, ``[batch, tokens]`` float32, from states ``[batch, tokens, hidden]`` of any dtype."""
    return 1.0 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


class Distances:
    """Geometric and proximal: cosine distance between input and output, its tail, its histogram, the update's size."""

    def __init__(self, layers: int, shards: int) -> None:
        self._sums = ratio_sums(2 + len(TAIL_THRESHOLDS), len(GROUPS), layers)
        self._histogram = np.zeros((len(GROUPS), layers, len(HISTOGRAM_EDGES) - 1), dtype=np.int64)

    def begin(self, batch: Batch) -> None:
        self._masks = torch.stack([batch.groups[group] for group in GROUPS])  # [groups, batch, tokens]
        device = self._masks.device
        self._counts = array(self._masks.sum(-1))
        self._thresholds = torch.tensor(TAIL_THRESHOLDS, device=device)[:, None, None]
        self._edges = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float32, device=device)

    def layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        distance = cosine_distance(before, after).clamp(0.0, 2.0)
        update = (after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(1e-12)
        values = torch.cat([distance[None], update[None], (distance > self._thresholds).float()]).double()
        totals = torch.einsum("gbt,kbt->kgb", self._masks.double(), values)
        self._sums[..., layer] += sample_sums(array(totals), self._counts)
        bins = torch.bucketize(distance, self._edges)
        for group, mask in enumerate(self._masks):
            counts = torch.bincount(bins[mask], minlength=self._histogram.shape[-1])
            self._histogram[group, layer] += counts.cpu().numpy()

    def end(self, logits: Tensor) -> None:
        pass

    def sums(self) -> KindSums:
        return KindSums({"distances": self._sums, "histogram": self._histogram})


class Operators:
    """What attention and the MLP each add to the stream: how far it turns the states, and its size beside the layer's.

    Attention is compared with the layer's input, the MLP with what it is added to, as in LLM-Drop (arXiv 2406.15786).
    """

    def __init__(self, layers: int, shards: int) -> None:
        self._sums = ratio_sums(3, len(PARTS), len(GROUPS), layers)
        self._added: dict[str, Tensor] = {}
        self._refused: dict[str, str] = {}

    @contextmanager
    def listening(self, stack: DecoderStack) -> Iterator[None]:
        """Take what the parts of every layer add, where its block can be taken apart."""
        with Hooks() as hooks:
            for number, layer in enumerate(stack.layers):
                try:
                    block = block_of(layer, int(stack.text_config.hidden_size))
                except NotSeparableError as error:
                    self._refused[str(number)] = str(error)
                    continue
                for name, part in zip(PARTS, (block.attention, block.mlp), strict=True):
                    hooks.after(layer.get_submodule(part.end), partial(self._take, name, part.scale))
            yield

    def _take(self, name: str, scale: float, output: Any) -> None:
        self._added[name] = hidden_of(output).float() * scale

    def begin(self, batch: Batch) -> None:
        self._masks = torch.stack([batch.groups[group] for group in GROUPS]).double()  # [groups, batch, tokens]
        self._counts = array(self._masks.sum(-1))

    def layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        added = {name: each.to(before.device).reshape(before.shape) for name, each in self._added.items()}
        self._added.clear()
        for number, name in enumerate(PARTS):
            if name not in added:
                return
            first, second = (before, before + added[name]) if name == "attention" else (after - added[name], after)
            distance = cosine_distance(first, second).clamp(0.0, 2.0)
            share = added[name].norm(dim=-1) / (after - before).norm(dim=-1).clamp_min(1e-12)
            values = torch.stack([distance, torch.arccos(1.0 - distance) / torch.pi, share]).double()
            totals = torch.einsum("gbt,kbt->kgb", self._masks, values)
            self._sums[:, :, number, :, layer] += sample_sums(array(totals), self._counts)

    def end(self, logits: Tensor) -> None:
        pass

    def sums(self) -> KindSums:
        return KindSums({"operators": self._sums}, refused=self._refused)


class Similarity:
    """Linear CKA (Kornblith et al. 2019), as a ratio of sums of unbiased minibatch HSIC estimates.

    The estimator is Song et al. 2012, equation 5, in minibatches as in Nguyen et al. 2021; it needs Gram matrices of
    some hundred tokens, whatever the model's width.
    """

    def __init__(self, layers: int, shards: int) -> None:
        groups = len(TOKEN_GROUPS)
        self._hsic = np.zeros((groups, layers, 3))
        self._products = np.zeros((groups, layers, 3, 3))
        self._batches, self._tokens = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)

    def begin(self, batch: Batch) -> None:
        """Choose the batch's tokens of each group."""
        self._chosen: list[Tensor | None] = []
        for group, name in enumerate(TOKEN_GROUPS):
            indices = batch.groups[name].flatten().nonzero().flatten()
            enough = len(indices) >= 8
            if enough:
                steps = torch.linspace(0, len(indices) - 1, min(len(indices), CKA_TOKENS), device=indices.device)
                indices = indices[steps.round().long()]
                self._batches[group] += 1
                self._tokens[group] += len(indices)
            self._chosen.append(indices if enough else None)

    def layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        flat = before.flatten(0, 1), after.flatten(0, 1)
        for group, indices in enumerate(self._chosen):
            if indices is None:
                continue
            first, second = (_gram(states[indices]) for states in flat)
            found = np.array([unbiased_hsic(first, second), unbiased_hsic(first, first), unbiased_hsic(second, second)])
            self._hsic[group, layer] += found
            self._products[group, layer] += np.outer(found, found)

    def end(self, logits: Tensor) -> None:
        pass

    def sums(self) -> KindSums:
        return KindSums(
            {"hsic": self._hsic, "products": self._products, "batches": self._batches, "tokens": self._tokens}
        )


def _gram(states: Tensor) -> Tensor:
    """Inner products ``[tokens, tokens]`` with a zero diagonal; the estimator is the same for shifted states."""
    centred = states - states.mean(0)
    return (centred @ centred.T).double().fill_diagonal_(0.0)


def unbiased_hsic(first: Tensor, second: Tensor) -> float:
    """Song et al. 2012, equation 5, from Gram matrices ``[n, n]`` with zero diagonals; n at least 4."""
    n = first.shape[0]
    rows, columns = first.sum(0), second.sum(0)
    trace = (first * second).sum()
    value = trace + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)
    return float(value) / (n * (n - 3))


class _LastStates:
    """Keep one batch's states of the last prompt token at every depth: the embeddings, then after each layer."""

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self._depths: list[Tensor] = []

    def layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        if layer == 0:
            self._depths.append(before[:, self.batch.last].clone())
        self._depths.append(after[:, self.batch.last].clone())

    def states(self) -> Tensor:
        """``[batch, layers + 1, hidden]``."""
        return torch.stack(self._depths, dim=1)


class Angles(_LastStates):
    """Angular distance of blocks of layers at the last prompt token (Gromov et al., arXiv 2403.17887)."""

    def __init__(self, layers: int, shards: int) -> None:
        self._layers = layers
        self._sums = ratio_sums(layers, layers)

    def end(self, logits: Tensor) -> None:
        """Add the angle of every block of n layers from layer l on, over pi."""
        units = torch.nn.functional.normalize(self.states().double(), dim=-1)
        angles = array(torch.arccos((units @ units.mT).clamp(-1.0, 1.0)) / torch.pi)  # [batch, depths, depths]
        for start in range(self._layers):
            for length in range(1, self._layers - start + 1):
                totals = angles[:, start, start + length]
                self._sums[:, length - 1, start] += sample_sums(totals, np.ones(len(totals)))

    def sums(self) -> KindSums:
        return KindSums({"angles": self._sums})


class AnswerStates(_LastStates):
    """Keep the last prompt token's states and the dense model's answer, for the probes fitted after the merge."""

    def __init__(self, layers: int, shards: int) -> None:
        self._limit = -(-PROBE_SAMPLES // shards)
        self._states: list[np.ndarray] = []
        self._answers: list[int] = []
        self._folds: list[int] = []

    def end(self, logits: Tensor) -> None:
        """Keep states and answers while there is room; all questions on an image fall into one fold."""
        room = self._limit - len(self._answers)
        if room <= 0:
            return
        self._states.append(self.states()[:room].float().cpu().numpy())
        self._answers += logits[:room].argmax(-1).tolist()
        self._folds += [zlib.crc32(sample.image_key.encode()) & 1 for sample in self.batch.samples[:room]]

    def sums(self) -> KindSums:
        """States ``[samples, layers + 1, hidden]``, answers and folds ``[samples]``."""
        states = np.concatenate(self._states) if self._states else np.zeros((0,), dtype=np.float32)
        return KindSums(
            {},
            {
                "states": states,
                "answers": np.array(self._answers, dtype=np.int64),
                "folds": np.array(self._folds, dtype=np.int64),
            },
        )


COLLECTORS: dict[str, type[Distances] | type[Operators] | type[Similarity] | type[Angles] | type[AnswerStates]] = {
    "distance": Distances,
    "operators": Operators,
    "cka": Similarity,
    "angular": Angles,
    "probes": AnswerStates,
}
