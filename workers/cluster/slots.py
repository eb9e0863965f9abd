"""The places of a pool's workers, what is in flight in them, and why a worker is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ray.exceptions import RayError

from workers.messages import Request, WorkerInfo


@dataclass
class Ticket:
    """A request on its way, and how many workers have had it."""

    number: int
    request: Request
    attempts: int = 0


@dataclass
class Slot:
    """The place of one worker: its actor now, and the call in flight, if any.

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


def describe_death(error: RayError) -> str:
    """Say why an actor is gone; what its start raised stands in the last line of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "creation task" in lines[0]:
        return lines[-1]
    return f"the worker's process died ({type(error).__name__}): killed, crashed, or out of memory"
