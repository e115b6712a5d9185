"""Trains a model: `python train.py [PRESET] [--option value ...]`; see `python train.py --help`."""

from bacon_fast.cli import train

if __name__ == "__main__":
    train()
