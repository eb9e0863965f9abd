"""Create the tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("id", RowId, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("name", name=op.f("uq_devices_name")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", RowId, nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_hash", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("precedence", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("attempt_limit", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", Time, nullable=True),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("started_at", Time, nullable=True),
        sa.Column("finished_at", Time, nullable=True),
        sa.CheckConstraint(
            "(state = 'running') = (owner IS NOT NULL AND lease_expires_at IS NOT NULL)",
            name=op.f("ck_jobs_running_has_a_lease"),
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'infeasible', 'failed', 'cancelled')",
            name=op.f("ck_jobs_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_jobs_leases",
        "jobs",
        ["lease_expires_at"],
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_index(
        "ix_jobs_queue",
        "jobs",
        ["precedence", "id"],
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index("ix_jobs_spec_hash", "jobs", ["spec_hash", "id"])
    op.create_index("ix_jobs_state", "jobs", ["state", "id"])

    op.create_table(
        "models",
        sa.Column("id", RowId, nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("num_layers", sa.Integer(), nullable=False),
        sa.Column("parameters", RowId, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_models")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_models_fingerprint")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", RowId, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("data_hash", sa.Text(), nullable=False),
        sa.Column("split_seed", RowId, nullable=False),
        sa.Column("calibration_size", sa.Integer(), nullable=False),
        sa.Column("search_size", sa.Integer(), nullable=False),
        sa.Column("held_out_size", sa.Integer(), nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint(
            "name",
            "data_hash",
            "split_seed",
            "calibration_size",
            "search_size",
            "held_out_size",
            name=op.f("uq_tasks_name"),
        ),
    )
    op.create_table(
        "evaluations",
        sa.Column("id", RowId, nullable=False),
        sa.Column("job_id", RowId, nullable=False),
        sa.Column("model_id", RowId, nullable=False),
        sa.Column("task_id", RowId, nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("compensation", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("split_hash", sa.Text(), nullable=False),
        sa.Column("rung", sa.Integer(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=True),
        sa.Column("scores", sa.LargeBinary(), nullable=False),
        sa.Column("secondary", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("failure", sa.Text(), nullable=True),
        sa.Column("reused_from", RowId, nullable=True),
        sa.Column("recorded_at", Time, nullable=False),
        sa.CheckConstraint(
            "(failure IS NULL) = (accuracy IS NOT NULL)", name=op.f("ck_evaluations_accuracy_or_failure")
        ),
        sa.CheckConstraint("accuracy BETWEEN 0 AND 1", name=op.f("ck_evaluations_accuracy_range")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_evaluations_job_id_jobs"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_evaluations_model_id_models"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["reused_from"],
            ["evaluations.id"],
            name=op.f("fk_evaluations_reused_from_evaluations"),
            ondelete="SET NULL",
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_evaluations_task_id_tasks"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluations")),
        sa.UniqueConstraint("job_id", "plan", "compensation", "split", "rung", name=op.f("uq_evaluations_job_id")),
    )
    op.create_index("ix_evaluations_known", "evaluations", ["model_id", "task_id", "split_hash", "plan", "rung"])
    op.create_index("ix_evaluations_reused_from", "evaluations", ["reused_from"])

    op.create_table(
        "job_counters",
        sa.Column("job_id", RowId, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_counters_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "name", name=op.f("pk_job_counters")),
    )
    op.create_table(
        "job_events",
        sa.Column("id", RowId, nullable=False),
        sa.Column("job_id", RowId, nullable=False),
        sa.Column("at", Time, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job_id", "id"])

    op.create_table(
        "job_stages",
        sa.Column("job_id", RowId, nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("recorded_at", Time, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_stages_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "stage", name=op.f("pk_job_stages")),
    )
    op.create_table(
        "latency_profiles",
        sa.Column("id", RowId, nullable=False),
        sa.Column("job_id", RowId, nullable=True),
        sa.Column("model_id", RowId, nullable=False),
        sa.Column("task_id", RowId, nullable=False),
        sa.Column("device_id", RowId, nullable=False),
        sa.Column("workload", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("dense_seconds", sa.Double(), nullable=False),
        sa.Column("layer_seconds", sa.JSON(), nullable=False),
        sa.Column("relative_error", sa.Double(), nullable=False),
        sa.Column("measured_at", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_latency_profiles_device_id_devices"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_latency_profiles_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_latency_profiles_model_id_models"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_latency_profiles_task_id_tasks"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_latency_profiles")),
        sa.UniqueConstraint(
            "job_id", "model_id", "task_id", "device_id", "workload", name=op.f("uq_latency_profiles_job_id")
        ),
    )
    op.create_index(
        "ix_latency_profiles_model_id", "latency_profiles", ["model_id", "task_id", "device_id", "workload", "id"]
    )

    op.create_table(
        "model_names",
        sa.Column("id", RowId, nullable=False),
        sa.Column("model_id", RowId, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("short_name", sa.Text(), nullable=False),
        sa.Column("seen_at", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_model_names_model_id_models"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_names")),
        sa.UniqueConstraint("model_id", "name", "revision", name=op.f("uq_model_names_model_id")),
    )
    op.create_index("ix_model_names_name", "model_names", ["name", "seen_at"])
    op.create_index("ix_model_names_short_name", "model_names", ["short_name", "seen_at"])

    op.create_table(
        "plans",
        sa.Column("id", RowId, nullable=False),
        sa.Column("job_id", RowId, nullable=True),
        sa.Column("model_id", RowId, nullable=False),
        sa.Column("task_id", RowId, nullable=False),
        sa.Column("device_id", RowId, nullable=False),
        sa.Column("workload", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("compensation", sa.Text(), nullable=False),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("accuracy", sa.Double(), nullable=False),
        sa.Column("accuracy_low", sa.Double(), nullable=False),
        sa.Column("accuracy_high", sa.Double(), nullable=False),
        sa.Column("dense_accuracy", sa.Double(), nullable=False),
        sa.Column("difference", sa.Double(), nullable=False),
        sa.Column("difference_low", sa.Double(), nullable=False),
        sa.Column("difference_high", sa.Double(), nullable=False),
        sa.Column("confidence", sa.Double(), nullable=False),
        sa.Column("dense_seconds", sa.Double(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("speedup", sa.Double(), nullable=False),
        sa.Column("speedup_low", sa.Double(), nullable=False),
        sa.Column("speedup_high", sa.Double(), nullable=False),
        sa.Column("dense_kv_cache_bytes", RowId, nullable=False),
        sa.Column("kv_cache_bytes", RowId, nullable=False),
        sa.Column("layers_touched", sa.Integer(), nullable=False),
        sa.Column("secondary", sa.JSON(), nullable=False),
        sa.Column("on_front", sa.Boolean(), nullable=False),
        sa.Column("contender", sa.Boolean(), nullable=False),
        sa.Column("published_at", Time, nullable=False),
        sa.CheckConstraint(
            "accuracy BETWEEN 0 AND 1 AND dense_accuracy BETWEEN 0 AND 1", name=op.f("ck_plans_accuracy_range")
        ),
        sa.CheckConstraint("difference_low <= difference_high", name=op.f("ck_plans_difference_interval")),
        sa.CheckConstraint("speedup > 0 AND speedup_low <= speedup_high", name=op.f("ck_plans_speedup_interval")),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_plans_device_id_devices"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_plans_job_id_jobs"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_plans_model_id_models"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_plans_task_id_tasks"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_plans")),
        sa.UniqueConstraint(
            "job_id",
            "model_id",
            "task_id",
            "device_id",
            "workload",
            "plan",
            "compensation",
            name=op.f("uq_plans_job_id"),
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_plans_accuracy", "plans", ["model_id", "task_id", "accuracy"])
    op.create_index(
        "ix_plans_contenders",
        "plans",
        [
            "contender",
            "model_id",
            "task_id",
            "device_id",
            "workload",
            "speedup",
            "accuracy",
            "difference_low",
            "seconds",
            "id",
        ],
    )
    op.create_index(
        "ix_plans_contenders_anywhere",
        "plans",
        ["contender", "model_id", "task_id", "speedup", "accuracy", "difference_low", "seconds", "id"],
    )
    op.create_index("ix_plans_device_id", "plans", ["device_id"])
    op.create_index("ix_plans_fastest", "plans", ["speedup"])
    op.create_index(
        "ix_plans_front",
        "plans",
        [
            "on_front",
            "model_id",
            "task_id",
            "device_id",
            "workload",
            "speedup",
            "accuracy",
            "difference_low",
            "seconds",
            "id",
        ],
    )
    op.create_index(
        "ix_plans_group",
        "plans",
        ["model_id", "task_id", "device_id", "workload", "speedup", "accuracy", "difference_low", "seconds", "id"],
    )
    op.create_index("ix_plans_speedup", "plans", ["model_id", "task_id", "speedup"])
    op.create_index(
        "uq_plans_imported",
        "plans",
        ["model_id", "task_id", "device_id", "workload", "plan", "compensation"],
        unique=True,
        sqlite_where=sa.text("job_id IS NULL"),
        postgresql_where=sa.text("job_id IS NULL"),
    )

    op.create_table(
        "redundancy_measurements",
        sa.Column("id", RowId, nullable=False),
        sa.Column("model_id", RowId, nullable=False),
        sa.Column("task_id", RowId, nullable=False),
        sa.Column("job_id", RowId, nullable=True),
        sa.Column("calibration_hash", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("token_group", sa.Text(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("standard_error", sa.Double(), nullable=True),
        sa.Column("n", RowId, nullable=False),
        sa.Column("measured_at", Time, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_redundancy_measurements_job_id_jobs"), ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name=op.f("fk_redundancy_measurements_model_id_models"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["task_id"], ["tasks.id"], name=op.f("fk_redundancy_measurements_task_id_tasks"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_redundancy_measurements")),
        sa.UniqueConstraint(
            "model_id",
            "task_id",
            "calibration_hash",
            "name",
            "token_group",
            "layer",
            name=op.f("uq_redundancy_measurements_model_id"),
        ),
    )
    op.create_index("ix_redundancy_measurements_job_id", "redundancy_measurements", ["job_id"])


def downgrade() -> None:
    op.drop_table("redundancy_measurements")
    op.drop_table("plans")
    op.drop_table("model_names")
    op.drop_table("latency_profiles")
    op.drop_table("job_stages")
    op.drop_table("job_events")
    op.drop_table("job_counters")
    op.drop_table("evaluations")
    op.drop_table("tasks")
    op.drop_table("models")
    op.drop_table("jobs")
    op.drop_table("devices")
