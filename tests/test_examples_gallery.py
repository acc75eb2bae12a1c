"""The gallery shows every example, and the table of features names only existing tests and examples."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GALLERY, FEATURES = ((ROOT / "docs" / name).read_text() for name in ("gallery.md", "contributing/features.md"))


def test_gallery_shows_every_example_with_its_command():
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("**/*.py")]
    scripts = [script for script in scripts if "shared_callbacks" not in script]
    assert len(scripts) >= 12
    for script in scripts:
        assert re.search(rf"^python {re.escape(script)}\b", GALLERY, re.MULTILINE), script
        assert f"](../{script})" in GALLERY, script


def test_every_picture_is_small_and_shown_with_alternative_text():
    shown = dict(re.findall(r"!\[(.+)\]\(pictures/(.+)\)", GALLERY))
    pictures = {path.name: path.stat().st_size for path in (ROOT / "docs" / "pictures").iterdir()}
    assert sorted(shown.values()) == sorted(pictures)
    assert max(pictures.values()) <= 60_000


def test_every_output_line_of_the_gallery_matches_a_printed_line():
    printed = "".join(path.read_text() for name in ("examples", "engine") for path in (ROOT / name).glob("**/*.py"))
    for block in re.findall(r"```text\n(.*?)```", GALLERY, flags=re.DOTALL):
        for line in block.splitlines():
            assert re.split(r"  |\d|,", line)[0].strip() in printed, line


def test_features_name_only_existing_tests_and_examples():
    rows = [row for row in FEATURES.splitlines() if row.startswith("|")][2:]
    rows = [row for row in rows if not row.startswith("| **")]
    assert len(rows) > 50
    for row in rows:
        name, evidence, source = row.split(" | ")[0], row.split("|")[-2], ""
        assert re.search(r"::|\]\(", evidence), name
        for file, test in re.findall(r"`(\w+\.py)?::(\w+)`", evidence):
            source = (ROOT / "tests" / file).read_text() if file else source
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{name}: {test}"
