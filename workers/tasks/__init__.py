"""Read tasks: files that say where questions and answers are, how they are asked, scored and split."""

from .joint import join_tasks, load_tasks
from .loading import Task, load_task
from .passages import Passage, TextTask
from .samples import Sample
from .spec import TaskSpec, bundled_tasks, load_spec, parse_spec

__all__ = [
    "Passage",
    "Sample",
    "Task",
    "TaskSpec",
    "TextTask",
    "bundled_tasks",
    "join_tasks",
    "load_spec",
    "load_task",
    "load_tasks",
    "parse_spec",
]
