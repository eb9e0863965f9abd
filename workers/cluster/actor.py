"""Define the Ray actor. It imports torch only once it runs, so that the driver need not."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from workers.cluster.settings import WorkerSettings
from workers.messages import ModelSource, Reply, Request, WorkerInfo
from workers.tasks import Task

if TYPE_CHECKING:
    from .handler import Handler


@dataclass(frozen=True)
class TaskReference:
    """A task as requests name it: workers fetch those that they do not hold, and keep those in use."""

    key: str
    reference: list[Any]
    """In a list, which Ray hands over without fetching the task."""
    in_use: frozenset[str]


def task_key(task: Task) -> str:
    """Identify a task, with what is beside it, by all that an answer depends on."""
    held = (task, *task.beside)
    return "; ".join(f"{each.data_hash} {each.definition_hash} {each.split_hash}" for each in held)


class Worker:
    """Ray actor around a model and a :class:`Handler` for each task: placed on a node, then loaded, then asked."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        self._source, self._task, self._settings = model, task, settings
        self._handlers: dict[str, Handler] = {}

    def place(self) -> None:
        """Answer, which an actor does once Ray has found it a node and started its process."""

    def setup(self) -> WorkerInfo:
        """Load the model. Raises ModelError when that is not possible."""
        gc.disable()  # what imports make stays: going through it again and again takes a fifth of their time
        from transformers.utils import logging as transformers_logging

        from .handler import Handler

        gc.freeze()
        gc.enable()
        transformers_logging.disable_progress_bar()
        handler = Handler.load(self._source, self._task, self._settings)
        self._handlers = {task_key(self._task): handler}
        return handler.info

    def handle(self, request: Request, task: TaskReference) -> Reply:
        """Answer a request about a task, or raise its error; the worker lives on."""
        if not self._handlers:
            raise RuntimeError("setup() must be called before the first request")
        if task.key not in self._handlers:
            known = next(iter(self._handlers.values()))
            self._handlers = {key: each for key, each in self._handlers.items() if key in task.in_use}
            self._handlers[task.key] = known.with_task(ray.get(task.reference[0]))
        return self._handlers[task.key].handle(request)
