"""A log of changes to a live model that can be undone exactly: what was there before is put back as the same object."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

_MISSING = object()


class Edits:
    """Changes made so far, undone in reverse order by :meth:`undo`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set ``mapping[key]``; undoing puts the old value back, or removes the key."""
        old = mapping.get(key, _MISSING)

        def restore() -> None:
            if old is _MISSING:
                mapping.pop(key, None)
            else:
                mapping[key] = old

        mapping[key] = value
        self._undo.append(restore)

    def set_instance_attribute(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute in the object's own dictionary, past ``__setattr__`` of modules and configurations."""
        self.set_item(owner.__dict__, name, value)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the changes are undone."""
        self._undo.append(action)

    def undo(self) -> None:
        """Undo every change, last first. Changes already undone are not undone twice."""
        while self._undo:
            self._undo.pop()()

    def forget(self) -> None:
        """Make the changes permanent."""
        self._undo.clear()
