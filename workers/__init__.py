"""What measures: the skip runtime, tasks, evaluation, latency, redundancy, and the Ray workers."""
