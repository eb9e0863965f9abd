"""Report how far a job is: to a terminal or a log, and to the database through the heartbeat."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Protocol


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


class Progress:
    """The state of one job, written by the job's thread and read by the heartbeat's; shown where there is a display."""

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
        self._set(State(stage, 0, total))

    def advance(self, steps: int = 1, news: str | None = None) -> None:
        """Count steps of the stage as done."""
        now = self.state
        self._set(replace(now, done=now.done + steps, news=now.news if news is None else news))

    def note(self, text: str) -> None:
        """Show a line that a person should see and that stays on the screen."""
        if self._display is not None:
            self._display.note(text)

    def _set(self, state: State) -> None:
        with self._lock:
            self._state = state
        if self._display is not None:
            self._display.update(state)
