"""Cache hidden states, keys and values at the nodes of the trie within a memory budget."""

from __future__ import annotations

from collections.abc import Hashable

from workers.layerwise.decoder import Keys, LayerOutput
from workers.lru import LruCache

Kept = LayerOutput | Keys
"""A state behind a layer, or what a layer's attention sees."""


class StateCache:
    """States by chunk and path, at most ``budget`` bytes of them.

    Those where several plans part are kept longest, then those used last. What is dropped is computed again when it
    is asked for; that costs time, not correctness.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._plain: LruCache[Hashable, Kept] = LruCache(budget, _nbytes)
        self._branching: LruCache[Hashable, Kept] = LruCache(budget, _nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all states that are kept."""
        return self._plain.held + self._branching.held

    def get(self, key: Hashable) -> Kept | None:
        """Return the state, which then counts as used last."""
        found = self._branching.get(key)
        return self._plain.get(key) if found is None else found

    def put(self, key: Hashable, state: Kept, *, branching: bool) -> None:
        """Keep a state, and drop others for it; one that alone is larger than the budget is not kept."""
        self.drop(key)
        size = state.nbytes
        if size > self.budget:
            return
        while self.nbytes + size > self.budget:
            (self._plain or self._branching).drop_oldest()
        (self._branching if branching else self._plain).put(key, state)

    def drop(self, key: Hashable) -> None:
        """Forget a state, if it is there."""
        self._branching.drop(key)
        self._plain.drop(key)

    def clear(self) -> None:
        """Forget all states."""
        self._plain.clear()
        self._branching.clear()


def _nbytes(state: Kept) -> int:
    return state.nbytes
