"""Checkpoints without the skipped layers, which plain transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from .applied import AppliedPlan
from .cutting import Cut, plan_cut, stored_quantisation
from .edits import Edits
from .folding import Maps, fold
from .hub_names import use_hub_names
from .joining import join_layers, require_joinable
from .layer_config import Kept
from .layer_removal import remove_layers
from .locate import DecoderStack
from .plan import PlanError, SkipPlan
from .quantised import quantisation_of
from .reload_check import require_faithful_files, require_faithful_reload


def save_pruned(
    model: nn.Module,
    plan: SkipPlan,
    directory: str | Path,
    *,
    processor: Any = None,
    max_shard_size: int | str = "5GB",
    original_names: bool = True,
    compensation: Maps | None = None,
    checkpoint: Path | None = None,
) -> Path:
    """Write ``model`` without the layers that ``plan`` skips as an ordinary checkpoint; the model stays as it was.

    Where a plan runs a layer without its MLP, skips what follows and runs a later layer without its attention, what is
    left of the two is written as one layer (:mod:`workers.runtime.joining`).

    Weights, configuration, generation configuration and, when given, the processor's files. The layers are taken out
    of the live model while it is saved, so no second copy of it is held. The directory appears when it is complete and
    was checked (:mod:`workers.runtime.reload_check`): a failed save leaves none.
    ``original_names`` names the tensors as the family's checkpoints on the hub do; otherwise they have their
    names in memory, which is what model code outside transformers loads. ``compensation`` holds the maps of the plan's
    gaps, which are folded into the written weights. ``checkpoint`` is the directory that the model was loaded from;
    where weights are quantised, tensors are copied from its files (:mod:`workers.runtime.cutting`). Raises
    :class:`PlanError` for plans that a checkpoint cannot say and for models that transformers would not load as they
    were saved, and ``FileExistsError`` when the directory exists and is not empty.
    """
    for layer in plan.needs_code:
        raise PlanError(
            f"layer {layer}: a checkpoint can leave layers out, but cannot say {plan[layer].letter} "
            f"({plan[layer].label}); save plans of R and S, and of M before A with nothing but S between"
        )
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty directory")
    applied, kept = AppliedPlan(model, plan), Kept.of_plan(plan)
    require_joinable(applied._stack, applied.descriptor, plan)
    cut = _cut(applied._stack, plan, checkpoint, compensation, original_names=original_names)
    edits = Edits()
    final = target.resolve()
    unchecked = final.with_name(f".{final.name}-{uuid4().hex[:12]}")
    unchecked.mkdir(parents=True)
    try:
        if compensation is not None:
            fold(edits, applied._stack, plan, compensation)
        if len(kept.layers) < len(plan):
            join_layers(edits, applied._stack, plan)
            remove_layers(edits, applied._stack, kept, permanent=True)
            require_faithful_reload(applied._stack)
        if cut is not None:
            _write_settings(model, unchecked)
            cut.write(unchecked)
        else:
            if original_names:
                use_hub_names(edits, model)
            _write(model, unchecked, max_shard_size, original_names=original_names)
        require_faithful_files(applied._stack, unchecked)
        if processor is not None:
            processor.save_pretrained(unchecked)
        unchecked.replace(final)
    finally:
        edits.undo()
        shutil.rmtree(unchecked, ignore_errors=True)
    return target


def _cut(
    stack: DecoderStack, plan: SkipPlan, checkpoint: Path | None, compensation: Maps | None, *, original_names: bool
) -> Cut | None:
    """Plan the cut through the files of a model with quantised weights; None where the live model can be saved."""
    # Where a device has no arithmetic for them, transformers loads quantised weights as plain ones, and forgets it.
    method = quantisation_of(stack.model.config) or stored_quantisation(checkpoint)
    if not method:
        return None
    if compensation is not None:
        raise PlanError(f"maps cannot be folded into quantised weights ({method}): save the plan without compensation")
    if checkpoint is None:
        raise PlanError(
            f"the weights are quantised ({method}) and are copied from the files that the model was loaded from: give "
            "their directory as checkpoint"
        )
    return plan_cut(stack, plan, checkpoint, original_names=original_names)


def _write_settings(model: nn.Module, directory: Path) -> None:
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is not None:
            settings.save_pretrained(directory)  # type: ignore[union-attr, operator]


def _write(model: nn.Module, directory: Path, max_shard_size: int | str, *, original_names: bool) -> None:
    """Save a model's weights and configuration. Raises :class:`PlanError` where transformers cannot."""
    try:
        model.save_pretrained(  # type: ignore[operator]
            directory, max_shard_size=max_shard_size, save_original_format=original_names
        )
    except OSError:
        raise
    except Exception as error:  # weights that are no plain tensors, such as those of a model quantised in memory
        reason = " ".join(str(error).split())
        raise PlanError(f"transformers cannot save the {type(model).__name__}: {reason}") from error
