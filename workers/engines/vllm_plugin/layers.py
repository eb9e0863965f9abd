"""Have decoder layers of vLLM leave out parts of their work, for all tokens or for vision tokens.

vLLM's decoder layers pass ``hidden_states`` and ``residual`` on, both ``[tokens, hidden]``, whose sum is the residual
stream (``residual`` is ``None`` before the first layer that runs); each norm adds the one to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .plan import Plan, PlanRefusedError, Treatment
from .step import Step

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Nothing(nn.Module):
    """Stands in for a part that is skipped: what it is given goes on, and its weights are not kept."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Pass ``hidden_states`` on; what else a layer gives its parts is not read."""
        return hidden_states

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read the part's weights over, where the checkpoint has them."""
        for _ in weights:
            pass
        return set()


class NoNorm(Nothing):
    """Stands in for the norm before a skipped part: nothing is added up yet, so the next norm does it."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        """Leave both to the next norm; before the first layer the stream is the residual alone."""
        return torch.zeros_like(hidden_states) if residual is None else (hidden_states, residual)


class NoLayer(Nothing):
    """Stands in for a layer that is skipped whole."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Pass both on."""
        return hidden_states, residual


def install(layers: nn.ModuleList, plan: Plan, contexts: dict[str, Any], step: Step) -> list[FrozenLayer]:
    """Put ``plan`` on the decoder layers of a model whose weights are not loaded yet; give the frozen ones.

    ``contexts`` is vLLM's table of layers with a KV cache, by name; skipped attention leaves it. Raises
    :class:`~.plan.PlanRefusedError` where the layers are not of the kind that a treatment knows.
    """
    if len(layers) != len(plan):
        raise PlanRefusedError(f"the plan is for {len(plan)} layers and vLLM builds {len(layers)}")
    frozen = []
    for number, treatment in enumerate(plan):
        layer: Any = layers[number]
        if treatment is not Treatment.RUN:
            _require_known(number, layer, treatment)
        if not treatment.keeps_attention:
            parts = set(layer.self_attn.modules())
            for name in [name for name, module in contexts.items() if module in parts]:
                del contexts[name]
        if treatment is Treatment.SKIP:
            layers[number] = NoLayer()
        elif treatment is Treatment.SKIP_ATTENTION:
            layer.input_layernorm, layer.self_attn = NoNorm(), Nothing()
        elif treatment is Treatment.SKIP_MLP:
            layer.post_attention_layernorm, layer.mlp = NoNorm(), Nothing()
        elif treatment is Treatment.FREEZE:
            frozen.append(FrozenLayer(layer, step))
        elif treatment is Treatment.FREEZE_ATTENTION:
            frozen.append(FrozenAttention(layer, step))
        elif treatment is Treatment.FREEZE_MLP:
            FrozenMlp(layer.mlp, step)
        elif treatment is Treatment.BYPASS:
            BypassedLayer(layer, step)
    return frozen


def _require_known(number: int, layer: Any, treatment: Treatment) -> None:
    kind = type(layer).__name__
    parameters = inspect.signature(layer.forward).parameters
    if tuple(parameters) != ("positions", "hidden_states", "residual"):
        raise PlanRefusedError(
            f"layer {number}: {treatment.value} is not known for {kind}, which takes {', '.join(parameters)}"
        )
    children = {name for name, _ in layer.named_children()}
    if children != PARTS:
        raise PlanRefusedError(
            f"layer {number}: {treatment.value} is known for layers of {', '.join(sorted(PARTS))} only, and {kind} has "
            f"{', '.join(sorted(children))}"
        )
    if not hasattr(layer.self_attn, "qkv_proj") or not hasattr(getattr(layer.self_attn, "attn", None), "layer_name"):
        raise PlanRefusedError(
            f"layer {number}: {treatment.value} is not known for attention of {type(layer.self_attn).__name__}"
        )


