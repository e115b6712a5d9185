"""Trains a model: `python train.py [PRESET] [--option value ...]`, the same as `bacon-fast train`; see its --help."""

from bacon_fast.cli import train

if __name__ == "__main__":
    train()
