"""Names of a checkpoint's tensors as the hub's checkpoints of its family have them.

transformers renames tensors when it loads them, and undoes that when it saves. It undoes the renamings that loading
needed, which for a directory of a newer release are fewer than for one of the hub: towers of CLIP and SigLIP lost a
level of names, and a model built from its configuration never had it. Engines have loaders of their own, written for
the hub's names. So every renaming of the family is undone, whatever the model was loaded from.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from .edits import Edits

PARTS_OF_LARGER_MODELS = frozenset({"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"})
"""The hub has these inside other models only, under a prefix that they do not read back themselves."""


def use_hub_names(edits: Edits, model: PreTrainedModel) -> None:
    """Have ``save_pretrained`` write the hub's names."""
    if model.config.model_type in PARTS_OF_LARGER_MODELS:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Without those of "legacy" (gamma and beta), which no release has written for years.
    edits.set_instance_attribute(
        model, "_weight_conversions", get_model_conversion_mapping(model, add_legacy=False) or None
    )
