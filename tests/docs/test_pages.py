"""README, CONTRIBUTING and docs/ are true: Python blocks run, command lines parse, files and folders exist."""

import contextlib
import importlib
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import tyro
from test_architecture import ARROWS

import bacon_fast
from bacon_fast import methods
from bacon_fast.__main__ import COMMANDS
from bacon_fast.cli import parse_runs

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"git", "pip", "cd", "tensorboard", "npm"}  # not ours


def blocks(markdown: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)


def commands(markdown: str) -> list[str]:
    """Command lines of the sh blocks, without comments; also those of ours in inline code."""
    text = "\n".join(blocks(markdown, "sh")).replace("\\\n", " ")
    inline = re.findall(r"`((?:\.venv/bin/python|\.venv/bin/bacon-fast|\.venv/bin/torchrun|make) [^`\n]+)`", markdown)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in [*text.splitlines(), *inline]]
    return [line for line in lines if line]


def check(command: str) -> None:
    """Raises unless this command line would be understood."""
    words = [word for word in shlex.split(command) if word != "..."]
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, *words = words
    if program.endswith("torchrun"):
        check_train(words[words.index("train.py") + 1 :])
    elif program == "make":
        check_make(words[0])
    elif program.endswith("bacon-fast"):
        check_command(*words)
    elif program.endswith(("python", "python3")):
        if words[0] == "-c":
            check_code(words[1])
        elif words[0] == "train.py":
            check_train(words[1:])
        elif words[0] == "-m":
            check_module(words[1], words[2:])
        else:
            check_script(ROOT / words[0], words[1:])
    elif program.startswith("benchmarks/"):
        assert (ROOT / program).is_file(), f"no file {program}"
    else:
        assert program in PROGRAMS, f"{program} is no command that this test knows"


def check_command(word: str, *words: str) -> None:
    """Through the parser of the command that `bacon-fast` calls by this word."""
    module = importlib.import_module(COMMANDS[word][0])
    if word == "train":
        check_train([*words])
    elif word == "reproduce":
        module._table(read(module.Arguments, [*words]))
    else:
        read(module.Arguments, [*words])


def check_train(words: list[str]) -> None:
    """Through train.py's own parser."""
    with finishes():
        parse_runs([word for word in words if word != "--download"])


def check_code(code: str) -> None:
    """Compiles, and what it takes from bacon_fast exists."""
    compile(code, "python -c", "exec")
    assert all(hasattr(bacon_fast, name) for name in re.findall(r"\bbacon_fast\.(\w+)", code)), code


def check_module(name: str, words: list[str]) -> None:
    if name == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif name.startswith("benchmarks"):
        path = ROOT.joinpath(*name.split("."))
        check_script(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), words)
    else:
        assert find_spec(name) is not None, f"no module {name}"


def check_script(path: Path, words: list[str]) -> None:
    """The file is there and knows the options; optional ones stand in brackets."""
    text = path.read_text()
    unknown = [word for word in (word.strip("[]") for word in words) if word.startswith("--") and word not in text]
    assert not unknown, f"{path.name} has no {', '.join(unknown)}"


def check_make(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"


def read(arguments: type, words: list[str]):
    with finishes():
        return tyro.cli(arguments, args=words)


@contextlib.contextmanager
def finishes():
    """--help ends the program with status 0, a wrong option with another one."""
    try:
        yield
    except SystemExit as end:
        assert not end.code, "the command line is refused"


def names(pages: list[Path], found) -> list:
    return [pytest.param(page, id=page.name) for page in pages if found(page.read_text())]


@pytest.mark.parametrize("page", names(PAGES, lambda text: blocks(text, "python")))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would paste them; files go to an empty directory."""
    monkeypatch.chdir(tmp_path)
    if "integrations.metric_learning" in page.read_text():
        pytest.importorskip("pytorch_metric_learning")
    if "onnxruntime" in page.read_text():
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the page needs the extra export")
    namespace: dict = {}
    with mock.patch.dict(methods.PARTS):  # a page may add a part
        for number, block in enumerate(blocks(page.read_text(), "python"), 1):
            exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", names(PAGES, commands))
def test_commands_parse(page, capsys):
    for command in commands(page.read_text()):
        try:
            check(command)
        except BaseException as error:
            pytest.fail(f"{page.name}: {command}\n{error}\n{capsys.readouterr().err}")


def test_contributing_has_the_arrows_between_the_folders():
    rows = re.findall(r"^\| (.+?) \|.*\| (?:`(.+?)`|nothing) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    arrows = {name.removesuffix(".py"): to for rooms, to in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", rooms)}
    assert len(arrows) > 10 and arrows.pop("csrc") == "reference"
    assert arrows == {name: ARROWS[name] for name in arrows}


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/adding-a-method.md", "docs/methods.md"]
)
def test_file_names_lead_to_files(page):
    """On the pages about the code, `folder/file.py` is a file of the repository or of the package."""
    names = set(re.findall(r"`([\w.]+/[\w./]*(?:/|\.[a-z]+))`", (ROOT / page).read_text()))
    assert len(names) > 10
    made_up = [name for name in names if "NAME" in name or "toy" in name]
    roots = (ROOT, ROOT / "bacon_fast")
    assert not [n for n in names.difference(made_up) if not any((root / n).exists() for root in roots)]


def test_there_is_something_to_check():
    texts = {page.name: page.read_text() for page in PAGES}
    assert sum(len(blocks(text, "python")) for text in texts.values()) >= 9
    assert sum(len(commands(text)) for text in texts.values()) >= 30
    assert {"README.md", "quickstart.md", "losses.md", "your-images.md"} <= {
        name for name, text in texts.items() if blocks(text, "python")
    }


@pytest.mark.parametrize(
    "command",
    [
        "python train.py no-such-preset",
        "python train.py digits --no-such-option 3",
        "python train.py digits --steps many",
        "bacon-fast reproduce no-such-table",
        "bacon-fast predict RUN --no-such-option",
        "bacon-fast no-such-word",
        "python -c 'import bacon_fast; bacon_fast.no_such_name()'",
        ".venv/bin/torchrun --nproc-per-node 2 train.py no-such-preset",
        "python -m bacon_fast.no_such_module",
        "python -m benchmarks.loss --no-such-option",
        "python -m benchmarks.no_such_file",
        "make no-such-target",
        "benchmarks/no_such_file.sh OUT",
        "no-such-program",
    ],
)
def test_a_stale_command_is_found(command):
    with pytest.raises((AssertionError, ValueError, FileNotFoundError, KeyError)):
        check(command)


def test_every_page_is_in_the_navigation():
    """mkdocs only notes a page that the navigation leaves out."""
    text, docs = (ROOT / "mkdocs.yml").read_text(), ROOT / "docs"
    assert all(f" {page.relative_to(docs)}" in text for page in docs.rglob("*.md"))


def test_relative_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: no file {target}"
