"""Cut calibration samples into batches that fit into memory with all that a measuring pass keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.errors import MeasurementError
from workers.models.inputs import PreparedBatch, prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.runtime.locate import DecoderStack
from workers.tasks import Sample, Task

KEPT_BYTES = 256 << 20
"""What a batch's states of all layers, or one layer's attention maps, may take."""


@dataclass(frozen=True)
class Batch:
    """Samples with their inputs on the device and masks ``[batch, tokens]`` of every token group.

    The last ``answer_tokens`` columns hold the dense model's answers, padded on the right; prompts are before them.
    """

    samples: tuple[Sample, ...]
    inputs: dict[str, Any]
    groups: dict[str, Tensor]
    answer_tokens: int = 0

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Length of the padded prompts with the answers behind them."""
        return int(self.groups["all"].shape[1])

    @property
    def last(self) -> int:
        """The column of every prompt's last token."""
        return self.tokens - self.answer_tokens - 1

    @property
    def work(self) -> float:
        """Cost of a pass over the batch, answers included, in passes over one prompt without an answer."""
        return self.size * self.tokens / (self.last + 1)

    @property
    def answering(self) -> Tensor:
        """Which of the columns from :attr:`last` on an answer is read from, bool ``[batch, 1 + answer_tokens]``."""
        return self.groups["answer"][:, self.last :]


def batches(
    loaded: LoadedModel,
    task: Task,
    samples: Sequence[Sample],
    stack: DecoderStack,
    token_ids: tuple[int, ...],
    size: int,
    failed: dict[str, str],
) -> Iterator[Batch]:
    """Yield batches of at most ``size`` samples, smaller where prompts are long; what fails goes to ``failed``."""
    position = 0
    while position < len(samples):
        prepared = prepare_batch(loaded, task, samples[position : position + size])
        fitting = size if prepared.inputs is None else _fitting(prepared, stack)
        if fitting < len(prepared.samples):
            size = fitting
            continue
        position += size
        failed.update(prepared.failed)
        if prepared.inputs is not None:
            inputs = to_device(prepared.inputs, loaded.device, loaded.model.dtype)
            yield Batch(prepared.samples, inputs, token_groups(inputs, token_ids))


def _fitting(prepared: PreparedBatch, stack: DecoderStack) -> int:
    """How many samples of such a length fit into ``KEPT_BYTES``, at least one."""
    assert prepared.inputs is not None
    tokens = int(prepared.inputs["input_ids"].shape[1])
    config = stack.text_config
    states = len(stack.layers) * tokens * int(config.hidden_size) * 4
    maps = int(config.num_attention_heads) * tokens * tokens * 4
    return max(1, KEPT_BYTES // max(states, maps))


def token_groups(
    inputs: dict[str, Any], vision_token_ids: tuple[int, ...], answer_tokens: int = 0
) -> dict[str, Tensor]:
    """Masks ``[batch, tokens]`` of the prompt's vision tokens, other tokens, both, and its last one.

    ``answer`` is that last token and the ``answer_tokens`` columns behind it. Padding, on the left of the prompts and
    on the right of the answers, is in none.
    """
    real = inputs["attention_mask"].bool()
    last = torch.zeros_like(real)
    last[:, real.shape[1] - answer_tokens - 1] = True
    if not bool(real[last].all()):
        raise MeasurementError("prompts must be padded on the left, so that the answer follows their last position")
    behind = torch.zeros_like(real)
    behind[:, real.shape[1] - answer_tokens :] = True
    ids = torch.tensor(sorted(vision_token_ids), device=real.device)
    prompt = real & ~behind
    vision = torch.isin(inputs["input_ids"], ids) & prompt
    return {
        "vision": vision,
        "text": prompt & ~vision,
        "all": prompt,
        "last": last,
        "answer": last | (real & behind),
    }
