"""Serve the live model under a plan in an engine: as a checkpoint, asked a task's samples, timed beside dense."""
