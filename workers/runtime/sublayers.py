"""Taking a decoder layer's block apart into attention and MLP, and running the layer without one of them.

A block can be taken apart where each of the two adds to the residual stream and nothing else does. That is not read off
names: the layer's own forward is run once with stand-ins in the place of its modules, whose results are known, and what
it does to them is looked at. No weight is read, so layers on torch's meta device are understood as well.

Shapes: states are ``[batch, tokens, hidden]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache_lengths import keyless_layer
from .edits import Edits
from .locate import forward_parameters, locate, shares_keys
from .plan import Action, SkipPlan

ATTENTION = ("self_attn", "self_attention", "attention", "attn")
MIXERS = ("linear_attn", "conv", "mamba")
"""Names of what stands in the place of attention in some layers; such layers can do without their MLP alone."""
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")
RESULTS = tuple(product((2, 3, 1), (1, 2)))
"""How many values attention and the MLP return, in the order in which it is tried; one value is a tensor alone."""
GAIN = 3.0
"""What the stand-ins of all other modules multiply states with."""


class NotSeparableError(ValueError):
    """A layer whose block is not residual + attention, then + MLP; the message says what was found."""


@dataclass(frozen=True)
class Sublayer:
    """Attention or MLP of a layer: the module, and how many values it returns.

    ``around`` names the modules in front of it and behind it that serve it alone: norms, mostly. What ``end`` returns,
    the part or the last module behind it, is added to the residual stream, times ``scale``.
    """

    name: str
    results: int
    around: tuple[str, ...]
    end: str
    scale: float


@dataclass(frozen=True)
class Block:
    """The two parts that a layer adds to the residual stream."""

    attention: Sublayer
    mlp: Sublayer
    in_sequence: bool
    """Whether the MLP reads the states with what attention added, as if the layer were two."""

    def part(self, action: Action) -> Sublayer:
        """Return the part that an action leaves out."""
        return self.attention if action.row.leaves_out == "attention" else self.mlp

    def modules(self, action: Action) -> tuple[str, ...]:
        """Name the layer's modules that do nothing under an action."""
        part = self.part(action)
        return (part.name, *part.around)


# Leaving a part out ---------------------------------------------------------------------------------------------------


class AddsNothing(nn.Module):
    """Stands in for an MLP, or for attention: zeros in the shape of its input."""

    def __init__(self, results: int) -> None:
        super().__init__()
        self._results = results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros ``[..., hidden]`` for states ``[..., hidden]``, in a tuple where the part returns one."""
        zeros = torch.zeros_like(_states(args, kwargs))
        return zeros if self._results == 1 else (zeros, *(None,) * (self._results - 1))


class NoAttention(AddsNothing):
    """Stands in for attention: the layer's place in the KV cache holds no keys, only the sequence's length."""

    def __init__(self, results: int, layer_idx: int, *, stores_keys: bool) -> None:
        super().__init__(results)
        self._layer_idx, self._stores_keys = layer_idx, stores_keys

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, as :class:`AddsNothing` gives them."""
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        if cache is not None and self._stores_keys:
            keyless_layer(cache, self._layer_idx).advance(_states(args, kwargs).shape[-2])
        return super().forward(*args, **kwargs)


def leave_out(
    edits: Edits, layer: nn.Module, block: Block, layer_idx: int, action: Action, *, permanent: bool = False
) -> None:
    """Have a layer run without the part of its block that ``action`` names, and without what serves this part alone.

    ``layer_idx`` is the layer's place in the KV cache. With ``permanent`` the modules leave the layer, and with them
    their memory; otherwise they stay where they are and are not called.
    """
    part = block.part(action)
    stand_in = (
        NoAttention(part.results, layer_idx, stores_keys=not shares_keys(layer))
        if action.row.leaves_out == "attention"
        else AddsNothing(part.results)
    )
    for name, module in ((part.name, stand_in), *((each, nn.Identity()) for each in part.around)):
        if permanent:
            edits.set_item(layer._modules, name, _emptied(getattr(layer, name), module.forward))
        else:
            edits.set_instance_attribute(getattr(layer, name), "forward", module.forward)


