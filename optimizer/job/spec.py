"""The job specification: every field of a job file, with its default. ``optimizer.job.loading`` reads one."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from optimizer import criteria
from optimizer.errors import UsageFault
from optimizer.registries import METHODS, STRATEGIES
from workers.compensation.recipe import NONE, Recipe
from workers.runtime import PlanError, SkipPlan
from workers.runtime.plan import LEGEND, Action

DEFAULT_DATABASE = "sqlite:///skipplan.db"
DEFAULT_ARTIFACTS = "skipplan-artifacts"

if TYPE_CHECKING:
    ActionName = str
else:
    ActionName = Literal[tuple(action.label for action in Action if action is not Action.RUN)]

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class _Section(BaseModel):
    """A section of the job file: frozen, and without fields that are not documented here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSpec(_Section):
    """Which model, and how the workers load it."""

    path: str = Field(
        min_length=1,
        description="Directory, name of a bundled reference model (llava-12) or of a built one (smollm2-30, see "
        "`skipplan reference build`), or hub id.",
    )
    revision: str | None = Field(default=None, description="Revision of a hub model; the default branch when absent.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Weights and activations; auto takes the checkpoint's own."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where a worker holds one.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="The attention implementation of transformers."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a hub model. Off by default.")
    allow_pickle: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="Names of pickled weight files that may be read where a model has no safetensors. Pickles are "
        "unpacked without running code in them, and only these.",
    )

    @field_validator("allow_pickle")
    @classmethod
    def _names_only(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if "/" in name or "\\" in name or name in (".", ".."):
                raise ValueError("must be names of files in the model's directory, without a path")
        return tuple(sorted(set(names)))


class ConstraintSpec(_Section):
    """Limits that a plan must meet to be an answer; accuracies are judged on the held-out split."""

    max_accuracy_drop: Share | None = Field(
        default=0.01,
        description="Largest loss of accuracy against the dense model, as a share (0.01 is one point). The upper "
        "confidence bound of the loss must stay under it. null: no limit.",
    )
    confidence: float = Field(
        default=0.95, ge=0.5, lt=1.0, description="Confidence of intervals and of the judgement over all finalists."
    )
    min_accuracy: Share | None = Field(default=None, description="Smallest held-out accuracy, by its lower bound.")
    min_speedup: float | None = Field(
        default=None, ge=1.0, le=1000.0, description="Smallest measured speed-up, by the lower end of its interval."
    )
    max_latency_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Most milliseconds of one request of the workload."
    )
    max_kv_cache_bytes: int | None = Field(
        default=None, ge=0, description="Most bytes of KV cache at the end of one request of the workload."
    )
    max_layers_touched: int | None = Field(default=None, ge=1, description="Most layers that may do other than run.")


