"""Ways to search: the project's own sampler, Optuna's, and the published methods, each in its own file."""