def _emptied(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Return a module of the same class, by which layers choose how they call it, with this forward and no weights."""
    kind = type(module)
    emptied: nn.Module = object.__new__(kind)
    nn.Module.__init__(emptied)
    emptied.__dict__.update(forward=forward, _is_hf_initialized=True)  # transformers would look for its weights
    return emptied.train(module.training)


def _states(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise TypeError("a module was called without hidden states")
    return states


def unused_modules(model: nn.Module, plan: SkipPlan) -> tuple[str, ...]:
    """Name the modules of ``model``'s layers that do nothing under a plan, as they are called once skipped layers left.

    Raises :class:`NotSeparableError`.
    """
    stack = locate(model)
    return tuple(
        f"{stack.path}.{new}.{name}"
        for new, old in enumerate(plan.kept)
        if plan[old].row.removes_part
        for name in block_of(stack.layers[old], int(stack.text_config.hidden_size)).modules(plan[old])
    )


# Understanding a block ------------------------------------------------------------------------------------------------


_found: WeakKeyDictionary[nn.Module, tuple[Hashable, Block | str]] = WeakKeyDictionary()
"""By layer what it was when it was examined, and its block, or why it has none."""


def block_of(layer: nn.Module, hidden_size: int) -> Block:
    """Find the attention and the MLP of a layer. Raises :class:`NotSeparableError` with what was found instead.

    A layer is examined once, and again when its own numbers and names or the classes of its modules have changed.
    """
    outline = _outline(layer, hidden_size)
    known = _found.get(layer)
    if known is None or known[0] != outline:
        try:
            known = outline, _examine(layer, hidden_size)
        except NotSeparableError as error:
            known = outline, str(error)
        _found[layer] = known
    if isinstance(known[1], str):
        raise NotSeparableError(known[1])
    return known[1]


def _outline(layer: nn.Module, hidden_size: int) -> Hashable:
    """Return what a layer's forward may branch on, but for objects that it shares with other layers."""
    plain = tuple((name, own) for name, own in layer.__dict__.items() if isinstance(own, (int, float, str, bool)))
    return hidden_size, type(layer), plain, tuple((name, type(child)) for name, child in layer.named_children())


def _examine(layer: nn.Module, hidden_size: int) -> Block:
    attention = _child(layer, (*ATTENTION, *MIXERS), "attention")
    mlp = _child(layer, MLP, "MLP")
    reason = ""
    for results in RESULTS:
        try:
            return _examined(_Rehearsal(layer, {attention: results[0], mlp: results[1]}, hidden_size), attention, mlp)
        except NotSeparableError as error:
            raise NotSeparableError(f"its block is not residual + attention, then + MLP: {error}") from None
        except Exception as error:  # whatever the layer's code raises for stand-ins is why it is not understood
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
    code = f"{type(layer).__name__}.forward"
    raise NotSeparableError(f"its block cannot be taken apart: {code} does not run over stand-ins ({reason})")


def _child(layer: nn.Module, names: Sequence[str], what: str) -> str:
    found = [name for name, child in layer.named_children() if name in names]
    if len(found) != 1:
        raise NotSeparableError(f"it has {len(found)} modules that are its {what} by name, not one")
    return found[0]


class _StandIn:
    """A call in the place of a module; it passes for one of the module's class, by which some layers choose a branch.

    Nothing else of the module is there.
    """

    def __init__(self, module: nn.Module, called: Callable[..., Any]) -> None:
        self._kind, self._called = type(module), called

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)


@dataclass(frozen=True)
class _Call:
    """One call of a module's stand-in."""

    name: str
    states: Tensor
    result: Tensor


