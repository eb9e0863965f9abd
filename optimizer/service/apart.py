"""Run one job in a process of its own, for a caller whose process Ray must not end.

The child reads the job from standard input, since a database's URL may hold a password, and tells the caller the job's
number, or the error that ended it.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import Interrupted, explain
from optimizer.service import channel
from optimizer.service.supervisor import Supervisor

if TYPE_CHECKING:
    from optimizer.job.spec import JobSpec

CHILD = """\
import sys
sys.path[:] = {path!r}
from optimizer.service.apart import main
main()
"""


def run_apart(spec: JobSpec, *, force: bool) -> int:
    """Run a job and return its number; one that has a result already is not run again unless ``force``.

    Raises what the job raises, and ClusterLost where its process ended suddenly; the job is back in the queue then.
    """
    given = json.dumps({"spec": spec.model_dump(mode="json"), "force": force})
    path = [str(Path(each).resolve()) for each in sys.path]  # where this process finds what its entry points name
    reported = Supervisor([sys.executable, "-c", CHILD.format(path=path)], given=given).run_once()
    if "error" in reported:
        raise _read_error(reported["error"])
    return int(reported["job"])


def main() -> None:
    """Do in the child what :func:`run_apart` asks for."""
    assert channel.open_channel()
    try:
        asked = json.loads(sys.stdin.read())
        channel.tell(job=_run(asked["spec"], force=asked["force"]), orderly=True)
    except KeyboardInterrupt:
        channel.tell(error=_written_error(Interrupted("interrupted")), orderly=True)
    except BaseException as error:
        channel.tell(error=_written_error(error), orderly=True)


def _run(document: dict[str, Any], *, force: bool) -> int:
    from optimizer.job.inputs import prepare
    from optimizer.job.spec import JobSpec
    from optimizer.service.runner import run_job
    from optimizer.stages.progress import Progress
    from storage.database import Database
    from storage.queue import jobs

    inputs = prepare(JobSpec.model_validate(document))
    with Database.open(inputs.spec.database) as db:
        known = None if force or not inputs.fingerprint else jobs.find_finished(db, inputs.spec_hash)
        return (known or run_job(db, inputs, Progress(), anew=force)).id


def _written_error(error: BaseException) -> dict[str, Any]:
    """Write an error as JSON; ours are built from their message alone, and those of others go as a traceback."""
    kind = type(error)
    if explain(error) is None:
        return {"module": "builtins", "name": "RuntimeError", "message": "".join(traceback.format_exception(error))}
    about = {"module": kind.__module__, "name": kind.__qualname__, "message": str(error)}
    return about | {"details": list(getattr(error, "details", ()))}


def _read_error(written: dict[str, Any]) -> Exception:
    error: Exception = getattr(import_module(written["module"]), written["name"])(written["message"])
    if written.get("details"):
        error.details = tuple(written["details"])  # type: ignore[attr-defined]
    return error
