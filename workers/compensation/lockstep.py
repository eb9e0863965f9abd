"""Calls that halt in the middle, so that many forward passes can reach the same layer before any goes on.

A map needs the states of all calibration tokens at one layer, and everything behind that layer needs the map. Each
batch's forward pass therefore runs in a thread of its own that waits inside the layer's hook; exactly one thread runs
at any time, so nothing is concurrent, and no layer is executed twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Told = TypeVar("Told")
Answer = TypeVar("Answer")


class _Closed(BaseException):
    """Unwinds a halted call that nobody will resume; not an Exception, so that model code does not catch it."""


class HaltingCall(Generic[Told, Answer]):
    """A call of ``body(halt)`` that advances from one ``halt(told)`` to the next; ``halt`` returns the given answer."""

    def __init__(self, body: Callable[[Callable[[Told], Answer]], None]) -> None:
        self._body = body
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._told: Told | None = None
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._closed = self.finished = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="halting-call")
        self._thread.start()

    def advance(self, answer: Answer | None = None) -> Told | None:
        """Run to the next halt and return what it tells, or None at the end. Raises what the body raises."""
        if self.finished:
            raise RuntimeError("this call has ended")
        self._answer, self._told = answer, None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._told

    def close(self) -> None:
        """Unwind the body from where it halts. A call that has ended may be closed too."""
        if not self.finished:
            self._closed = True
            self._go.release()
        self._thread.join()

    def _halt(self, told: Told) -> Answer:
        self._told = told
        self._stopped.release()
        self._go.acquire()
        if self._closed:
            raise _Closed
        return self._answer  # type: ignore[return-value]  # what advance() was given

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                self._body(self._halt)
        except _Closed:
            pass
        except BaseException as error:  # handed to whoever advances the call
            self._error = error
        finally:
            self.finished = True
            self._stopped.release()

    def __enter__(self) -> HaltingCall[Told, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
