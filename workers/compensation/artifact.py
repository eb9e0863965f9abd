"""Fitted maps as safetensors bytes: equal maps give equal bytes, so that a checksum tells whether a re-fit is the same.

The file holds ``layers.K.matrix`` float32, which is applied from the right to the MLP's output of layer K (``[hidden,
hidden]``) or, with ``scope=projection``, to what its last projection is given (``[width, hidden]``); ``layers.K.bias``
``[hidden]`` where there is one; and as metadata one JSON text with sorted keys: what was fitted, on what, and how well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from workers.runtime.folding import GapMap
from workers.runtime.gaps import gaps
from workers.runtime.plan import PlanError, SkipPlan
from workers.text import one_line

from .fit import Fitted
from .recipe import CompensationError, Recipe

FORMAT = 1
KEY = "skipplan"
_NAME = re.compile(r"layers\.(\d+)\.(matrix|bias)")


@dataclass(frozen=True)
class Provenance:
    """What maps were fitted on: with the plan and the recipe, all that a re-fit needs to give the same bits."""

    model_fingerprint: str
    task: str
    samples: int
    """Calibration samples, as they stand in the split, one an image first."""
    tokens: int
    """Tokens that the sums ran over."""
    settings: str
    """Dtype, attention, device and versions."""


def encode(fitted: Fitted, provenance: Provenance) -> bytes:
    """The maps of a fit as a safetensors file."""
    tensors = {}
    for layer, own in fitted.maps.items():
        tensors[f"layers.{layer}.matrix"] = own.matrix.contiguous()
        if own.bias is not None:
            tensors[f"layers.{layer}.bias"] = own.bias.contiguous()
    told = {
        "format": FORMAT,
        "plan": fitted.plan,
        "compensation": fitted.compensation,
        "model_fingerprint": provenance.model_fingerprint,
        "task": provenance.task,
        "samples": provenance.samples,
        "tokens": provenance.tokens,
        "settings": provenance.settings,
        "gaps": [
            {
                "layer": gap.layer,
                "end": gap.end,
                "plain": gap.plain_share,
                "unexplained": gap.unexplained,
                "share": fitted.maps[gap.layer].share,
            }
            for gap in fitted.gaps
        ],
    }
    return save(tensors, metadata={KEY: json.dumps(told, sort_keys=True)})


@dataclass(frozen=True)
class Decoded:
    """What a file of maps holds."""

    plan: str
    compensation: str
    maps: dict[int, GapMap]
    metadata: dict[str, Any]


def decode(content: bytes, *, plan: str | None = None) -> Decoded:
    """Read a file of maps, checked against the gaps of its plan.

    Raises :class:`CompensationError` when it is no such file, or not that of ``plan``.
    """
    try:
        tensors, told = load(content), _metadata(content)
        own_plan, compensation = str(told["plan"]), str(told["compensation"])
        recipe = Recipe.parse(compensation)
        open_gaps = {gap.layer: gap.end for gap in gaps(SkipPlan.parse(own_plan), drift=recipe.drift)}
        shares = {int(gap["layer"]): float(gap["share"]) for gap in told["gaps"]}
    except (SafetensorError, ValueError, KeyError, TypeError, PlanError) as error:
        raise CompensationError(f"compensation maps cannot be read: {one_line(error)}") from None
    if told.get("format") != FORMAT:
        raise CompensationError(f"compensation maps of format {told.get('format')!r} cannot be read, expected {FORMAT}")
    if plan is not None and own_plan != plan:
        raise CompensationError(f"the compensation maps are those of plan {own_plan}, not of {plan}")
    names = {match.group(0) for name in tensors if (match := _NAME.fullmatch(name))}
    matrices = {int(name.split(".")[1]) for name in names if name.endswith("matrix")}
    if names != tensors.keys() or not matrices == open_gaps.keys() == shares.keys():
        raise CompensationError(f"the compensation maps do not hold one map for every gap of plan {own_plan}")
    maps = {
        layer: GapMap(
            layer,
            end,
            tensors[f"layers.{layer}.matrix"],
            tensors.get(f"layers.{layer}.bias"),
            shares[layer],
            recipe.scope,
        )
        for layer, end in open_gaps.items()
    }
    return Decoded(own_plan, compensation, maps, told)


def _metadata(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    if not isinstance(told, dict):
        raise ValueError("their metadata is no JSON object")
    return told
