"""A log of changes to a live model that can be undone exactly: what was there before is put back as the same object."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn

from .plan import PlanError

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

        self._undo.append(restore)  # before the change: an interrupt may come between the two
        mapping[key] = value

    def set_instance_attribute(self, owner: object, name: str, value: Any) -> None:
        """Set an attribute in the object's own dictionary, past ``__setattr__`` of modules and configurations."""
        self.set_item(owner.__dict__, name, value)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the changes are undone; it may be called again where an interrupt stopped it."""
        self._undo.append(action)

    def undo(self) -> None:
        """Undo every change, last first, whatever one of them raises: the first error is raised in the end.

        Changes already undone are not undone twice.
        """
        error: BaseException | None = None
        interrupted: Callable[[], None] | None = None
        while self._undo:
            action = self._undo[-1]
            try:
                action()
            except Exception as raised:
                error = error or raised
            except BaseException as interrupt:
                error = interrupt
                if interrupted is not action:  # it may have stopped halfway: once more
                    interrupted = action
                    continue
            self._undo.pop()
        if error is not None:
            raise error

    def forget(self) -> None:
        """Make the changes permanent."""
        self._undo.clear()


class NotCopied:
    """Part of a plan on a live model, which leads back to that model: a copy of it would run the original's layers."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()


def refuse_copy(*_: object) -> NoReturn:
    """Raise :class:`PlanError` with the reason why a model under a plan is not copied."""
    raise PlanError(
        "a model cannot be copied, pickled or saved whole while a plan is on it (the copy would run the layers of this "
        "one): leave apply() first and apply the plan to the copy; save_pruned() writes a model without its skipped "
        "layers"
    )
