"""Let a job score the same plan on several tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NAME = "uq_evaluations_job_id"
COLUMNS = ["job_id", "task_id", "plan", "compensation", "split", "n_samples"]


def upgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint(NAME, "evaluations", type_="unique")
        op.create_unique_constraint(NAME, "evaluations", COLUMNS)
        return
    # SQLite makes the table anew, and dropping the old one empties the references of its rows to each other.
    reused = sa.text("SELECT id, reused_from FROM evaluations WHERE reused_from IS NOT NULL")
    rows = [{"row": row.id, "of": row.reused_from} for row in op.get_bind().execute(reused)]
    with op.batch_alter_table("evaluations") as evaluations:
        evaluations.drop_constraint(NAME, type_="unique")
        evaluations.create_unique_constraint(NAME, COLUMNS)
    if rows:
        op.get_bind().execute(sa.text("UPDATE evaluations SET reused_from = :of WHERE id = :row"), rows)
