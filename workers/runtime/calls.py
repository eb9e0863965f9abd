"""Knowing which calls of a model run, in which threads, so that a plan is never taken off under one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from .edits import Edits

Inside = Callable[[tuple[Any, ...], dict[str, Any]], Callable[[], None]]
"""Called with the arguments of a call that starts; what it returns is called when the call ends, however it ends."""


class RunningCalls:
    """The calls of one model that run under one plan."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._depth: dict[int, int] = {}
        """Nested calls by the thread that runs them."""

    def watch(self, edits: Edits, module: nn.Module, method: str, inside: Inside | None = None) -> None:
        """Take part in every call of ``module.method`` from now on; ``inside`` gets its arguments.

        A method of the instance, not hooks: torch leaves hooks out when a call ends by an interrupt.
        """
        original = getattr(module, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            me = threading.get_ident()
            with self._changed:
                self._depth[me] = self._depth.get(me, 0) + 1
            ended: Callable[[], None] | None = None
            try:
                if inside is not None:
                    ended = inside(args, kwargs)
                return original(*args, **kwargs)
            finally:
                if ended is not None:
                    ended()
                with self._changed:
                    self._depth[me] -= 1
                    if not self._depth[me]:
                        del self._depth[me]
                        self._changed.notify_all()

        edits.set_instance_attribute(module, method, watched)

    @contextmanager
    def none_elsewhere(self) -> Iterator[None]:
        """Wait until no other thread is in a call, and let none begin; an interrupt ends the waiting, not the block."""
        me = threading.get_ident()
        with self._changed:
            try:
                self._changed.wait_for(lambda: not self._depth.keys() - {me})
            finally:
                yield
