"""`python -m bacon_fast.reproduce TABLE`: a table of the literature run again, ours beside the published numbers."""
