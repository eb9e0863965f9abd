"""The fitted guard of a plan in an export, beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.exports.document import PlanDocument
from optimizer.exports.interface import ExportFault
from optimizer.exports.target import inside
from storage.records.plans import LOSSLESS, Plan
from workers.compensation import store
from workers.messages import Artifact

FILE_NAME = "guard/guard.safetensors"
"""That of ``workers.runtime.guard``, which reads it in ``runtime`` exports."""


def checksum_of(plan: PlanDocument) -> str | None:
    """Return the SHA-256 of the guard's file; None where the plan has no guard."""
    found: str | None = _figures(plan.figures.secondary).get("checksum")
    return found


def artifact_of(plan: Plan) -> Artifact | None:
    """Return where the guard of a published plan lies; None where it has none, or nobody knows."""
    own = _figures(plan.secondary)
    if "checksum" not in own or "artifact" not in own:
        return None
    return Artifact(own["artifact"], own["checksum"])


def fetch(artifact: Artifact) -> bytes:
    """Return the content of a guard's file. Raises CompensationError when it cannot be read."""
    return store.get(artifact, name="guard", remedy="`skipplan run --force` with the job file fits it again")


def require(plan: PlanDocument, content: bytes | None) -> str:
    """Say why a plan that answers by itself has no guard; empty where it has one, or drafts.

    Raises ExportFault where it was published with one that is not at hand.
    """
    if content is not None or plan.mode == LOSSLESS:
        return ""
    if checksum_of(plan) is not None:
        raise ExportFault(
            f"the guard that plan {plan.plan} was published with is not at hand: import the plan from a directory that "
            f"holds {FILE_NAME}, or export where it was measured"
        )
    reason = _figures(plan.figures.secondary).get("note") or "none was fitted for this plan"
    return (
        f"no guard, so the plan answers every prompt, also those unlike the task's: {reason}; `skipplan run --force` "
        "with the job file fits one"
    )


def _figures(secondary: dict[str, Any]) -> dict[str, Any]:
    return secondary.get("guard") or {}


def of_directory(plan: PlanDocument, directory: Path) -> Path | None:
    """Return the guard's file of an export. Raises ExportFault when it is not that of the plan."""
    file, expected = inside(directory, FILE_NAME), checksum_of(plan)
    if expected is None or not file.is_file():
        return None
    if store.checksum(file.read_bytes()) != expected:
        raise ExportFault(f"{file} is not the guard that the plan was published with")
    return file


def write(content: bytes | None, directory: Path) -> None:
    """Put the guard's file into an export."""
    if content is not None:
        file = directory / FILE_NAME
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
