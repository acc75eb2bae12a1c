"""Every Python block of the documentation runs in order and prints the output shown below it."""

import json
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
MARK = "=== end of block"
BLOCK = re.compile(
    r"^```(?P<kind>python|sh)(?: title=\"(?P<file>\S+)\")?\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<shown>.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)
"""A block at the left margin (the tabs of a comparison are not run), and a text block directly below it.

A Python block is run, or saved if its title names a file. A page that saves a script also runs its commands.
"""
PUBLIC = (ROOT / "tests" / "api.txt").read_text().splitlines()


def names(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """Return the blocks of a page that are run."""
    found = list(BLOCK.finditer(page.read_text()))
    saves = any(block["file"] for block in found)
    return [block for block in found if block["kind"] == "python" or saves]


def program(page):
    """Return the blocks of a page as one program with the line numbers of the page."""
    text, written = page.read_text(), ""
    for block in blocks(page):
        written += "\n" * (text.count("\n", 0, block.start("code")) - written.count("\n"))
        code = block["code"]
        if block["file"]:
            code = f"__import__('pathlib').Path({block['file']!r}).write_text({code!r})\n"
        elif block["kind"] == "sh":
            code = "".join(f"run_command({line!r})\n" for line in code.splitlines())
        written += f"{code}print({MARK!r}, flush=True)"
    return f"{written}\n[test() for name, test in list(globals().items()) if name.startswith('test_')]\n"


PAGES = [page for page in EVERY_PAGE if blocks(page)]


def masked(text):
    """Return the lines with masked numbers and collapsed columns, without lines that appear only on a slow machine."""
    lines = [line for line in text.strip().splitlines() if not re.search(r"onstep: compiled|\d:\d\d left", line)]
    return [re.sub(r"\s+|-+", " ", re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "#", line)) for line in lines]


@pytest.fixture(scope="session")
def server():
    """A process that runs pages; see run_pages.py."""
    command = [sys.executable, "-u", "-W", "error", ROOT / "tests" / "run_pages.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_code_blocks_of_a_page_run_and_print_the_shown_output(page, tmp_path, server):
    folder, output = tmp_path / "folder", tmp_path / "output"
    folder.mkdir()
    task = {"program": program(page), "folder": str(folder), "output": str(output), "seconds": 300}
    print(json.dumps(task), file=server.stdin, flush=True)
    status = server.stdout.readline()
    printed = output.read_text()
    assert status == "0\n", f"train.py is {names(page)}\n{printed}"
    for block, text in zip(blocks(page), printed.split(f"{MARK}\n"), strict=False):
        assert block["shown"] is None or masked(text) == masked(block["shown"]), f"{block['code']}\nprints:\n{text}"


@pytest.mark.slow
def test_first_run_is_interrupted_and_resumes_as_the_page_shows(tmp_path):
    _, _, code, shown = blocks(DOCS / "index.md")[0].groups()
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
def test_site_builds_without_a_warning_and_loads_nothing_external_and_shows_what_is_public(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {page: (tmp_path / page.relative_to(DOCS).with_suffix(".html")).read_text() for page in DOCS.rglob("*.md")}
    for page, html in pages.items():
        assert not re.findall(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=.?https?:", html), page
        assert "iframe-worker.js" in html  # for search from disk, as browsers start no worker from a file
    assert "Checkpoint" in (tmp_path / "search" / "search_index.js").read_text()
    reference = "".join(html for page, html in pages.items() if page.parent.name == "reference")
    shown = set(re.findall(r'id="(onstep[\w.]*)"', reference))
    shown.add("onstep.state.TrainState.replace")  # made by Flax's decorator
    assert {documented(name) for name in PUBLIC if "(" in name} <= shown
    assert not [name for name in shown if "._" in name]


def test_links_between_documents_exist():
    for page in EVERY_PAGE:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def documented(name):
    """Return the name under which the reference shows a public name."""
    name = name.partition("(")[0]
    if name == "onstep.evaluate":
        return "onstep.evaluate.evaluate"  # because the module has the same name
    return re.sub(r"onstep\.callbacks\.checkpoint\.(load|save)", r"onstep.storage.\1", name)


def test_reference_lists_every_public_name():
    shown = set()
    for page in (DOCS / "reference").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)((?:\n .*)*)", page.read_text(), flags=re.MULTILINE):
            members = re.search(r"members: \[(.*)\]", options)
            shown |= {f"{name}.{member}" for member in members[1].split(", ")} if members else {name}
    assert len(PUBLIC) > 250
    for name in map(documented, PUBLIC):
        assert any(name == holder or name.startswith(f"{holder}.") for holder in shown), name


def test_each_public_module_has_a_page_in_the_reference():
    index = (DOCS / "reference" / "index.md").read_text()
    pages = {page.stem: page.read_text() for page in (DOCS / "reference").glob("*.md") if page.stem != "index"}
    for name, text in pages.items():
        module = "onstep" if name == "onstep" else f"onstep.{name}"
        assert text.startswith(f"# {module}\n")
        assert f"[`{module}`]({name}.md)" in index
        assert not [line for line in text.splitlines() if line.startswith("::: ") and module not in line]


def test_every_callback_has_a_page_with_an_example():
    index = (DOCS / "callbacks" / "index.md").read_text()
    for name in onstep.callbacks.__all__:
        module = getattr(onstep.callbacks, name).__module__.rpartition(".")[2]
        page = DOCS / "callbacks" / f"{module}.md"
        text = page.read_text()
        assert text.startswith(f"# {name}\n")
        assert blocks(page), name
        assert "```text" in text or "![" in text, name
        assert f"]({module}.md" in index, name


def test_commands_have_no_prompt_so_that_they_can_be_copied():
    for page in EVERY_PAGE:
        text = page.read_text()
        assert "```console" not in text, page.name
        for commands in re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL):
            assert not re.search(r"^\s*[$%>] ", commands, flags=re.MULTILINE), f"{page.name}: {commands}"


def test_readme_is_short_and_starts_with_how_to_install_and_code():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    script = lines.index("```python")
    assert script < 20
    assert any("pip install" in line for line in lines[:script])
