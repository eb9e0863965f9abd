"""Run migrations for Alembic, on the connection and in the transaction that ``storage.migration`` opened."""

from alembic import context

from storage.connection import VERSION_TABLE

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations with: skipplan db upgrade")
context.configure(connection=connection, version_table=VERSION_TABLE, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
