"""Speculate with the plan of an export: the directory holds the plan and its maps, the dense model is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from .folding import GapMap
from .gaps import gaps
from .plan import PlanError, SkipPlan
from .speculation import Speculation, speculate
from .tensor_file import read_tensors

DOCUMENT = "skipplan.json"
MAPS = "compensation/maps.safetensors"


def speculate_from(dense: nn.Module, directory: str | Path, draft_length: int | None = None) -> Speculation:
    """Return :func:`speculate` of the dense model and the plan, with its maps, of the export in ``directory``.

    Raises :class:`PlanError` as that does, and where the directory is no export or lacks the plan's maps.
    """
    plan, compensation = _read_document(Path(directory, DOCUMENT))
    maps = None
    if compensation != "none" and gaps(plan):
        maps = _read_maps(Path(directory, MAPS), compensation)
    return speculate(dense, plan, maps, draft_length)


def _read_document(file: Path) -> tuple[SkipPlan, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return SkipPlan.parse(content["plan"]), str(content["compensation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file} is not the plan of an export: {error}") from None


def _read_maps(file: Path, compensation: str) -> dict[int, GapMap]:
    """Read the file of maps, whose form ``workers/compensation/artifact.py`` describes."""
    try:
        tensors, record = read_tensors(file.read_bytes())
        scope: Any = "projection" if "scope=projection" in compensation.split() else "output"
        return {
            int(gap["layer"]): GapMap(
                int(gap["layer"]), int(gap["end"]), tensors[f"layers.{gap['layer']}.matrix"], float(gap["share"]), scope
            )
            for gap in record["gaps"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{file} does not hold the plan's maps: {error}") from None
