"""Give fields of stored jobs the places and names that job files have today."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MOVED = {"latency_precision": ("latency", "precision"), "latency_seconds": ("latency", "max_seconds")}
"""Fields of a job, with the section and the name that they have today."""

RENAMED = {"evaluations": "trials", "latency": "latency_model"}
"""Fields of the section ``search``."""

LATENCY_MODELS = {"measured": "profile"}
"""Values of ``search.latency_model`` that have another name today."""


def upgrade() -> None:
    jobs = sa.table("jobs", sa.column("id"), sa.column("spec", sa.JSON()))
    connection = op.get_bind()
    for job, spec in connection.execute(sa.select(jobs.c.id, jobs.c.spec)).all():
        moved = {name: value for name, value in spec.items() if name not in MOVED}
        for name, (section, field) in MOVED.items():
            if name in spec:
                moved[section] = moved.get(section, {}) | {field: spec[name]}
        if "search" in spec:
            search = {RENAMED.get(name, name): value for name, value in spec["search"].items()}
            if "latency_model" in search:
                search["latency_model"] = LATENCY_MODELS.get(search["latency_model"], search["latency_model"])
            moved["search"] = search
        if moved != spec:
            connection.execute(sa.update(jobs).where(jobs.c.id == job).values(spec=moved))
