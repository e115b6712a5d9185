"""bacon_fast: a fused training engine for class-imbalanced semi-supervised image classification."""

__version__ = "0.1.0"
