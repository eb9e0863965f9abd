"""Cache hidden states, keys and values at the nodes of the trie within a memory budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from workers.layerwise.decoder import Keys, LayerOutput

Kept = LayerOutput | Keys
"""A state behind a layer, or what a layer's attention sees."""


class StateCache:
    """States by chunk and path, at most ``budget`` bytes of them.

    Those where several plans part are kept longest, then those used last. What is dropped is computed again when it
    is asked for; that costs time, not correctness.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._plain: OrderedDict[Hashable, Kept] = OrderedDict()
        self._branching: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, key: Hashable) -> Kept | None:
        """Return the state, which then counts as used last."""
        for states in (self._branching, self._plain):
            if key in states:
                states.move_to_end(key)
                return states[key]
        return None

    def put(self, key: Hashable, state: Kept, *, branching: bool) -> None:
        """Keep a state, and drop others for it; one that alone is larger than the budget is not kept."""
        self.drop(key)
        size = state.nbytes
        if size > self.budget:
            return
        while self.nbytes + size > self.budget:
            self._evict()
        (self._branching if branching else self._plain)[key] = state
        self.nbytes += size

    def drop(self, key: Hashable) -> None:
        """Forget a state, if it is there."""
        for states in (self._branching, self._plain):
            state = states.pop(key, None)
            if state is not None:
                self.nbytes -= state.nbytes

    def clear(self) -> None:
        """Forget all states."""
        self._plain.clear()
        self._branching.clear()
        self.nbytes = 0

    def _evict(self) -> None:
        states = self._plain or self._branching
        _, state = states.popitem(last=False)
        self.nbytes -= state.nbytes
