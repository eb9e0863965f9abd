"""Share, measure and judge a worker's device: lock, memory, arithmetic."""
