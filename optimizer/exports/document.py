"""``skipplan.json``: what stands beside every export, and what ``skipplan import`` reads.

The models below are the one definition of the file; ``docs/schema/skipplan-plan.schema.json`` is generated from them.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from platform import python_version
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from optimizer.errors import UsageFault
from optimizer.search.space import touched
from storage.records.identities import ModelIdentity, TaskIdentity
from storage.records.plans import Plan, PlanFigures
from workers.runtime.plan import LEGEND, LETTERS, SkipPlan

SCHEMA_VERSION: Literal[1] = 1
FILE_NAME = "skipplan.json"
LARGEST_FILE = 16 << 20


def _no_truth_value(value: Any) -> Any:
    """Python takes True for 1; JSON does not."""
    if isinstance(value, bool):
        raise ValueError("a number is expected, not a truth value")
    return value


Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{6,128}$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Letters = Annotated[str, StringConstraints(pattern=f"^[{LETTERS}]+$", max_length=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Common to all parts of the file: nothing unknown, nothing converted, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Interval(Part):
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Model(Part):
    """The model that the plan belongs to: its identity is the fingerprint, the name is for people."""

    name: Name
    fingerprint: Hash
    family: Name
    num_layers: Rank
    parameters: Count


class Task(Part):
    """The task that the plan was verified on."""

    name: Name
    data_hash: Name
    split_seed: int
    calibration_size: Count
    search_size: Count
    held_out_size: Count


class Figures(Part):
    """What was verified on the held-out split and measured on the device; accuracies are shares, times seconds."""

    n: Rank = Field(description="Held-out samples")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Of the intervals; the difference's own is in secondary.difference_confidence where it was "
        "corrected for the number of plans compared"
    )
    accuracy: Interval
    dense_accuracy: Share
    difference: Interval = Field(description="Accuracy less dense accuracy on the same samples; a loss is negative")
    speedup: Interval = Field(description="Dense seconds / plan seconds, measured in pairs")
    seconds: Positive
    dense_seconds: Positive
    kv_cache_bytes: Count
    dense_kv_cache_bytes: Count
    secondary: dict[str, Any] = {}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("estimate", "low", "high"):
            value = getattr(self.accuracy, name)
            if not 0 <= value <= 1:
                raise ValueError(f"accuracy.{name} is {value}, outside [0, 1]")
        if self.speedup.estimate <= 0:
            raise ValueError(f"speedup.estimate is {self.speedup.estimate}, must be above 0")
        return self


class File(Part):
    """One written file."""

    size: Count
    sha256: Checksum


class Export(Part):
    """How and from what the directory around the file was written."""

    format: Name
    created_at: AwareDatetime
    model_fingerprint: Hash | None = Field(
        description="Of the model that was exported; another than the plan's only if that was forced. "
        "Null where no model was needed"
    )
    versions: dict[str, str]
    files: dict[str, File] = Field(description="By path within the directory; skipplan.json and README.md left out")


class PlanDocument(Part):
    """A published plan: what it does, for which model and task, and what was verified about it."""

    model_config = ConfigDict(title="skipplan plan")

    schema_version: Annotated[Literal[1], BeforeValidator(_no_truth_value)]
    plan: Letters = Field(description=f"One letter per decoder layer: {LEGEND}")
    compensation: Name = Field(description="'none', or how the gaps of skipped layers are compensated")
    maps_sha256: Checksum | None = Field(
        default=None, description="Of the fitted maps' file, compensation/maps.safetensors; null without compensation"
    )
    model: Model
    task: Task
    device: Name
    workload: Name
    figures: Figures
    origin: Literal["measured", "imported"]
    published_at: AwareDatetime
    export: Export | None = None

    @model_validator(mode="after")
    def _length(self) -> Self:
        if len(self.plan) != self.model.num_layers:
            raise ValueError(f"the plan has {len(self.plan)} letters, the model {self.model.num_layers} layers")
        return self

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"

    def plan_figures(self) -> PlanFigures:
        """The figures as the database keeps them."""
        own = self.figures
        return PlanFigures(
            plan=self.plan,
            compensation=self.compensation,
            artefact_checksum=self.maps_sha256,
            n=own.n,
            confidence=own.confidence,
            accuracy=own.accuracy.estimate,
            accuracy_low=own.accuracy.low,
            accuracy_high=own.accuracy.high,
            dense_accuracy=own.dense_accuracy,
            difference=own.difference.estimate,
            difference_low=own.difference.low,
            difference_high=own.difference.high,
            speedup=own.speedup.estimate,
            speedup_low=own.speedup.low,
            speedup_high=own.speedup.high,
            seconds=own.seconds,
            dense_seconds=own.dense_seconds,
            kv_cache_bytes=own.kv_cache_bytes,
            dense_kv_cache_bytes=own.dense_kv_cache_bytes,
            layers_touched=touched(SkipPlan.parse(self.plan)),
            secondary=own.secondary,
        )


def describe(plan: Plan, model: ModelIdentity, task: TaskIdentity) -> PlanDocument:
    """The document of a stored plan, without an export."""
    return PlanDocument(
        schema_version=SCHEMA_VERSION,
        plan=plan.plan,
        compensation=plan.compensation,
        maps_sha256=plan.artefact_checksum,
        model=Model(
            name=shared_name(plan.model),
            fingerprint=model.fingerprint,
            family=model.family,
            num_layers=model.num_layers,
            parameters=model.parameters,
        ),
        task=Task(
            name=task.name,
            data_hash=task.data_hash,
            split_seed=task.split_seed,
            calibration_size=task.calibration_size,
            search_size=task.search_size,
            held_out_size=task.held_out_size,
        ),
        device=plan.device,
        workload=plan.workload,
        figures=Figures(
            n=plan.n,
            confidence=plan.confidence,
            accuracy=Interval(estimate=plan.accuracy, low=plan.accuracy_low, high=plan.accuracy_high),
            dense_accuracy=plan.dense_accuracy,
            difference=Interval(estimate=plan.difference, low=plan.difference_low, high=plan.difference_high),
            speedup=Interval(estimate=plan.speedup, low=plan.speedup_low, high=plan.speedup_high),
            seconds=plan.seconds,
            dense_seconds=plan.dense_seconds,
            kv_cache_bytes=plan.kv_cache_bytes,
            dense_kv_cache_bytes=plan.dense_kv_cache_bytes,
            secondary=plan.secondary,
        ),
        origin="imported" if plan.origin == "imported" else "measured",
        published_at=plan.published_at,
    )


def shared_name(model: str) -> str:
    """A model's name as strangers may read it: a local path without the directories that lead to it."""
    path = PurePath(model)
    return path.name if path.is_absolute() or len(path.parts) > 2 or model.startswith((".", "~")) else model


def read(path: Path) -> PlanDocument:
    """Read the file, or the one in a directory, and check it. Raises UsageFault naming the field."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UsageFault(f"{file} is larger than {LARGEST_FILE} bytes, so it is no plan")
        return PlanDocument.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UsageFault(f"{file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise UsageFault(f"{file} is no valid plan: {where}: {first['msg']}") from None


def json_schema() -> dict[str, Any]:
    """The published JSON Schema of the file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | PlanDocument.model_json_schema()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of installed packages."""
    found = {"python": python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
