"""The fitted maps of a compensated plan in an export: beside the model, so that it can be verified and handed on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.exports.document import PlanDocument
from optimizer.exports.interface import ExportFault
from optimizer.exports.target import inside
from workers.compensation import store
from workers.messages import NO_COMPENSATION, Artifact

if TYPE_CHECKING:
    from workers.runtime.folding import Maps

FILE_NAME = "compensation/maps.safetensors"
"""In a directory of its own, since servers take every safetensors file beside the model for weights."""


def needs_maps(plan: PlanDocument) -> bool:
    """Whether the plan has gaps that maps compensate."""
    from workers.runtime import SkipPlan
    from workers.runtime.gaps import gaps

    return plan.compensation != NO_COMPENSATION and bool(gaps(SkipPlan.parse(plan.plan)))


def fetch(plan: PlanDocument, artifact: Artifact | None) -> bytes | None:
    """Return the content of the maps' file; None where the plan has none, or nobody knows where they lie.

    Raises CompensationError when they are recorded but cannot be read.
    """
    return store.get(artifact) if artifact is not None and needs_maps(plan) else None


def read(plan: PlanDocument, content: bytes | None) -> Maps | None:
    """Return the maps to put into weights. Raises ExportFault when the plan needs them and they are not there."""
    if not needs_maps(plan):
        return None
    if content is None:
        raise ExportFault(
            f"the gaps of plan {plan.plan} are compensated ({plan.compensation}), but its maps are not at hand: "
            f"import the plan from a directory that holds {FILE_NAME}, or export where it was measured"
        )
    from workers.compensation.artifact import decode

    return decode(content, plan=plan.plan).maps


def of_directory(plan: PlanDocument, directory: Path) -> bytes | None:
    """Return the maps' file of an export. Raises ExportFault when it is not what the plan was verified with."""
    file = inside(directory, FILE_NAME)
    if not needs_maps(plan) or plan.artifact_checksum is None or not file.is_file():
        return None
    content = file.read_bytes()
    if store.checksum(content) != plan.artifact_checksum:
        raise ExportFault(f"{file} does not hold the maps that the plan was verified with")
    return content


def write(content: bytes | None, directory: Path) -> None:
    """Put the maps' file into an export."""
    if content is not None:
        file = directory / FILE_NAME
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
