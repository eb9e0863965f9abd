"""Define the errors of this package, each one line that names what is wrong and what would be right.

They cross process boundaries (a worker raises, the driver shows), so each is built from its message alone.
"""

from __future__ import annotations


class WorkersError(Exception):
    """Base of all errors raised by this package; ``str(error)`` is one line for a person."""


class ModelError(WorkersError):
    """A model cannot be found, read, or used."""


class TaskError(WorkersError):
    """A task file, its data, or one of its images is not usable."""


class TooFewSamplesError(TaskError):
    """A task's data has fewer images or samples than its splits ask for; ``fitting`` are sizes that it has room for."""

    def __init__(self, message: str, fitting: dict[str, int]) -> None:
        super().__init__(message)
        self.fitting = fitting


class ImageError(TaskError):
    """One image cannot be decoded; the sample that shows it fails, the job goes on."""


class PromptError(TaskError):
    """One sample cannot be asked of this model; the sample fails, the job goes on."""


class ClusterError(WorkersError):
    """The cluster cannot be reached, lacks what was asked for, or lost all its workers."""


class ClusterLost(ClusterError):  # noqa: N818 - named like the database's LeaseLost
    """The cluster of the workers ended, or did not start: its head, this machine's node, or all of them."""


class ClusterAway(ClusterError):  # noqa: N818
    """Nothing answers at the cluster's address."""


class MeasurementError(WorkersError):
    """A measurement was asked for that cannot be made, for example an unknown split."""


class EngineError(WorkersError):
    """An engine that serves models is not there, or cannot do what was asked."""


class EngineAbsent(EngineError):  # noqa: N818
    """Nobody said where an engine is, and it is not where it is looked for."""


class EngineLost(EngineError):  # noqa: N818
    """An engine does not start with a model, ended, or does not answer."""


class UnknownNameError(WorkersError, KeyError):
    """Nothing of this name is registered, or what is cannot be imported."""

    __str__ = WorkersError.__str__  # KeyError's would put the message in quotes
