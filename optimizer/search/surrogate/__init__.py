"""The project's own sampler, in Optuna's interface: a Bayesian surrogate over single and pair terms of the plan."""
