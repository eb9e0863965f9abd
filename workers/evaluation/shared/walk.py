"""Walk the trie: compute hidden states at its nodes, and the answer positions' final states at the plans' ends.

The walk goes depth first, one chunk after another, so that only the states of one branch have to be alive; the cache
keeps as many more as its budget holds, for plans that are asked for later.

Shapes: a chunk's state is ``[rows, tokens, hidden]``, its answer positions' ``[positions, hidden]``
(:mod:`workers.evaluation.shared.packing`); keys and values are ``[rows, heads, tokens, size]`` each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from workers.compensation.trie_maps import TrieMaps
from workers.layerwise.decoder import Decoder, Keys, LayerOutput, Watch
from workers.layerwise.trie import ApplyMap, Execute, Node, Step
from workers.runtime.plan import Action

from .continuation import Continuation
from .packing import Chunk, Context
from .state_cache import StateCache


@dataclass
class Tally:
    """Layer executions so far, as ``Evaluation`` counts them."""

    executions: float = 0.0
    by_plan: dict[str, float] = field(default_factory=dict)


class Walker:
    """Compute states of chunks at nodes of a trie."""

    def __init__(self, decoder: Decoder, states: StateCache, tally: Tally | None = None) -> None:
        self._decoder, self._states = decoder, states
        self.maps: TrieMaps | None = None
        """What ``ApplyMap`` steps do; forget the states kept for other maps when this changes."""
        self.tally = tally or Tally()
        self._charged = ""
        self.keeps_keys = False
        """Whether layers' keys and values are kept as they are executed, for continuations that are likely to come."""
        self._with_keys: set[tuple[tuple[object, ...], tuple[Step, ...]]] = set()

    def ends(self, node: Node, chunk: Chunk) -> Iterator[tuple[Node, Tensor]]:
        """Every node where plans end, with the final states ``[answer positions, hidden]`` there, depth first."""
        if node.plans:
            self.forget_keys(but={each.path for each in node.ancestry()})
            self._charged = node.plans[0]
            yield node, self.answer_states(node, chunk)
        for child in node.children.values():
            self._charged = next(below.plans[0] for below in child.walk() if below.plans)
            if child.children:  # otherwise only the answer positions of its last layer are needed
                self.state(child, chunk)
            yield from self.ends(child, chunk)

    # States ---------------------------------------------------------------------------------------------------------

    def state(self, node: Node, chunk: Chunk) -> LayerOutput:
        """Return the state of all rows at a node, from the cache or computed from the nearest ancestor's."""
        if node.parent is None:
            return LayerOutput(chunk.context.hidden)
        key = self._key(node, chunk)
        known = self._states.get(key)
        if isinstance(known, LayerOutput) and (known.watched is not None or not node.map_follows):
            return known
        before = self.state(node.parent, chunk)
        if isinstance(node.step, ApplyMap):
            output = LayerOutput(self._mapped(node, before))
        else:
            output = self._execute(node, chunk, before.hidden)
        self._states.put(key, output, branching=node.branching)
        return output

    def _key(self, node: Node, chunk: Chunk) -> tuple[object, ...]:
        return (chunk.key, node.path)

    def _execute(self, node: Node, chunk: Chunk, hidden: Tensor) -> LayerOutput:
        step = node.step
        assert isinstance(step, Execute)
        self._count(chunk, node)
        arguments, watch = chunk.context.arguments[step.layer], self._watch(node)
        if step.action is not Action.RUN:
            return self._decoder.run_rows(step.layer, step.action, chunk.context.vision, hidden, arguments, watch)
        if not self.keeps_keys:
            return self._decoder.run(step.layer, hidden, arguments, watch)
        output, keys = self._decoder.run_with_keys(step.layer, hidden, arguments, watch)
        self._keep(node, chunk, keys)
        return output

    def _watch(self, node: Node) -> Watch | None:
        step = node.step
        if not node.map_follows or not isinstance(step, Execute):
            return None
        assert self.maps is not None
        return self.maps.watch(step)

    def _count(self, chunk: Chunk, node: Node) -> None:
        assert isinstance(node.step, Execute)
        executions = chunk.n_samples * node.step.action.row.executions
        self.tally.executions += executions
        self.tally.by_plan[self._charged] = self.tally.by_plan.get(self._charged, 0.0) + executions

    # Ends -----------------------------------------------------------------------------------------------------------

    def answer_states(self, node: Node, chunk: Chunk) -> Tensor:
        """Return final states ``[answer positions, hidden]``; the last layer runs only these rows."""
        hidden = self._full_or_answers(node, chunk)
        return hidden[chunk.answer_rows, chunk.answer_columns]

    def _full_or_answers(self, node: Node, chunk: Chunk) -> Tensor:
        assert node.parent is not None
        known = self._states.get(self._key(node, chunk))
        if known is not None or node.children:
            return self.state(node, chunk).hidden
        step = node.step
        if isinstance(step, ApplyMap):
            before = self._answer_output(node.parent, chunk)
            return self._mapped(node, before)
        return self._answer_output(node, chunk).hidden

    def _answer_output(self, node: Node, chunk: Chunk) -> LayerOutput:
        """Return a node's state that is right at the answer positions only."""
        assert node.parent is not None
        known = self._states.get(self._key(node, chunk))
        step = node.step
        if known is not None or not isinstance(step, Execute):
            return self.state(node, chunk)
        before = self.state(node.parent, chunk)
        self._count(chunk, node)
        layer, arguments = self._text_arguments(node, chunk.context)
        return self._decoder.run_text(
            layer, step.action, chunk.answer_split, before.hidden, arguments, self._watch(node)
        )

    def _text_arguments(self, node: Node, context: Context) -> tuple[int, dict[str, Any]]:
        """Return a node's layer, and its arguments for text tokens."""
        step = node.step
        assert isinstance(step, Execute)
        arguments = context.arguments[step.layer]
        if step.action.row.hides_vision:
            arguments = context.without_vision(arguments, self._decoder.mask_name)
        return step.layer, arguments

    # Continuations --------------------------------------------------------------------------------------------------

    def continued(self, node: Node, continuation: Continuation, before: Sequence[Keys]) -> tuple[Tensor, list[Keys]]:
        """Return final states ``[positions, hidden]`` of a continuation, under the plan that ends at a node.

        ``before`` is what the pass before gave as second result: keys and values of the tokens it has fed, by layer
        that has any. Like decoding on the plain path, it is not counted.
        """
        nodes = node.ancestry()[1:]
        own = LayerOutput(continuation.hidden)
        fed: list[Keys] = []
        for each in nodes:
            if isinstance(each.step, ApplyMap):
                own = LayerOutput(self._mapped(each, own))
                continue
            assert isinstance(each.step, Execute)
            action = each.step.action
            layer, arguments = self._text_arguments(each, continuation.context)
            if not action.row.keeps_keys:
                given = self._decoder.arguments_of(layer, continuation.new, arguments)
                own = self._decoder.run_rows(layer, action, None, own.hidden, given, self._watch(each))
                continue
            of_chunks = [self._keys_at(each, chunk) for chunk, _ in continuation.sources]
            seen = continuation.known(of_chunks, before[len(fed)] if before else None)
            with self._decoder.without(layer, action):
                own = self._decoder.run_new(layer, continuation.new, own.hidden, arguments, seen, self._watch(each))
            fed.append(continuation.kept(seen))
        return continuation.answers_in(own.hidden), fed

    def _keys_at(self, node: Node, chunk: Chunk) -> Keys:
        """Keys and values of a chunk's tokens at a node's layer, kept for the plans that begin alike."""
        assert node.parent is not None and isinstance(node.step, Execute)
        known = self._states.get(("keys", *self._key(node, chunk)))
        if known is None:
            before = self.state(node.parent, chunk).hidden
            known = self._decoder.keys(node.step.layer, before, chunk.context.arguments[node.step.layer])
            self._keep(node, chunk, known)
        assert isinstance(known, Keys)
        return known

    def _keep(self, node: Node, chunk: Chunk, keys: Keys) -> None:
        self._states.put(("keys", *self._key(node, chunk)), keys.by_themselves(), branching=False)
        self._with_keys.add((chunk.key, node.path))

    def forget_keys(self, but: Collection[tuple[Step, ...]] = ()) -> None:
        """Forget keys and values, except at the paths ``but``.

        The walk is depth first: only paths on the way to the next plan's end are visited again.
        """
        for chunk, path in [each for each in self._with_keys if each[1] not in but]:
            self._states.drop(("keys", chunk, path))
            self._with_keys.discard((chunk, path))

    # Maps ------------------------------------------------------------------------------------------------------------

    def _mapped(self, node: Node, before: LayerOutput) -> Tensor:
        step = node.step
        assert isinstance(step, ApplyMap) and self.maps is not None
        return self.maps.transform(step, before)
