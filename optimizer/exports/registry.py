"""The export formats by name, and the refusal of plans that a format cannot take."""

from __future__ import annotations

from optimizer.exports import checkpoint, llama_cpp, mergekit, openvino, plan_file, runtime, vllm
from optimizer.exports.formats import ExportFault, ExportFormat
from workers.runtime import SkipPlan
from workers.text import did_you_mean

FORMATS: dict[str, ExportFormat] = {
    module.FORMAT.name: module.FORMAT
    for module in (plan_file, checkpoint, runtime, mergekit, llama_cpp, openvino, vllm)
}


def find(name: str) -> ExportFormat:
    """The format of this name. Raises ExportFault naming those that are there."""
    if name not in FORMATS:
        raise ExportFault(
            f"--format: {name!r} is unknown; choose one of {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}"
        )
    return FORMATS[name]


def require_takes(chosen: ExportFormat, plan: SkipPlan, compensation: str) -> None:
    """Refuse a plan that the format cannot take. Raises ExportFault with the reason and the formats that can."""
    reason = chosen.refusal(plan, compensation)
    if reason is None:
        return
    able = [each.name for each in FORMATS.values() if each.refusal(plan, compensation) is None]
    raise ExportFault(
        f"--format: {chosen.name} cannot take plan {plan.text}: {reason}; formats that can: {', '.join(able)}"
    )
