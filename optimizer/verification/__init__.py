"""Held-out judgement of plans and the statistics behind it."""
