"""Held-out verification of plans, and the statistics behind it."""
