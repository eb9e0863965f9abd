"""``skipplan.json``: what stands beside every export, and what ``skipplan import`` reads.

The models below are the one definition of the file; ``docs/schema/skipplan-plan.schema.json`` is generated from them.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
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
from storage.errors import InvalidValue
from storage.records.lookup import ModelRecord, TaskRecord
from storage.records.plans import LOSSLESS, MeasuredFigures, Plan, PlanFigures
from workers.runtime.plan import LEGEND, LETTERS, SkipPlan

SCHEMA_VERSION: Literal[2] = 2
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
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Common to all parts of the file: nothing unknown, nothing converted, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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

    schema_version: Annotated[Literal[2], BeforeValidator(_no_truth_value)]
    plan: Letters = Field(description=f"One letter per decoder layer: {LEGEND}")
    compensation: Name = Field(description="'none', or how the gaps of skipped layers are compensated")
    artifact_checksum: Checksum | None = Field(
        default=None,
        description="SHA-256 of the fitted maps' file, compensation/maps.safetensors; null without compensation",
    )
    model: ModelRecord
    task: TaskRecord
    device: Name
    workload: Name
    mode: Literal["standalone", "lossless"] = Field(
        default="standalone", description="Whether the plan answers in the place of the dense model, or drafts for it"
    )
    figures: MeasuredFigures
    origin: Literal["measured", "imported"]
    published_at: AwareDatetime
    export: Export | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            self.figures.check("figures")
        except InvalidValue as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _drafters_memory(self) -> Self:
        if self.mode == LOSSLESS and self.figures.extra_bytes is None:
            raise ValueError("figures.extra_bytes: a lossless plan needs it, the memory beside the dense model")
        return self

    @model_validator(mode="after")
    def _length(self) -> Self:
        if len(self.plan) != self.model.num_layers:
            raise ValueError(f"the plan has {len(self.plan)} letters, the model {self.model.num_layers} layers")
        return self

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"

    def plan_figures(self) -> PlanFigures:
        """Return the plan and its figures as the database keeps them."""
        return PlanFigures(
            plan=self.plan,
            compensation=self.compensation,
            layers_touched=touched(SkipPlan.parse(self.plan)),
            artifact_checksum=self.artifact_checksum,
            **{each.name: getattr(self.figures, each.name) for each in fields(MeasuredFigures)},
        )


def describe(plan: Plan, model: ModelRecord, task: TaskRecord) -> PlanDocument:
    """Return the document of a stored plan, without an export."""
    return PlanDocument(
        schema_version=SCHEMA_VERSION,
        plan=plan.plan,
        compensation=plan.compensation,
        artifact_checksum=plan.artifact_checksum,
        model=replace(model, name=shared_name(plan.model)),
        task=task,
        device=plan.device,
        workload=plan.workload,
        mode="lossless" if plan.mode == LOSSLESS else "standalone",
        figures=replace(
            MeasuredFigures(**{each.name: getattr(plan, each.name) for each in fields(MeasuredFigures)}),
            secondary=_without_places(plan.secondary),
        ),
        origin="imported" if plan.origin == "imported" else "measured",
        published_at=plan.published_at,
    )


def _without_places(secondary: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the guard's file lies here, which is nobody else's business."""
    if "guard" not in secondary:
        return secondary
    return secondary | {"guard": {name: value for name, value in secondary["guard"].items() if name != "artifact"}}


def shared_name(model: str) -> str:
    """Return a model's name as strangers may read it: a local path without the directories that lead to it."""
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
    """Return the published JSON Schema of the file."""
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
