"""Every Python block of the documentation runs in order and prints the output shown below it."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import onstep.callbacks
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EVERY_PAGE = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in EVERY_PAGE if "```python" in page.read_text()]
MARK = "=== end of block"


def names(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Return the Python blocks of a page, each with the text block directly below it, or None."""
    below = r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    return [(code, shown or None) for code, shown in re.findall(below, page.read_text(), flags=re.DOTALL)]


def masked(text):
    """Return the lines with masked numbers and collapsed columns, without lines that appear only on a slow machine."""
    lines = [line for line in text.strip().splitlines() if not re.search(r"onstep: compiled|\d:\d\d left", line)]
    return [re.sub(r"\s+|-+", " ", re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", line)) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_code_blocks_of_a_page_run_and_print_the_shown_output(page, tmp_path):
    found = blocks(page)
    program = "".join(f"{code}\nprint({MARK!r}, flush=True)\n" for code, _ in found)
    program += "[test() for name, test in list(globals().items()) if name.startswith('test_')]\n"
    command = [sys.executable, "-u", "-W", "error", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout
    printed = done.stdout.split(f"{MARK}\n")
    for (code, shown), text in zip(found, printed, strict=False):
        assert shown is None or masked(text) == masked(shown), code


@pytest.mark.slow
def test_first_run_is_interrupted_and_resumes_as_the_page_shows(tmp_path):
    code, shown = blocks(DOCS / "index.md")[0]
    (tmp_path / "train.py").write_text(code)
    command = [sys.executable, "-u", "train.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    printed = []
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as first:
        for line in first.stdout:
            printed.append(line)
            if line.startswith("step 440"):
                first.send_signal(signal.SIGINT)
    assert first.returncode == -signal.SIGINT
    assert printed[-1] == "onstep: saved at step 440; run the same command to resume\n"
    second = subprocess.run(command, cwd=tmp_path, timeout=300, check=True, **pipes).stdout
    assert "onstep: resuming from step" in second
    both, shown = (
        "\n".join(line for line in text.splitlines() if line.startswith(("step", "done")))
        for text in ("".join([*printed, second]), shown)
    )
    assert masked(both) == masked(shown)


@pytest.mark.slow
def test_site_builds_without_a_warning_and_loads_nothing_external(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in DOCS.rglob("*.md"):
        html = (tmp_path / page.relative_to(DOCS).with_suffix(".html")).read_text()
        assert not re.findall(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=.?https?:", html), page


def test_links_between_documents_exist():
    for page in EVERY_PAGE:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_reference_lists_every_public_name():
    shown = set(re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    shown.add("onstep.evaluate")  # shown as onstep.evaluate.evaluate, because the module has the same name
    public = re.findall(r"^[\w.]+", (ROOT / "tests/api.txt").read_text(), flags=re.MULTILINE)
    assert len(public) > 100
    for name in public:  # a class and the config module show their members
        assert name in shown or any(name.startswith(f"{holder}.") for holder in shown), name


def test_catalogue_has_a_row_and_an_example_for_every_callback():
    page = (DOCS / "callbacks/catalogue.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\(#(\w+)\)", page, flags=re.MULTILINE)
    sections = re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert {name for name, _ in sections} == set(onstep.callbacks.__all__)
    assert {(name, anchor) for name, anchor in rows} == {(name, name.lower()) for name, _ in sections}
    for name, text in sections:
        assert "```python" in text, name
        assert "```text" in text or "![" in text, name


def test_readme_is_short_and_starts_with_code():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert lines.index("```python") < 15
