"""Images in a mapped file: the same dataset, the same batches, decoded once."""

import dataclasses
import errno
import fcntl
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bacon_fast.data import image_cache
from bacon_fast.data.datasets import load_dataset
from bacon_fast.data.image_cache import mapped_files
from bacon_fast.data.longtail import PROTOCOLS, make_split
from bacon_fast.data.pool import HostPool, Window, resident
from bacon_fast.engine import build
from bacon_fast.engine.batches import Batches
from bacon_fast.engine.config import Config
from bacon_fast.engine.groups import DataOptions

CPU = torch.device("cpu")


def write_folder(root, per_class: int = 5) -> None:
    generator = np.random.default_rng(0)
    for part, classes in (("train", ("ant", "bee")), ("test", ("ant", "bee")), ("unlabeled", ("",))):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(generator.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(folder / f"{i}.bmp")


def load(root, **changes):
    return load_dataset("folder", data_dir=root, **({"image_size": 8, "images": "mapped"} | changes))


def test_it_is_the_dataset_that_memory_would_hold(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(image_cache, "CHUNK", 4)  # parts that end inside a chunk
    memory, mapped = load(tmp_path, images="memory"), load(tmp_path)
    for name in ("train_images", "train_labels", "test_images", "test_labels", "unlabeled_images"):
        assert torch.equal(getattr(mapped, name), getattr(memory, name)), name
    assert torch.equal(mapped.pool(), torch.cat([memory.train_images, memory.unlabeled_images]))
    assert mapped.fingerprint == memory.fingerprint, "a split of one fits the other"
    make_split(memory, PROTOCOLS["as-is"], 0).verify(mapped)


def test_each_interpolation_has_a_file_of_its_own(tmp_path):
    write_folder(tmp_path)
    for how in ("bicubic", "bilinear"):
        memory, mapped = (load(tmp_path, images=images, interpolation=how) for images in ("memory", "mapped"))
        assert torch.equal(mapped.train_images, memory.train_images)
        whole = Image.open(tmp_path / "train" / "ant" / "0.bmp").resize((8, 8), Image.Resampling[how.upper()])
        assert np.array_equal(memory.train_images[0], np.asarray(whole))
    assert len(list((tmp_path / ".bacon_fast").glob("*.images"))) == 2


def test_the_pool_is_not_copied(tmp_path):
    write_folder(tmp_path)
    for dataset in (load(tmp_path), load(tmp_path, images="memory")):
        assert dataset.pool().data_ptr() == dataset.train_images.data_ptr()
        assert dataset.pool().shape == (15, 8, 8, 3)
    for unlabeled in (dataset.unlabeled_images.clone(), dataset.test_images):  # elsewhere, or not right behind
        separate = dataclasses.replace(dataset, unlabeled_images=unlabeled)
        assert torch.equal(separate.pool(), torch.cat([dataset.train_images, unlabeled]))
        assert separate.pool().data_ptr() != dataset.pool().data_ptr()


def test_files_are_decoded_once_and_again_when_one_changes(tmp_path, monkeypatch):
    write_folder(tmp_path)
    decoded = []
    decode = image_cache.decode
    monkeypatch.setattr(
        image_cache, "decode", lambda files, *a, **k: decoded.append(len(files)) or decode(files, *a, **k)
    )
    first = load(tmp_path)
    assert decoded == [25]
    again = load(tmp_path)
    assert decoded == [25] and torch.equal(first.train_images, again.train_images)
    image = tmp_path / "train" / "ant" / "0.bmp"
    status = image.stat()
    Image.fromarray(np.zeros((9, 11, 3), dtype=np.uint8)).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert image.stat().st_size == status.st_size, "only the time of change tells"
    assert load(tmp_path).train_images[0].sum() == 0 and decoded == [25, 25]
    load(tmp_path, image_size=6)
    assert decoded == [25, 25, 25]


def cut(data: bytearray) -> bytearray:
    return data[:9]


def zeroed(data: bytearray) -> bytearray:
    return bytearray(len(data))


def flipped(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 8
    return data


def swapped(data: bytearray) -> bytearray:
    return data[192:384] + data[:192] + data[384:]  # the first two images


@pytest.mark.parametrize("damage", [cut, zeroed, flipped, swapped])
@pytest.mark.parametrize("suffix", ["images", "fingerprint"])
def test_a_damaged_file_is_named_and_made_again(tmp_path, monkeypatch, damage, suffix):
    write_folder(tmp_path)
    monkeypatch.setattr(image_cache, "_BLOCK", 100)  # several, and none of them an image
    first = load(tmp_path)
    expected, fingerprint = first.pool().clone(), first.fingerprint
    (file,) = (tmp_path / ".bacon_fast").glob(f"*.{suffix}")
    whole = file.read_bytes()
    file.write_bytes(damage(bytearray(whole)))
    if damage is swapped and suffix == "fingerprint":  # a sound one, of other images
        image_cache.remember(file.with_name("0123.fingerprint"), "0" * 64)
        file.with_name("0123.fingerprint").replace(file)
    with pytest.warns(UserWarning, match=rf"{file}: damaged"):
        again = load(tmp_path)
    assert torch.equal(again.pool(), expected) and again.fingerprint == fingerprint
    assert file.read_bytes() == whole


def test_every_bit_of_the_cached_files_is_checked(tmp_path):
    """200 random flips: none is used in silence."""
    write_folder(tmp_path)
    load(tmp_path)
    generator = np.random.default_rng(0)
    for file in (*(tmp_path / ".bacon_fast").glob("*.images"), *(tmp_path / ".bacon_fast").glob("*.fingerprint")):
        whole = file.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            data[generator.integers(len(data))] ^= 1 << generator.integers(8)
            file.write_bytes(data)
            with pytest.warns(UserWarning, match=rf"{file}: damaged"):
                load(tmp_path)
            assert file.read_bytes() == whole


def test_new_pixels_get_a_new_fingerprint(tmp_path, monkeypatch):
    """As when another version of Pillow decodes them."""
    write_folder(tmp_path)
    first = load(tmp_path)
    (file,) = (tmp_path / ".bacon_fast").glob("*.images")
    file.unlink()
    decode = image_cache.decode

    def inverted(files, rows, **options):
        failed = decode(files, rows, **options)
        rows[:] = 255 - rows
        return failed

    monkeypatch.setattr(image_cache, "decode", inverted)
    assert load(tmp_path).fingerprint != first.fingerprint


def test_the_fingerprint_is_computed_once(tmp_path, monkeypatch):
    write_folder(tmp_path)
    expected = load(tmp_path).fingerprint
    monkeypatch.setattr("bacon_fast.data.datasets.ImageDataset._fingerprint", lambda self: pytest.fail("read again"))
    assert load(tmp_path).fingerprint == expected
    names = {p.suffix or p.name for p in (tmp_path / ".bacon_fast").iterdir()}
    assert names == {".lock", ".fingerprint", ".images"}


def test_any_file_name_will_do(tmp_path):
    write_folder(tmp_path)
    image = tmp_path / "train" / "ant" / "0.bmp"
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/\xff\xfe.bmp"))  # no UTF-8
    assert torch.equal(load(tmp_path).train_images, load(tmp_path, images="memory").train_images)


def test_unreadable_files_of_all_chunks_are_named_and_leave_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(image_cache, "CHUNK", 4)
    for name in ("train/ant/3.bmp", "train/bee/4.bmp", "unlabeled/0.bmp"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)3 image files cannot be read.*ant/3\.bmp.*bee/4\.bmp.*unlabeled/0\.bmp"):
        load(tmp_path, unreadable="error")
    assert [p.name for p in (tmp_path / ".bacon_fast").iterdir()] == [".lock"]


@pytest.mark.parametrize("chunk", [4, 1024])
def test_unreadable_unlabeled_files_are_left_out_now_and_later(tmp_path, monkeypatch, chunk):
    write_folder(tmp_path)
    monkeypatch.setattr(image_cache, "CHUNK", chunk)
    whole = load(tmp_path, images="memory").unlabeled_images
    for i in (1, 4):
        (tmp_path / "unlabeled" / f"{i}.bmp").write_bytes(b"")
    warning = r"2 of 5 unlabeled images cannot be read and are left out: .*/1\.bmp \(.*; .*/4\.bmp \("
    for images in ("memory", "mapped", "mapped"):
        with pytest.warns(UserWarning, match=warning) as warned:
            dataset = load(tmp_path, images=images)
        assert len(warned) == 1 and torch.equal(dataset.unlabeled_images, whole[[0, 2, 3]])
        assert dataset.pool_size == 13 and len(dataset.test_images) == 10
    with pytest.raises(ValueError, match=r"(?s)^2 image files cannot be read:.*1\.bmp.*4\.bmp"):
        load(tmp_path, unreadable="error")
    (notes,) = (tmp_path / ".bacon_fast").glob("*.unreadable")
    notes.write_bytes(flipped(bytearray(notes.read_bytes())))
    with pytest.warns(UserWarning, match=r"damaged, decoding the images again"):
        assert torch.equal(load(tmp_path).unlabeled_images, whole[[0, 2, 3]])


def test_auto_maps_what_is_above_the_limit(tmp_path):
    write_folder(tmp_path)
    size = 25 * 8 * 8 * 3
    assert not load(tmp_path, images="auto", most_in_memory=size).mapped
    assert not load(tmp_path, images="auto").mapped and not (tmp_path / ".bacon_fast").exists()
    mapped = load(tmp_path, images="auto", most_in_memory=size - 1)
    assert mapped.mapped and torch.equal(mapped.pool(), load(tmp_path, images="memory").pool())


def test_auto_is_a_quarter_of_memory_and_half_of_the_gpu(monkeypatch):
    monkeypatch.setattr(build, "physical_memory", lambda: 8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=3 << 30))
    assert build._most_in_memory(CPU) == 2 << 30
    assert build._most_in_memory(torch.device("cuda")) == 3 << 29
    monkeypatch.setattr(build, "physical_memory", lambda: None)
    assert build._most_in_memory(CPU) is None


def test_what_a_killed_writer_left_is_removed(tmp_path):
    write_folder(tmp_path)
    kept, left = (tmp_path / ".bacon_fast" / name for name in ("0123.images", ".0123.images.4567.tmp"))
    kept.parent.mkdir()
    kept.touch()
    left.touch()
    load(tmp_path)
    assert kept.exists() and not left.exists()
    for name in (".0123.images.4567.tmp", ".0123.fingerprint.4567.tmp"):
        kept.with_name(name).touch()
    with open(kept.with_name(".lock"), "ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # one at work needs its file
        load(tmp_path)
    assert len(list(kept.parent.glob(".*.tmp"))) == 2
    load(tmp_path)  # which finds its images and writes nothing
    assert not list(kept.parent.glob(".*.tmp"))


def test_a_second_writer_waits_for_the_first(tmp_path, monkeypatch):
    write_folder(tmp_path)
    expected = load(tmp_path).train_images.clone()
    (file,) = (tmp_path / ".bacon_fast").glob("*.images")
    unfinished = file.rename(file.with_name(f".{file.name}.1.tmp"))
    monkeypatch.setattr(image_cache, "_decode", lambda *_: pytest.fail("decoded again"))
    flock = fcntl.flock

    def finish_and_lock(lock, operation):
        if operation == fcntl.LOCK_EX:  # waits
            unfinished.rename(file)
            flock(first, fcntl.LOCK_UN)
        flock(lock, operation)

    with open(tmp_path / ".bacon_fast" / ".lock", "ab") as first:
        flock(first, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", finish_and_lock)
        with pytest.warns(UserWarning, match=rf"{tmp_path}/\.bacon_fast: waiting for another process"):
            assert torch.equal(load(tmp_path).train_images, expected)


def test_without_locks_everyone_writes_and_removes_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path)

    def unsupported(lock, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    other = tmp_path / ".bacon_fast" / ".0123.images.1.tmp"
    other.parent.mkdir()
    other.touch()
    assert torch.equal(load(tmp_path).train_images, load(tmp_path, images="memory").train_images) and other.exists()


def test_a_file_larger_than_memory_is_mapped(tmp_path, monkeypatch):
    (tmp_path / "0.bmp").touch()
    meminfo = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    memory = 1024 * (int(meminfo["MemTotal:"]) + int(meminfo["SwapTotal:"]))
    size = math.isqrt(2 * memory // 3)

    def write(files, size, path, optional, interpolation):
        with open(path, "wb") as sparse:
            sparse.truncate(len(files) * size * size * 3)
            sparse.seek(-1, os.SEEK_END)
            sparse.write(b"\x07")

    monkeypatch.setattr(image_cache, "_decode", write)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _, _ = mapped_files(tmp_path, [tmp_path / "0.bmp"], size)
    assert images.nbytes > 1.9 * memory and images[0, -1, -1].tolist() == [0, 0, 7]


@pytest.mark.parametrize(("name", "size"), [("digits", 16), ("folder", None)])
def test_only_folders_with_a_size_can_be_mapped(tmp_path, name, size):
    with pytest.raises(ValueError, match="images: expected dataset folder and an image size"):
        load_dataset(name, data_dir=tmp_path, image_size=size, images="mapped")


def test_more_images_than_memory_are_refused_before_decoding(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr("bacon_fast.data.sources.read_readable", lambda *_: pytest.fail("decoded"))
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 9 if name == "SC_PHYS_PAGES" else sysconf(name))
    with pytest.raises(ValueError, match=r"images: 25 images at 224x224 need .* GB .*--images mapped"):
        load(tmp_path, images="memory", image_size=224)


def test_more_images_than_a_gpu_holds_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    with pytest.raises(ValueError, match=r"images: .* do not fit .*--images mapped"):
        resident(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.device("cuda"))
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    assert resident(images, CPU) is images


def test_window_holds_the_rows_of_the_step_at_a_fixed_address():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3)
    pool = HostPool(images, CPU)
    assert len(pool) == 6 and pool.shape == (6, 2, 2, 3) and pool[torch.tensor([5, 0])][:, 0, 0, 0].tolist() == [5, 0]
    window = Window(pool, 3)
    address = window.images.data_ptr()
    for step, rows in enumerate(([0, 5, 2], [1, 1, 4], [3, 2, 0])):
        window.load(torch.tensor(rows), step)
        assert window.images[:, 1, 1, 2].tolist() == rows and window.images.data_ptr() == address


@pytest.mark.parametrize("views", [("weak", "strong", "strong"), ()])
def test_batches_are_those_of_resident_images(tmp_path, views):
    write_folder(tmp_path)
    data = {"dataset": "folder", "data_dir": tmp_path, "image_size": 8, "protocol": "as-is"}
    config = Config.of("fixmatch", {"data": data, "views": {"batch_size": 3}})
    built = []
    for images in ("memory", "mapped"):
        dataset = load(tmp_path, images=images)
        split = make_split(dataset, PROTOCOLS["as-is"], 0)
        every = {"balanced_view": True, "labeled_strong_view": True}
        built.append(Batches(config.replace(images=images), split, dataset, CPU, views, **every))
    for step in range(12):  # several epochs
        if step == 8:  # another labeled set, as CReST has
            for batches in built:
                batches.set_labeled(torch.tensor([7, 1, 12, 3]), torch.tensor([1, 0, 1, 0]))
        for batches in built:
            batches.prepare(step)
        one, two = (batches.batch(torch.tensor(step)) for batches in built)
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert built[0].window is None and isinstance(built[1].pool, HostPool)


def test_configuration_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="images: expected auto or memory, except for dataset folder"):
        DataOptions(images="mapped")
    with pytest.raises(ValueError, match="image_size: expected a side in pixels"):
        DataOptions(images="mapped", dataset="folder", protocol="as-is", data_dir=tmp_path)
