"""Redundancy statistics of the dense model's layers, streamed over the calibration split.

Geometric redundancy (Hartman et al. 2025, arXiv 2509.25584: the average cosine distance between consecutive hidden
states): d(x, y) = 1 - <x, y> / (|x| |y|) between a decoder layer's input and output state, per token group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import MeasurementError
from .evaluation import DEFAULT_BATCH_SIZE, PreparedBatch, prepare_batch
from .messages import TOKEN_GROUPS, RedundancySums
from .models import LoadedModel
from .prompts import to_device
from .runtime.families import describe
from .tasks import Task


def score_redundancy(
    loaded: LoadedModel, task: Task, *, shard: int = 0, shards: int = 1, batch_size: int = DEFAULT_BATCH_SIZE
) -> RedundancySums:
    """Accumulate over ``samples[shard::shards]`` of the calibration split, one prefill per batch of prompts.

    Samples whose image cannot be decoded are left out and not counted.

    Raises:
        MeasurementError: the decoder layers do not pass ``[batch, tokens, hidden]`` states of the prompt's length.
    """
    samples = task.calibration[shard::shards]
    accumulator = _Accumulator(describe(loaded.model).num_layers)
    for start in range(0, len(samples), batch_size):
        batch = prepare_batch(loaded, task, samples[start : start + batch_size])
        if batch.inputs is not None:
            _add_batch(loaded, batch, accumulator)
    return accumulator.sums()


def _add_batch(loaded: LoadedModel, batch: PreparedBatch, accumulator: _Accumulator) -> None:
    assert batch.inputs is not None
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    groups = token_groups(inputs, describe(loaded.model).vision_token_ids)
    accumulator.add_samples(groups)
    with torch.inference_mode(), _distances_into(loaded, groups, accumulator):
        # One new token is the prefill alone, entered the way every family prepares its inputs for.
        loaded.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
        )


@contextmanager
def _distances_into(loaded: LoadedModel, groups: dict[str, torch.Tensor], accumulator: _Accumulator) -> Iterator[None]:
    """Hook every decoder layer; only one layer's input state is held at a time."""
    stack = loaded.model.get_submodule(describe(loaded.model).stack_path)
    held: dict[int, torch.Tensor] = {}
    expected = tuple(groups["all"].shape)

    def before(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if state.dim() != 3 or tuple(state.shape[:2]) != expected:
            raise MeasurementError(
                f"layer {layer}: the hidden state has shape {tuple(state.shape)}, expected {expected} and hidden"
            )
        held[layer] = state.to(torch.float32, copy=True)

    def after(layer: int, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        accumulator.add_layer(layer, cosine_distance(held.pop(layer), state), groups)

    handles = []
    for number, module in enumerate(stack.children()):
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, layer=number: before(layer, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _, __, output, layer=number: after(layer, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_groups(inputs: dict[str, Any], vision_token_ids: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Masks ``[batch, tokens]`` of the vision tokens, the other tokens, and both; padding is in none."""
    real = inputs["attention_mask"].bool()
    ids = torch.tensor(sorted(vision_token_ids), device=real.device)
    vision = torch.isin(inputs["input_ids"], ids) & real
    return {"vision": vision, "text": real & ~vision, "all": real}


def cosine_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """d(before, after) per token, ``[batch, tokens]`` float32, from states ``[batch, tokens, hidden]`` of any dtype."""
    return 1.0 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


class _Accumulator:
    """Sums over tokens and samples in float64, on the CPU."""

    def __init__(self, layers: int) -> None:
        zeros = {group: torch.zeros(layers, dtype=torch.float64) for group in TOKEN_GROUPS}
        self.distances = zeros
        self.squares = {group: zero.clone() for group, zero in zeros.items()}
        self.sample_squares = {group: zero.clone() for group, zero in zeros.items()}
        self.sample_products = {group: zero.clone() for group, zero in zeros.items()}
        self.tokens = dict.fromkeys(TOKEN_GROUPS, 0)
        self.token_squares = dict.fromkeys(TOKEN_GROUPS, 0)
        self.samples = 0

    def add_samples(self, groups: dict[str, torch.Tensor]) -> None:
        """Count the samples and tokens of a batch; ``groups`` holds masks ``[batch, tokens]``."""
        self.samples += groups["all"].shape[0]
        for group, mask in groups.items():
            counts = mask.sum(dim=1).tolist()
            self.tokens[group] += sum(counts)
            self.token_squares[group] += sum(count * count for count in counts)

    def add_layer(self, layer: int, distance: torch.Tensor, groups: dict[str, torch.Tensor]) -> None:
        """Add a layer's distances ``[batch, tokens]``."""
        wide = distance.double()
        for group, mask in groups.items():
            chosen = wide.masked_fill(~mask, 0.0)
            per_sample = chosen.sum(dim=1)
            self.distances[group][layer] += per_sample.sum().item()
            self.squares[group][layer] += chosen.square().sum().item()
            self.sample_squares[group][layer] += per_sample.square().sum().item()
            self.sample_products[group][layer] += (per_sample * mask.sum(dim=1)).sum().item()

    def sums(self) -> RedundancySums:
        """Return the sums as plain values."""
        return RedundancySums(
            distance_sum=_plain(self.distances),
            distance_squares=_plain(self.squares),
            sample_squares=_plain(self.sample_squares),
            sample_products=_plain(self.sample_products),
            tokens=dict(self.tokens),
            token_squares=dict(self.token_squares),
            samples=self.samples,
        )


def _plain(values: dict[str, torch.Tensor]) -> dict[str, tuple[float, ...]]:
    return {group: tuple(value.tolist()) for group, value in values.items()}
