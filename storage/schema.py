"""Define the tables. Changing one means writing a migration beside it; ``skipplan db check`` compares the two."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, LargeBinary, MetaData, String, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from storage.types import Json, Real, RowId, Text, UtcDateTime, database_now

REVISION = "0009"
"""The migration that these tables correspond to."""

JOB_STATES = ("queued", "running", "succeeded", "infeasible", "failed", "cancelled")

ROLES = ("read", "submit", "admin")
"""What the bearer of a token may do, each including those before it."""

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Base of all tables, which name their constraints from the first revision on, so that migrations can drop them."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012  (read by SQLAlchemy, never changed)
        str: Text(),
        datetime: UtcDateTime(),
        dict[str, Any]: Json(),
        float: Real(),
        bytes: LargeBinary(),
    }


def _id() -> Mapped[int]:
    return mapped_column(RowId, primary_key=True)


def _reference(target: str, ondelete: str = "RESTRICT", **options: Any) -> Mapped[Any]:
    return mapped_column(RowId, ForeignKey(f"{target}.id", ondelete=ondelete), **options)


def _now() -> Mapped[datetime]:
    return mapped_column(insert_default=database_now())


class ModelRow(Base):
    """A model's identity is the fingerprint of its configuration and weights, wherever it was loaded from."""

    __tablename__ = "models"

    id: Mapped[int] = _id()
    fingerprint: Mapped[str] = mapped_column(unique=True)
    family: Mapped[str]
    num_layers: Mapped[int]
    parameters: Mapped[int] = mapped_column(RowId)
    created_at: Mapped[datetime] = _now()


class ModelNameRow(Base):
    """A path or hub id (and revision) under which a model was loaded, and when it last was."""

    __tablename__ = "model_names"
    __table_args__ = (
        UniqueConstraint("model_id", "name", "revision"),
        Index(None, "name", "seen_at"),
        Index(None, "short_name", "seen_at"),
    )

    id: Mapped[int] = _id()
    model_id: Mapped[int] = _reference("models", "CASCADE")
    name: Mapped[str]
    revision: Mapped[str]
    """Empty where none was asked for, since NULLs would not be unique."""
    short_name: Mapped[str]
    """The last part of the name: what a person types."""
    seen_at: Mapped[datetime] = _now()


class TaskRow(Base):
    """A task: its data (with prompt and metric) by hash, and how they were split."""

    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("name", "task_hash", "split_seed", "calibration_size", "search_size", "held_out_size"),
    )

    id: Mapped[int] = _id()
    name: Mapped[str]
    task_hash: Mapped[str]
    """Covers the samples and whatever else changes a score: prompt, metric, splits."""
    split_seed: Mapped[int] = mapped_column(RowId)
    calibration_size: Mapped[int]
    search_size: Mapped[int]
    held_out_size: Mapped[int]
    created_at: Mapped[datetime] = _now()
    data_hash: Mapped[str] = mapped_column(server_default="")
    """Of the samples alone, and ``definition_hash`` of how they are asked and scored; empty where not known."""
    definition_hash: Mapped[str] = mapped_column(server_default="")
    seen_at: Mapped[datetime | None] = mapped_column(insert_default=database_now())
    """When a job last used the task; None for one that was only imported."""


class DeviceRow(Base):
    """A device that latency was measured on, by the name that the worker gave."""

    __tablename__ = "devices"

    id: Mapped[int] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = _now()


class JobRow(Base):
    """A job in the queue. ``attempt`` only ever grows; with ``owner`` it names who may write for the job."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('" + "', '".join(JOB_STATES) + "')", name="state"),
        CheckConstraint(
            "(state = 'running') = (owner IS NOT NULL AND lease_expires_at IS NOT NULL)", name="running_has_a_lease"
        ),
        Index(
            "ix_jobs_queue",
            "precedence",
            "id",
            sqlite_where=text("state = 'queued'"),
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_leases",
            "lease_expires_at",
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        Index(None, "spec_hash", "id"),
        Index(None, "state", "id"),
        {"sqlite_autoincrement": True},  # the number of a removed job must never name another one
    )

    id: Mapped[int] = _id()
    spec: Mapped[dict[str, Any]]
    spec_hash: Mapped[str]
    state: Mapped[str] = mapped_column(String(16))
    precedence: Mapped[int]
    """Minus the priority, so that the queue's index is in the order in which jobs are taken."""
    owner: Mapped[str | None]
    attempt: Mapped[int]
    attempt_limit: Mapped[int]
    lease_expires_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any]]
    error: Mapped[str | None]
    created_at: Mapped[datetime] = _now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    """A queued job is not taken before; set when a cluster or the like failed and is given time to recover."""


