"""The device of a worker: lock, memory, arithmetic."""
