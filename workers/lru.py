"""Keep the values that were used last, within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LruCache(Generic[Key, Value]):
    """Keep values whose sizes together are at most ``budget``; those used longest ago are dropped first.

    Without ``size`` every value counts 1. The value put last stays, even if it alone is larger than the budget.
    """

    def __init__(self, budget: int, size: Callable[[Value], int] = lambda _: 1) -> None:
        self.budget = budget
        self.held = 0
        """Sizes of all values that are kept, together."""
        self._size = size
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        """Count the values that are kept."""
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """Return a value, which then counts as used last; None where it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> Value:
        """Keep a value in the place of a former one, drop others for it, and return it."""
        self.drop(key)
        self._values[key] = value
        self.held += self._size(value)
        while self.held > self.budget and len(self._values) > 1:
            self.drop_oldest()
        return value

    def drop(self, key: Key) -> None:
        """Forget a value, if it is kept."""
        if key in self._values:
            self.held -= self._size(self._values.pop(key))

    def drop_oldest(self) -> None:
        """Forget the value that was used longest ago. Raises KeyError where none is kept."""
        _, value = self._values.popitem(last=False)
        self.held -= self._size(value)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()
        self.held = 0
