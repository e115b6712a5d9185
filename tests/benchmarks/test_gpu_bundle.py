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


def test_the_stamp_is_of_the_sources_that_were_built(tmp_path, monkeypatch):
    """A build takes minutes, in which somebody may change the sources."""
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "constraints.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    monkeypatch.setattr(bundle, "BUNDLE", tmp_path / "gpu-bundle")
    bundle.BUNDLE.mkdir()
    built = []

    def build(*command: object, **environment: str) -> None:
        built.append(bundle.digest())
        library = tmp_path / "build/gpu/lib/bacon_fast/_C.cpython-312-x86_64-linux-gnu.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
        (tmp_path / "csrc/b.cpp").write_text("changed")

    monkeypatch.setattr(bundle, "run", build)
    bundle.make_extension(Path("python"))
    assert (bundle.BUNDLE / "_C.digest").read_text() == built[0] != bundle.digest()
    bundle.make_extension(Path("python"))
    bundle.make_extension(Path("python"))  # nothing to do
    assert len(built) == 2 and (bundle.BUNDLE / "_C.digest").read_text() == bundle.digest()


@pytest.mark.slow
def test_trainers_run_on_kernels_that_write_nothing(tmp_path):
    """What a kernel would have written may be an index, and torch's own operations take it as one."""
    script = (
        "from benchmarks.gpu_bundle import record; record.run_gate = lambda expression: None; "
        "record.run_losses = record.run_steps = lambda: None; record.main()"
    )
    values = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "launches.pkl"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, env=values, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = {row[1] for row in pickle.loads(path.read_bytes())}
    assert {"_rank_kernel", "_moments_kernel", "_input_gradient_kernel"} <= names


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
