"""The job queue: jobs, their attempts, events and stages."""