class SearchSpec(_Section):
    """How plans are proposed and how many are tried."""

    evaluations: int = Field(default=200, ge=1, le=1_000_000, description="Number of distinct plans to evaluate.")
    layer_executions: int | None = Field(
        default=None,
        ge=1,
        description="Most layer executions (samples times layers that run, each plan as if evaluated alone).",
    )
    seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Most seconds of searching; the batch under way ends."
    )
    strategy: str = Field(
        default="surrogate",
        description="surrogate: the project's own sampler. tpe, nsga2, gp, random: Optuna's. The others are published "
        "methods (see docs/search.md).",
        json_schema_extra=lambda schema: schema.update(enum=[*STRATEGIES]),
    )
    seeds: Literal["theory", "random", "none"] = Field(
        default="theory",
        description="Where samplers begin: plans that the criterion proposes, random plans, or nothing.",
    )
    plans: tuple[str, ...] = Field(
        default=(),
        description=f"Plans that are tried before all others, one letter a layer ({LEGEND}); samplers only.",
    )
    warm_start: bool = Field(
        default=True, description="Use what earlier jobs found out about this model, on this task and on others."
    )
    min_gain: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Stop when the expected gain of the front's hypervolume, as a share, stays under this. "
        "null: the budget alone ends the search.",
    )
    patience: int = Field(default=4, ge=1, le=1000, description="Batches in a row that min_gain must be missed.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the sampler and of every resampling.")
    batch: int = Field(
        default=8, ge=1, le=4096, description="Plans proposed together; the same on any number of workers."
    )
    rungs: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description="Growing prefix sizes of the search split; a plan that cannot reach the front stops on an early "
        "one. Default: a quarter of the split, then all of it.",
    )
    latency: Literal["measured", "layers"] = Field(
        default="measured",
        description="What predicts a plan's time during the search. measured: the profile of this device. layers: the "
        "number of layers that run (a frozen or bypassed one counts half), the same on any machine, so that a search "
        "can be repeated exactly.",
    )
    finalists: int = Field(default=6, ge=1, le=64, description="Most plans of the front that are verified held-out.")

    @field_validator("strategy")
    @classmethod
    def _strategy_is_registered(cls, name: str) -> str:
        if name not in STRATEGIES:
            raise PydanticKnownError("literal_error", {"expected": ", ".join(f"'{each}'" for each in STRATEGIES)})
        return name

    @field_validator("plans")
    @classmethod
    def _plans_can_be_read(cls, plans: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(SkipPlan.parse(plan).text for plan in plans)
        except PlanError as error:
            raise ValueError(str(error)) from None

    @field_validator("rungs")
    @classmethod
    def _rungs_grow(cls, rungs: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if rungs is not None and (not rungs or list(rungs) != sorted(set(rungs))):
            raise ValueError("the sizes must grow, for example [64, 256]")
        return rungs


class CompensationSpec(_Section):
    """Compensation of skipped layers by fitted maps that are folded into the weights before the gaps."""

    kind: Literal["none", "linear", "both"] = Field(
        default="none",
        description="none: plain skips. linear: every gap is compensated by a linear map. both: the search has either.",
    )
    ridge: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="Pull of the maps towards the plain skip, relative to the mean square of what they act on.",
    )
    weighting: Literal["uniform", "answers"] = Field(
        default="answers", description="How much a calibration token counts (see docs/compensation.md)."
    )
    tokens: int = Field(
        default=16384, ge=1, le=10_000_000, description="Calibration tokens that maps are fitted on, in whole samples."
    )
    source: Literal["pruned", "dense"] = Field(
        default="pruned",
        description="pruned: fit on the compensated model's own states, from the bottom up. dense: on dense states.",
    )
    drift: bool = Field(
        default=False, description="Also fit a map behind every kept layer above the first gap; needs source pruned."
    )
    scope: Literal["output", "projection"] = Field(
        default="output",
        description="output: a map acts on what the MLP adds. projection: the MLP's whole last projection is fitted "
        "anew, which can compensate more.",
    )

    @model_validator(mode="after")
    def _dense_states_do_not_drift(self) -> CompensationSpec:
        if self.drift and self.source == "dense":
            raise ValueError("drift: true needs source: pruned, since the dense model's states do not drift")
        return self

    @property
    def recipe(self) -> Recipe:
        """How maps are fitted; also where ``kind`` asks for none."""
        return Recipe(
            "linear", self.ridge, self.weighting, self.tokens, self.source, drift=self.drift, scope=self.scope
        )

    @property
    def choices(self) -> tuple[str, ...]:
        """List the compensations that candidates may have, as texts."""
        by_kind = {"none": (NONE.text,), "linear": (self.recipe.text,), "both": (NONE.text, self.recipe.text)}
        return by_kind[self.kind]


class CollateralSpec(_Section):
    """Measurements beside the job's task, since plans, and compensations above all, are fitted to that task alone."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="Names or files of other tasks that verified plans are scored on."
    )
    text: str | None = Field(
        default=None, min_length=1, description="A UTF-8 text file on which plans are compared with dense, by KL."
    )
    samples: int = Field(default=200, ge=1, le=1_000_000, description="Most held-out samples of each other task.")


class SplitSpec(_Section):
    """Sizes of the three splits, where the job wants other ones than the task says."""

    calibration: int | None = Field(default=None, ge=1, description="Samples of the redundancy statistics.")
    search: int | None = Field(default=None, ge=1, description="Samples that proposals are judged on.")
    held_out: int | None = Field(default=None, ge=1, description="Samples that published figures come from.")
    unit: Literal["images", "samples"] | None = Field(
        default=None, description="What the sizes count; the task's own unit when absent."
    )
    calibration_per_image: int | None = Field(
        default=None, ge=1, description="Most calibration samples about one image; the task's own limit when absent."
    )


class WorkloadSpec(_Section):
    """The serving workload that latency is measured for."""

    batch_size: int = Field(default=1, ge=1, le=4096, description="Prompts per request.")
    new_tokens: int = Field(default=4, ge=1, le=65536, description="Tokens generated per prompt.")


class ClusterSpec(_Section):
    """Where the workers run."""

    address: str = Field(
        default="local",
        min_length=1,
        description="local: a Ray instance of this job alone. auto, host:port or ray://host:port: a running cluster.",
    )
    workers: int | Literal["auto"] = Field(
        default="auto", description="Number of workers; auto: one per GPU or per CPU core."
    )
    cpus_per_worker: float = Field(
        default=1.0, gt=0, le=1024, description="CPU cores reserved per worker, and its torch threads."
    )
    gpus_per_worker: float | None = Field(
        default=None, ge=0, le=64, description="GPUs reserved per worker, fractions share; absent: one where there are."
    )
    memory_per_worker: float | None = Field(
        default=None, gt=0, le=65536, description="GiB of memory reserved per worker, in Ray's accounts."
    )
    batch_size: int = Field(
        default=32, ge=1, le=65536, description="Samples evaluated together; halved when memory ends."
    )
    request_timeout_seconds: float = Field(
        default=3600.0, gt=0, le=1e6, description="A worker that takes longer over one request is replaced."
    )
    max_attempts: int = Field(
        default=2, ge=1, le=1000, description="Workers that may be lost over one request before it is given up."
    )

    @field_validator("workers")
    @classmethod
    def _at_least_one_worker(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and not 1 <= workers <= 4096:
            raise ValueError("must be auto or a number from 1 to 4096")
        return workers


DETERMINES_RESULT = {
    "model",
    "task",
    "actions",
    "criterion",
    "thresholds",
    "redundancy_samples",
    "constraint",
    "protect",
    "search",
    "compensation",
    "collateral",
    "splits",
    "workload",
    "evaluation",
    "latency_precision",
    "latency_seconds",
}
"""Fields that count when jobs are compared, each with everything in it."""
ONLY_WHERE_AND_WHEN = {"cluster", "priority", "attempts", "database", "artifacts"}
"""Fields that do not: where and when a job runs, and where its results lie. Every field is in one of the two sets."""


class JobSpec(_Section):
    """Everything a job file says. Relative paths in a file are relative to that file."""

    model: ModelSpec
    task: str = Field(min_length=1, description="Name of a bundled task, or path of a task file.")
    actions: tuple[ActionName, ...] = Field(
        default=("skip",), min_length=1, description="What may happen at a layer: skip, freeze, bypass."
    )
    criterion: str = Field(
        default="skip-it",
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
    protect: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), description="Layers (from 0) that must run.")
    search: SearchSpec = SearchSpec()
    compensation: CompensationSpec = CompensationSpec()
    collateral: CollateralSpec = CollateralSpec()
    splits: SplitSpec = SplitSpec()
    workload: WorkloadSpec = WorkloadSpec()
    evaluation: Literal["auto", "fast", "plain"] = Field(
        default="auto",
        description="How plans are scored. fast: plans share work; an error where that would not be exact. plain: one "
        "generate call a batch. auto: fast where it is exact for the model and the task, else plain.",
    )
    latency_precision: float = Field(
        default=0.02, gt=0, le=0.5, description="Half-width of the speed-up's interval to measure down to, relative."
    )
    latency_seconds: float = Field(
        default=60.0, gt=0, le=86_400, description="Most seconds spent on re-measuring one finalist."
    )
    cluster: ClusterSpec = ClusterSpec()
    priority: int = Field(default=0, ge=-1000, le=1000, description="Jobs of higher priority are taken first.")
    attempts: int = Field(
        default=5,
        ge=1,
        le=1000,
        description="How often the job is begun without getting anywhere before it counts as failed.",
    )
    database: str = Field(default=DEFAULT_DATABASE, min_length=1, description="SQLAlchemy URL.")
    artifacts: str = Field(
        default=DEFAULT_ARTIFACTS,
        min_length=1,
        description="Where fitted maps are kept: a directory, or an fsspec URL that workers can read.",
    )

    @field_validator("actions")
    @classmethod
    def _actions_once(cls, actions: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(actions)) != len(actions):
            raise ValueError("each action may be named once")
        return tuple(sorted(actions))

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
    def _rungs_fit(self) -> JobSpec:
        largest = self.search.rungs[-1] if self.search.rungs else 0
        if self.splits.search is not None and largest > self.splits.search:
            raise ValueError(f"search.rungs: {largest} is more than the {self.splits.search} samples of splits.search")
        return self

    @property
    def letters(self) -> str:
        """Letters of run and of the actions the search may use, for example ``"RS"``."""
        return "".join(action.letter for action in Action if action is Action.RUN or action.label in self.actions)

    def canonical(self) -> dict[str, Any]:
        """Dump the fields of ``DETERMINES_RESULT`` as plain JSON values."""
        return self.model_dump(mode="json", include=DETERMINES_RESULT)

    def digest(self, **inputs: str) -> str:
        """Hash :meth:`canonical` and the contents of the job's inputs (task data, model), to find equal jobs."""
        text = json.dumps({"spec": self.canonical(), "inputs": inputs}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
