"""Evaluate plans inside lmms-eval, as a model of it: ``--model skipplan``."""
