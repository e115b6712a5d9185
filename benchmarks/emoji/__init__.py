"""A worked example with pretrained weights: emoji pictures of nine classes, 40 to 4 labels."""
