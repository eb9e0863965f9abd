"""Open the images of samples and process both into model inputs; list those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import BatchFeature

from workers.errors import ImageError
from workers.tasks import Sample, Task
from workers.text import describe_error

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
    """Open images and build inputs; samples that cannot be opened, or that the processor refuses, are failed."""
    opened, images = [], []
    failed: dict[str, str] = {}
    for sample in samples:
        try:
            images.append(sample.image.open())
            opened.append(sample)
        except ImageError as error:
            failed[sample.id] = str(error)
    try:
        inputs = build_inputs(loaded.processor, task.spec, opened, images) if opened else None
    except Exception as error:  # processors raise all kinds, and none names the sample
        if len(opened) == 1:
            return PreparedBatch((), None, failed | {opened[0].id: refused(error)})
        alone = {sample.id: prepare_batch(loaded, task, [sample]).failed for sample in opened}
        for reasons in alone.values():
            failed |= reasons
        usable = [sample for sample in opened if not alone[sample.id]]
        if len(usable) == len(opened):
            raise  # each by itself is fine, so that it is no sample's fault
        return replace(prepare_batch(loaded, task, usable), failed=failed)
    return PreparedBatch(tuple(opened), inputs, failed)


def refused(error: Exception) -> str:
    """Word the reason of a sample that the processor refuses."""
    return f"the model's processor refuses it: {describe_error(error)}"
