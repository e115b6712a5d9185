"""The choice between the GPU backends of the contrastive family, by a table of times."""

import pytest
import torch

from bacon_fast.ops import backends
from bacon_fast.ops.contrastive_times import Time, fastest, fastest_on_gpu, numbers_of, read_times


def time(source: str, card: str, rows: int, backend: str, us: float, numbers: str = "half") -> Time:
    return Time(source, card, numbers, rows, 4096, 128, backend, us)


def test_the_nearest_shape_decides_and_measured_before_predicted():
    times = [
        time("predicted", "A", 100, "triton", 1.0),
        time("predicted", "A", 100, "chunks", 2.0),
        time("measured", "B", 100, "triton", 4.0),
        time("measured", "B", 100, "chunks", 3.0),
        time("measured", "B", 10_000, "triton", 5.0),
        time("measured", "B", 10_000, "chunks", 6.0),
    ]
    assert fastest(times, "B", "half", 200, 4096, 128) == "chunks"
    assert fastest(times, "B", "half", 5000, 4096, 128) == "triton"
    assert fastest(times, "C", "half", 5000, 4096, 128) == "triton"  # predicted, for cards that nobody measured
    assert fastest(times, "B", "float32", 200, 4096, 128) is None


def test_the_table_that_is_shipped_says_what_was_predicted():
    times = read_times()
    shapes = {(time.numbers, time.rows, time.columns, time.dim) for time in times}
    assert len(times) == 2 * len(shapes) and {time.backend for time in times} == {"triton", "chunks"}
    for rows in (192, 1024, 3584, 7168):
        for columns in (4096, 65_536):
            for numbers in ("float32", "tf32", "half"):
                assert (numbers, rows, columns, 128) in shapes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a,b\n", "found a,b"),
        ("source,card,numbers,rows,columns,dim,backend,us\nmeasured,A,half,1,2,3,triton\n", "found one that is not"),
        ("source,card,numbers,rows,columns,dim,backend,us\nguessed,A,half,1,2,3,triton,4\n", "found Time"),
        ("source,card,numbers,rows,columns,dim,backend,us\nmeasured,A,half,0,2,3,triton,4\n", "found Time"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, text, found):
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=found):
        read_times(path)


def test_numbers_of_dtypes():
    assert [numbers_of(dtype, True) for dtype in (torch.float16, torch.bfloat16)] == ["half", "half"]
    assert numbers_of(torch.float32, True) == "tf32" and numbers_of(torch.float32, False) == "float32"
    assert numbers_of(torch.float64, True) == "float32"


def test_a_cpu_has_no_preference_and_a_preference_must_be_able_to_serve(monkeypatch):
    vectors = torch.empty(5, 4)
    assert fastest_on_gpu(vectors, 7) is None
    seen = []
    table = {
        "first": backends.Backend(lambda: "first", lambda tensor: None),
        "second": backends.Backend(lambda: "second", lambda tensor: "broken" if tensor.shape[1] > 4 else None),
    }
    monkeypatch.setitem(backends.BACKENDS, "an operation", table)
    monkeypatch.setitem(backends.PREFERENCES, "an operation", lambda tensor, columns: seen.append(columns) or "second")
    assert backends.choose_backend("an operation", None, vectors)() == "second"
    assert backends.choose_backend("an operation", None, torch.empty(5, 9), 70)() == "first"
    assert seen == [5, 70]
