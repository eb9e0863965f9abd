"""Strategies of a search: samplers, published methods, and bisection of nested families before a sampler."""
