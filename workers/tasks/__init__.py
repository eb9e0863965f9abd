"""Read tasks: files that say where questions and answers are, how they are asked, scored and split."""

from .loading import Task, load_task
from .samples import Sample
from .spec import TaskSpec, bundled_tasks, load_spec, parse_spec

__all__ = ["Sample", "Task", "TaskSpec", "bundled_tasks", "load_spec", "load_task", "parse_spec"]
