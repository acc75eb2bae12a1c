"""The public API: `api.txt` lists every public name with its arguments, and changes only on purpose.

`python tests/test_api.py > tests/api.txt` regenerates the list; `docs/api_stability.md` says what a change means.
"""

import difflib
import importlib
import inspect
import re
from pathlib import Path

import onstep
import onstep.callbacks
from onstep.callback import EVENTS
from onstep.plan import Plan

ROOT = Path(__file__).parent.parent
LISTS = ["onstep", "onstep.callbacks", "onstep.storage", "onstep.testing", "onstep.tools"]
NAMES = {
    "onstep.callbacks.checkpoint": ["load", "save"],
    "onstep.callbacks.json_lines": ["read_json_lines"],
    "onstep.config": ["Config", "OptimizerConfig", "SchedulerConfig", "TrainingConfig", "plot"],
    "onstep.plots": ["group_by_chart", "line_styles", "plot", "spans_decades"],
    "onstep.plan": ["Plan"],
    "onstep.processes": ["ProcessError", "agree", "first", "handle_sigterm", "writes"],
    "onstep.redact": ["redacted", "without_secrets"],
    "onstep.sharding": ["by_path", "create", "fsdp", "make_mesh", "replicated"],
    "onstep.state": ["TrainState"],
}
"""Modules that are imported by name, with the public names of each."""
GIVEN = (onstep.Loop, onstep.Result, onstep.Steps, Plan)
"""Classes that only the engine creates."""


def public():
    """Yield every public object with its public name."""
    for module in LISTS:
        for name in importlib.import_module(module).__all__:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)
    for module, names in NAMES.items():
        for name in names:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def arguments(function):
    """Return a signature such as `(step, callbacks, *, log_every)`: names and kinds; defaults and types may change."""
    shown = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else ...)
        for p in inspect.signature(function).parameters.values()
        if p.name != "self" and not p.name.startswith("_")
    ]
    return str(inspect.Signature(shown)).replace("=Ellipsis", "=...")


def members(kind):
    """Yield the public names that a class defines: attributes listed in its docstring, methods, properties."""
    listed = re.search(r"Attributes:\n(.*?)(\n\n|\Z)", inspect.getdoc(kind) or "", flags=re.DOTALL)
    for name in re.findall(r"^ {4}(\w+):", listed[1], flags=re.MULTILINE) if listed else ():
        yield name, None
    inherited = () if kind is onstep.Callback else (*EVENTS, "observer", "init", "update", "get_state", "set_state")
    for name, found in vars(kind).items():
        if name.startswith("_") or name in inherited:
            continue
        if isinstance(found, property):
            yield name, None
        elif inspect.isfunction(found) or isinstance(found, classmethod | staticmethod):
            yield name, getattr(kind, name)


def listing():
    lines = set()
    for name, found in public():
        made = found not in GIVEN and not (inspect.isclass(found) and issubclass(found, Exception))
        lines.add(name + (arguments(found) if made else ""))
        if inspect.isclass(found):
            lines |= {f"{name}.{member}{arguments(it) if it else ''}" for member, it in members(found)}
    return sorted(lines)


def test_public_api_matches_the_list():
    was = (ROOT / "tests" / "api.txt").read_text().splitlines()
    changes = list(difflib.unified_diff(was, listing(), "api.txt", "onstep", n=0, lineterm=""))
    assert not changes, "\n".join(["On purpose? python tests/test_api.py > tests/api.txt", *changes])


def test_public_names_have_docstrings():
    for name, found in public():
        members_of = members(found) if inspect.isclass(found) else ()
        for member, it in [("", found), *((member, it) for member, it in members_of if it)]:
            assert inspect.getdoc(it), f"{name}.{member}"


def test_public_objects_have_an_example_that_runs():
    for name, found in public():
        is_error = inspect.isclass(found) and issubclass(found, Exception)
        assert is_error or ">>>" in inspect.getdoc(found), name


def test_public_modules_are_documented():
    page = (ROOT / "docs" / "api_stability.md").read_text()
    for module in [*LISTS, *NAMES]:
        assert f"`{module}`" in page


def test_version_is_semantic():
    assert re.fullmatch(r"\d+\.\d+\.\d+", onstep.__version__)


if __name__ == "__main__":
    print(*listing(), sep="\n")
