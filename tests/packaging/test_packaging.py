"""sdist, wheel and editable install carry the native extension and the kernels, under our name only."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT = (
    "import pathlib, torch, bacon_fast, bacon_fast.kernels, bacon_fast._C, bacon_fast.engine.report; "
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
        file.extractall(tmp_path / "site")
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bacon_fast"}
    assert {f"bacon_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} == kernels
    where = run(sys.executable, "-c", IMPORT, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where.strip()) == tmp_path / "site" / "bacon_fast"


def test_editable_install_imports_this_checkout(tmp_path):
    where = run(sys.executable, "-c", IMPORT, cwd=tmp_path)
    assert Path(where.strip()) == ROOT / "bacon_fast"


def test_kernels_is_no_top_level_module(tmp_path):
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kernels') is not None)"
    run(sys.executable, "-c", code, cwd=tmp_path)
