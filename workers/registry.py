"""Named objects of one kind: built-in rows, and what other packages register by entry point.

The shape of the Language Model Evaluation Harness's ``api/registry.py``: a row may be the object itself or the text
``"module:attribute"``, which is imported when the name is first looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from workers.errors import UnknownNameError
from workers.text import did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to objects of one kind. Built-in names come first, and win over entry points of the same name.

    Looking up a name raises UnknownNameError when nobody registered it, several packages did, or the import fails.
    """

    def __init__(
        self, group: str, built_in: Mapping[str, T | str], *, adapt: Callable[[str, T], T] = lambda name, found: found
    ) -> None:
        """``group`` is the entry point group; ``adapt`` wraps what an entry point gives, by its name."""
        self.group, self.built_in = group, built_in
        self._adapt = adapt
        self._found: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._found:
            row = self.built_in.get(name)
            if row is None:
                self._found[name] = self._adapt(name, self._from_entry_point(name))
            else:
                self._found[name] = self._import(name, row) if isinstance(row, str) else row
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or any(name == each for each in self)

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from sorted({point.name for point in entry_points(group=self.group)} - self.built_in.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def check(self, name: str) -> str:
        """Return a registered name without importing anything. Raises UnknownNameError for any other."""
        if name not in self:
            raise UnknownNameError(f"{name!r} is unknown; choose one of {', '.join(self)}{did_you_mean(name, self)}")
        return name

    def _from_entry_point(self, name: str) -> T:
        found = list(entry_points(group=self.group, name=self.check(name)))
        if len(found) > 1:
            packages = ", ".join(sorted(point.dist.name if point.dist else point.value for point in found))
            raise UnknownNameError(f"{name!r} is offered by several packages ({packages}); uninstall all but one")
        return self._import(name, found[0].value)

    @staticmethod
    def _import(name: str, target: str) -> T:
        module, _, attribute = target.partition(":")
        try:
            return cast(T, getattr(import_module(module), attribute))
        except (ImportError, AttributeError) as error:
            raise UnknownNameError(f"{name!r} cannot be imported from {target}: {error}") from None
