"""Fitting the guard of a plan: which prompts are like those that the plan was calibrated on."""
