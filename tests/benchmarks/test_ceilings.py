"""benchmarks/ceilings.py on a CPU, with operands that take no time."""

import csv

import pytest
import torch

from benchmarks import ceilings


def test_bytes_and_operations_are_counted(monkeypatch):
    monkeypatch.setitem(ceilings.SIZES, "cpu", (4_000_000, 500_000, 64, torch.float32))
    size, side = 1000, 16
    copy, product = ceilings.copy_call(size, "cpu"), ceilings.product_call(side, torch.float32, "cpu")
    assert copy().numel() == size and copy().float().std() > 60  # random bytes: 74
    assert product().shape == (side, side) and product().std() > 1  # random operands: 4
    cases = list(ceilings.measurements("cpu").values())
    large, small, side, _ = ceilings.SIZES["cpu"]
    assert [amount for _, amount, _ in cases] == [2 * large / 1e9, 2 * small / 1e9, 2 * side**3 / 1e12]


def test_a_run_gives_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(ceilings.SIZES, "cpu", (4_000_000, 500_000, 64, torch.float32))
    out = tmp_path / "ceilings.csv"
    monkeypatch.setattr("sys.argv", ["ceilings.py", "--rounds", "3", "--threads", "1", "--out", str(out)])
    ceilings.main()
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["unit"] for row in rows] == ["GB/s", "GB/s", "TFLOP/s"]
    for row in rows:
        assert 0 < float(row["q25"]) <= float(row["median"]) <= float(row["q75"])
        assert row["commit"] and row["machine"]


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["ceilings.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        ceilings.main()
    assert "no usable CUDA device" in capsys.readouterr().err
