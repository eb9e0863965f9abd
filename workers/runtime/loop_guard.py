"""Reading the source of a decoder's loop over its layers for anything that depends on a layer's place in the list.

Skipping a layer moves the later ones forward. A family whose loop indexes something by position that this runtime
does not know about would then go silently wrong, so it is refused instead.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import nn

POSITION_FREE = frozenset({"per_layer_inputs[:, :, i, :]"})
"""Uses of a layer's position that need no attention: the sliced tensor shrinks with the stack."""

COUNTS_ROWS = re.compile(
    r"\barange\(|\.get_seq_length\(|(cache|past_key_values)\.layers\[|\.update_ind|\.get_conv_state\("
)
"""What shows that an attention module derives positions from the number of rows, or reaches into the cache."""


@dataclass(frozen=True)
class LoopFacts:
    """Facts about a loop over the decoder layers: all it does besides handing hidden states on."""

    found: bool
    positions: frozenset[str] = frozenset()
    """Uses of the loop's index, as source with the index called ``i``."""
    carried: frozenset[str] = frozenset()
    """What one layer hands to the next besides hidden states."""


def attribute_uses(facts: LoopFacts, names: frozenset[str]) -> frozenset[str]:
    """Return the position uses in ``facts`` that are not lookups in a list whose name is in ``names``."""
    known = re.compile(r"self\.(?:\w*config\.)?(\w+)\[i\]")
    compared = re.compile(r"i (?:==|in|<|>=) self\.(?:\w*config\.)?(\w+)")
    return frozenset(
        use
        for use in facts.positions - POSITION_FREE
        if not any((match := pattern.fullmatch(use)) and match[1] in names for pattern in (known, compared))
    )


def loop_facts(owner: nn.Module, list_name: str) -> LoopFacts:
    """Facts about the loop over ``owner.<list_name>`` in the forward of its class."""
    facts: LoopFacts = _loop_facts(cast(Hashable, type(owner)), list_name)
    return facts


@lru_cache(maxsize=256)
def _loop_facts(owner: Any, list_name: str) -> LoopFacts:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(owner.forward)))
    except (OSError, TypeError):
        return LoopFacts(found=False)
    loops = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.For) and re.search(rf"\bself\.{list_name}\b", ast.unparse(node.iter))
    ]
    if len(loops) != 1:
        return LoopFacts(found=False)
    return _facts_of(loops[0], list_name)


def _facts_of(loop: ast.For, list_name: str) -> LoopFacts:
    iterated = re.sub(rf"self\.{list_name}(\[:self\.\w*config\.\w+\])?", "LAYERS", ast.unparse(loop.iter))
    if iterated == "LAYERS" and isinstance(loop.target, ast.Name):
        index, layer = None, loop.target.id
    elif iterated == "enumerate(LAYERS)" and isinstance(loop.target, ast.Tuple):
        index, layer = (name.id if isinstance(name, ast.Name) else "" for name in loop.target.elts)
    else:
        return LoopFacts(found=True, positions=frozenset({ast.unparse(loop.iter)}))
    return LoopFacts(
        found=True, positions=_uses_of(loop, index) if index else frozenset(), carried=_carried(loop, index, layer)
    )


def _uses_of(loop: ast.For, index: str) -> frozenset[str]:
    """Return the smallest expressions around each use of the index, the index renamed to ``i``."""
    parents = {child: node for node in ast.walk(loop) for child in ast.iter_child_nodes(node)}
    uses = set()
    for node in ast.walk(loop):
        if not (isinstance(node, ast.Name) and node.id == index and isinstance(node.ctx, ast.Load)):
            continue
        around = parents[node]
        while isinstance(around, (ast.Tuple, ast.Slice)):
            around = parents[around]
        uses.add(re.sub(rf"\b{index}\b", "i", ast.unparse(around)))
    return frozenset(uses)


def _carried(loop: ast.For, index: str | None, layer: str) -> frozenset[str]:
    """Names that a layer's call reads and the loop sets from anything but the layer's place or the layer itself."""
    calls = [
        node
        for node in ast.walk(loop)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == layer
    ]
    if not calls:
        return frozenset({f"no call of {layer}"})
    first = calls[0].args[0] if calls[0].args else next((k.value for k in calls[0].keywords), None)
    hidden = first.id if isinstance(first, ast.Name) else ""
    read = {name.id for call in calls for name in ast.walk(call) if isinstance(name, ast.Name)} - {layer, hidden}
    carried = set()
    for node in ast.walk(loop):
        if not isinstance(node, ast.Assign):
            continue
        value_names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
        from_layer_call = any(call in ast.walk(node.value) for call in calls)
        for target in node.targets:
            names = {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
            if from_layer_call and isinstance(target, ast.Tuple):
                carried |= names - {hidden}
            elif from_layer_call or not names & read:
                continue
            elif not value_names & {index, layer}:
                carried |= names & read
    return frozenset(carried)


def counts_rows(layer: nn.Module, cache_arguments: tuple[str, ...], allowed: Callable[[nn.Module], bool]) -> str:
    """Name of the first class in ``layer`` whose attention depends on how many rows it is given, empty if none."""
    for module in layer.modules():
        if _counts_rows(cast(Hashable, type(module)), cache_arguments) and not allowed(module):
            return type(module).__name__
    return ""


@lru_cache(maxsize=1024)
def _counts_rows(kind: Any, cache_arguments: tuple[str, ...]) -> bool:
    forward = inspect.unwrap(kind.forward)
    try:
        takes_cache = bool(set(cache_arguments).intersection(inspect.signature(forward).parameters))
        return takes_cache and COUNTS_ROWS.search(inspect.getsource(forward)) is not None
    except (OSError, TypeError, ValueError):
        return True
