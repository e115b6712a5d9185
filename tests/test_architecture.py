"""Which module may import which: the arrows between the rooms, no circles, and each module on its own."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1] / "bacon_fast"

# Each package and module at the root, and which of the others it may import.
ARROWS = {
    "reference": "",
    "kernels": "reference",
    "files": "",
    "system": "",
    "__main__": "",
    "ops": "reference kernels _C",
    "functional": "ops",
    "data": "ops reference files system",
    "models": "functional ops reference",
    "losses": "models functional ops reference",
    "methods": "losses models data functional ops reference",
    "engine": "methods losses models data functional ops files system",
    "report": "engine data files",
    "labeling": "data files",
    "exporting": "models data files",
    "run": "labeling exporting engine methods models data files",
    "parser": "engine methods data",
    "cli": "parser report engine methods data",
    "training": "cli parser run engine methods",
    "evaluate": "cli run engine files",
    "predict": "cli run engine files",
    "label": "cli run labeling engine",
    "export": "cli run engine",
    "redraw": "cli report engine",
    "info": "ops system _C",
    "reproduce": "cli parser run report engine methods data files",
    "integrations": "losses functional ops reference",
}
# A function may import these when it is called, because they are slow or not always there: Triton, the extension,
# pictures.
LATE = ("bacon_fast.kernels", "bacon_fast._C", "bacon_fast.report", "bacon_fast.reproduce.figures")


class Import(NamedTuple):
    importer: str
    imported: str
    kind: str
    """now (when the importer is loaded), late (in a function) or typing (under TYPE_CHECKING)."""


def modules() -> dict[str, Path]:
    """Name and file of each module of the package."""
    files = [*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]  # kernels is a link, which rglob does not follow
    return {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    """Imports of our own modules, including the packages that are loaded before them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, kind) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield from ((f"{base}.{alias.name}", kind) for alias in node.names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            kind = "late"
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            kind = "typing"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, kind)

    for imported, kind in visit(ast.parse(path.read_text()), "now"):
        while imported and imported not in known:  # a name in a module
            imported = imported.rpartition(".")[0]
        # The packages around a module are loaded before it, except those that the importer is in.
        while "." in imported and not f"{name}.".startswith(f"{imported}."):
            yield Import(name, imported, kind)
            imported = imported.rpartition(".")[0]


MODULES = modules()
IMPORTS = [one for name in MODULES for one in imports_of(name, MODULES[name], {*MODULES, "bacon_fast._C"})]


def room(module: str) -> str:
    return module.removeprefix("bacon_fast.").split(".")[0]


def test_the_arrows_between_the_rooms():
    rooms = {room(name) for name in MODULES} - {"bacon_fast"}
    assert rooms <= set(ARROWS), "a new room needs a line in ARROWS"
    wrong = [
        f"{one.importer} -> {one.imported}"
        for one in IMPORTS
        if room(one.importer) != room(one.imported) and room(one.imported) not in ARROWS[room(one.importer)].split()
    ]
    assert not wrong


def test_the_table_of_arrows_has_no_circle():
    list(TopologicalSorter({name: targets.split() for name, targets in ARROWS.items()}).static_order())


def test_no_circle_among_the_modules():
    """Counts late imports too, which would only hide a circle."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for one in IMPORTS:
        graph[one.importer].add(one.imported)
    list(TopologicalSorter(graph).static_order())


def test_imports_are_at_the_top_but_for_what_is_slow_or_not_always_there():
    late = [one for one in IMPORTS if one.kind != "now"]
    assert not [one for one in late if one.kind == "typing" or not one.imported.startswith(LATE)]


def test_only_the_report_and_the_tables_draw():
    drawing = re.compile(r"^\s*(from|import) (matplotlib|html|sklearn\.(manifold|decomposition))\b", re.MULTILINE)
    found = {room(name) for name, path in MODULES.items() if drawing.search(path.read_text())}
    assert found == {"report", "reproduce"}


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# A process for each argument (modules between commas), forked from one that has loaded the other packages.
IMPORT = """
import importlib, os, sys, traceback
for name in ("scipy.special", "sklearn.manifold", "matplotlib.figure", "torch.utils.tensorboard", "torchvision"):
    importlib.import_module(name)
failed = 0
for names in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            for name in names.split(","):
                importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.mark.slow
def test_modules_can_be_imported_in_any_order():
    """All of them, and one of each room first. As there are no circles, the others can be the first one too."""
    names = sorted(name for name in MODULES if not name.startswith("bacon_fast.integrations.usb"))
    first = {room(name): name for name in names}
    python(IMPORT, *first.values(), ",".join(names))


HEAVY = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "tensorboard", "torchvision", "tyro", "triton", "PIL"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bacon_fast", HEAVY),
        ("bacon_fast.__main__", HEAVY),
        ("bacon_fast.engine.trainer", {"matplotlib", "sklearn"}),
        ("bacon_fast.cli", {"matplotlib"}),
    ],
)
def test_imports_are_cheap_and_quiet(module, absent):
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{n.split('.')[0] for n in sys.modules})"
    assert not set(python(code, module).split()) & absent


def test_public_names_are_those_of_their_modules():
    code = """
import bacon_fast
for name in bacon_fast.__all__:
    assert name in dir(bacon_fast), name
    getattr(bacon_fast, name)
from bacon_fast import BaConLoss, functional
from bacon_fast.losses import BaConLoss as same
assert BaConLoss is same and functional.__name__ == "bacon_fast.functional"
assert not hasattr(bacon_fast, "Trainr")
"""
    python(code)
