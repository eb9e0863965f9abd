"""Read from a checkpoint's configuration which parts of which decoder layers are skipped. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class PlanRefusedError(ValueError):
    """A plan that cannot be served, with the reason and what would be right in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"skipplan: {reason}")


class Treatment(Enum):
    """A decoder layer runs, or saves work in one of these ways; the value is its name in messages."""

    RUN = "run"
    FREEZE = "freeze"
    BYPASS = "bypass"
    SKIP_ATTENTION = "skip_attention"
    SKIP_MLP = "skip_mlp"
    FREEZE_ATTENTION = "freeze_attention"
    FREEZE_MLP = "freeze_mlp"
    SKIP = "skip"

    @property
    def keeps_attention(self) -> bool:
        """Whether the layer has attention, and so a KV cache."""
        return self not in (Treatment.SKIP_ATTENTION, Treatment.SKIP)

    @property
    def keeps_mlp(self) -> bool:
        """Whether the layer has its MLP."""
        return self not in (Treatment.SKIP_MLP, Treatment.SKIP)

    @property
    def splits_tokens(self) -> bool:
        """Whether vision tokens are treated apart."""
        return self in PAST

    @classmethod
    def without(cls, parts: Iterable[str]) -> Treatment:
        """Return the treatment that skips ``parts``, of ``"attention"`` and ``"mlp"``."""
        return {
            frozenset(): cls.RUN,
            frozenset({"attention"}): cls.SKIP_ATTENTION,
            frozenset({"mlp"}): cls.SKIP_MLP,
            frozenset({"attention", "mlp"}): cls.SKIP,
        }[frozenset(parts)]


PAST = {
    Treatment.FREEZE: "frozen",
    Treatment.BYPASS: "bypassed",
    Treatment.FREEZE_ATTENTION: "frozen in its attention",
    Treatment.FREEZE_MLP: "frozen in its MLP",
}
"""Treatments of vision tokens alone, as messages say them: ``"layer 3 is frozen"``."""

LETTERS = {
    "R": Treatment.RUN,
    "F": Treatment.FREEZE,
    "B": Treatment.BYPASS,
    "S": Treatment.SKIP,
    "A": Treatment.SKIP_ATTENTION,
    "M": Treatment.SKIP_MLP,
    "Q": Treatment.FREEZE_ATTENTION,
    "P": Treatment.FREEZE_MLP,
}
"""The letters of ``skip_plan``, as the runtime's table of actions has them."""

Plan = tuple[Treatment, ...]
"""One treatment per decoder layer."""


def read_plan(config: Mapping[str, Any]) -> Plan | None:
    """Read the plan of ``config``, the content of a ``config.json``; ``None`` when every layer runs whole.

    It may be given as ``skip_plan`` (one letter per layer), as ``per_layer_config`` of transformers
    (``{"23": {"skip": ["mlp"]}}``) or as NVIDIA's ``block_configs`` (``attention.no_op``, ``ffn.no_op``), in the text
    model's configuration or beside it. Raises :class:`PlanRefusedError` when it cannot be read, does not fit the model,
    or is given twice and not equally.
    """
    text = config.get("text_config") or config
    readers = {"skip_plan": _letters, "per_layer_config": _per_layer, "block_configs": _blocks}
    found: dict[str, Plan] = {}
    for name, reader in readers.items():
        content = text.get(name) or config.get(name)
        if content:
            found[name] = reader(content, text)
    if len(set(found.values())) > 1:
        raise PlanRefusedError(f"{' and '.join(found)} of config.json name different plans; keep one of them")
    plan = next(iter(found.values()), None)
    if plan is None or set(plan) == {Treatment.RUN}:
        return None
    if not any(layer.keeps_attention for layer in plan):
        raise PlanRefusedError(
            "the plan leaves no layer with attention, so there would be no KV cache; keep at least one"
        )
    return plan


def _letters(content: Any, text: Mapping[str, Any]) -> Plan:
    layers = text["num_hidden_layers"]
    if not isinstance(content, str):
        raise PlanRefusedError(f"skip_plan of config.json is {content!r}, not a text of one letter per layer")
    for layer, letter in enumerate(content):
        if letter not in LETTERS:
            raise PlanRefusedError(
                f"skip_plan of config.json: layer {layer}: {letter!r} is none of {', '.join(LETTERS)}"
            )
    if len(content) != layers:
        raise PlanRefusedError(
            f"skip_plan of config.json is for {len(content)} layers and the model has {layers}: it is another model's"
        )
    return tuple(LETTERS[letter] for letter in content)


