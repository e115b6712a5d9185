"""Files are written whole or not at all."""

import os

import pytest

from bacon_fast.files import read_record, to_json, write_atomically, write_record


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


def test_a_record_is_read_as_it_was_written(tmp_path):
    values = {"b": [1, 2.5, None, "ä"], "a": {"n": 2**64 - 1, "x": -0.0}}
    write_record(tmp_path / "one.json", values)
    assert read_record(tmp_path / "one.json") == values
    text = (tmp_path / "one.json").read_text()
    (tmp_path / "one.json").write_text(" ".join(text.split()))  # spaces are not content
    assert read_record(tmp_path / "one.json") == values
    (tmp_path / "one.json").write_text(text.replace("2.5", "2.6"))
    with pytest.raises(ValueError, match=r"one\.json: its content does not have the digest in it \(sha256\)"):
        read_record(tmp_path / "one.json")


def test_numbers_that_json_does_not_have_are_named(tmp_path):
    values = {"last": {"bacc": float("nan")}, "recall": [0.5, (1, float("inf"))]}
    with pytest.raises(ValueError, match=r"^not finite: last\.bacc, recall\.1\.1$"):
        to_json(values)
    with pytest.raises(ValueError, match=r"one\.json: not finite: last\.bacc"):
        write_record(tmp_path / "one.json", values)
    assert list(tmp_path.iterdir()) == []
    assert to_json({"a": [1, 0.5, None]}) == '{"a": [1, 0.5, null]}'
