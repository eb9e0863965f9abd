"""All families, and the plans that each is tried with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import pytest
from transformers import PreTrainedModel

from . import (
    held_out_exotic,
    held_out_grids,
    held_out_omni,
    held_out_stacks,
    held_out_towers,
    patch_grids,
    picture_towers,
    text_only,
    uneven_stacks,
)
from .tiny import TEXT_BESIDE_PICTURES, Family, Prompt, build, since

SINCE = {
    "qwen4_exp": "5.18",
    "glm5_next": "5.18",
    "hyperclovax_vision_v2": "5.18",
    "molmo2": "5.20",
    "mistral_large4": "5.22",
    "lfm3_vl": "5.23",
    "granite_docling": "5.23",
}
"""The first release that builds a family; those not named here are in all that are supported."""
SHARED_KEYS = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_unified")
"""Families that say since 5.23 which layers share keys and values; before, they are refused as a whole."""


def of_this_release(*families: Family) -> tuple[Family, ...]:
    there = [each for each in families if since(SINCE.get(each.name, "5.0"))]
    refused = () if since("5.23") else SHARED_KEYS
    return tuple(replace(each, may_be_unsupported=True) if each.name in refused else each for each in there)


FAMILIES: tuple[Family, ...] = of_this_release(
    *picture_towers.FAMILIES,
    *patch_grids.FAMILIES,
    *uneven_stacks.FAMILIES,
    *text_only.FAMILIES,
)
HELD_OUT: tuple[Family, ...] = of_this_release(
    *held_out_towers.FAMILIES,
    *held_out_grids.FAMILIES,
    *held_out_omni.FAMILIES,
    *held_out_exotic.FAMILIES,
    *held_out_stacks.FAMILIES,
)
"""Families beyond those the runtime was written for. They go through the same checks with fewer plans each."""
ALL = (*FAMILIES, *HELD_OUT)

OFTEN = (*FAMILIES, *[f for f in HELD_OUT if f not in held_out_stacks.FAMILIES][::3])
"""Families of the default run: all that the runtime was written for, and every third of the others."""

every_family = pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in OFTEN else pytest.mark.slow, id=f.name) for f in ALL],
    scope="module",
)
"""Runs a test on all families, one family after the other; on most of those beyond the known ones only when asked."""

every_family_at_length = pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in HELD_OUT else (), id=f.name) for f in ALL],
    scope="module",
)
"""For tests that take a second a family: those that the runtime was not written for only when asked."""

ONE_PICTURE = Prompt((3, 0, 5), seed=1)
TEXT_ONLY = Prompt((9,), seed=2)
TWO_PICTURES = Prompt((4, 0, 2, 0, 3), seed=3)
PICTURE_FIRST = Prompt((0, 4), seed=4)

SUPPRESSED = tuple(range(90, 99))
"""Placeholders and special ids: a generated one would stand for a picture that is not there."""


def by_name(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@lru_cache(maxsize=4)
def model_of(family_name: str, attention: str | None = None) -> PreTrainedModel:
    """A model shared by tests that leave it as they found it. Few are kept: tests run family by family."""
    return build(by_name(family_name), attention)


def is_held_out(family: Family) -> bool:
    return family in HELD_OUT


def prompts_of(family: Family) -> list[Prompt]:
    """Prompts of different lengths that the family understands one at a time."""
    if not family.multimodal:
        return [TEXT_ONLY, Prompt((5,), seed=5)]
    prompts = [ONE_PICTURE] if is_held_out(family) else [ONE_PICTURE, PICTURE_FIRST]
    if family.max_images > 1:
        prompts.append(TWO_PICTURES)
    if family.text_only:
        prompts.append(TEXT_ONLY)
    return prompts


def batch_of(family: Family) -> list[Prompt]:
    """Prompts that plain transformers handles right in one left-padded batch."""
    return [prompt for prompt in prompts_of(family) if prompt.images or TEXT_BESIDE_PICTURES not in family.traps]


def letters(family: Family, layer: int) -> str:
    """The actions that the runtime has to offer at a layer, R first."""
    declined = family.refused.get(layer, "") + family.may_refuse.get(layer, "")
    return "".join(letter for letter in "RFBS" if letter not in declined)


def single(family: Family, layer: int, letter: str) -> str:
    return "R" * layer + letter + "R" * (family.layers - layer - 1)


def mixed_plans(
    family: Family, count: int, *, seed: int = 0, only: str = "RFBS", also: Mapping[int, str] | None = None
) -> list[str]:
    """Random plans over the actions in `only`: the same ones in every run, possible for the family, never dense.

    `also` adds letters per layer that the runtime need not offer but does.
    """
    generator = random.Random(f"{family.name} {seed} {only}")
    choices = [
        "".join(letter for letter in letters(family, layer) + (also or {}).get(layer, "") if letter in only)
        for layer in range(family.layers)
    ]
    plans: list[str] = []
    for _ in range(200):
        if len(plans) == count:
            break
        plan = "".join(generator.choice(choice) for choice in choices)
        if family.possible(plan) and plan not in plans and set(plan) != {"R"} and set(plan) != {"S"}:
            plans.append(plan)
    return plans


def plans_of(family: Family, also: Mapping[int, str] | None = None) -> list[str]:
    """The plans that a family is tried with in every run of the tests."""
    mixed = mixed_plans(family, 2, also=also)
    return mixed if is_held_out(family) else [*end_plans(family), *mixed]


def end_plans(family: Family, only: str = "RFBS") -> list[str]:
    """For each action, the plan that takes it at the first and at the last layer, or as near as the family allows."""
    plans = []
    for letter in only.replace("R", ""):
        able = [layer for layer in range(family.layers) if letter in letters(family, layer)]
        if len(able) > 1:
            plan = "".join(letter if layer in (able[0], able[-1]) else "R" for layer in range(family.layers))
            if family.possible(plan):
                plans.append(plan)
    return plans
