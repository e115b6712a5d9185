"""sdist, wheel and editable install carry the native extension and the kernels, under our name only."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = (
    "import pathlib, torch, bacon_fast, bacon_fast.kernels, bacon_fast._C, bacon_fast.report.page; "
    "print(pathlib.Path(bacon_fast.__file__).parent)"
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git tracks, or of the whole folder where there is no git."""
    target = tmp_path_factory.mktemp("source") / "tree"
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("needs a git checkout, to know which files belong to the project")
    for name in listing.stdout.splitlines():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, path, follow_symlinks=False)
    return target


@pytest.mark.slow
def test_sdist_and_the_wheel_built_from_it(source, tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    run(*build, "--sdist", str(source), cwd=tmp_path, BACON_FAST_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
        file.extractall(tmp_path / "unpacked", filter="data")
    for needed in ("csrc/ops.cpp", "bacon_fast/kernels/__init__.py", "LICENSE", "setup.py", "train.py"):
        assert needed in names, f"{needed} is missing from the sdist"

    (tree,) = (tmp_path / "unpacked").iterdir()
    run(*build, "--wheel", str(tree), cwd=tmp_path, BACON_FAST_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        tops = {name.split("/", 1)[0] for name in file.namelist()}
        kernels = {name for name in file.namelist() if name.startswith("bacon_fast/kernels/")}
        (entry_points,) = (name for name in file.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "bacon-fast = bacon_fast.__main__:main" in file.read(entry_points).decode().splitlines()
        file.extractall(tmp_path / "site")
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bacon_fast"}
    (library,) = (tmp_path / "site/bacon_fast").glob("_C*")
    assert library.stat().st_size < 5e6  # stripped: its debug information alone has 26 MB
    assert {f"bacon_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} == kernels
    where = run(sys.executable, "-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where.strip()) == tmp_path / "site" / "bacon_fast"


def test_editable_install_imports_this_checkout(tmp_path):
    where = run(sys.executable, "-c", IMPORT, cwd=tmp_path)
    assert Path(where.strip()) == ROOT / "bacon_fast"


def test_kernels_is_no_top_level_module(tmp_path):
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kernels') is not None)"
    run(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_without_a_compiler_everything_but_the_native_extension_is_installed(source, tmp_path):
    site, missing = tmp_path / "site", {"CXX": "/nonexistent/c++", "BACON_FAST_CUDA": "", "OMP_NUM_THREADS": "1"}
    pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        command = [*pip, "--target", str(site), str(source)]
        subprocess.run(command, cwd=tmp_path, env=os.environ | missing, check=True, stdout=file, stderr=file)
    assert "warning: bacon_fast is installed without its native extension" in log.read_text()
    assert "the C++ compiler '/nonexistent/c++' was not found" in log.read_text()
    assert not list(site.rglob("_C*"))

    # -S: an editable installation beside it would give its own extension.
    python = [sys.executable, "-S"]
    here = missing | {"PYTHONPATH": f"{site}:{sysconfig.get_path('purelib')}"}
    where = run(*python, "-c", "import bacon_fast; print(bacon_fast.__file__)", cwd=tmp_path, **here)
    assert Path(where.strip()).is_relative_to(site)
    report = run(*python, "-m", "bacon_fast.info", cwd=tmp_path, **here)
    assert "native extension: not built" in report and "the C++ compiler '/nonexistent/c++' is not there" in report
    shutil.copy(ROOT / "train.py", tmp_path)
    run(*python, "train.py", "digits", "--steps", "5", "--no-report", "--run-dir", "run", cwd=tmp_path, **here)
    assert (tmp_path / "run" / "summary.json").exists()


def test_forcing_cuda_without_a_toolkit_is_an_error(tmp_path):
    environment = os.environ | {"BACON_FAST_CUDA": "1", "PATH": "/nonexistent"}
    code = "import pathlib, runpy; pathlib.Path.exists = lambda path: False; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "error: BACON_FAST_CUDA=1, but no CUDA toolkit was found" in done.stderr