class _SplitLayer:
    """Forward of a decoder layer that vision rows do not go through: they keep their state."""

    def __init__(self, layer: nn.Module, step: Step) -> None:
        self._layer: Any = layer
        self._step = step
        self._forward: Callable[..., tuple[Tensor, Tensor]] = layer.forward
        layer.forward = self.run

    def run(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the layer on text rows; ``positions`` are ``[tokens]`` or ``[3, tokens]``."""
        rows = self._step.rows
        if rows is None:
            return self._forward(positions, hidden_states, residual)
        self.before(positions, hidden_states, residual)
        changed = []
        if len(rows.text):
            text = _rows(hidden_states, residual, rows.text)
            changed.append((rows.text, self._forward(positions[..., rows.text], *text)))
        if (vision := self.of_vision(hidden_states, residual)) is not None:
            changed.append((rows.vision, vision))
        if not changed:
            return hidden_states, residual
        # Before the first layer, hidden states are the buffer of the model's inputs.
        hidden_states = hidden_states.clone() if residual is None else hidden_states
        residual = torch.zeros_like(hidden_states) if residual is None else residual
        for own, (own_hidden, own_residual) in changed:
            hidden_states.index_copy_(0, own, own_hidden)
            residual.index_copy_(0, own, own_residual)
        return hidden_states, residual

    def before(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Do what text rows need of vision rows."""

    def of_vision(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return both for the vision rows behind the layer; None where they stay as they are."""
        return None


def _rows(hidden_states: Tensor, residual: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Copy some rows of both, since norms work in place."""
    return hidden_states[rows], None if residual is None else residual[rows]


class BypassedLayer(_SplitLayer):
    """A layer whose text rows see no vision tokens: the step gives its attention a cache of text alone."""

    def __init__(self, layer: nn.Module, step: Step) -> None:
        super().__init__(layer, step)
        step.bypass(self._layer.self_attn.attn)


class _Captured(Exception):  # noqa: N818
    """Ends an attention module's forward once keys and values are there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _KeysValues(nn.Module):
    """The part of a projection behind its first ``queries`` outputs, by the projection's own method."""

    def __init__(self, projection: Any, queries: int) -> None:
        super().__init__()
        self.quant_method = projection.quant_method
        self.weight = _part(projection.weight, queries)
        self.bias = None if projection.bias is None else _part(projection.bias, queries)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project ``[tokens, hidden]`` to keys and values side by side."""
        projected: Tensor = self.quant_method.apply(self, hidden_states, self.bias)
        return projected


def _part(whole: Tensor, start: int) -> nn.Parameter:
    part = whole.detach()[start:]
    # Kernels of CPUs pack the whole and drop it; elsewhere the part stays in its place.
    return nn.Parameter(part.clone() if part.device.type == "cpu" else part, requires_grad=False)


class FrozenLayer(_SplitLayer):
    """A layer whose vision rows give keys and values only, to which text rows attend."""

    def __init__(self, layer: nn.Module, step: Step) -> None:
        super().__init__(layer, step)
        self._attention: Any = self._layer.self_attn.attn
        self._projection: Any = self._layer.self_attn.qkv_proj
        self._attend: Callable[..., Tensor] = self._attention.forward
        self._project: Callable[..., Any] = self._projection.forward
        self._attention.forward, self._projection.forward = self.attend, self.project
        self._queries: int = self._projection.num_heads * self._projection.head_size
        self._capturing = False
        self._captured: _Captured | None = None
        self._keys_values: _KeysValues | None = None
        self._queries_alone = step.freeze(self._attention)

    def take_weights(self) -> None:
        """Make a projection to keys and values alone of the loaded weights, where they are not quantised."""
        if type(self._projection.quant_method).__name__ == "UnquantizedLinearMethod":
            # vLLM prepares modules that have a method once all weights are loaded, this one too.
            self._keys_values = self._layer.self_attn.keys_values = _KeysValues(self._projection, self._queries)

    def before(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> None:
        """Compute keys and values of vision rows by the layer's own modules, which stop before attention."""
        rows = self._step.rows
        assert rows is not None
        normed, _ = _normed(self._layer.input_layernorm, *_rows(hidden_states, residual, rows.vision))
        self._capturing = True
        try:
            self._layer.self_attn(positions=positions[..., rows.vision], hidden_states=normed)
        except _Captured as captured:
            self._captured = captured
            if not len(rows.text):  # no query asks, but the cache takes the keys
                self._step.store(self._attention, captured.keys, captured.values, self._attend)
        finally:
            self._capturing = False

    def project(self, hidden_states: Tensor) -> Any:
        """Project to queries, keys and values, side by side; without queries (zeros) while those are not asked for."""
        if not self._capturing or self._keys_values is None:
            return self._project(hidden_states)
        keys_values = self._keys_values(hidden_states)
        return torch.cat([keys_values.new_zeros(len(keys_values), self._queries), keys_values], dim=-1), None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as the layer does, or stop with keys and values, or let text rows attend to all rows."""
        if self._step.rows is None:
            return self._attend(query, key, value)
        if self._capturing:
            raise _Captured(key, value)
        return self._attend_rows(query, key, value)

    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, vision = self._step.rows, self._captured
        assert rows is not None and vision is not None
        tokens = len(rows.vision_mask)
        keys = _merged(tokens, (rows.text, key), (rows.vision, vision.keys))
        values = _merged(tokens, (rows.text, value), (rows.vision, vision.values))
        self._captured = None
        if self._queries_alone:
            return self._attend(query, keys, values)
        queries = query.new_zeros(tokens, query.shape[-1]).index_copy_(0, rows.text, query)
        return self._attend(queries, keys, values)[rows.text]


class FrozenAttention(FrozenLayer):
    """A layer whose attention adds nothing to vision rows, to which text rows attend; the MLP runs for all rows."""

    def of_vision(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the MLP on the vision rows."""
        assert self._step.rows is not None
        vision = _rows(hidden_states, residual, self._step.rows.vision)
        normed, stream = _normed(self._layer.post_attention_layernorm, *vision)
        return self._layer.mlp(normed), stream


class FrozenMlp:
    """Forward of an MLP that adds nothing to vision rows."""

    def __init__(self, mlp: Any, step: Step) -> None:
        self._step = step
        self._forward: Callable[[Tensor], Tensor] = mlp.forward
        mlp.forward = self.run

    def run(self, hidden_states: Tensor) -> Tensor:
        """Run the MLP on text rows of ``[tokens, hidden]``; the others get zeros."""
        rows = self._step.rows
        if rows is None:
            return self._forward(hidden_states)
        added = torch.zeros_like(hidden_states)
        return added.index_copy_(0, rows.text, self._forward(hidden_states[rows.text])) if len(rows.text) else added


def _normed(norm: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add both up, as norms of vLLM do, and return the norm and the sum."""
    if residual is None:
        return norm(hidden_states), hidden_states
    normed, stream = norm(hidden_states, residual)
    return normed, stream


def _merged(tokens: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Put the rows of each part, ``[rows, size]``, in their places among ``tokens``."""
    merged = parts[0][1].new_empty(tokens, parts[0][1].shape[-1])
    for rows, values in parts:
        merged.index_copy_(0, rows, values)
    return merged
