"""Open the images of samples and process both into model inputs; list those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BatchFeature

from workers.errors import ImageError
from workers.tasks import Sample, Task

from .loading import LoadedModel
from .prompts import build_inputs


@dataclass(frozen=True)
class PreparedBatch:
    """Samples whose images could be opened, their model inputs on the CPU, and why the others failed."""

    samples: tuple[Sample, ...]
    inputs: BatchFeature | None
    failed: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the input tensors."""
        tensors = () if self.inputs is None else self.inputs.values()
        return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def prepare_batch(loaded: LoadedModel, task: Task, samples: Sequence[Sample]) -> PreparedBatch:
    """Open images and build inputs; samples whose image cannot be decoded are listed as failed."""
    opened, images = [], []
    failed: dict[str, str] = {}
    for sample in samples:
        try:
            images.append(sample.image.open())
            opened.append(sample)
        except ImageError as error:
            failed[sample.id] = str(error)
    inputs = build_inputs(loaded.processor, task.spec, opened, images) if opened else None
    return PreparedBatch(tuple(opened), inputs, failed)
