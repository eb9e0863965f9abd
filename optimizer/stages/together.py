"""Run stages that need nothing of each other at the same time: while one waits for workers, another asks for some.

Each stage has a thread. They take turns: one computes, the others wait for workers, so that nothing of a job needs
locks, and only the order of requests differs from one stage after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any


class Abandoned(BaseException):
    """Ends a stage beside one that failed; no Exception, so that no stage takes it for a failure of its own."""


@dataclass
class _Group:
    """Stages that run together, in the order in which they would run one after another."""

    failed: float = float("inf")
    """The first of them, in that order, that failed."""


_PLACES: ContextVar[tuple[tuple[_Group, int], ...]] = ContextVar("places", default=())
"""The groups that this thread's stage is in, and its place in each; a stage may run parts of itself together."""

Begin = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Begins a part of a stage, and returns what waits for its end."""


class Turns:
    """Take turns among the stages of one job that run together."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let others have their turn inside the block. Raises Abandoned where the job ends by a stage before."""
        places = _PLACES.get()
        if not places:
            yield  # this stage runs alone
            return
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
        if any(group.failed < place for group, place in places):
            raise Abandoned

    def together(self, *stages: Callable[[], Any]) -> list[Any]:
        """Run stages beside each other and return what each returns, in their order.

        Where some fail, raises what the first of them in their order raised: those behind it are abandoned at their
        next request, those before it go on, since they would have come first.
        """
        with self.beside() as begin:
            ends = [begin(stage) for stage in stages]
            return [end() for end in ends]

    @contextmanager
    def beside(self) -> Iterator[Begin]:
        """Begin parts of a stage beside it; where it computes meanwhile, it has to be one that runs together.

        Their first requests are in their order. Beginning a part returns what waits for its end, which then returns
        what the part returned or raises what it raised. Those behind one that fails are abandoned at their next
        request; all are, where the block fails.
        """
        group = _Group()
        found: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        threads: list[threading.Thread] = []

        def run(place: int, part: Callable[[], Any], begun: threading.Event) -> None:
            with self._turn:
                begun.set()
                _PLACES.set((*_PLACES.get(), (group, place)))
                try:
                    found[place] = part()
                except BaseException as error:
                    errors[place] = error
                    group.failed = min(group.failed, place)

        def begin(part: Callable[[], Any]) -> Callable[[], Any]:
            place, begun = len(threads), threading.Event()
            work = partial(copy_context().run, run, place, part, begun)
            threads.append(threading.Thread(target=work, daemon=True))
            with self.waiting():
                threads[place].start()
                begun.wait()
            return partial(end, place)

        def end(place: int) -> Any:
            with self.waiting():
                threads[place].join()
            if place in errors:
                raise errors[place]
            return found[place]

        try:
            yield begin
        except BaseException as error:
            group.failed = -1
            if not isinstance(error, KeyboardInterrupt):  # then they end at their next request, unwaited for
                with self.waiting():
                    for thread in threads:
                        thread.join()
            raise