class JobEventRow(Base):
    """An entry of a job's history: a transition, or what else its owner reported."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = _id()
    job_id: Mapped[int] = _reference("jobs", "CASCADE")
    at: Mapped[datetime] = _now()
    attempt: Mapped[int]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


class JobStageRow(Base):
    """The result of a finished stage of a job, so that a killed job goes on after it."""

    __tablename__ = "job_stages"

    job_id: Mapped[int] = _reference("jobs", "CASCADE", primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    payload: Mapped[dict[str, Any]]
    recorded_at: Mapped[datetime] = _now()


class JobCounterRow(Base):
    """A running sum of a job, such as evaluations done or layer executions saved."""

    __tablename__ = "job_counters"

    job_id: Mapped[int] = _reference("jobs", "CASCADE", primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class LatencyProfileRow(Base):
    """Seconds of every layer under every action, measured on a device under a workload."""

    __tablename__ = "latency_profiles"
    __table_args__ = (
        UniqueConstraint("job_id", "model_id", "task_id", "device_id", "workload"),
        Index(None, "model_id", "task_id", "device_id", "workload", "id"),
    )

    id: Mapped[int] = _id()
    job_id: Mapped[int | None] = _reference("jobs", "SET NULL")
    model_id: Mapped[int] = _reference("models")
    task_id: Mapped[int] = _reference("tasks")
    device_id: Mapped[int] = _reference("devices")
    workload: Mapped[str]
    prompt_tokens: Mapped[int]
    dense_latency_seconds: Mapped[float]
    layer_seconds: Mapped[dict[str, Any]]
    relative_error: Mapped[float]
    measured_at: Mapped[datetime] = _now()
    phases: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    """``layer_seconds``, prefill and decoding apart."""


class RedundancyRow(Base):
    """One redundancy statistic of one layer over one group of tokens of the calibration split."""

    __tablename__ = "redundancy_measurements"
    __table_args__ = (UniqueConstraint("model_id", "task_id", "calibration_hash", "name", "token_group", "layer"),)

    id: Mapped[int] = _id()
    model_id: Mapped[int] = _reference("models")
    task_id: Mapped[int] = _reference("tasks")
    job_id: Mapped[int | None] = _reference("jobs", "SET NULL", index=True)
    calibration_hash: Mapped[str]
    name: Mapped[str]
    token_group: Mapped[str]
    layer: Mapped[int]
    value: Mapped[float]
    standard_error: Mapped[float | None]
    n: Mapped[int] = mapped_column(RowId)
    measured_at: Mapped[datetime] = _now()


class EvaluationRow(Base):
    """Per-sample scores of a plan on the first samples of a split, or the reason why there are none."""

    __tablename__ = "evaluations"
    __table_args__ = (
        UniqueConstraint("job_id", "task_id", "plan", "compensation", "split", "n_samples"),
        Index("ix_evaluations_known", "model_id", "task_id", "split_hash", "plan", "n_samples"),
        CheckConstraint("(failure IS NULL) = (accuracy IS NOT NULL)", name="accuracy_or_failure"),
        CheckConstraint("accuracy BETWEEN 0 AND 1", name="accuracy_range"),
    )

    id: Mapped[int] = _id()
    job_id: Mapped[int] = _reference("jobs", "CASCADE")
    model_id: Mapped[int] = _reference("models")
    task_id: Mapped[int] = _reference("tasks")
    plan: Mapped[str]
    compensation: Mapped[str]
    settings: Mapped[str]
    """What else may change an answer, such as the dtype and the attention kernel."""
    split: Mapped[str]
    split_hash: Mapped[str]
    n_samples: Mapped[int]
    accuracy: Mapped[float | None]
    scores: Mapped[bytes]
    secondary: Mapped[dict[str, Any]]
    seconds: Mapped[float]
    failure: Mapped[str | None]
    reused_from: Mapped[int | None] = _reference("evaluations", "SET NULL", index=True)
    """The evaluation of an earlier job that these scores were taken from, where this job ran nothing."""
    recorded_at: Mapped[datetime] = _now()
    kl: Mapped[bytes | None]
    """Per sample the divergence from the dense model's answer distribution, packed like ``scores``."""
    layer_executions: Mapped[int] = mapped_column(RowId, server_default="0")
    layer_executions_saved: Mapped[int] = mapped_column(RowId, server_default="0")
    artifact: Mapped[str | None]
    """Where the fitted compensation lies, and the checksum of that file."""
    artifact_checksum: Mapped[str | None]


