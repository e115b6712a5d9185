"""The package where the operating system, or the build, is another one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    python_path = environment.pop("PYTHONPATH", str(ROOT))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path} | environment
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_without_fcntl_affinity_sysconf_triton_and_native_code_runs_train_and_predict(tmp_path):
    done = run(str(Path(__file__).with_name("other_system.py")), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"out: {tmp_path / 'locked'} is in use by another command" in done.stdout
    assert "not triton: triton is not installed" in done.stdout and "cpp: the native extension" in done.stdout
    for folder in ("built-in", "own"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert summary["steps"] == 3 and 0 <= summary["bacc"] <= 1
    assert "data:image/png" in (tmp_path / "own" / "report.html").read_text()
    metrics, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert metrics["num_images"] == 4 and [row["class"] in ("dark", "light") for row in rows] == [True, True]


@pytest.fixture
def changed_schema(tmp_path) -> Path:
    """A folder with the package as it is after `git pull`: a schema has changed, the extension is the old one."""
    pytest.importorskip("bacon_fast._C", reason="the native extension is not built")
    package = tmp_path / "site" / "bacon_fast"
    package.mkdir(parents=True)
    for path in (ROOT / "bacon_fast").iterdir():
        (package / path.name).symlink_to(path)
    (package / "ops").unlink()
    shutil.copytree(ROOT / "bacon_fast" / "ops", package / "ops")
    return package


CODE = """
import torch
from bacon_fast import functional, info
from bacon_fast.ops import backends
print(info.native_extension())
labels = torch.tensor([0, 0, 1, 1])
print(float(functional.sup_con_loss(torch.eye(4), labels, temperature=1.0)))
"""


def test_an_extension_of_another_schema_is_not_usable_and_the_rest_is(changed_schema, tmp_path):
    file = changed_schema / "ops" / "ring_rows.py"
    text = file.read_text()
    file.write_text(re.sub(r'"\(Tensor ring, Tensor step, int stride', '"(Tensor ring, Tensor step, bool new', text))
    assert file.read_text() != text
    done = run("-S", "-c", CODE, cwd=tmp_path, PYTHONPATH=search_path(changed_schema))
    assert done.returncode == 0, done.stderr
    line, loss = done.stdout.splitlines()
    assert re.search(r"bacon_fast\._C is not usable: .*schema.*; run `make setup`", line), line
    assert float(loss) == pytest.approx(1.0986, abs=1e-3)  # every row's three others are alike: log 3


def test_an_extension_that_lacks_an_operation_is_not_usable(changed_schema, tmp_path):
    file = changed_schema / "ops" / "ring_rows.py"
    file.write_text(file.read_text() + '\ntorch.library.define("bacon_fast::newer", "(Tensor a) -> Tensor")\n')
    done = run("-S", "-c", CODE, cwd=tmp_path, PYTHONPATH=search_path(changed_schema))
    assert done.returncode == 0, done.stderr
    assert "bacon_fast._C is not usable: it was built before bacon_fast::newer" in done.stdout


def search_path(package: Path) -> str:
    """That package, and the others of this environment without the editable installation."""
    return f"{package.parent}{os.pathsep}{Path(pytest.__file__).parents[1]}"
