"""Decoder layers run one at a time, with shared prefixes."""
