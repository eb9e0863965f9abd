"""The export formats by name, and the refusal of plans that a format cannot take."""

from __future__ import annotations

from optimizer.exports.formats import ExportFault, ExportFormat
from optimizer.registries import EXPORT_FORMATS
from workers.errors import UnknownNameError
from workers.runtime import SkipPlan


def find(name: str) -> ExportFormat:
    """The format of this name. Raises ExportFault naming those that are there."""
    try:
        found: ExportFormat = EXPORT_FORMATS[name]
    except UnknownNameError as error:
        raise ExportFault(f"--format: {error}") from None
    return found


def require_takes(chosen: ExportFormat, plan: SkipPlan, compensation: str) -> None:
    """Refuse a plan that the format cannot take. Raises ExportFault with the reason and the formats that can."""
    reason = chosen.refusal(plan, compensation)
    if reason is None:
        return
    able = [each.name for each in EXPORT_FORMATS.values() if each.refusal(plan, compensation) is None]
    raise ExportFault(
        f"--format: {chosen.name} cannot take plan {plan.text}: {reason}; formats that can: {', '.join(able)}"
    )
