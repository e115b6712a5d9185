"""A hook of mkdocs: brings README, CONTRIBUTING, CHANGELOG and the measured rows into the site.

The links between them are written as GitHub needs them, relative to where the files lie, and rewritten here.
"""

from pathlib import Path

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    root = Path(config.config_file_path).parent
    outside = {root / source: target for source, target in PAGES.items()}
    outside |= {path: f"results/{path.name}" for path in root.glob("benchmarks/results/*") if path.suffix != ".md"}
    for path, target in outside.items():
        files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    for above in ("", "../"):  # from the root of the repository, and from docs/
        markdown = markdown.replace(f"]({above}benchmarks/results/", "](results/")
        for source, target in PAGES.items():
            markdown = markdown.replace(f"]({above}{source}", f"]({target}")
    return markdown.replace("](docs/", "](")
