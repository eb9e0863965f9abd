"""Tell plans that draft for the dense model from those that answer in its place."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

GROUP = ["model_id", "task_id", "device_id", "workload", "mode"]
COMPARED = ["speedup", "accuracy", "difference_low", "latency_seconds", "id"]
INDEXES = {
    "ix_plans_contenders": ["contender", *GROUP, *COMPARED],
    "ix_plans_contenders_anywhere": ["contender", "model_id", "task_id", "mode", *COMPARED],
    "ix_plans_front": ["on_front", *GROUP, *COMPARED],
    "ix_plans_group": [*GROUP, *COMPARED],
    "ix_plans_speedup": ["model_id", "task_id", "mode", "speedup"],
    "ix_plans_accuracy": ["model_id", "task_id", "mode", "accuracy"],
    "ix_plans_fastest": ["mode", "speedup"],
}


def upgrade() -> None:
    op.add_column("plans", sa.Column("mode", sa.Text(), server_default="standalone", nullable=False))
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("plans", sa.Column("extra_bytes", big, nullable=True))
    for name, columns in INDEXES.items():
        op.drop_index(name, table_name="plans")
        op.create_index(name, "plans", columns)
    op.drop_index("uq_plans_imported", table_name="plans")
    imported = sa.text("job_id IS NULL")
    op.create_index(
        "uq_plans_imported",
        "plans",
        [*GROUP, "plan", "compensation"],
        unique=True,
        sqlite_where=imported,
        postgresql_where=imported,
    )
