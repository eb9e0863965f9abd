"""The Ray actor. Imports torch only once it runs, so that the driver need not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.messages import ModelSource, Reply, Request, WorkerInfo, WorkerSettings
from workers.tasks import Task

if TYPE_CHECKING:
    from .handler import Measurer


class Worker:
    """Holds one model and one task; loads when told to, then answers one request at a time."""

    def __init__(self, model: ModelSource, task: Task, settings: WorkerSettings) -> None:
        self._source, self._task, self._settings = model, task, settings
        self._measurer: Measurer | None = None

    def place(self) -> None:
        """Answer, which an actor does once Ray has found it a node and started its process."""

    def setup(self) -> WorkerInfo:
        """Load the model. Raises ModelError when that is not possible."""
        from transformers.utils import logging as transformers_logging

        from .handler import Measurer

        transformers_logging.disable_progress_bar()
        self._measurer = Measurer.load(self._source, self._task, self._settings)
        return self._measurer.info

    def change_task(self, task: Task) -> WorkerInfo:
        """Keep the model, and answer requests about another task from now on."""
        if self._measurer is None:
            raise RuntimeError("setup() must be called before the task can be changed")
        self._task = task
        self._measurer = self._measurer.with_task(task)
        return self._measurer.info

    def handle(self, request: Request) -> Reply:
        """Do what a request says. Raises what went wrong; the worker lives on."""
        if self._measurer is None:
            raise RuntimeError("setup() must be called before the first request")
        return self._measurer.handle(request)
