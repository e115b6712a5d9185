"""Training steps a second of one step, written as peers write it and as we do: `python -m benchmarks.throughput`."""
