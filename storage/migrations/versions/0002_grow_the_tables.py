"""Keep what evaluations cost and saved, where compensations lie, and until when a job is to wait."""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True)

# Both engines add and drop such columns in place (SQLite since 3.35), so no table is rebuilt.
ADDED: dict[str, list[Callable[[], sa.Column[Any]]]] = {
    "jobs": [
        lambda: sa.Column("not_before", Time, nullable=True),
    ],
    "evaluations": [
        lambda: sa.Column("kl", sa.LargeBinary(), nullable=True),
        lambda: sa.Column("layer_executions", RowId, server_default="0", nullable=False),
        lambda: sa.Column("layer_executions_saved", RowId, server_default="0", nullable=False),
        lambda: sa.Column("artefact", sa.Text(), nullable=True),
        lambda: sa.Column("artefact_checksum", sa.Text(), nullable=True),
    ],
    "latency_profiles": [
        lambda: sa.Column("phases", sa.JSON(), server_default="{}", nullable=False),
    ],
    "plans": [
        lambda: sa.Column("artefact", sa.Text(), nullable=True),
        lambda: sa.Column("artefact_checksum", sa.Text(), nullable=True),
    ],
}


def upgrade() -> None:
    for table, columns in ADDED.items():
        for column in columns:
            op.add_column(table, column())


def downgrade() -> None:
    for table, columns in reversed(ADDED.items()):
        for column in reversed(columns):
            op.drop_column(table, column().name)
