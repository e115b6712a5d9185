"""Class balancers that act on pseudo-labels, one file each (methods.md H); `base.py` is what they share."""
