"""What travels to a GPU machine that is lent for minutes, made without a GPU: `python -m benchmarks.gpu_bundle`."""
