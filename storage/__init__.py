"""What remembers: schema, migrations, job queue, measurements, plans and their queries."""
