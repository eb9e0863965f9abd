"""Write the live model under a plan as the checkpoint that engines read."""

from __future__ import annotations

import json
from pathlib import Path

from workers.engines.vllm_plugin.register import EXPORTED
from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan, save_pruned
from workers.runtime.folding import Maps
from workers.runtime.joining import is_joinable
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


def write_served_checkpoint(
    loaded: LoadedModel, plan: SkipPlan, directory: Path, maps: Maps | None = None, *, plain: bool = False
) -> None:
    """Write the checkpoint with a tokenizer that engines read as transformers does. Raises as write_checkpoint.

    What a plain checkpoint cannot hold is raised where it has to be ``plain``. Otherwise ``skip_plan`` of
    ``config.json`` has one letter for each layer that is left, and the model type is one of its own: only an engine
    that knows the field loads it, where others would run every layer that is left for every token.
    """
    coded = not plain and bool(plan.needs_code or not is_joinable(loaded.model, plan))
    write_checkpoint(loaded, plan.removal if coded else plan, directory, maps)
    write_vocabulary(loaded, directory)
    write_start_of_text(loaded, directory)
    if coded:
        file = directory / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"skip_plan": plan.remainder.text, "model_type": EXPORTED + config["model_type"]}
        file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
