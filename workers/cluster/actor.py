"""Define the Ray actor. It imports torch only once it runs, so that the driver need not."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from workers.cluster.settings import WorkerSettings
from workers.messages import ModelSource, Reply, Request, WorkerInfo
from workers.tasks import Task

if TYPE_CHECKING:
    from .handler import Handler


class Worker:
    """Ray actor around a :class:`Handler`: placed on a node, then loaded, then asked."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        self._source, self._task, self._settings = model, task, settings
        self._handler: Handler | None = None

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
        self._handler = Handler.load(self._source, self._task, self._settings)
        return self._handler.info

    def change_task(self, task: Task) -> WorkerInfo:
        """Keep the model, and answer requests about another task from now on."""
        self._handler = self._ready().with_task(task)
        return self._handler.info

    def handle(self, request: Request) -> Reply:
        """Answer a request, or raise its error; the worker lives on."""
        return self._ready().handle(request)

    def _ready(self) -> Handler:
        if self._handler is None:
            raise RuntimeError("setup() must be called before the first request")
        return self._handler
