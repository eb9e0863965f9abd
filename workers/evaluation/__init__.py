"""Plain evaluation, the reference that the engine is held to."""
