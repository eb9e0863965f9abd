"""Models, tasks and measurements: skip runtime, evaluation, redundancy, compensation, latency, and the Ray workers."""
