"""Give every concept one word: columns, fields of stored jobs, and fields of what stages and plans hold as JSON."""

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Both engines rename and drop such columns in place, with the indexes and constraints they are part of.
COLUMNS = {
    "tasks": {"data_hash": "task_hash"},
    "latency_profiles": {"dense_seconds": "dense_latency_seconds"},
    "evaluations": {"rung": "n_samples", "artefact": "artifact", "artefact_checksum": "artifact_checksum"},
    "plans": {
        "n": "n_samples",
        "seconds": "latency_seconds",
        "dense_seconds": "dense_latency_seconds",
        "artefact": "artifact",
        "artefact_checksum": "artifact_checksum",
    },
}

SPEC = {"scoring_samples": "redundancy_samples", "artefacts": "artifacts"}
"""Fields of a job; one in a section is written with a dot."""

SPEC_REMOVED: tuple[str, ...] = ("search.measured_pairs", "compensation.bias")
"""Fields of a job that are no more, written the same way."""

SECONDARY = {"plain": "plain_share", "n": "n_samples"}
"""Keys anywhere in the secondary figures of a published plan."""

PAYLOADS = {"search": {"tried": "trials"}}
"""By stage, keys anywhere in what a finished job recorded of it, where today's code reads them of old jobs."""

# Their recorded stages have another form today: what evaluations and plans hold of them is enough to begin anew.
UNFINISHED = "SELECT id FROM jobs WHERE state NOT IN ('succeeded', 'infeasible')"


def upgrade() -> None:
    _count_samples()
    for table, columns in COLUMNS.items():
        for old, new in columns.items():
            op.alter_column(table, old, new_column_name=new)
    op.drop_column("evaluations", "n")
    op.drop_column("devices", "details")
    # Those jobs begin their stages anew; what they evaluated stays, and is not run again.
    op.execute(f"DELETE FROM job_stages WHERE job_id IN ({UNFINISHED})")
    op.execute("UPDATE job_stages SET stage = 'redundancy' WHERE stage = 'score'")
    op.execute("UPDATE job_events SET message = 'redundancy' WHERE kind = 'stage_finished' AND message = 'score'")
    op.execute(
        "UPDATE job_counters SET name = 'redundancy_passes_' || substr(name, 16) WHERE name LIKE 'scoring_passes_%'"
    )
    _rewrite("jobs", ("id",), "spec", lambda _, spec: _renamed_fields(spec))
    _rewrite("plans", ("id",), "secondary", lambda _, value: _renamed_keys(value, SECONDARY))
    _rewrite(
        "job_stages",
        ("job_id", "stage"),
        "payload",
        lambda row, value: _renamed_keys(value, PAYLOADS.get(row.stage, {})),
    )


def _count_samples() -> None:
    """Let ``rung`` be the number of samples, which ``n`` was for scores; of rows that then are one, keep the first."""
    connection = op.get_bind()
    twice = connection.execute(
        sa.text(
            "SELECT later.id FROM evaluations later JOIN evaluations first ON first.job_id = later.job_id "
            "AND first.plan = later.plan AND first.compensation = later.compensation AND first.split = later.split "
            "AND CASE WHEN first.failure IS NULL THEN first.n ELSE first.rung END "
            "  = CASE WHEN later.failure IS NULL THEN later.n ELSE later.rung END "
            "AND (first.failure IS NULL AND later.failure IS NOT NULL "
            "  OR (first.failure IS NULL) = (later.failure IS NULL) AND first.id < later.id)"
        )
    )
    for (evaluation,) in set(twice):
        connection.execute(
            sa.text("UPDATE evaluations SET reused_from = NULL WHERE reused_from = :id"), {"id": evaluation}
        )
        connection.execute(sa.text("DELETE FROM evaluations WHERE id = :id"), {"id": evaluation})
    # In two steps, since the numbers of a plan must not meet on the way.
    op.execute("UPDATE evaluations SET rung = -1 - n WHERE failure IS NULL AND rung <> n")
    op.execute("UPDATE evaluations SET rung = -1 - rung WHERE rung < 0")


def _rewrite(table: str, key: tuple[str, ...], column: str, change: Callable[[Any, Any], Any]) -> None:
    """Replace the JSON of a column, row by row, where ``change`` gives another value."""
    rows = sa.table(table, *map(sa.column, key), sa.column(column, sa.JSON()))
    connection = op.get_bind()
    for row in connection.execute(sa.select(rows)).all():
        old = getattr(row, column)
        new = change(row, old)
        if new != old:
            same = [rows.c[name] == getattr(row, name) for name in key]
            connection.execute(sa.update(rows).where(*same).values({column: new}))


def _renamed_fields(spec: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return the fields of a job under today's names, at their place."""
    return {
        SPEC.get(section + name, section + name).rpartition(".")[2]: (
            _renamed_fields(value, f"{section}{name}.") if isinstance(value, dict) else value
        )
        for name, value in spec.items()
        if section + name not in SPEC_REMOVED
    }


def _renamed_keys(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed_keys(each, names) for key, each in value.items()}
    return [_renamed_keys(each, names) for each in value] if isinstance(value, list) else value
