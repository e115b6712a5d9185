"""Files are written whole or not at all."""

import os

import pytest

from bacon_fast.files import write_atomically


def test_the_file_is_replaced_and_its_folder_made(tmp_path):
    target, seen = tmp_path / "folder" / "file", []
    write_atomically(target, lambda temporary: temporary.write_text("old"))

    def write(temporary):
        temporary.write_text("new")
        seen.append(target.read_text())

    write_atomically(target, write)
    assert seen == ["old"] and target.read_text() == "new"
    assert os.listdir(target.parent) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail_half_way(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail_half_way)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
