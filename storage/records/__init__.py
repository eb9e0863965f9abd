"""Recorded results: evaluations, measurements, plans and their queries."""
