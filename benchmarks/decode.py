"""Images a second of decoding large JPEGs: Pillow as loaders use it, and `read_files`, which decodes them reduced.

    python -m benchmarks.decode

Generated JPEGs of 1600 x 1200 pixels, quality 90, resized to 256 x 256, on one thread. The arms take turns, and a ratio
is the median of the rounds' ratios. Before, the results are compared: they differ by resampling only.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bacon_fast.data.images import read_files
from benchmarks.common import (
    RESULTS,
    append_csv,
    median_ratio,
    package_version,
    print_table,
    provenance,
    quantile,
    time_interleaved,
)

WIDTH, HEIGHT, COUNT = 1600, 1200, 12


def write_jpegs(folder: Path) -> list[Path]:
    """Pictures that are smooth with some noise, as photographs are."""
    generator, files = np.random.default_rng(0), []
    for i in range(COUNT):
        smooth = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(smooth.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float32)
        noisy = pixels + generator.normal(0, 6, pixels.shape)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def pillow(files: list[Path], size: int) -> np.ndarray:
    """Each image whole, then resized."""
    images = [Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR) for file in files]
    return np.stack([np.asarray(image) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side in pixels to resize to")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_cpu.csv", help="CSV file to append to")
    arguments = parser.parse_args()
    size = arguments.size
    torch.set_num_threads(1)  # for the row
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # `read_files` takes a thread a usable core
    with tempfile.TemporaryDirectory() as folder:
        files = write_jpegs(Path(folder))
        difference = np.abs(read_files(files, size).numpy().astype(int) - pillow(files, size)).mean()
        if difference > 3:
            raise SystemExit(f"the images differ by {difference:.1f} levels on average")
        arms = {"pillow": lambda: pillow(files, size), "read_files": lambda: read_files(files, size)}
        samples = time_interleaved(arms, "cpu", rounds=arguments.rounds)
    rows = []
    for name, seconds in samples.items():
        low, median, high = (quantile(seconds, share) * 1e3 / COUNT for share in (0.25, 0.5, 0.75))
        rows.append(
            provenance("cpu")
            | {"pillow": package_version("pillow"), "source": f"{WIDTH}x{HEIGHT}", "size": size, "arm": name}
            | {"images": COUNT, "rounds": arguments.rounds, "mean_difference": round(float(difference), 2)}
            | {"median_ms_an_image": round(median, 2), "q25_ms": round(low, 2), "q75_ms": round(high, 2)}
            | {"times_as_fast": round(median_ratio(samples["pillow"], seconds), 2), "baseline": "pillow"}
        )
    columns = ("arm", "median_ms_an_image", "q25_ms", "q75_ms", "times_as_fast")
    print_table(columns, [[str(row[column]) for column in columns] for row in rows])
    append_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
