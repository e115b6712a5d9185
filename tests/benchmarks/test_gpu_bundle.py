"""benchmarks/gpu_bundle: launches are recorded without a GPU, and the compiled ones are those that Triton looks for."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_bundle import __main__ as bundle

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="needs Triton's compiler")


def run(*words: object, **environment: str) -> str:
    values = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_launches_are_recorded_and_compiled_once(tmp_path):
    path, cache = tmp_path / "launches.pkl", tmp_path / "cache"
    run("benchmarks.gpu_bundle.record", path, "bacon_step and half_precision")
    rows = pickle.loads(path.read_bytes())
    pointers = {kind for row in rows for kind in dict(row[2]).values()}
    # The kernels of a whole step of BaCon for either dtype, and no other's.
    assert all("bacon_step" in module for module, *_ in rows) and {"*bf16", "*fp16"} <= pointers
    # With the tiles of the GPU: the interpreter's programs have one warp.
    assert {row[5] for row in rows if row[1] in ("_compare_kernel", "_gradient_kernel")} == {4}
    path.write_bytes(pickle.dumps(rows[-1:]))
    for _ in range(2):  # the second time it is found
        run("benchmarks.gpu_bundle.compile", path, TRITON_CACHE_DIR=str(cache))
        assert len(list(cache.rglob("*.cubin"))) == 1


def test_the_digest_is_that_of_the_sources(tmp_path, monkeypatch):
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "constraints.txt", "csrc/a.cpp"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    before = bundle.digest()
    assert before == bundle.digest()
    (tmp_path / "csrc/a.cpp").rename(tmp_path / "csrc/b.cpp")
    renamed = bundle.digest()
    (tmp_path / "csrc/b.cpp").write_text("changed")
    assert len({before, renamed, bundle.digest()}) == 3


def test_a_bundle_that_is_too_large_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    monkeypatch.setattr(bundle, "BUNDLE", tmp_path / "gpu-bundle")
    monkeypatch.setattr(bundle, "LIMIT", 1000)
    monkeypatch.setattr(bundle, "make_venv", lambda: Path("python"))
    monkeypatch.setattr(bundle, "make_wheels", lambda python: (bundle.BUNDLE / "a.whl").write_bytes(bytes(2000)))
    monkeypatch.setattr("sys.argv", ["gpu_bundle", "--parts", "wheels"])
    with pytest.raises(SystemExit, match="may travel"):
        bundle.main()
    assert "a.whl" in capsys.readouterr().out