def _per_layer(content: Any, text: Mapping[str, Any]) -> Plan:
    layers = text["num_hidden_layers"]
    if not isinstance(content, Mapping):
        raise PlanRefusedError('per_layer_config of config.json is not a table such as {"23": {"skip": ["mlp"]}}')
    plan = [Treatment.RUN] * layers
    for key, overrides in content.items():
        layer = int(key) if str(key).isdecimal() else layers
        if layer >= layers:
            raise PlanRefusedError(f"per_layer_config of config.json: no layer {key} in a model of {layers} layers")
        where = f"per_layer_config of config.json: layer {layer}"
        parts = overrides.get("skip") or ()
        if isinstance(parts, str) or not set(parts) <= {"attention", "mlp"}:
            raise PlanRefusedError(f'{where}: skip is {parts!r}, not a list of "attention" and "mlp"')
        _refuse_other_sizes(where, overrides, text, known={"skip"})
        plan[layer] = Treatment.without(parts)
    return tuple(plan)


def _blocks(content: Any, text: Mapping[str, Any]) -> Plan:
    layers = text["num_hidden_layers"]
    if not isinstance(content, Sequence) or len(content) != layers:
        raise PlanRefusedError(
            f"block_configs of config.json is not a list of {layers} entries, one per layer of the model"
        )
    plan = []
    for layer, block in enumerate(content):
        parts = {"attention": block.get("attention") or {}, "mlp": block.get("ffn") or {}}
        skipped = {name for name, part in parts.items() if part.get("no_op")}
        for name in parts.keys() - skipped:
            _refuse_other_sizes(
                f"block_configs of config.json: layer {layer}: {name}", parts[name], text, known={"no_op"}
            )
        plan.append(Treatment.without(skipped))
    return tuple(plan)


def _refuse_other_sizes(where: str, values: Mapping[str, Any], text: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what makes a layer another one than its neighbours, beyond ``known``."""
    of_model = dict(text)
    if text.get("num_key_value_heads"):
        of_model["n_heads_in_group"] = text["num_attention_heads"] // text["num_key_value_heads"]
    for name, value in values.items():
        if name not in known and value and value != of_model.get(name):
            raise PlanRefusedError(f"{where}: {name} = {value!r} is not the model's, and only skipped parts are served")


@dataclass(frozen=True)
class Serving:
    """Settings of vLLM that decide whether a plan can be served, under its options' names."""

    compiled: bool = False
    prefix_caching: bool = False
    cpu_attention: bool = True
    """Whether attention is vLLM's for CPUs (``CPU_ATTN``)."""
    options: tuple[str, ...] = ()
    """Further options in use, of :data:`UNTRIED` and :data:`UNTRIED_WITH_TOKENS`."""


UNTRIED = ("--pipeline-parallel-size", "--enable-lora", "--kv-transfer-config")
"""Options under which no plan is served: layers, adapters or cached keys of the dense model would be expected."""
UNTRIED_WITH_TOKENS = (
    "--speculative-config",
    "--enable-prompt-embeds",
    "--enable-dbo",
    "--decode-context-parallel-size",
)
"""Options under which it is not known which rows of a step are vision tokens."""


def refuse_serving(plan: Plan, serving: Serving) -> None:
    """Raise :class:`PlanRefusedError` for what ``plan`` cannot be served with."""
    splitting = [layer for layer, treatment in enumerate(plan) if treatment.splits_tokens]
    untried = UNTRIED + (UNTRIED_WITH_TOKENS if splitting else ())
    for option in serving.options:
        if option in untried:
            raise PlanRefusedError(f"the plan of config.json is not served with {option}; leave it out")
    if splitting and serving.compiled:
        raise PlanRefusedError(
            f"layer {splitting[0]} is {PAST[plan[splitting[0]]]}: vision and text rows are gathered, whose number "
            "changes from step to step, so nothing may be compiled or captured; add --enforce-eager"
        )
    bypassed = [layer for layer, treatment in enumerate(plan) if treatment is Treatment.BYPASS]
    if bypassed and serving.prefix_caching:
        raise PlanRefusedError(
            f"layer {bypassed[0]} is bypassed: its cache holds text tokens one behind the other, so blocks are not "
            "those of a prefix; add --no-enable-prefix-caching"
        )
    if bypassed and not serving.cpu_attention:
        raise PlanRefusedError(
            f"layer {bypassed[0]} is bypassed, which is served with attention for CPUs only (CPU_ATTN)"
        )
