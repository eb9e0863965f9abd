"""The Ray actor, its pool, and the connection to a cluster."""
