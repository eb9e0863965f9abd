"""Split samples: disjoint by image, the same for the same seed, with prefixes that are fair subsets."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.errors import TooFewSamplesError

from .samples import Sample
from .spec import SplitSizes

SPLITS = ("calibration", "search", "held_out")


@dataclass(frozen=True)
class Region:
    """Samples that may go to some of the splits only, for example because a model was trained on their images."""

    splits: tuple[str, ...]
    samples: tuple[Sample, ...]


def make_splits(regions: Sequence[Region], sizes: SplitSizes, task: str) -> dict[str, tuple[Sample, ...]]:
    """Deal whole images out to the splits.

    Images stand in the order of a hash of seed and image, which neither the order nor the number of other rows
    changes; all questions about an image stand together. So the first n samples of a split are a random subset by
    image, and a larger n contains the smaller one. Questions that a limit per image leaves out go to no split.

    Raises:
        TooFewSamplesError: too few images (or samples) for the sizes asked for.
    """
    result: dict[str, tuple[Sample, ...]] = {}
    taken: set[str] = set()
    for region in regions:
        images = _by_image(region.samples, sizes.seed, without=taken)
        position = 0
        for split in region.splits:
            size = getattr(sizes, split)
            chosen, position = _take(images, position, size, sizes.unit, sizes.most_per_image(split))
            if chosen is None:
                raise _too_few(task, region.splits, sizes, images)
            result[split] = tuple(chosen)
        taken.update(group[0].image_key for group in images[:position])
    return {split: result[split] for split in SPLITS}


def _too_few(
    task: str, splits: Sequence[str], sizes: SplitSizes, images: Sequence[Sequence[Sample]]
) -> TooFewSamplesError:
    """Say how many were asked for and are there, and propose sizes in the same proportions that are sure to fit."""
    asked = {split: int(getattr(sizes, split)) for split in splits}
    wanted = " + ".join(f"{split} {size}" for split, size in asked.items())
    room = available = len(images) if sizes.unit == "images" else sum(len(group) for group in images)
    if sizes.unit == "samples":  # where a split's last image is cut, the rest of its questions goes to no split
        limits = [limit for split in splits if (limit := sizes.most_per_image(split)) is not None]
        room = sum(min([len(group), *limits]) for group in images)
        room -= len(splits) * (max((len(group) for group in images), default=1) - 1)
    fitting = {split: size * room // sum(asked.values()) for split, size in asked.items()}
    if min(fitting.values()) == 0:
        fitting = {}
    advice = ", ".join(f"{split}: {size}" for split, size in fitting.items())
    return TooFewSamplesError(
        f"task {task}: too few {sizes.unit} for the splits: {wanted} asked for, {available} there (splits are disjoint "
        f"by image)" + (f"; these would fit: {advice}" if fitting else ""),
        fitting,
    )


def _by_image(samples: Iterable[Sample], seed: int, *, without: set[str]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.image_key not in without:
            groups[sample.image_key].append(sample)
    ordered = sorted(groups, key=lambda key: (_rank(seed, key), key))
    return [sorted(groups[key], key=lambda sample: (_rank(seed, key, sample.id), sample.id)) for key in ordered]


def _take(
    images: list[list[Sample]], position: int, size: int, unit: str, most: int | None
) -> tuple[list[Sample] | None, int]:
    """Take ``size`` images or samples from ``position`` on, at most ``most`` samples an image.

    The last image is cut to reach a number of samples.
    """
    if unit == "images":
        groups = images[position : position + size]
        chosen = [sample for group in groups for sample in group[:most]] if len(groups) == size else None
        return chosen, position + len(groups)
    chosen = []
    while len(chosen) < size and position < len(images):
        chosen += images[position][:most]
        position += 1
    return (chosen[:size] if len(chosen) >= size else None), position


def _rank(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
