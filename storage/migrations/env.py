"""What Alembic runs for every command: on the connection, and in the transaction, that ``storage.migration`` opened."""

from alembic import context

from storage.migration import COMPARE_OPTIONS

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations with: skipplan db upgrade")
context.configure(connection=connection, render_as_batch=True, transactional_ddl=True, **COMPARE_OPTIONS)
with context.begin_transaction():
    context.run_migrations()
