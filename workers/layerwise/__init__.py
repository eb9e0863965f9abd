"""Run decoder layers one at a time, with shared prefixes."""
