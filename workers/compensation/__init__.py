"""Compensated skips: linear maps, fitted in closed form, that repair the gap behind skipped layers."""
