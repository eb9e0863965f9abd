"""Read the states of prompts where a decoder layer begins, from forward passes that end there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workers.layerwise.hooks import Hooks
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.runtime.guard import prompt_features
from workers.runtime.locate import locate, vision_token_ids
from workers.tasks import Sample, Task

WORDS = 12
"""Words of a text that are asked together."""


def one_per_image(
    samples: Sequence[Sample], most: int | None = None, *, parts: Sequence[Task] = ()
) -> tuple[Sample, ...]:
    """Return the first sample about each of at most ``most`` images: those about one image are not independent.

    Of a joint task's samples those of its ``parts`` take turns where they ask about the same images.
    """
    about: dict[str, list[Sample]] = {}
    for sample in samples:
        about.setdefault(sample.image_key, []).append(sample)
    names, taken = [part.name for part in parts], Counter[str]()
    chosen = []
    for same in about.values():
        asked = [next((name for name in names if sample.id.startswith(f"{name}/")), "") for sample in same]
        rarest = min(range(len(same)), key=lambda number: taken[asked[number]])
        taken[asked[rarest]] += 1
        chosen.append(same[rarest])
    return tuple(chosen[:most])


def asking_text(task: Task, samples: Sequence[Sample], text: str) -> tuple[Task, tuple[Sample, ...]]:
    """Ask pieces of a text in the place of the task's prompts, about the samples' images, as many as there are."""
    words = text.split()
    pieces = [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]
    asked = tuple(replace(sample, question=piece) for sample, piece in zip(samples, pieces, strict=False))
    return replace(task, spec=task.spec.changed(prompt="{question}")), asked


class _Reached(BaseException):
    """Ends a forward pass behind the last states that are wanted; no Exception, so that no model code catches it."""


def task_features(
    loaded: LoadedModel, task: Task, samples: Sequence[Sample], layers: Sequence[int]
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Return the dense model's features of prompts, ``[prompts, 2 * hidden]`` by layer on the CPU.

    Also why samples have none: their images do not open, or the processor refuses them. They are asked one by one, as
    in a server: padding moves positions, on which the states of some families depend.
    """
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    failed: dict[str, str] = {}
    for sample in samples:
        batch = prepare_batch(loaded, task, [sample])
        failed |= batch.failed
        if batch.inputs is not None:
            for layer, features in input_features(loaded, batch.inputs, layers).items():
                found[layer].append(features)
    width = 2 * int(locate(loaded.model).text_config.hidden_size)
    return {layer: torch.cat(parts) if parts else torch.empty(0, width) for layer, parts in found.items()}, failed


def input_features(loaded: LoadedModel, inputs: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the features of model inputs by layer, ``[batch, 2 * hidden]``, from one pass that ends at the last."""
    stack = locate(loaded.model)
    ids = inputs["input_ids"]
    real = inputs["attention_mask"].bool()
    vision = torch.isin(ids, torch.tensor(vision_token_ids(stack.model.config), dtype=ids.dtype)) & real
    found: dict[int, Tensor] = {}
    here = loaded.device

    def note(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        found[layer] = prompt_features(states, vision.to(here), (real & ~vision).to(here)).cpu()
        if layer == max(layers):
            raise _Reached

    with Hooks() as hooks, torch.inference_mode():
        for layer in layers:
            hooks.before(stack.layers[layer], partial(note, layer))
        with suppress(_Reached):
            loaded.model(**to_device(inputs, here, loaded.model.dtype), use_cache=False)
    return found
