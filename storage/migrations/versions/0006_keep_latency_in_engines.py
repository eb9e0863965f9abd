"""Keep what engines took to serve published plans."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

RATIOS = ("speedup", "speedup_low", "speedup_high")
TIMES = ("first_token_seconds", "latency_seconds", "requests_per_second")


def upgrade() -> None:
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "engine_latencies",
        sa.Column("id", big, nullable=False),
        sa.Column("plan_id", big, nullable=False),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=False) for name in RATIOS),
        *(sa.Column(f"{side}{name}", sa.Double(), nullable=False) for name in TIMES for side in ("", "dense_")),
        *(sa.Column(f"{side}seconds_per_token", sa.Double(), nullable=True) for side in ("", "dense_")),
        sa.Column("kv_cache_bytes", big, nullable=True),
        *(sa.Column(f"{side}kv_cache_tokens", big, nullable=True) for side in ("", "dense_")),
        sa.Column("measured_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["plan_id"], ["plans.id"], name=op.f("fk_engine_latencies_plan_id_plans"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_engine_latencies")),
        sa.UniqueConstraint("plan_id", "engine", "version", "concurrency", name=op.f("uq_engine_latencies_plan_id")),
    )
