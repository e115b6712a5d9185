"""A small set of pictures for trying pretrained backbones: emoji of two vendors, nine classes, few labels.

    npm pack emoji-datasource-google@15.1.2 emoji-datasource-twitter@15.1.2
    python -m benchmarks.emoji.images --packages . --out DIR

The pictures are Noto Emoji (Apache License 2.0) and Twemoji (CC-BY 4.0), 64 x 64 pixels, on white. They are drawings
and not photos: what they show is that weights, classes and labels work together, not how well a method does on photos.

DIR gets images/ and, for each seed, train-seedN.csv (40 labels in the largest class, 4 in the smallest; the rest have
none, and are as imbalanced as emoji are) and test.csv (20 emoji a class, two pictures each). No emoji is in both parts.
"""

import argparse
import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

VENDORS = ("google", "twitter")
CLASSES = {
    "People & Body": "people",
    "Flags": "flags",
    "Objects": "objects",
    "Symbols": "symbols",
    "Travel & Places": "travel",
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Activities": "activities",
}
LABELS = (40, 30, 22, 17, 13, 9, 7, 5, 4)
TEST_EMOJI = 20


def unpack(package: Path, vendor: str, out: Path) -> dict[str, list[str]]:
    """Writes the vendor's pictures on white; returns the names of each class's emoji that both vendors draw."""
    with tarfile.open(package) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
        for entry in entries:
            if not _is_used(entry):
                continue
            data = archive.extractfile(f"package/img/{vendor}/64/{entry['image']}").read()
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            Image.alpha_composite(white, picture).convert("RGB").save(out / f"{vendor}-{entry['image']}")
    names = {name: [] for name in CLASSES.values()}
    for entry in filter(_is_used, entries):
        names[CLASSES[entry["category"]]].append(entry["image"])
    return {name: sorted(images) for name, images in names.items()}


def _is_used(entry: dict) -> bool:
    return entry["category"] in CLASSES and all(entry[f"has_img_{vendor}"] for vendor in VENDORS)


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image_path", "label"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with the two .tgz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    images = arguments.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    found = []
    for vendor in VENDORS:
        (package,) = arguments.packages.glob(f"emoji-datasource-{vendor}-*.tgz")
        found.append(unpack(package, vendor, images))
    names, other = found
    if names != other:
        raise ValueError("packages: expected two of one version, found different emoji in them")
    order = {name: np.random.default_rng(0).permutation(members).tolist() for name, members in names.items()}
    test = {name: members[:TEST_EMOJI] for name, members in order.items()}
    rows = [(f"images/{v}-{image}", name) for name, members in test.items() for image in members for v in VENDORS]
    write_csv(arguments.out / "test.csv", rows)
    for seed in range(arguments.seeds):
        generator = np.random.default_rng([1, seed])
        rows = []
        for (name, members), labels in zip(order.items(), LABELS):
            pictures = [f"images/{v}-{image}" for image in members[TEST_EMOJI:] for v in VENDORS]
            labeled = set(generator.permutation(len(pictures))[:labels].tolist())
            rows += [(picture, name if i in labeled else "") for i, picture in enumerate(pictures)]
        write_csv(arguments.out / f"train-seed{seed}.csv", rows)


if __name__ == "__main__":
    main()
