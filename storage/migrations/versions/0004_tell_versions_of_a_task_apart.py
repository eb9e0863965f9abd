"""Keep of every task what its data and its definition are, and when it was last used, to tell its versions apart."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("data_hash", "definition_hash"):  # empty in old rows: not known
        op.add_column("tasks", sa.Column(name, sa.Text(), server_default="", nullable=False))
    op.add_column("tasks", sa.Column("seen_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE tasks SET seen_at = created_at")
