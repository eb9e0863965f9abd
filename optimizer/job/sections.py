"""The sections of a job file, each field with its default and its meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from optimizer.registries import STRATEGIES
from workers.compensation.recipe import NONE, OWN_TEXT, Recipe
from workers.engines.interface import ENGINES
from workers.runtime import PlanError, SkipPlan
from workers.runtime.plan import LEGEND
from workers.validation import require_one_of

TRANSFORMERS = "transformers"
"""In place of an engine: the live model is timed alone."""

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the job file: frozen, and without fields that are not documented here."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSpec(Section):
    """Which model, and how the workers load it."""

    path: str = Field(
        min_length=1,
        description="Directory, name of a bundled reference model (llava-12) or of a built one (smollm2-30, "
        "smollm2-30-scenes, see `skipplan reference build`), or hub id.",
    )
    revision: str | None = Field(default=None, description="Revision of a hub model; the default branch when absent.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Weights and activations; auto takes the checkpoint's own, or float32 where the workers' device "
        "would emulate that.",
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


class ConstraintSpec(Section):
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
    min_dense_accuracy: Share | None = Field(
        default=None,
        description="Smallest accuracy of the dense model on the search split; below it the job ends before the "
        "search. null: more than chance, which is guessing an option or always giving the most frequent answer. 0: go "
        "on anyway; every result then says so where the dense model is not above chance.",
    )
    min_speedup: float | None = Field(
        default=None, ge=1.0, le=1000.0, description="Smallest measured speed-up, by the lower end of its interval."
    )
    max_latency_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Most milliseconds of one request of the workload."
    )
    max_kv_cache_bytes: int | None = Field(
        default=None, ge=0, description="Most bytes of KV cache at the end of one request of the workload."
    )
    max_layers_touched: int | None = Field(
        default=None, ge=1, description="Maximum number of layers with another action than run."
    )


class TaskGoal(Section):
    """One of a job's several tasks, with its own limits and its weight."""

    task: str = Field(min_length=1, description="Name of a bundled task, or path of a task file.")
    max_accuracy_drop: Share | None = Field(
        default=None, description="As in constraint, for this task; that of constraint when absent. null: no limit."
    )
    min_accuracy: Share | None = Field(
        default=None, description="As in constraint, for this task; that of constraint when absent. null: no limit."
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How much its loss counts with search.objective: mean."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"task": value} if isinstance(value, str) else value

    def completed(self, constraint: ConstraintSpec) -> TaskGoal:
        """Take the limits that were not given from the job's constraint."""
        names = {"max_accuracy_drop", "min_accuracy"} - self.model_fields_set
        return self.model_copy(update={name: getattr(constraint, name) for name in names})


class SearchSpec(Section):
    """How plans are proposed and how many are tried."""

    trials: int = Field(default=200, ge=1, le=1_000_000, description="Number of distinct plans to try.")
    layer_executions: int | None = Field(
        default=None,
        ge=1,
        description="Most layer executions (samples times layers that run, each plan as if evaluated alone; without "
        "attention a layer counts two thirds, without its MLP one third).",
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
        description="The plans that samplers begin with: what the criterion proposes, random plans, or none.",
    )
    plans: tuple[str, ...] = Field(
        default=(),
        description=f"Plans that are tried before all others, one letter a layer ({LEGEND}); samplers only.",
    )
    warm_start: bool = Field(
        default=True, description="Use what earlier jobs found out about this model, on this task and on others."
    )
    objective: Literal["worst", "mean"] = Field(
        default="worst",
        description="What the search minimises beside latency where several losses are judged (see "
        "docs/several-tasks.md). worst: the loss that is the largest share of its limit. mean: the weighted mean of "
        "the tasks' losses.",
    )
    min_gain: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Stop when the expected gain of the front's hypervolume, as a share, stays under this. "
        "null: the budget alone ends the search.",
    )
    patience: int = Field(default=4, ge=1, le=1000, description="Batches in a row that min_gain must be missed.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the random numbers of the sampler and of every resampling."
    )
    batch: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Plans proposed together, from 32 on in halves; the same on any number of workers.",
    )
    rungs: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None,
        description="Growing prefix sizes of the search split; a plan that cannot reach the front stops on an early "
        "one. Default: a quarter of the split, then all of it.",
    )
    latency_model: Literal["profile", "layers"] = Field(
        default="profile",
        description="What predicts a plan's time during the search. profile: the sum of its layers' times, measured on "
        "this device once a job. layers: the "
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


class CompensationSpec(Section):
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

    text_share: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="Share of the calibration tokens that are general text, for what the task does not ask for "
        "(see docs/compensation.md). 0: the task alone.",
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        description="A UTF-8 file with the general text; null: the dense model samples its own.",
    )

    @model_validator(mode="after")
    def _text_has_a_share(self) -> CompensationSpec:
        if self.text is not None and not self.text_share:
            raise ValueError("text: needs a text_share above 0")
        return self

    @model_validator(mode="after")
    def _dense_states_do_not_drift(self) -> CompensationSpec:
        if self.drift and self.source == "dense":
            raise ValueError("drift: true needs source: pruned, since the dense model's states do not drift")
        return self

    def recipe(self, text_id: str = OWN_TEXT) -> Recipe:
        """Return how maps are fitted, also where ``kind`` asks for none; ``text_id`` is that of the file ``text``."""
        return Recipe(
            "linear",
            self.ridge,
            self.weighting,
            self.tokens,
            self.source,
            drift=self.drift,
            scope=self.scope,
            text_share=self.text_share,
            text_id=text_id,
        )

    def choices(self, text_id: str = OWN_TEXT) -> tuple[str, ...]:
        """List the compensations that candidates may have, as texts."""
        own = self.recipe(text_id).text
        by_kind = {"none": (NONE.text,), "linear": (own,), "both": (NONE.text, own)}
        return by_kind[self.kind]


