"""Make one request of the dense model or of a speculation on it: the tokens that answer it, and its seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from workers.evaluation.plain import without_prompt
from workers.latency.request import synchronise
from workers.models.loading import LoadedModel
from workers.models.ties import end_tokens


@dataclass(frozen=True)
class Answered:
    """Seconds of a request, and of what comes behind its first token; the rows' tokens with those that end them."""

    seconds: float
    decoding: float
    answers: list[tuple[int, ...]]


class _FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Note when the first token was there; end nothing."""

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        self._devices = devices
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        """Look at ``input_ids`` ``[batch, tokens]``."""
        if self.at is None:
            synchronise(*self._devices)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(loaded: LoadedModel, model: Any, inputs: Mapping[str, Any], **tokens: int) -> Answered:
    """Time one request of the model, or of a speculation on it, the device idle before and after."""
    first = _FirstToken(loaded.devices)
    synchronise(*loaded.devices)
    started = time.perf_counter()
    with torch.inference_mode(), loaded.states_left_in_place():
        sequences = generate(loaded, model, inputs, stopping_criteria=StoppingCriteriaList([first]), **tokens)
    synchronise(*loaded.devices)
    ended = time.perf_counter()
    decoding = ended - (ended if first.at is None else first.at)
    return Answered(ended - started, decoding, answers_of(loaded, sequences, inputs))


def generate(loaded: LoadedModel, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
    """Generate greedily; ``model`` is the loaded one or a speculation on it."""
    with torch.inference_mode(), loaded.states_left_in_place():
        sequences: Tensor = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
            use_cache=True,  # checkpoints often say no, left over from training; whoever serves them has one
            return_dict_in_generate=False,
            **settings,
        )
    return sequences


def answers_of(loaded: LoadedModel, sequences: Tensor, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return each row's new tokens, up to the one that ends it; ``sequences`` is ``[batch, tokens]``."""
    ends = end_tokens(loaded.model)
    found = []
    for row in without_prompt(sequences, inputs["input_ids"]).tolist():
        length = next((number for number, token in enumerate(row, start=1) if token in ends), len(row))
        found.append(tuple(row[:length]))
    return found
