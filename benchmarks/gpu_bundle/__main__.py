"""Makes the folder gpu-bundle/: what a GPU machine would have to build or download before gpu_suite.sh runs on it.

    make gpu-bundle                                   # all of it, or what changed
    python -m benchmarks.gpu_bundle --parts launches  # only the kernels

It holds the native extension for Python 3.12 and compute capability 9.0, the machine code of the Triton kernels that
the gate and the benchmarks launch, and the wheels that the machine lacks. .venv-gpu gets Python 3.12 with the pinned
PyTorch (5 GB). Git ignores both folders; the bundle has to stay under 30 MB.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "gpu-bundle"
VENV = ROOT / ".venv-gpu"
# Triton's index of a compiled kernel has absolute paths: gpu_suite.sh unpacks it where it was written.
CACHE = Path("/tmp/bacon_fast_triton")
LIMIT = 30_000_000
WHEELS = ("tyro", "typeguard", "docstring_parser", "pytorch-metric-learning")
PARTS = ("extension", "launches", "wheels")


def digest() -> str:
    """Of everything that the extension is made from."""
    files = [ROOT / "setup.py", ROOT / "constraints.txt", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    content = hashlib.sha256()
    for path in files:
        content.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return content.hexdigest()


def run(*command: str | Path, **environment: str) -> None:
    subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | environment, check=True)


def make_venv() -> Path:
    """The Python 3.12 that the bundle is made with."""
    python = VENV / "bin/python"
    if not python.exists():
        found = sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12"))
        if not found and (path := shutil.which("python3.12")):
            found = [path]
        if not found:
            sys.exit("error: the GPU machine has Python 3.12, and there is no python3.12 here to build for it")
        run(found[-1], "-m", "venv", VENV)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    run(*pip, "torch", "triton", "numpy", "setuptools", "wheel", "ninja", "pybind11")
    return python


def make_extension(python: Path) -> None:
    stamp, sources = BUNDLE / "_C.digest", digest()  # of what is built: sources may change meanwhile
    if stamp.exists() and stamp.read_text() == sources and list(BUNDLE.glob("_C.*.so")):
        print("extension: up to date")
        return
    stamp.unlink(missing_ok=True)
    build = ROOT / "build/gpu"
    places = ["--build-lib", build / "lib", "--build-temp", build / "temp"]
    run(python, "setup.py", "--quiet", "build_ext", *places, BACON_FAST_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    for path in BUNDLE.glob("_C.*.so"):
        path.unlink()
    (library,) = (build / "lib/bacon_fast").glob("_C.cpython-312-*.so")
    shutil.copy2(library, BUNDLE)
    stamp.write_text(sources)


def make_launches(python: Path) -> None:
    """Records here, compiles with the Python and Triton of the GPU machine, whose cache it is."""
    with tempfile.TemporaryDirectory() as folder:
        launches = Path(folder) / "launches.pkl"
        run(sys.executable, "-m", "benchmarks.gpu_bundle.record", launches)
        shutil.rmtree(CACHE, ignore_errors=True)
        run(python, "-m", "benchmarks.gpu_bundle.compile", launches, TRITON_CACHE_DIR=str(CACHE))
    with tarfile.open(BUNDLE / "triton.tar.xz", "w:xz") as archive:
        archive.add(CACHE, CACHE.name)


def make_wheels(python: Path) -> None:
    folder = BUNDLE / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [
        python,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "-c",
        "constraints.txt",
    ]
    run(*pip, "--only-binary=:all:", "-d", folder, *WHEELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--digest", action="store_true", help="print the digest of the extension's sources, no more")
    options = parser.parse_args()
    if options.digest:
        print(digest())
        return
    BUNDLE.mkdir(exist_ok=True)
    python = make_venv()
    for part in options.parts:
        {"extension": make_extension, "launches": make_launches, "wheels": make_wheels}[part](python)
    sizes = {path: path.stat().st_size for path in sorted(BUNDLE.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size / 1e6:8.2f} MB  {path.relative_to(ROOT)}")
    if sum(sizes.values()) > LIMIT:
        sys.exit(f"error: {sum(sizes.values()) / 1e6:.0f} MB, and {LIMIT / 1e6:.0f} may travel")


if __name__ == "__main__":
    main()
