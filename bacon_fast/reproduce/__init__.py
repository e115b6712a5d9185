"""`bacon-fast reproduce TABLE`: runs a table of the literature again, and shows ours beside the published."""
