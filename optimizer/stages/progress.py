"""Telling how far a job is: to a terminal, to the database, or to nobody."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol


class Display(Protocol):
    """Shows progress; called from the thread that runs the job."""

    def update(self, state: State) -> None:
        """Show the state, which may have changed in any field."""
        ...

    def note(self, text: str) -> None:
        """Show a line that stays."""
        ...


@dataclass(frozen=True)
class State:
    """Where a job stands: the stage, how much of it is done, and its latest news."""

    stage: str = "starting"
    done: int = 0
    total: int | None = None
    news: str = ""


class Silent:
    """Shows nothing."""

    def update(self, state: State) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


class Progress:
    """The state of one job, written by the job's thread and read by the heartbeat's."""

    def __init__(self, display: Display | None = None) -> None:
        self._display = display or Silent()
        self._lock = threading.Lock()
        self._state = State()

    @property
    def state(self) -> State:
        """The state now."""
        with self._lock:
            return self._state

    def begin(self, stage: str, total: int | None = None) -> None:
        """A stage begins; ``total`` steps are expected, or an unknown number."""
        self._set(State(stage, 0, total))

    def advance(self, steps: int = 1, news: str | None = None) -> None:
        """Steps of the stage are done."""
        now = self.state
        self._set(State(now.stage, now.done + steps, now.total, now.news if news is None else news))

    def note(self, text: str) -> None:
        """Something a person should know and that stays on the screen."""
        self._display.note(text)

    def _set(self, state: State) -> None:
        with self._lock:
            self._state = state
        self._display.update(state)