class _Rehearsal:
    """Run a layer's own forward over stand-ins for its modules."""

    def __init__(self, layer: nn.Module, parts: dict[str, int], hidden_size: int) -> None:
        self.layer, self.parts = layer, parts
        generator = torch.Generator().manual_seed(0)
        # Five rows: a tensor that the layer takes for a tuple does not come apart into two or three.
        self.states, self.added, self.changed = (
            torch.randn(5, 2, hidden_size, generator=generator, dtype=torch.float64, device="cpu") for _ in range(3)
        )

    def run(
        self, given: dict[str, Tensor], without: Sequence[str] = (), states: Tensor | None = None
    ) -> tuple[Tensor, list[_Call]]:
        """Return the layer's output, and the calls in order, where the parts return what is ``given``.

        Parts not named return zeros; modules in ``without`` return what they are given. The layer runs on ``states``.
        """
        calls: list[_Call] = []

        def stand_in(name: str, module: nn.Module) -> _StandIn:
            def called(*args: Any, **kwargs: Any) -> Any:
                states = _states(args, kwargs)
                if name in self.parts:
                    result = given.get(name, torch.zeros_like(self.states)).view(states.shape)
                else:
                    plain = name in without or isinstance(module, nn.Dropout)
                    result = states.clone() if plain else states * GAIN
                calls.append(_Call(name, states, result))
                results = self.parts.get(name, 1)
                return result if results == 1 else (result, *(None,) * (results - 1))

            return _StandIn(module, called)

        layer = self.layer
        shell = object.__new__(type(layer))
        own = {name: each for name, each in layer.__dict__.items() if name != "forward"}
        shell.__dict__.update(
            own,
            _modules={name: stand_in(name, child) for name, child in layer.named_children()},
            _parameters={name: _ones(each) for name, each in layer._parameters.items()},
            _buffers={name: _ones(each) for name, each in layer._buffers.items()},
            training=False,
        )
        parameters = list(forward_parameters(layer).values())
        arguments = {
            each.name: None if each.default is each.empty else each.default
            for each in parameters[1:]
            if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        }
        with torch.no_grad():
            output = type(layer).forward(shell, self.states if states is None else states, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.shape != self.states.shape:
            raise NotSeparableError("it returns no hidden states of the shape that it is given")
        return hidden, calls


def _examined(rehearsal: _Rehearsal, attention: str, mlp: str) -> Block:
    """Return the block, if it is one. Raises :class:`NotSeparableError` where it is another."""
    states, added = rehearsal.states, {attention: rehearsal.added, mlp: rehearsal.changed}
    nothing, calls = rehearsal.run({})
    if not torch.equal(nothing, states):
        raise NotSeparableError("without both its output is not its input (norms behind the sums, or further parts)")
    alone, factors, behind = {}, {}, {}
    for name, own in added.items():
        if sum(call.name == name for call in calls) != 1:
            raise NotSeparableError(f"its {name} does not run exactly once")
        alone[name], given = rehearsal.run({name: own})
        factor = _multiple(alone[name] - states, own)
        if factor is None:
            raise NotSeparableError(f"it does more to what its {name} returns than to add it")
        factors[name] = factor
        behind[name] = [each for each in given if each.name != name and _multiple(each.states, own) is not None]
    both, _ = rehearsal.run(added)
    if not torch.allclose(both + states, alone[attention] + alone[mlp]):
        raise NotSeparableError("what it adds is not the sum of what attention and MLP return")
    parts = {}
    for name in added:
        other = next(each for each in added if each != name)
        around = tuple(_serving(rehearsal, name, behind[name], calls))
        _, with_them = rehearsal.run({other: added[other]})
        found, without = rehearsal.run({other: added[other]}, around)
        others = [[call.states for call in each if call.name not in (name, *around)] for each in (with_them, without)]
        if not torch.equal(found, alone[other]) or not all(map(torch.equal, *others)):
            raise NotSeparableError(f"others read what {' and '.join(around)} make for its {name}")
        end = next((each.name for each in reversed(behind[name]) if each.name in around), name)
        gain = math.prod(_multiple(each.result, each.states) or 1.0 for each in behind[name])
        parts[name] = Sublayer(name, rehearsal.parts[name], around, end, factors[name] / gain)
    return Block(parts[attention], parts[mlp], _in_sequence(rehearsal, attention, mlp))


def _in_sequence(rehearsal: _Rehearsal, attention: str, mlp: str) -> bool:
    """Whether the layer does at once what it does without its MLP, and then without its attention."""
    both, at_once = rehearsal.run({attention: rehearsal.added, mlp: rehearsal.changed})
    between, first = rehearsal.run({attention: rehearsal.added})
    after, second = rehearsal.run({mlp: rehearsal.changed}, states=between)
    pairs = (
        (both, after),
        (_read(at_once, attention), _read(first, attention)),
        (_read(at_once, mlp), _read(second, mlp)),
    )
    return all(torch.allclose(own, other) for own, other in pairs)


def _read(calls: Sequence[_Call], name: str) -> Tensor:
    return next(call.states for call in calls if call.name == name)


def _serving(rehearsal: _Rehearsal, name: str, behind: Sequence[_Call], calls: Sequence[_Call]) -> Iterator[str]:
    """Yield the modules whose results only the part reads, and those that only what the part returns goes through."""
    once = {call.name for call in calls if sum(each.name == call.name for each in calls) == 1}
    reads = _read(calls, name)
    while True:
        readers = [call.name for call in calls if call.states is reads]
        maker = next((call for call in calls if call.result is reads), None)
        if maker is None or len(readers) != 1 or maker.name not in once:
            break
        yield maker.name
        reads = maker.states
    for call in behind:
        if call.name in once:
            yield call.name
        elif not isinstance(rehearsal.layer.get_submodule(call.name), nn.Dropout):
            raise NotSeparableError(f"{call.name} behind its {name} serves others, too")


def _multiple(found: Tensor, of: Tensor) -> float | None:
    """Return the factor by which ``found`` is a multiple of a tensor; None where it is none, or nothing."""
    of = of.view(found.shape) if of.numel() == found.numel() else of
    if of.shape != found.shape:
        return None
    factor = float((found * of).sum() / (of * of).sum())
    return factor if abs(factor) > 1e-12 and torch.allclose(found, factor * of) else None


def _ones(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.ones(tensor.shape, dtype=torch.float64, device="cpu")
