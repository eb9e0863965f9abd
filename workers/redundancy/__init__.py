"""Redundancy of decoder layers, measured on the calibration split."""
