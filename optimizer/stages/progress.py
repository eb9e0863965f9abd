"""Report how far a job is: to a terminal, a file or a log, and to the database through the heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from typing import Protocol

LINE_SECONDS = 30.0
"""Longest silence of :class:`StageLines` while a stage goes on."""


class Display(Protocol):
    """Shows a job's progress; called from the thread that runs the job."""

    def update(self, state: State) -> None:
        """Show the state, which may have changed in any field."""
        ...

    def note(self, text: str) -> None:
        """Show a line that stays."""
        ...


@dataclass(frozen=True)
class State:
    """The stage that a job is at, how much of it is done, and its latest news."""

    stage: str = "starting"
    done: int = 0
    total: int | None = None
    news: str = ""

    @property
    def text(self) -> str:
        """The stage with what is done of it, for example ``"search 12/48: RRSRSS 0.961"``."""
        counted = f" {self.done}/{self.total}" if self.total else f" {self.done}" if self.done else ""
        return f"{self.stage}{counted}{f': {self.news}' if self.news else ''}"


class StageLines:
    """Write a line as each stage begins, and inside of ``with`` at least one in every ``LINE_SECONDS``.

    ``write`` gets ``"stage"`` or ``"progress"``, and the state; ``note`` gets lines that are no state.
    """

    def __init__(self, write: Callable[[str, State], None], note: Callable[[str], None]) -> None:
        self._write, self.note = write, note
        self._state = State("")
        self._due = time.monotonic() + LINE_SECONDS
        self._context = copy_context()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> StageLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def update(self, state: State) -> None:
        begins = state.stage != self._state.stage and not state.done and not state.news  # others may run beside it
        self._state, self._context = state, copy_context()  # a log's lines name the job by its context
        if begins:
            self._due = time.monotonic() + LINE_SECONDS
            self._write("stage", state)

    def _repeat(self) -> None:
        while not self._ended.wait(max(0.01, self._due - time.monotonic())):
            if time.monotonic() >= self._due:
                self._due = time.monotonic() + LINE_SECONDS
                self._context.run(self._write, "progress", self._state)


@dataclass
class _Stage:
    """The stage that a thread is at, and the threads that it started."""

    progress: Progress
    state: State


_STAGE: ContextVar[_Stage | None] = ContextVar("stage", default=None)


class Progress:
    """The state of one job, written by its threads and read by the heartbeat's; shown where there is a display.

    Where stages run beside each other, it is the state of the one that advanced last.
    """

    def __init__(self, display: Display | None = None) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._state = State()

    @property
    def state(self) -> State:
        with self._lock:
            return self._state

    def begin(self, stage: str, total: int | None = None) -> None:
        """Begin a stage of ``total`` steps, or of an unknown number."""
        own = _Stage(self, State(stage, 0, total))
        _STAGE.set(own)
        self._set(own.state)

    def advance(self, steps: int = 1, news: str | None = None) -> None:
        """Count steps of the stage as done."""
        own = _STAGE.get()
        now = self.state if own is None or own.progress is not self else own.state
        now = replace(now, done=now.done + steps, news=now.news if news is None else news)
        if own is not None and own.progress is self:
            own.state = now
        self._set(now)

    def note(self, text: str) -> None:
        """Show a line that a person should see and that stays on the screen."""
        if self._display is not None:
            self._display.note(text)

    def _set(self, state: State) -> None:
        with self._lock:
            self._state = state
        if self._display is not None:
            self._display.update(state)
