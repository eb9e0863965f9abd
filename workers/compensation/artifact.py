"""Encode fitted maps as safetensors bytes: equal maps give equal bytes, so that a checksum shows an equal re-fit.

The file holds ``layers.K.matrix`` float32, which is applied from the right to the MLP's output of layer K (``[hidden,
hidden]``) or, with ``scope=projection``, to what its last projection is given (``[width, hidden]``); where the plan
leaves out that MLP, to those of its attention.
Metadata: one JSON text with sorted keys that says what was fitted, on what, and how well.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Provenance:
    """Circumstances of a fit: with the plan and the recipe, all that a re-fit needs to give the same bits."""

    model_fingerprint: str
    task: str
    samples: int
    """Calibration samples, as they stand in the split, one an image first."""
    tokens: int
    """Tokens that the sums ran over."""
    text_tokens: int
    """Of these, tokens of general text."""
    settings: str
    """Dtype, attention, device and versions."""


def encode(fitted: Fitted, provenance: Provenance) -> bytes:
    """Return the maps of a fit as a safetensors file."""
    tensors = {f"layers.{layer}.matrix": own.matrix.contiguous() for layer, own in fitted.maps.items()}
    record = {
        "format": FORMAT,
        "plan": fitted.plan,
        "compensation": fitted.compensation,
        **asdict(provenance),
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
    return save(tensors, metadata={KEY: json.dumps(record, sort_keys=True)})


@dataclass(frozen=True)
class Decoded:
    """The content of a file of maps."""

    plan: str
    compensation: str
    maps: dict[int, GapMap]
    metadata: dict[str, Any]


def decode(content: bytes, *, plan: str | None = None) -> Decoded:
    """Read a file of maps, checked against the gaps of its plan.

    Raises :class:`CompensationError` when it is no such file, or not that of ``plan``.
    """
    try:
        tensors, record = load(content), _metadata(content)
        own_plan, compensation = str(record["plan"]), str(record["compensation"])
        recipe = Recipe.parse(compensation)
        open_gaps = {gap.layer: gap for gap in gaps(SkipPlan.parse(own_plan), drift=recipe.drift)}
        shares = {int(gap["layer"]): float(gap["share"]) for gap in record["gaps"]}
    except (SafetensorError, ValueError, KeyError, TypeError, PlanError) as error:
        raise CompensationError(f"compensation maps cannot be read: {one_line(error)}") from None
    if record.get("format") != FORMAT:
        raise CompensationError(
            f"compensation maps of format {record.get('format')!r} cannot be read, expected {FORMAT}"
        )
    if plan is not None and own_plan != plan:
        raise CompensationError(f"the compensation maps are those of plan {own_plan}, not of {plan}")
    if tensors.keys() != {f"layers.{layer}.matrix" for layer in open_gaps} or open_gaps.keys() != shares.keys():
        raise CompensationError(f"the compensation maps do not hold one map for every gap of plan {own_plan}")
    maps = {
        layer: GapMap(layer, gap.end, tensors[f"layers.{layer}.matrix"], shares[layer], recipe.scope, gap.part)
        for layer, gap in open_gaps.items()
    }
    return Decoded(own_plan, compensation, maps, record)


def _metadata(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    if not isinstance(record, dict):
        raise ValueError("their metadata is no JSON object")
    return record
