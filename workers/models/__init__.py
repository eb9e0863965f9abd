"""Find, check and load models, and turn samples into their inputs."""
