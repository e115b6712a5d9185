"""benchmarks/emoji on two packages made here: no emoji in both parts, labels, white ground."""

import csv
import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from benchmarks.emoji import images as emoji_images


def pack(folder, vendor: str, emoji: int) -> None:
    """A package of the vendor's, `emoji` a class, and one that the other vendor does not draw."""
    entries = [
        {"category": category, "image": f"{c}{i:03}.png", "has_img_google": True, "has_img_twitter": i > 0}
        for c, category in enumerate([*emoji_images.CLASSES, "Component"])
        for i in range(emoji + 1)
    ]
    with tarfile.open(folder / f"emoji-datasource-{vendor}-1.0.0.tgz", "w:gz") as archive:
        files = {"emoji.json": json.dumps(entries).encode()}
        for entry in entries:
            picture = io.BytesIO()
            Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(picture, "PNG")  # nothing is drawn
            files[f"img/{vendor}/64/{entry['image']}"] = picture.getvalue()
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def made(tmp_path, monkeypatch):
    for vendor in emoji_images.VENDORS:
        pack(tmp_path, vendor, emoji=45)
    out = tmp_path / "set"
    monkeypatch.setattr(sys, "argv", ["emoji_images", "--packages", str(tmp_path), "--out", str(out), "--seeds", "2"])
    emoji_images.main()
    return out


def test_the_parts_share_no_emoji_and_the_labels_are_counted(made):
    test = read(made / "test.csv")
    names = list(emoji_images.CLASSES.values())
    assert [sum(row["label"] == name for row in test) for name in names] == [2 * emoji_images.TEST_EMOJI] * 9
    emoji = [{row["image_path"].rsplit("-", 1)[1] for row in rows} for rows in (test, read(made / "train-seed0.csv"))]
    assert not emoji[0] & emoji[1] and len(emoji[0] | emoji[1]) == 9 * 45
    labeled = []
    for seed in range(2):
        rows = read(made / f"train-seed{seed}.csv")
        assert len(rows) == 9 * 2 * (45 - emoji_images.TEST_EMOJI)
        assert tuple(sum(row["label"] == name for row in rows) for name in names) == emoji_images.LABELS
        labeled.append([row["image_path"] for row in rows if row["label"]])
    assert labeled[0] != labeled[1]


def test_pictures_are_on_white(made):
    path = made / read(made / "test.csv")[0]["image_path"]
    with Image.open(path) as picture:
        assert (picture.mode, picture.size, picture.getextrema()) == ("RGB", (64, 64), ((255, 255),) * 3)