_GROUP = ("model_id", "task_id", "device_id", "workload", "mode")
_COMPARED = ("speedup", "accuracy", "difference_low", "latency_seconds", "id")


class PlanRow(Base):
    """A published plan: verified on the held-out split, latency measured against dense."""

    __tablename__ = "plans"
    __table_args__ = (
        UniqueConstraint("job_id", "model_id", "task_id", "device_id", "workload", "plan", "compensation"),
        Index(
            "uq_plans_imported",
            "model_id",
            "task_id",
            "device_id",
            "workload",
            "mode",
            "plan",
            "compensation",
            unique=True,
            sqlite_where=text("job_id IS NULL"),
            postgresql_where=text("job_id IS NULL"),
        ),
        # The flags come first, so that these indexes match one condition more than the others do: SQLite's planner,
        # which does not reckon with partial indexes being small, then takes them. The rest is there to be read from
        # the index alone.
        Index("ix_plans_contenders", "contender", *_GROUP, *_COMPARED),
        Index("ix_plans_contenders_anywhere", "contender", "model_id", "task_id", "mode", *_COMPARED),
        Index("ix_plans_front", "on_front", *_GROUP, *_COMPARED),
        Index("ix_plans_group", *_GROUP, *_COMPARED),
        Index("ix_plans_speedup", "model_id", "task_id", "mode", "speedup"),
        Index("ix_plans_accuracy", "model_id", "task_id", "mode", "accuracy"),
        Index("ix_plans_fastest", "mode", "speedup"),
        CheckConstraint("accuracy BETWEEN 0 AND 1 AND dense_accuracy BETWEEN 0 AND 1", name="accuracy_range"),
        CheckConstraint("difference_low <= difference_high", name="difference_interval"),
        CheckConstraint("speedup > 0 AND speedup_low <= speedup_high", name="speedup_interval"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = _id()
    job_id: Mapped[int | None] = _reference("jobs", "CASCADE")
    model_id: Mapped[int] = _reference("models")
    task_id: Mapped[int] = _reference("tasks")
    device_id: Mapped[int] = _reference("devices", index=True)
    workload: Mapped[str]
    plan: Mapped[str]
    compensation: Mapped[str]
    origin: Mapped[str]
    n_samples: Mapped[int]
    accuracy: Mapped[float]
    accuracy_low: Mapped[float]
    accuracy_high: Mapped[float]
    dense_accuracy: Mapped[float]
    difference: Mapped[float]
    difference_low: Mapped[float]
    difference_high: Mapped[float]
    confidence: Mapped[float]
    dense_latency_seconds: Mapped[float]
    latency_seconds: Mapped[float]
    speedup: Mapped[float]
    speedup_low: Mapped[float]
    speedup_high: Mapped[float]
    dense_kv_cache_bytes: Mapped[int] = mapped_column(RowId)
    kv_cache_bytes: Mapped[int] = mapped_column(RowId)
    layers_touched: Mapped[int]
    secondary: Mapped[dict[str, Any]]
    on_front: Mapped[bool]
    """No plan of its model, task, device and workload is at least as accurate and as fast, and better in one."""
    contender: Mapped[bool]
    """No plan of its group is at least as good in everything that a query can constrain (see ``storage.pareto``)."""
    published_at: Mapped[datetime] = _now()
    artifact: Mapped[str | None]
    """Where the fitted compensation lies, and the checksum of that file."""
    artifact_checksum: Mapped[str | None]
    mode: Mapped[str] = mapped_column(server_default="standalone")
    """``standalone``, or ``lossless``: the plan drafts and the dense model verifies."""
    extra_bytes: Mapped[int | None] = mapped_column(RowId)
    """Memory beside the dense model and its cache, of a lossless plan."""


class EngineLatencyRow(Base):
    """Latency and throughput of a published plan, and of dense, in one version of an engine at one concurrency."""

    __tablename__ = "engine_latencies"
    __table_args__ = (UniqueConstraint("plan_id", "engine", "version", "concurrency"),)

    id: Mapped[int] = _id()
    plan_id: Mapped[int] = _reference("plans", "CASCADE")
    engine: Mapped[str]
    version: Mapped[str]
    dtype: Mapped[str]
    concurrency: Mapped[int]
    rounds: Mapped[int]
    speedup: Mapped[float]
    speedup_low: Mapped[float]
    speedup_high: Mapped[float]
    first_token_seconds: Mapped[float]
    dense_first_token_seconds: Mapped[float]
    latency_seconds: Mapped[float]
    dense_latency_seconds: Mapped[float]
    requests_per_second: Mapped[float]
    dense_requests_per_second: Mapped[float]
    seconds_per_token: Mapped[float | None]
    dense_seconds_per_token: Mapped[float | None]
    kv_cache_bytes: Mapped[int | None] = mapped_column(RowId)
    kv_cache_tokens: Mapped[int | None] = mapped_column(RowId)
    dense_kv_cache_tokens: Mapped[int | None] = mapped_column(RowId)
    measured_at: Mapped[datetime] = _now()


class AccessTokenRow(Base):
    """A token of the HTTP API. Of its secret only the hash is kept."""

    __tablename__ = "access_tokens"
    __table_args__ = (
        CheckConstraint("role IN ('" + "', '".join(ROLES) + "')", name="role"),
        {"sqlite_autoincrement": True},  # what a removed token submitted must never become another one's
    )

    id: Mapped[int] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str] = mapped_column(String(16))
    handle: Mapped[str] = mapped_column(unique=True)
    """The part of the token that is no secret, by which its row is found."""
    digest: Mapped[str]
    """SHA-256 of the secret part, which is random and long, so that neither salt nor stretching is needed."""
    created_at: Mapped[datetime] = _now()


class SubmissionRow(Base):
    """A request to the HTTP API that asked for a job, and the job that it was given."""

    __tablename__ = "submissions"
    __table_args__ = (UniqueConstraint("token_id", "key"),)

    id: Mapped[int] = _id()
    token_id: Mapped[int | None] = _reference("access_tokens", "SET NULL")
    key: Mapped[str | None]
    """The idempotency key that the client chose, if it did."""
    request_hash: Mapped[str]
    job_id: Mapped[int | None] = _reference("jobs", "CASCADE", index=True)
    queued_it: Mapped[bool]
    """Whether the job was queued for this request, and not there already."""
    created_at: Mapped[datetime] = _now()


class HookDeliveryRow(Base):
    """A message about a job to one hook; due at ``next_at``, which is empty once it is delivered or given up."""

    __tablename__ = "hook_deliveries"
    __table_args__ = (
        Index(
            "ix_hook_deliveries_due",
            "next_at",
            sqlite_where=text("next_at IS NOT NULL"),
            postgresql_where=text("next_at IS NOT NULL"),
        ),
    )

    id: Mapped[int] = _id()
    job_id: Mapped[int] = _reference("jobs", "CASCADE", index=True)
    target: Mapped[str]
    payload: Mapped[dict[str, Any]]
    attempts: Mapped[int]
    next_at: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]
    error: Mapped[str | None]
    created_at: Mapped[datetime] = _now()
