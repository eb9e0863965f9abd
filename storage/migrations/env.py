"""What Alembic runs for every command: on the connection, and in the transaction, that ``storage.migration`` opened."""

from typing import Any, Literal

from alembic import context

from storage.migration import COMPARE_OPTIONS


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Write our column types as what they are in the database: migrations must not change when the types do."""
    if kind == "type" and type(item).__module__ == "storage.types":
        return f"sa.{item.impl!r}"
    return False


connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations with: skipplan db upgrade")
context.configure(
    connection=connection, render_as_batch=True, transactional_ddl=True, render_item=render_item, **COMPARE_OPTIONS
)
with context.begin_transaction():
    context.run_migrations()
