"""Models: checkpoints, loading, prompts and processor inputs."""
