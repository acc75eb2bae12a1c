"""Hooks for MkDocs: the import names of the packages, and pages for files outside docs/."""

import os
import re
import shutil
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
SHOWN = {".py": "py", ".toml": "toml", ".yaml": "yaml"}
CODE = '---\nsearch: {{ exclude: true }}\n---\n# {name}\n\n```{language} title="{path}"\n{text}```\n'


@event_priority(100)  # run before mkdocstrings imports the packages
def on_config(config):
    """Copy the two source folders to the paths of their import names."""
    layout = ROOT / "build/docs"
    shutil.rmtree(layout, ignore_errors=True)
    for source, package in (("engine", "onstep"), ("callbacks", "onstep/callbacks")):
        shutil.copytree(ROOT / source, layout / package, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files, config):
    """Add the examples and the project's texts as pages, and the benchmark plots as files."""

    def add(name, content, inclusion=InclusionLevel.NOT_IN_NAV):
        files.append(File.generated(config, name, content=content, inclusion=inclusion))

    for path in sorted(p for p in (ROOT / "examples").rglob("*") if "__pycache__" not in p.parts):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in SHOWN:
            code = CODE.format(name=path.name, path=name, language=SHOWN[path.suffix], text=path.read_text())
            add(f"{name}.md", code)
        elif path.is_dir() and any(child.suffix in SHOWN for child in path.iterdir()):
            shown = [child.name for child in sorted(path.iterdir()) if child.is_dir() or child.suffix in SHOWN]
            listed = "\n".join(f"- [{child}]({child})" for child in shown if not child.startswith("_"))
            text = path / "README.md"
            add(f"{name}/index.md", f"{text.read_text() if text.exists() else f'# {path.name}'}\n\n{listed}\n")
    for path in sorted((ROOT / "benchmarks/results").glob("*.png")):
        add(path.relative_to(ROOT).as_posix(), path.read_bytes())
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        add(name, (ROOT / name).read_text(), InclusionLevel.INCLUDED)
    add("SECURITY.md", (ROOT / "SECURITY.md").read_text())
    add("LICENSE.md", CODE.format(name="License", path="LICENSE", language="text", text=(ROOT / "LICENSE").read_text()))


def on_page_markdown(markdown, page, config, files):
    """Rewrite links out of docs/ to pages of the site, and unescape `|` in code, as GitHub does.

    Search lists explanations before the reference and the project's texts.
    """
    if page.file.src_uri.startswith("reference/") or page.file.generated_by is not None:
        page.meta.setdefault("search", {"boost": 0.5})
    generated = page.file.generated_by is not None
    folder = (ROOT if generated else ROOT / "docs") / os.path.dirname(page.file.src_uri)

    def rewrite(match):
        path = Path(os.path.normpath(folder / match[1]))
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix().removeprefix("docs/")
        found = next((n for n in (name, f"{name}.md", f"{name}/index.md") if files.get_file_from_path(n)), None)
        return f"]({os.path.relpath(found, os.path.dirname(page.file.src_uri))}" if found else match[0]

    markdown = re.sub(r"\]\(([^)#\s:]+)", rewrite, markdown)
    return re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), markdown)
