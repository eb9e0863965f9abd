"""Show samples as the model sees them: the image after the processor, the rendered prompt, the dense model's answer."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workers.evaluation.plain import PlainEvaluator, scores_of
from workers.messages import ShownSample
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.runtime.families import describe
from workers.runtime.plan import SkipPlan
from workers.tasks import Sample

RGB = 3


def show(evaluator: PlainEvaluator, samples: Sequence[Sample], *, pictures: bool = False) -> tuple[ShownSample, ...]:
    """Ask the dense model about samples by the plain path, and describe what it was given and answered."""
    descriptor = describe(evaluator.loaded.model)
    answers = evaluator.answer(SkipPlan.dense(descriptor.num_layers), samples)
    vision = frozenset(descriptor.vision_token_ids)
    return tuple(_shown(evaluator, sample, answers, vision, pictures) for sample in samples)


def _shown(
    evaluator: PlainEvaluator, sample: Sample, answers: Any, vision: frozenset[int], pictures: bool
) -> ShownSample:
    loaded, task = evaluator.loaded, evaluator.task
    prepared = prepare_batch(loaded, task, [sample])
    ids: list[int] = [] if prepared.inputs is None else prepared.inputs["input_ids"][0].tolist()
    image, picture = "", b""
    if pictures and prepared.inputs is not None:
        image, picture = _picture(loaded, sample, prepared.inputs)
    answer = answers.texts.get(sample.id)
    return ShownSample(
        id=sample.id,
        prompt=_prompt(loaded, ids, vision),
        prompt_tokens=len(ids),
        vision_tokens=sum(each in vision for each in ids),
        accepted=sample.answers,
        choices=sample.choices,
        answer=answer,
        score=None if answer is None else scores_of(task.spec, sample, answers)[0],
        cut=not task.spec.is_choice and len(answers.tokens.get(sample.id, ())) >= task.spec.answer.max_new_tokens,
        failure=answers.failed.get(sample.id, ""),
        image=image,
        picture=picture,
    )


def _prompt(loaded: LoadedModel, ids: Sequence[int], vision: frozenset[int]) -> str:
    shorter = [each for token, run in groupby(ids) for each in ([token] if token in vision else run)]
    text: str = loaded.processor.tokenizer.decode(shorter, skip_special_tokens=False)
    return text


# Pictures -----------------------------------------------------------------------------------------------------------


def _picture(loaded: LoadedModel, sample: Sample, inputs: Mapping[str, Any]) -> tuple[str, bytes]:
    """Say the sizes of a sample's image before and after the processor, and draw the latter as PNG."""
    before = "x".join(map(str, sample.image.open().size))
    tiles = _tiles(loaded.processor.image_processor, inputs)
    if tiles is None:
        shapes = {name: list(value.shape) for name, value in inputs.items() if "pixel" in name}
        return f"{before}, as tensors {shapes}, which cannot be drawn", b""
    count, _, height, width = tiles.shape
    after = f"{width}x{height}" if count == 1 else f"{count} parts of {width}x{height}"
    return f"{before}, to the model {after}", _drawn(loaded.processor.image_processor, tiles)


def _tiles(processor: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the pixels that the vision tower sees, ``[parts, 3, height, width]``; None where their layout is unknown.

    ``pixel_values`` are ``[images, 3, height, width]``, ``[images, parts, 3, height, width]``, or (Qwen-VL) patches in
    rows of ``3 * frames * patch * patch``, in squares of ``merge_size`` patches.
    """
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor):
        return None
    if pixels.dim() >= 4 and pixels.shape[-3] == RGB:
        return pixels.reshape(-1, *pixels.shape[-3:]).float()
    grid = inputs.get("image_grid_thw")
    patch, merge = getattr(processor, "patch_size", None), getattr(processor, "merge_size", None)
    if pixels.dim() != 2 or not isinstance(grid, Tensor) or not isinstance(patch, int) or not isinstance(merge, int):
        return None
    _, rows, columns = grid[0].tolist()
    frames = pixels.shape[1] // (RGB * patch * patch)
    own = pixels[: rows * columns].reshape(rows // merge, columns // merge, merge, merge, RGB, frames, patch, patch)
    upright = own[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6)
    return upright.reshape(1, RGB, rows * patch, columns * patch).float()


def _drawn(processor: Any, tiles: Tensor) -> bytes:
    """Undo the normalisation, and lay the parts side by side in a near-square of rows."""
    mean, std = (
        torch.tensor(getattr(processor, name, None) or default).reshape(1, -1, 1, 1)
        for name, default in (("image_mean", [0.0]), ("image_std", [1.0]))
    )
    pixels = (tiles * std + mean if getattr(processor, "do_normalize", True) else tiles).clamp(0, 1)
    shown = (255 * pixels).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    count, height, width, _ = shown.shape
    across = math.ceil(math.sqrt(count))
    sheet = np.full((math.ceil(count / across) * height, across * width, RGB), 255, np.uint8)
    for number, part in enumerate(shown):
        top, left = number // across * height, number % across * width
        sheet[top : top + height, left : left + width] = part
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG")
    return stream.getvalue()
