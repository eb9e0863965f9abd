"""Tiny random-weight models of many families, and independent references to hold the runtime against."""
