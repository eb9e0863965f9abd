"""Layer-indexed configuration: which attributes are per layer, and how they change when layers leave.

What an attribute is follows from its name alone. Guessing by length is wrong: in several default configurations a list
of layer *indices* has exactly as many entries as there are layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .edits import Edits
from .plan import SkipPlan

SLICED_LISTS = frozenset(
    {
        "activation_sparsity_pattern",
        "attention_layer_types",
        "attn_type_list",
        "indexer_types",
        "intermediate_size",  # a list in Gemma 3n, a number elsewhere
        "kv_sharing_modes",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "moe_topk",  # a list in HunYuan, a number elsewhere
        "no_rope_layers",
        "num_experts",  # a list in HunYuan, a number elsewhere
        "rope_layers",
        "rope_types",
        "swiglu_limits",
        "swiglu_limits_shared",
    }
)
"""Entry ``i`` belongs to layer ``i``."""

INDEX_LISTS = frozenset(
    {
        "cross_attention_layers",
        "full_attn_idxs",
        "global_attn_layers",
        "mlp_only_layers",
        "moe_layers",
        "rope_scaling_layers",
    }
)
"""The entries are layer indices."""

LEADING_COUNTS = frozenset(
    {
        "first_k_dense_replace",
        "first_kv_shared_layer_idx",
        "max_window_layers",
        "moe_layer_start_index",
        "num_dense_layers",
    }
)
"""How many of the first layers are of another kind."""

TRAILING_COUNTS = frozenset({"num_kv_shared_layers"})
"""How many of the last layers are of another kind."""

OF_MLP = frozenset(
    {
        "activation_sparsity_pattern",
        "first_k_dense_replace",
        "intermediate_size",
        "mlp_layer_types",
        "mlp_only_layers",
        "moe_layer_start_index",
        "moe_layers",
        "moe_topk",
        "num_dense_layers",
        "num_experts",
        "swiglu_limits",
        "swiglu_limits_shared",
    }
)
"""Of all these names, those that say what a layer's MLP is; the others go with its attention."""

NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "eos_token_id",
        "keys_to_ignore_at_inference",
        "moe_intermediate_size",
        "mtp_layer_types",
        "mtp_layers_block_type",
        "mtp_mlp_layer_types",
        "suppress_tokens",
        "time_step_limit",
    }
)
"""Lists that say nothing about layers, whatever their length."""


@dataclass(frozen=True)
class Kept:
    """The layers that stay, in order: of each new layer the one that its attention is of, and the one of its MLP."""

    layers: tuple[int, ...]
    mlps: tuple[int, ...]

    def of(self, name: str) -> tuple[int, ...]:
        """Return the layers that an attribute of the configuration follows."""
        return self.mlps if name in OF_MLP else self.layers

    @classmethod
    def of_plan(cls, plan: SkipPlan) -> Kept:
        """Return the layers that stay of a plan; two that it joins are one."""
        mlp_of = dict(plan.joins)
        layers = tuple(layer for layer in plan.kept if layer not in mlp_of.values())
        return cls(layers, tuple(mlp_of.get(layer, layer) for layer in layers))


@dataclass(frozen=True)
class LayerNames:
    """Which attributes of a family's text configuration are indexed by layer, by what they mean."""

    sliced: frozenset[str] = SLICED_LISTS
    indices: frozenset[str] = INDEX_LISTS
    leading: frozenset[str] = LEADING_COUNTS
    trailing: frozenset[str] = TRAILING_COUNTS
    ignored: frozenset[str] = NOT_PER_LAYER
    depth: tuple[str, ...] = ("num_hidden_layers",)
    """Names of the number of layers."""

    def extended(self, **more: Sequence[str]) -> LayerNames:
        """Return these names with more of some kinds."""
        return replace(
            self, **{kind: type(getattr(self, kind))((*getattr(self, kind), *names)) for kind, names in more.items()}
        )


def stored_name(config: Any, name: str) -> str:
    """Return the key under which ``config`` stores the attribute it offers as ``name``."""
    mapping: Mapping[str, str] = type(config).attribute_map
    return mapping.get(name, name)


def stored(config: Any) -> dict[str, Any]:
    """Return the configuration's own stored attributes (properties are not among them)."""
    values: dict[str, Any] = config.__dict__
    return values


def unknown_per_layer_lists(config: Any, names: LayerNames, num_layers: int) -> list[str]:
    """Return stored lists with one entry per layer whose meaning no table gives; a plan must not guess it."""
    known = names.sliced | names.indices | names.ignored
    return sorted(
        name
        for name, value in stored(config).items()
        if isinstance(value, (list, tuple)) and len(value) == num_layers > 0 and name not in known and name[0] != "_"
    )


def renumbering(kept: Sequence[int]) -> dict[int, int]:
    """Return the new index of every kept layer."""
    return {old: new for new, old in enumerate(kept)}


def keep_layers(edits: Edits, config: Any, names: LayerNames, num_layers: int, kept: Kept) -> None:
    """Change ``config`` in place so that it describes the kept layers only."""
    new_index = renumbering(kept.layers)
    values = stored(config)
    keep_values(edits, values, names, num_layers, kept)
    _make_periods_explicit(edits, values, num_layers, renumbering(kept.mlps))
    heterogeneity = values.get("_heterogeneity_spec")
    if heterogeneity is not None:
        overrides = heterogeneity.per_layer_overrides
        rekeyed = {new_index[layer]: own for layer, own in overrides.items() if layer in new_index}
        edits.set_item(values, "_heterogeneity_spec", replace(heterogeneity, per_layer_overrides=rekeyed))
    for name in names.depth:
        edits.set_item(values, stored_name(config, name), len(kept.layers))


def keep_values(edits: Edits, values: dict[str, Any], names: LayerNames, num_layers: int, kept: Kept) -> None:
    """Change the layer-indexed entries of ``values``: those of a configuration, or copies kept on a module."""
    for name in names.sliced:
        value = values.get(name)
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            edits.set_item(values, name, type(value)(value[layer] for layer in kept.of(name)))
    for name in names.indices - ({"mlp_only_layers"} if _has_sparse_period(values) else set()):
        value = values.get(name)
        if isinstance(value, (list, tuple)):
            new_index = renumbering(kept.of(name))
            edits.set_item(values, name, type(value)(new_index[layer] for layer in value if layer in new_index))
    for name in names.leading:
        if _is_count(values.get(name)):
            edits.set_item(values, name, sum(layer < values[name] for layer in kept.of(name)))
    for name in names.trailing:
        if _is_count(values.get(name)):
            edits.set_item(values, name, sum(layer >= num_layers - values[name] for layer in kept.of(name)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_sparse_period(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("decoder_sparse_step"), int) and "mlp_only_layers" in values


def _make_periods_explicit(edits: Edits, values: dict[str, Any], num_layers: int, new_index: Mapping[int, int]) -> None:
    """Write "every n-th layer is a mixture of experts" as the list of the layers that are not."""
    if not _has_sparse_period(values):
        return
    step, dense_only = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    dense = [layer for layer in range(num_layers) if layer in dense_only or (layer + 1) % step != 0]
    edits.set_item(values, "mlp_only_layers", [new_index[layer] for layer in dense if layer in new_index])
    edits.set_item(values, "decoder_sparse_step", 1)
