"""The package as such: imports, arrows between files, size, and nothing unsafe."""

import ast
import io
import re
import subprocess
import sys
import threading
import tokenize
from pathlib import Path

import onstep
import onstep.callbacks
import pytest

ROOT = Path(__file__).parent.parent
ENGINE = sorted((ROOT / "engine").glob("*.py"))
CALLBACKS = sorted((ROOT / "callbacks").glob("*.py"))
APART = ("config", "state")
"""Modules that nothing imports but those who use them."""
CORE = ("engine", "events", "loop", "callback", "cadence", "compiled", "metrics", "feed")


def imports(path, everywhere=True):
    """The modules that a file imports, with dots for relative ones; or those that it always does."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", [p for p in ENGINE if p.stem not in APART], ids=lambda path: path.stem)
def test_the_engine_imports_no_callback_and_only_jax_and_numpy(path):
    allowed = set(sys.stdlib_module_names) | {"jax", "numpy", "__future__"}
    for name in imports(path, everywhere=False):
        assert name.startswith(".") or name.split(".")[0] in allowed
    assert not any("callbacks" in name for name in imports(path))


@pytest.mark.parametrize("path", [p for p in CALLBACKS if p.stem != "__init__"], ids=lambda path: path.stem)
def test_a_callback_imports_no_other(path):
    assert not any(name.startswith((".", "onstep.callbacks")) for name in imports(path))


def test_nothing_imports_the_folders_by_their_own_names():
    for path in [*ENGINE, *CALLBACKS, *ROOT.glob("examples/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("bench*/*.py")]:
        assert not {"engine", "callbacks"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("module", ["onstep", "onstep.callbacks"])
def test_an_import_loads_no_heavy_package_prints_nothing_and_starts_nothing(module):
    code = f"""
import threading, signal, logging, sys, atexit
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
import jax
import {module}
heavy = {{"orbax", "tensorboardX", "flax", "clu", "optax", "tqdm", "tensorflow", "pydantic", "yaml", "matplotlib",
         "wandb", "mlflow"}}
heavy &= set(sys.modules)
after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
assert not heavy, heavy
assert before == after
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def lines_of_code(path):
    """Lines that hold code: no docstring, no comment, no blank."""
    source, lines = path.read_text(), set()
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_core_stays_within_a_thousand_lines():
    assert sum(lines_of_code(ROOT / "engine" / f"{name}.py") for name in CORE) <= 1000


def test_the_loop_fits_on_a_screen():
    methods = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse((ROOT / "engine" / "engine.py").read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert methods["_turns"] + methods["_advance"] <= 60


def test_nothing_unsafe_is_called():
    unsafe = re.compile(r"\bpickle\b(?!\.?\")|cloudpickle|\beval\(|\bexec\(|allow_pickle=True|yaml\.load\(")
    for path in ENGINE + CALLBACKS:
        code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
        assert not unsafe.search(code), path


def test_everything_public_is_exported_and_documented():
    for module in (onstep, onstep.callbacks):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name
    exported = {name for name in vars(onstep.callbacks) if name in onstep.callbacks.__all__}
    assert exported == set(onstep.callbacks.__all__)


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest
    assert newest[1] == onstep.__version__


@pytest.mark.parametrize("path", [p for p in CALLBACKS if p.stem != "__init__"], ids=lambda path: path.stem)
def test_any_callback_can_be_deleted(path, tmp_path):
    """The others import without it, once its line in `__init__` is gone."""
    folder = tmp_path / "rest"
    folder.mkdir()
    for other in CALLBACKS:
        if other != path:
            lines = other.read_text().splitlines(keepends=True)
            (folder / other.name).write_text("".join(line for line in lines if f"from .{path.stem} import" not in line))
    names = [
        line.split(" import ")[1] for line in (folder / "__init__.py").read_text().splitlines() if "import" in line
    ]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rest; [getattr(rest, n) for n in {names}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_this_process_has_no_stray_thread():
    assert all(thread is threading.main_thread() or thread.daemon for thread in threading.enumerate())
