"""A read-only web page over the database: jobs, plans, models and tasks, reports, and a JSON API."""
