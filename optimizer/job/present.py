"""Tell plans of a model's and a task's present files from those of former ones.

A name may have stood for several versions of a model or a task. The present one is what its files hold now, where they
can be read: at the path of the last job that published a plan under the name, or bundled under it. Where they cannot,
it is the version that was last used.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from storage.database import Database
from storage.errors import NotFound
from storage.queue import jobs
from storage.records import lookup, plans
from storage.records.lookup import TaskVersion
from storage.records.plans import Plan, PlanQuery
from workers.errors import ModelError, TaskError
from workers.messages import ModelSource
from workers.models.checkpoint import find_here, fingerprint_checkpoint
from workers.tasks.joint import JOINED_BY, joint_hash
from workers.tasks.loading import hash_data, hash_definition
from workers.tasks.spec import HARNESS, DrawnSource, HubSource, LmmsEvalSource, TaskSpec, load_spec

LOCAL = "local"
MOST_COMBINATIONS = 1_000
"""Versions of a joint task's parts that are looked through for those that it was made of."""
SECONDS_KEPT = 60
"""A process that asks longer looks at a task's files again after so long."""


class PresentVersions:
    """The present versions of a database's models and tasks, each found out when it is first asked for."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._fingerprints: dict[str, str] = {}
        self._specs: dict[str, TaskSpec | None] = {}

    def resolve(self, query: PlanQuery, *, all_versions: bool) -> PlanQuery:
        """Let a query mean present versions alone, or all versions of what it names. Raises NotFound."""
        return self.named(query) if all_versions else self.only(query)

    def only(self, query: PlanQuery) -> PlanQuery:
        """Restrict a query to present versions. Raises NotFound for a model or task that the database does not know.

        A model that is named by its fingerprint is taken as it is. A task may be named by the path of its file.
        """
        named = self.named(query)
        models = named.model_ids or tuple(dict.fromkeys(each.id for each in self._models))
        tasks = named.task_ids or tuple(each.id for each in self._tasks)
        by_fingerprint = query.model is not None and not self._names(query.model)
        return replace(
            named,
            model_ids=models if by_fingerprint else tuple(each for each in models if self._is_present_model(each)),
            task_ids=tuple(each.id for each in self._tasks if each.id in tasks and not self._task_changes(each)),
        )

    def named(self, query: PlanQuery) -> PlanQuery:
        """Let a query mean every version of the model and the task that it names. Raises NotFound."""
        model_ids = task_ids = None
        if query.model is not None:
            names = self._names(query.model)
            model_ids = tuple(dict.fromkeys(each.id for each in self._models if each.name in names))
            model_ids = model_ids or (lookup.find_model(self._db, query.model, query.revision),)
        if query.task is not None:
            name, known = query.task, {each.name for each in self._tasks}
            joined = JOINED_BY.join(sorted(part.strip() for part in name.split(JOINED_BY)))
            if name not in known and joined in known:
                name = joined
            elif name not in known and (Path(name).is_file() or name.startswith(f"{HARNESS}:")):
                spec = _read_spec(name)
                name = name if spec is None else spec.name
                self._specs[name] = spec
            task_ids = tuple(lookup.find_tasks(self._db, name))
        return replace(query, model_ids=model_ids, task_ids=task_ids)

    def changes(self, plan: Plan) -> tuple[str, ...]:
        """Say what differs between what a plan was measured on and what is there now; empty where nothing does."""
        model = () if plan.fingerprint == self._fingerprint(plan.model) else ("model files",)
        task = next((each for each in self._tasks if each.id == plan.task_id), None)
        return model + (self._task_changes(task) if task is not None else ())

    @cached_property
    def _models(self) -> list[lookup.ModelVersion]:
        return lookup.model_versions(self._db)

    @cached_property
    def _tasks(self) -> list[TaskVersion]:
        return lookup.task_versions(self._db)

    def _names(self, model: str) -> set[str]:
        wanted = lookup.trimmed(model)
        names = {each.name for each in self._models}
        here = str(Path(wanted).expanduser().resolve())  # as in a job file, before a name
        exact = {here} if here in names else names & {wanted}
        last = next((each.name for each in self._models if lookup.short_name(each.name) == wanted), None)
        return exact or ({last} if last is not None else set())

    def _is_present_model(self, model_id: int) -> bool:
        names = [each.name for each in self._models if each.id == model_id]
        fingerprint = next(each.fingerprint for each in self._models if each.id == model_id)
        return any(self._fingerprint(name) == fingerprint for name in names)

    def _fingerprint(self, name: str) -> str:
        """Return the fingerprint that a model of this name has now, or had when it was last loaded."""
        if name not in self._fingerprints:
            known = [each for each in self._models if each.name == name]
            spec = self._last_job(model_ids=[each.id for each in known]) if known else {}
            given = spec.get("model") or {}
            given = given if given.get("path") == name else {}
            source = ModelSource(
                name,
                given.get("revision"),
                trust_remote_code=given.get("trust_remote_code", False),
                allow_pickle=tuple(given.get("allow_pickle", ())),
            )
            read = _read_fingerprint(source) if _is_local(spec) else None
            self._fingerprints[name] = read or (known[0].fingerprint if known else "")
        return self._fingerprints[name]

    def _task_changes(self, task: TaskVersion) -> tuple[str, ...]:
        data, definition = self._present_task(task)
        return tuple(
            name
            for name, same in (
                ("data", data == task.data_hash),
                ("prompt, answer or metric", definition == task.definition_hash),
            )
            if not same
        )

    def _present_task(self, task: TaskVersion) -> tuple[str, str]:
        """Return the hashes of data and definition that a task of this name has now, or had when it was last used."""
        versions = [each for each in self._tasks if each.name == task.name]
        last = versions[0]
        if JOINED_BY in task.name:
            spec = self._last_job(task_ids=[each.id for each in versions])
            if spec.get("tasks") or not spec:  # else it is one task, and that is its name
                return self._present_parts(task, spec)
        if task.name not in self._specs:
            spec = self._last_job(task_ids=[each.id for each in versions])
            self._specs[task.name] = _read_spec(str(spec.get("task") or task.name)) if _is_local(spec) else None
        found = self._specs[task.name]
        if found is None or isinstance(found.source, LmmsEvalSource):  # whose harness would be started to ask it
            return last.data_hash, last.definition_hash
        if isinstance(found.source, HubSource) and not Path(found.source.id).is_dir():  # its rows would be fetched
            return last.data_hash, hash_definition(found)
        if isinstance(found.source, DrawnSource):  # as many are drawn as the splits hold
            found = found.with_splits(
                calibration=task.calibration_size, search=task.search_size, held_out=task.held_out_size
            )
        data = _data_of(found, int(time.monotonic() / SECONDS_KEPT))
        return last.data_hash if data is None else data, hash_definition(found)

    def _present_parts(self, task: TaskVersion, spec: dict[str, Any]) -> tuple[str, str]:
        """Return the same of a joint task: from its parts as they were when it was used, each as it is now."""
        for goal in spec.get("tasks") or () if _is_local(spec) else ():
            found = _read_spec(str(goal["task"]))
            if found is not None and self._specs.get(found.name) is None:  # a part by itself has no job that says where
                self._specs[found.name] = found
        known = [[each for each in self._tasks if each.name == name] for name in task.name.split(JOINED_BY)]
        for parts in islice(product(*known), MOST_COMBINATIONS):
            if joint_hash({part.name: part.data_hash for part in parts}) == task.data_hash:
                now = {part.name: self._present_task(part) for part in parts}
                data, definition = ({name: each[number] for name, each in now.items()} for number in (0, 1))
                return joint_hash(data), joint_hash(definition)
        return task.data_hash, task.definition_hash  # imported: its parts are not known here

    def _last_job(self, *, model_ids: Sequence[int] = (), task_ids: Sequence[int] = ()) -> dict[str, Any]:
        """Read the specification of the last job that published a plan of these; empty where there is none."""
        job = plans.last_job(self._db, model_ids=model_ids, task_ids=task_ids)
        try:
            return {} if job is None else jobs.get(self._db, job).spec
        except NotFound:
            return {}


def _is_local(spec: dict[str, Any]) -> bool:
    """Whether files that a job names are this machine's."""
    return bool((spec.get("cluster") or {}).get("address", LOCAL) == LOCAL)


def _read_spec(name: str) -> TaskSpec | None:
    try:
        return load_spec(name)
    except TaskError:
        return None


def _read_fingerprint(source: ModelSource) -> str | None:
    directory = find_here(source)
    if directory is None:
        return None
    stats = [(str(path), path.stat()) for path in sorted(directory.rglob("*")) if path.is_file()]
    state = tuple((path, each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for path, each in stats)
    return _fingerprint_of(directory, source, state)


@lru_cache(maxsize=16)
def _data_of(spec: TaskSpec, period: int) -> str | None:
    """Hash a task's data once in a ``period``: its images may be many, and a dashboard asks again and again."""
    try:
        return hash_data(spec)
    except TaskError:
        return None


@lru_cache(maxsize=16)
def _fingerprint_of(directory: Path, source: ModelSource, state: object) -> str | None:
    """Hash a model's files once while their ``state`` stays: a dashboard asks again and again."""
    try:
        return fingerprint_checkpoint(directory, source.allow_pickle, trust_remote_code=source.trust_remote_code)
    except ModelError:
        return None
