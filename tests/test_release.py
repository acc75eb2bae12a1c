"""The contents of a release: its metadata, and the wheel and sdist that `make dist` builds."""

import email
import os
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import onstep
import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIST = Path(os.environ.get("ONSTEP_DIST", "dist"))
built = pytest.mark.skipif("ONSTEP_DIST" not in os.environ, reason="run by `make dist`")


def wheel():
    return zipfile.ZipFile(next(DIST.glob("onstep-*.whl")))


def information(name):
    """Return the text of a metadata file of the wheel."""
    return wheel().read(f"onstep-{onstep.__version__}.dist-info/{name}").decode()


def sources():
    """Return the files that the wheel must hold: bytes by name."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
        for folder, package in (("engine", "onstep"), ("callbacks", "onstep/callbacks"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@built
def test_wheel_holds_only_the_package():
    code = {name: wheel().read(name) for name in wheel().namelist() if ".dist-info/" not in name}
    assert code == sources()
    assert "onstep/py.typed" in code


@built
def test_wheel_metadata_matches_the_project():
    said = email.message_from_string(information("METADATA"))
    assert (said["Name"], said["Version"], said["Summary"]) == ("onstep", onstep.__version__, PROJECT["description"])
    assert (said["License-Expression"], said["Requires-Python"]) == (PROJECT["license"], PROJECT["requires-python"])
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    needs = {re.split(r"[<>=;\s]", need)[0] for need in said.get_all("Requires-Dist") if "extra ==" not in need}
    assert needs == {re.split(r"[<>=]", need)[0] for need in PROJECT["dependencies"]}
    assert information("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert "Tag: py3-none-any" in information("WHEEL")


@built
def test_sdist_has_the_files_to_build_and_test():
    with tarfile.open(next(DIST.glob("onstep-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", ".ci/run"} <= names
    for folder in ("engine", "callbacks", "tests", "examples", "docs"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")} <= names
    assert not [name for name in names if re.search(r"(^|/)(__pycache__|runs|\.venv[^/]*|build|site)(/|$)", name)]


def test_citation_has_the_current_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (onstep.__version__, PROJECT["license"])


def test_pre_commit_uses_the_ruff_version_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = next(need for need in PROJECT["optional-dependencies"]["dev"] if need.startswith("ruff"))
    assert hooks[0]["rev"] == pinned.replace("ruff==", "v")


def test_requirements_have_a_lower_bound_and_no_upper_bound():
    extras = PROJECT["optional-dependencies"]
    for need in [*PROJECT["dependencies"], *extras["config"], *extras["demo"], *extras["examples"]]:
        assert re.fullmatch(r"onstep\[[\w,]+\]|[\w.-]+(\[\w+\])?>=\d+(\.\d+)*", need), need


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 45
