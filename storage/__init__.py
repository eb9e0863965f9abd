"""The database: schema, migrations, job queue, measurements, plans and their queries."""
