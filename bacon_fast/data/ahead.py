"""Image files for prediction, decoded in chunks: the next one is decoded while the caller works on the one before."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bacon_fast.data.images import Interpolation, decode

CHUNK = 128
"""Files a chunk."""


class Stored(NamedTuple):
    """How images are resized: to H x W, by what."""

    height: int
    width: int
    interpolation: Interpolation = "bilinear"


class Chunk(NamedTuple):
    """Files, in order, and what is in them.

    images: uint8 [n,H,W,3] for each `Stored` that was asked for; black for a file that cannot be decoded.
    failed: name and reason of each such file by its index.
    """

    files: Sequence[Path]
    images: dict[Stored, Tensor]
    failed: dict[int, str]


def read_ahead(
    files: Sequence[Path], kinds: Sequence[Stored], done: Callable[[], object] = lambda: None
) -> Iterator[Chunk]:
    """All files in order, decoded in threads and resized in each of the ways. `done` is called after each file."""

    def read(start: int) -> Chunk:
        part = files[start : start + CHUNK]
        images, failed = {}, {}
        for number, kind in enumerate(dict.fromkeys(kinds)):
            rows = np.zeros((len(part), kind.height, kind.width, 3), dtype=np.uint8)
            failed |= decode(part, rows, kind.interpolation, done=(lambda: None) if number else done)
            images[kind] = torch.from_numpy(rows)
        return Chunk(part, images, failed)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(CHUNK, len(files) + CHUNK, CHUNK):
            chunk = ahead.result()
            if start < len(files):
                ahead = reader.submit(read, start)
            yield chunk
