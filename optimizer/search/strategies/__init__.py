"""Strategies of a search: samplers, published methods, and bisection of nested chains before a sampler."""
