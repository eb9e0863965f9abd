"""Build the reference models that do not ship as checkpoints."""
