"""Latency of requests, layers and plans."""
