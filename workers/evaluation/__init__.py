"""Plain evaluation, the reference that the shared evaluation is held to."""
