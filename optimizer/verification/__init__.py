"""Held-out verification: which plans are verified, and whether they are within the constraint."""
