"""Training of the bundled reference models: ``PYTHONPATH=tests python -m reference_training.train``."""
