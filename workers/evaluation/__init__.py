"""Evaluation of plans: plain, the reference, and shared, which is held to it."""
