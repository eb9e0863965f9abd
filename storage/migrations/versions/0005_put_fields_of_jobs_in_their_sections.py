"""Put fields of stored jobs where job files have them today."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOVED = {"latency_precision": ("latency", "precision"), "latency_seconds": ("latency", "max_seconds")}
"""Fields of a job, with the section and the name that they have today."""


def upgrade() -> None:
    jobs = sa.table("jobs", sa.column("id"), sa.column("spec", sa.JSON()))
    connection = op.get_bind()
    for job, spec in connection.execute(sa.select(jobs.c.id, jobs.c.spec)).all():
        moved = {name: value for name, value in spec.items() if name not in MOVED}
        for name, (section, field) in MOVED.items():
            if name in spec:
                moved[section] = moved.get(section, {}) | {field: spec[name]}
        if moved != spec:
            connection.execute(sa.update(jobs).where(jobs.c.id == job).values(spec=moved))
