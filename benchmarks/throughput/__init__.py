"""Training steps a second of the same step, from the way peers make it to ours: `python -m benchmarks.throughput`."""
