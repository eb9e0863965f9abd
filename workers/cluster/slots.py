"""Keep the state of a pool's workers: the call in flight, the request it is for, and why a worker died."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray.exceptions import OutOfMemoryError, RayError

from workers.messages import Alone, Failure, Reply, Request, WorkerInfo
from workers.text import first_line, last_line

if TYPE_CHECKING:
    from .share import PoolShare

Result = Reply | Failure


@dataclass
class Ticket:
    """A submitted request, whose it is, where its result goes, and how many workers have been given it."""

    number: int
    request: Request
    share: PoolShare
    results: deque[tuple[int, Result]]
    attempts: int = 0

    @property
    def alone(self) -> bool:
        """Whether no other request may run beside it on its device."""
        return isinstance(self.request, Alone)

    @property
    def kind(self) -> str:
        """The request's type by name, for logs and metrics."""
        return type(self.request).__name__


@dataclass
class Slot:
    """State of one worker of the pool: its present actor, and the call in flight, if any.

    ``placing``: Ray looks for a node with room for it; ``loading``: it loads the model or a task; ``ready``: it is
    idle or works on its ticket.
    """

    number: int
    actor: Any
    reference: Any
    deadline: float
    stage: Literal["placing", "loading", "ready"] = "placing"
    ticket: Ticket | None = None
    info: WorkerInfo | None = None
    failed_starts: int = 0

    @property
    def device(self) -> str:
        """What other workers may share with this one; empty until the worker has said it."""
        return "" if self.info is None else self.info.device_id

    @property
    def needs_device_alone(self) -> bool:
        """Whether the request in flight allows no other beside it on the device."""
        return self.ticket is not None and self.ticket.alone

    def call(self, reference: Any, seconds: float) -> None:
        """Wait for a call's result, for so many seconds at most."""
        self.reference, self.deadline = reference, time.monotonic() + seconds

    def load(self, reference: Any, seconds: float) -> None:
        """Wait for a call that loads the model or a task."""
        self.stage = "loading"
        self.call(reference, seconds)


def describe_death(error: RayError) -> str:
    """Say why an actor is gone; what its start raised stands in the last line of Ray's message."""
    first, last = first_line(error), last_line(str(error), "")
    if first != last and "creation task" in first:
        return last
    if isinstance(error, OutOfMemoryError):
        return "Ray ended the worker's process because the node's memory ran out"
    return f"the worker's process died ({type(error).__name__}): killed, crashed, or out of memory"
