"""Preflight of a job: check its file, data and model, and show samples, without starting workers."""
