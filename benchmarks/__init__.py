"""Measurements: each file is a command, run from the root of the checkout as `python -m benchmarks.NAME`."""
