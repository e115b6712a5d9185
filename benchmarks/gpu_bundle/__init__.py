"""Makes, without a GPU, the files for a GPU machine that is lent for minutes: `python -m benchmarks.gpu_bundle`."""