class CollateralSpec(Section):
    """Measurements beside the job's task, since plans, and compensations above all, are fitted to that task alone."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="Names or files of other tasks that verified plans are scored on."
    )
    text: str | None = Field(
        default=None, min_length=1, description="A UTF-8 text file on which plans are compared with dense, by KL."
    )
    samples: int = Field(default=200, ge=1, le=1_000_000, description="Most samples of each other task and split.")
    max_accuracy_drop: Share | None = Field(
        default=None,
        description="Largest loss of accuracy on each of tasks, judged in the search and, by the upper confidence "
        "bound, held-out. null: measured after the search, and not judged.",
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Largest divergence from dense on text, in nats a token: judged in the search on one half of the "
        "text's passages, and by the upper confidence bound on the other. null: measured, and not judged.",
    )

    @model_validator(mode="after")
    def _limits_have_something_to_limit(self) -> CollateralSpec:
        if self.max_kl is not None and self.text is None:
            raise ValueError("max_kl: needs a text")
        if self.max_accuracy_drop is not None and not self.tasks:
            raise ValueError("max_accuracy_drop: needs tasks; that of the job's own task stands in constraint")
        return self


class GuardSpec(Section):
    """The test that tells prompts like the calibration ones from others, which runtime exports carry."""

    false_alarms: float | None = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="Share of the task's own prompts that the guard may send to the dense model; 0.01 needs 99 images "
        "in the search split. null: no guard.",
    )


class SplitSpec(Section):
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


class WorkloadSpec(Section):
    """The serving workload that latency is measured for."""

    batch_size: int = Field(default=1, ge=1, le=4096, description="Prompts per request.")
    new_tokens: int = Field(default=4, ge=1, le=65536, description="Tokens generated per prompt.")
    concurrency: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Requests in flight at once where latency.engine serves; 1, 4 and 16 are measured beside it.",
    )


class LatencySpec(Section):
    """How the latency of the plans that are verified is measured, in turns with dense."""

    engine: str = Field(
        default=TRANSFORMERS,
        min_length=1,
        description="What judges whether a plan is fast enough. transformers: generate on the live model. An engine "
        "(vllm, llama.cpp, openvino, or one of an entry point): dense and plan are served by it as well, and its "
        "speed-up at workload.concurrency decides.",
    )
    precision: float = Field(
        default=0.02, gt=0, le=0.5, description="Width of the speed-up's interval, relative, at which measuring stops."
    )
    max_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Most seconds spent on measuring one plan; in an engine, at each concurrency.",
    )

    @field_validator("engine")
    @classmethod
    def _engine_is_registered(cls, name: str) -> str:
        return require_one_of(name, (TRANSFORMERS, *ENGINES))


class ClusterSpec(Section):
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
        default=None,
        ge=0,
        le=64,
        description="GPUs per worker, of one node: fractions share one, over several the model's layers are spread. "
        "Absent: 1 if the cluster has GPUs, else 0.",
    )
    memory_per_worker: float | None = Field(
        default=None, gt=0, le=65536, description="GiB of memory reserved with Ray per worker (not enforced)."
    )
    batch_size: int = Field(
        default=32, ge=1, le=65536, description="Samples evaluated together; halved when memory ends."
    )
    load_timeout_seconds: float = Field(
        default=900.0, gt=0, le=1e6, description="A worker that takes longer to load the model is an error."
    )
    request_timeout_seconds: float = Field(
        default=3600.0, gt=0, le=1e6, description="A worker that takes longer over one request is replaced."
    )
    max_attempts: int = Field(
        default=2, ge=1, le=1000, description="Workers that may be lost over one request before it is given up."
    )

    @field_validator("gpus_per_worker")
    @classmethod
    def _part_of_one_gpu_or_whole_ones(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a part of one GPU or a whole number")
        return gpus

    @field_validator("workers")
    @classmethod
    def _at_least_one_worker(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and not 1 <= workers <= 4096:
            raise ValueError("must be auto or a number from 1 to 4096")
        return workers
