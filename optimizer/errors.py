"""Faults that a user can meet, each with its exit code.

A fault's message is one line that names what is wrong and what would be right; the command line prints it without a
traceback. Anything else that escapes is a defect of ours and ends with exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.text import one_line


class Fault(Exception):  # noqa: N818 - a fault of the input or surroundings, not an error of ours
    """A problem that is explained to the user in one line."""

    exit_code = 1

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(one_line(message))
        self.details = tuple(one_line(detail) for detail in details)
        """Lines that illustrate the message, such as samples; printed below it."""


class UsageFault(Fault):
    """The job file, an option, a path, the task's data or the model is not usable as given."""

    exit_code = 2


class NoFeasiblePlan(Fault):
    """No plan meets the constraint: the dense model is the answer."""

    exit_code = 3


class ClusterOrDatabaseFault(Fault):
    """The Ray cluster, the database or an engine cannot be reached, lacks resources, or ended during the work."""

    exit_code = 4


class LeaseLost(ClusterOrDatabaseFault):
    """Another process took over the job, so this one must not write any more."""


class Interrupted(Fault):
    """The user or the system asked the process to stop (Ctrl-C, SIGTERM); the job is resumable."""

    exit_code = 130


def explain(error: BaseException) -> tuple[int, str] | None:
    """Give exit code and one line for an error that a user can act on, or None for a defect of ours."""
    from storage import errors as storage
    from workers import errors as workers
    from workers.runtime import PlanError

    if isinstance(error, Fault):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code, "interrupted"
    if isinstance(error, workers.ClusterError | workers.EngineLost | storage.DatabaseError | storage.LeaseLost):
        return ClusterOrDatabaseFault.exit_code, one_line(error)
    if isinstance(error, workers.WorkersError | storage.StorageError | PlanError):
        return UsageFault.exit_code, one_line(error)
    return None
