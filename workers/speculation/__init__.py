"""Time a plan as a drafter beside the dense model, and hold its answers against the dense model's."""
