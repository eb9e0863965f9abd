"""Run functions in the main thread on behalf of others: Ray changes the handlers of signals as it starts and ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, Queue
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.2
"""Between two looks whether the others still run."""


class MainThread:
    """Call it with a function that the main thread is to run; the main thread serves while other threads run."""

    def __init__(self) -> None:
        self._asked: Queue[tuple[Callable[[], Any], Future[Any]]] = Queue()

    def __call__(self, function: Callable[[], T]) -> T:
        """Return what the function returns, or raise what it raises."""
        if threading.current_thread() is threading.main_thread():
            return function()
        answer: Future[T] = Future()
        self._asked.put((function, answer))
        return answer.result()

    def serve(self, threads: Sequence[threading.Thread]) -> None:
        """Run what threads ask for until all of them have ended. Raises KeyboardInterrupt when a signal says so."""
        while any(thread.is_alive() for thread in threads):
            try:
                function, answer = self._asked.get(timeout=LOOK_SECONDS)
            except Empty:
                continue
            try:
                answer.set_result(function())
            except KeyboardInterrupt as error:
                answer.set_exception(error)
                raise
            except BaseException as error:
                answer.set_exception(error)
