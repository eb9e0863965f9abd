"""The job specification: every field of a job file, with its default. ``optimizer.job.loading`` reads one."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from optimizer import criteria
from optimizer.errors import UsageFault
from optimizer.job.sections import (
    TRANSFORMERS,
    ClusterSpec,
    CollateralSpec,
    CompensationSpec,
    ConstraintSpec,
    GuardSpec,
    LatencySpec,
    ModelSpec,
    SearchSpec,
    Section,
    Share,
    SplitSpec,
    TaskGoal,
    WorkloadSpec,
)
from optimizer.registries import METHODS
from storage.records.plans import LOSSLESS
from workers.runtime.plan import Action

DEFAULT_DATABASE = "sqlite:///skipplan.db"
DEFAULT_ARTIFACTS = "skipplan-artifacts"

if TYPE_CHECKING:
    ActionName = str
else:
    ActionName = Literal[tuple(action.label for action in Action if action is not Action.RUN)]

LEAST_TOKENS = 8
"""Fewest new tokens of answers that drafting can gain anything on."""

DETERMINES_RESULT = {
    "mode",
    "model",
    "task",
    "tasks",
    "actions",
    "criterion",
    "thresholds",
    "redundancy_samples",
    "constraint",
    "protect",
    "search",
    "compensation",
    "collateral",
    "guard",
    "splits",
    "workload",
    "evaluation",
    "latency",
}
"""Fields that count when jobs are compared, each with everything in it."""
ONLY_WHERE_AND_WHEN = {
    "max_failed_samples",
    "cluster",
    "priority",
    "attempts",
    "notify",
    "tracking",
    "database",
    "artifacts",
}
"""Fields that do not: where, when and how far a job runs, and where its results lie. Every field is in one set."""


class JobSpec(Section):
    """Everything a job file says. Relative paths in a file are relative to that file."""

    mode: Literal["standalone", "lossless"] = Field(
        default="standalone",
        description="standalone: the plan answers in the place of the dense model. lossless: it drafts, and the dense "
        "model verifies, so that answers stay the dense model's (see docs/lossless.md).",
    )
    model: ModelSpec
    task: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a bundled task, path of a task file, or lmms-eval:NAME (see docs/how-to/lmms-eval.md); or "
        "several in tasks.",
    )
    actions: tuple[ActionName, ...] = Field(
        default=("skip",),
        min_length=1,
        description="What may happen at a layer: skip it, freeze or bypass vision tokens, leave out a part, for every "
        "token or for vision tokens alone.",
    )
    criterion: str = Field(
        default="calibrated",
        min_length=1,
        description="What predicts the risk of each layer and action, from which the first plans come "
        "(see docs/theory.md).",
    )
    thresholds: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, description="The criterion's thresholds, by name; its own where absent."
    )
    redundancy_samples: int | None = Field(
        default=None,
        ge=1,
        description="Calibration samples that redundancy is measured on, the first ones; null: all. Maps are fitted on "
        "all.",
    )
    constraint: ConstraintSpec = ConstraintSpec()
    tasks: tuple[TaskGoal, ...] = Field(
        default=(),
        description="In the place of task: two or more tasks that every plan must keep, each a name, or a mapping with "
        "limits of its own (see docs/several-tasks.md).",
    )
    protect: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="Layers (from 0) that must run.")
    search: SearchSpec = SearchSpec()
    compensation: CompensationSpec = CompensationSpec()
    collateral: CollateralSpec = CollateralSpec()
    guard: GuardSpec = GuardSpec()
    splits: SplitSpec = SplitSpec()
    workload: WorkloadSpec = WorkloadSpec()
    latency: LatencySpec = LatencySpec()
    evaluation: Literal["auto", "fast", "plain"] = Field(
        default="auto",
        description="How plans are scored. fast: plans share work; an error where that would not be exact. plain: one "
        "generate call a batch. auto: fast where it is exact for the model and the task, else plain.",
    )
    max_failed_samples: Share = Field(
        default=0.01,
        description="Largest share of a split's samples that may fail (image, processor, NaN, memory) before the job "
        "ends with their list; one is always tolerated, unless this is 0.",
    )
    cluster: ClusterSpec = ClusterSpec()
    priority: int = Field(default=0, ge=-1000, le=1000, description="Jobs of higher priority are taken first.")
    attempts: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="Attempts without a new stage or evaluation after which the job fails.",
    )
    notify: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="Who is told when the job is queued, runs and ends: http or https URLs, which are sent signed "
        "JSON, and the word command, for the one that SKIPPLAN_HOOK_COMMAND names (see docs/service.md).",
    )
    tracking: Literal["mlflow"] | None = Field(
        default=None,
        description="Where the job is followed besides the database: mlflow, the server in MLFLOW_TRACKING_URI "
        "(see docs/service.md).",
    )
    database: str = Field(default=DEFAULT_DATABASE, min_length=1, description="SQLAlchemy URL.")
    artifacts: str = Field(
        default=DEFAULT_ARTIFACTS,
        min_length=1,
        description="Where fitted maps are kept: a directory, or an fsspec URL that workers can read.",
    )

    @model_validator(mode="after")
    def _names_its_tasks(self) -> JobSpec:
        """Let each of several tasks have its limits written out."""
        if (self.task is None) == (not self.tasks):
            raise ValueError("task: name one task here, or two or more under tasks")
        if len(self.tasks) == 1:
            raise ValueError("tasks: holds one task; name it in task, with its limits in constraint")
        self.__dict__["tasks"] = tuple(goal.completed(self.constraint) for goal in self.tasks)
        return self

    @field_validator("actions")
    @classmethod
    def _actions_once(cls, actions: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(actions)) != len(actions):
            raise ValueError("each action may be named once")
        return tuple(sorted(actions))

    @field_validator("notify")
    @classmethod
    def _hooks_can_be_told(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_check_hook(target) for target in targets))

    @model_validator(mode="after")
    def _criterion_exists(self) -> JobSpec:
        """Write out the thresholds that were not given, so that they are recorded with the job's result."""
        try:
            known = criteria.load(self.criterion, self.thresholds).thresholds
        except UsageFault as fault:
            raise ValueError(str(fault)) from None
        self.__dict__["thresholds"] = dict(known)  # the model is frozen to everybody else
        return self

    @model_validator(mode="after")
    def _given_plans_are_of_this_job(self) -> JobSpec:
        if self.search.plans and self.search.strategy in METHODS:
            raise ValueError(f"search.plans: strategy {self.search.strategy} tries its own plans only; use a sampler")
        for plan in self.search.plans:
            foreign = sorted(set(plan) - set(self.letters))
            if foreign:
                raise ValueError(f"search.plans: {plan} has {', '.join(foreign)}, which is no action of this job")
            touched = [layer for layer in self.protect if layer < len(plan) and plan[layer] != Action.RUN.letter]
            if touched:
                raise ValueError(f"search.plans: {plan} does not run layer {touched[0]}, which is protected")
        return self

    @model_validator(mode="after")
    def _compensation_fits(self) -> JobSpec:
        parts = [action.label for action in Action if action.row.removes_part and action.label in self.actions]
        if parts and self.compensation.kind != "none" and self.compensation.source == "dense":
            raise ValueError(
                f"compensation.source: plans with {' and '.join(parts)} are not compensated with source dense; take "
                "source pruned, or leave these actions out"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_be_asked(self) -> JobSpec:
        engine, workload = self.latency.engine, self.workload
        if engine == TRANSFORMERS and workload.concurrency != 1:
            raise ValueError("workload.concurrency: needs an engine that serves; name it in latency.engine")
        if engine != TRANSFORMERS and workload.batch_size != 1:
            raise ValueError(
                f"workload.batch_size: latency.engine {engine} is asked one prompt a request; leave it at 1, and use "
                "workload.concurrency"
            )
        seconds = 4 * self.latency.max_seconds
        if engine != TRANSFORMERS and seconds > self.cluster.request_timeout_seconds:
            raise ValueError(
                f"cluster.request_timeout_seconds: {self.cluster.request_timeout_seconds:g} is less than the "
                f"{seconds:g} that latency.max_seconds allows at four concurrencies in {engine}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _lossless_fits(self) -> JobSpec:
        """Leave a lossless job without a limit on accuracy, which it cannot lose, and without a guard."""
        if not self.is_lossless:
            return self
        constraint = self.constraint
        for name in ("max_accuracy_drop", "min_accuracy"):
            if name in constraint.model_fields_set and getattr(constraint, name) is not None:
                raise ValueError(
                    f"constraint.{name}: lossless plans answer as the dense model does, so there is nothing to limit; "
                    "leave it out, or take mode: standalone"
                )
        if self.tasks:
            raise ValueError(
                "tasks: a lossless plan drafts for one task; name it in task, the others in collateral.tasks"
            )
        for name in ("max_accuracy_drop", "max_kl"):
            if getattr(self.collateral, name) is not None:
                raise ValueError(
                    f"collateral.{name}: lossless plans answer as the dense model does everywhere; leave it out"
                )
        if self.actions != (Action.SKIP.label,):
            raise ValueError(
                "actions: a lossless plan drafts text by leaving whole layers out; leave actions at [skip]"
            )
        if self.workload.new_tokens < LEAST_TOKENS:
            raise ValueError(
                f"workload.new_tokens: {self.workload.new_tokens} tokens leave too little to draft; a lossless job "
                f"needs {LEAST_TOKENS} or more, about as many as the task's answers have"
            )
        if "guard" in self.model_fields_set and self.guard.false_alarms is not None:
            raise ValueError(
                "guard: lossless plans answer every prompt as the dense model does, so there is nothing to guard; "
                "leave it out"
            )
        if self.latency.engine != TRANSFORMERS:
            raise ValueError(
                f"latency.engine: lossless plans are timed on the live model, not in {self.latency.engine}; leave "
                "it out"
            )
        self.__dict__["constraint"] = constraint.model_copy(update={"max_accuracy_drop": None})
        self.__dict__["guard"] = GuardSpec(false_alarms=None)
        return self

    @model_validator(mode="after")
    def _rungs_fit(self) -> JobSpec:
        largest = self.search.rungs[-1] if self.search.rungs else 0
        alone = not self.judges_several  # of several, the samples count together, once their data are read
        if alone and self.splits.search is not None and largest > self.splits.search:
            raise ValueError(f"search.rungs: {largest} is more than the {self.splits.search} samples of splits.search")
        return self

    @property
    def is_lossless(self) -> bool:
        """Whether plans draft for the dense model."""
        return self.mode == LOSSLESS

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, as the job file names them."""
        return tuple(goal.task for goal in self.tasks) or ((self.task,) if self.task else ())

    @property
    def judges_several(self) -> bool:
        """Whether plans are judged by more than the accuracy on one task."""
        limits = self.collateral.max_accuracy_drop, self.collateral.max_kl
        return bool(self.tasks) or any(limit is not None for limit in limits)

    @property
    def letters(self) -> str:
        """Letters of run and of the actions the search may use, for example ``"RS"``."""
        return "".join(action.letter for action in Action if action is Action.RUN or action.label in self.actions)

    def not_served(self, letters: str) -> str:
        """Say which actions of the job an engine that serves ``letters`` does not; empty where it serves all."""
        foreign = [action.label for action in Action if action.letter in self.letters and action.letter not in letters]
        if not foreign:
            return ""
        return (
            f"actions: {self.latency.engine} as it is installed does not serve {', '.join(foreign)}; leave them out"
            + (", or install this version's skipplan-vllm beside it" if self.latency.engine == "vllm" else "")
        )

    def canonical(self) -> dict[str, Any]:
        """Dump the fields of ``DETERMINES_RESULT`` as plain JSON values."""
        fields = self.model_dump(mode="json", include=DETERMINES_RESULT)
        if self.constraint.min_dense_accuracy is None:  # jobs of before there was this limit are found again
            del fields["constraint"]["min_dense_accuracy"]
        if self.latency.engine == TRANSFORMERS:  # what an engine alone reads
            del fields["latency"]["engine"], fields["workload"]["concurrency"]
        if not self.is_lossless:  # jobs of before there was a choice
            del fields["mode"]
        if self.tasks:
            del fields["task"]
        else:
            del fields["tasks"]
        if self.search.objective == "worst":
            del fields["search"]["objective"]
        for name in ("max_accuracy_drop", "max_kl"):
            if fields["collateral"][name] is None:
                del fields["collateral"][name]
        if self.guard == GuardSpec() or self.is_lossless:  # jobs of before there were guards are found again
            del fields["guard"]
        if self.compensation.kind == "none" or not self.compensation.text_share:  # nor before there were mixtures
            del fields["compensation"]["text_share"], fields["compensation"]["text"]
        return fields

    def digest(self, **inputs: str) -> str:
        """Hash :meth:`canonical` and the contents of the job's inputs (task data, model), to find equal jobs."""
        text = json.dumps({"spec": self.canonical(), "inputs": inputs}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _check_hook(target: str) -> str:
    """Return what a job file names as a hook. Raises ValueError where it is neither a URL nor ``command``."""
    if target == "command":
        return target
    parts = urlsplit(target)  # a ValueError of its own says what is wrong with a port or an address
    printable = target.isascii() and target.isprintable() and " " not in target and len(target) <= 2000
    if not printable or parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{target[:100]!r} must be an http or https URL, or the word command")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user or password in it is not taken; the signature says who sends")
    return target
