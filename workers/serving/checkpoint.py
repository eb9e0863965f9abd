"""Write the live model under a plan as the checkpoint that engines read."""

from __future__ import annotations

import json
from pathlib import Path

from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan, save_pruned
from workers.runtime.folding import Maps
from workers.serving.published_form import write_published_form, write_start_of_text, write_vocabulary


def write_checkpoint(loaded: LoadedModel, plan: SkipPlan, directory: Path, maps: Maps | None = None) -> None:
    """Write the model without the layers that ``plan`` skips, in the form of the hub's checkpoints.

    Raises PlanError for a plan that a checkpoint cannot hold, ModelError where the family cannot be written in that
    form.
    """
    save_pruned(
        loaded.model,
        plan,
        directory,
        processor=loaded.processor,
        compensation=maps,
        checkpoint=loaded.directory,
    )
    write_published_form(loaded, directory)


def write_served_checkpoint(loaded: LoadedModel, plan: SkipPlan, directory: Path, maps: Maps | None = None) -> None:
    """Write the checkpoint with a tokenizer that engines read as transformers does. Raises as write_checkpoint.

    Where layers are neither run nor skipped, ``skip_plan`` of ``config.json`` has one letter for each layer that is
    left: only an engine that knows the field serves the plan.
    """
    write_checkpoint(loaded, plan.removal, directory, maps)
    write_vocabulary(loaded, directory)
    write_start_of_text(loaded, directory)
    if plan.needs_vision_tokens or plan.partial:
        file = directory / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["skip_plan"] = plan.remainder.text
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
