"""Put the dense model's own answers behind the prompts: one pass then reads every position that an answer is read from.

What decoding feeds back is fed: the answer's tokens without the end token, or without the last one where the limit of
new tokens ended it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BatchFeature

from .greedy import decode_greedily
from .inputs import PreparedBatch
from .loading import LoadedModel
from .multiple_choice import NAN_LOGITS


class NoPromptsReturnedError(RuntimeError):
    """The family's ``generate`` returns no prompts, so that answers cannot be put behind them."""

    def __init__(self) -> None:
        super().__init__("this family's generate() returns no prompts, so answers cannot be put behind them")


def generate_fed_answers(
    loaded: LoadedModel, batch: PreparedBatch, max_new_tokens: int
) -> tuple[list[Tensor], dict[str, str]]:
    """Return the tokens that greedy decoding feeds back, by sample on the CPU; and why samples have none.

    Raises NoPromptsReturnedError.
    """
    prompts, sequences, watch = decode_greedily(loaded, batch, max_new_tokens)
    length = prompts.shape[1]
    if not torch.equal(sequences[:, :length], prompts):
        raise NoPromptsReturnedError
    answers = [fed_tokens(row, loaded.model.generation_config.eos_token_id) for row in sequences[:, length:].cpu()]
    nan = zip(batch.samples, watch.nan.tolist(), strict=True)
    return answers, {sample.id: NAN_LOGITS for sample, is_nan in nan if is_nan}


def fed_tokens(answer: Tensor, end: int | Sequence[int] | None) -> Tensor:
    """Return the generated tokens that decoding feeds back: all before the end token, or before the last one."""
    ends = torch.isin(answer, torch.tensor([end] if isinstance(end, int) else list(end or ())))
    length = int(ends.nonzero()[0]) if bool(ends.any()) else len(answer) - 1
    return answer[:length]


def append_answers(inputs: BatchFeature, answers: Sequence[Tensor], pad: int) -> BatchFeature:
    """Put answers behind prompts, padded on the right. Whatever else has an entry per token gets that of text, 0."""
    width = max(len(answer) for answer in answers)
    shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
    tokens = torch.full((len(answers), width), pad)
    mask = torch.zeros((len(answers), width), dtype=torch.long)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = answer
        mask[row, : len(answer)] = 1
    extended = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:
            more = {"input_ids": tokens, "attention_mask": mask}.get(name, torch.zeros_like(tokens))
            extended[name] = torch.cat([value, more.to(device, value.dtype)], dim=1)
    return BatchFeature(extended)
