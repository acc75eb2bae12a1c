"""The structure of the package: what imports what, what is private, and that nothing unsafe is called."""

import ast
import collections
import importlib
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import onstep
import onstep.callbacks
import pytest

ROOT = Path(__file__).parent.parent
ENGINE = {
    ".".join(path.relative_to(ROOT / "engine").with_suffix("").parts): path for path in (ROOT / "engine").rglob("*.py")
}
"""The files of `onstep` by the name of their module below it, such as `data.stream`."""
CALLBACKS = {path.stem: path for path in (ROOT / "callbacks").glob("*.py")}
SUPPORT = {path.stem: path for path in (ROOT / "callbacks" / "_support").glob("*.py")}
OUTSIDE = {*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/*.py")}
NO_INIT = [name for name in CALLBACKS if name != "__init__"]

LAYERS = """
    __main__
    cli
    __init__
    testing
    tools
    plots
    event_files record_files
    engine
    compare
    plan
    replay
    steps
    loop
    result
    events
    evaluate influences
    compiled.step
    compiled.blocks compiled.function compiled.throttle
    compiled.cost compiled.origin compiled.__init__
    data.stream
    data.source data.prefetch
    data.batches
    data.stacking data.__init__
    metrics
    means
    callback
    cadence
    storage.__init__
    storage.trees
    storage.writer
    storage.checkpoints
    storage.manifest storage.orbax_trees storage.lock
    storage.files
    views first_bad
    operations
    blame
    records snapshot representation spans
    placement sharding
    processes
    config fields
    checks exclusive interrupts redact state
    messages activity
    trees version source_lines
"""
"""The modules of `onstep` from top to bottom. Imports point downwards, to a line further below."""

UPWARDS = {("callback", "loop")}
"""The only import that points upwards: every event is given the loop, and its signature says so."""

PUBLIC = {
    "onstep": set(onstep.__all__) | {"__version__"},
    "onstep.tools": None,
    "onstep.processes": {"ProcessError", "agree", "first", "handle_sigterm", "writes"},
    "onstep.redact": {"redacted", "without_secrets"},
    "onstep.plots": {"COLOURS", "DASHES", "plot", "group_by_chart", "line_styles", "spans_decades"},
    "onstep.storage": None,
}
"""What built-in callbacks may import of the engine: public names, so that whatever they do, yours can do as well.
None means everything in `__all__`."""

PRIVATE = {
    ("activity", "sys._current_frames"): "the documented way to see what another thread is doing",
    ("callback", "callback._reset"): "a public method could collide with one of a subclass",
    ("loop", "earlier._stream"): "a Result continues the iterator of its run, which is nobody else's business",
}
"""Reads of another object's private attributes by (module, text), each with its reason. At most ten."""

WAITS = {
    "callbacks/checkpoint.py": "a callback's arguments, for the configuration that is saved",
    "callbacks/fingerprint.py": "the hashes of a due step",
    "callbacks/histograms.py": "a record of histograms",
    "callbacks/images.py": "images to be written",
    "callbacks/nan_guard.py": "the report of a NaN",
    "callbacks/profiler.py": "the last step of a trace",
    "callbacks/repeat_step.py": "the comparison of two calls",
    "callbacks/report.py": "no device: its curves are lists of numbers on the host",
    "callbacks/summary.py": "means and deviations of the parameters, before the first step",
    "callbacks/swa.py": "whether anything has been averaged yet, in an evaluation or at the end",
    "engine/cli.py": "the metrics of a replayed step",
    "engine/compiled/throttle.py": "more than in_flight calls",
    "engine/data/batches.py": "arrays of which Batches is made",
    "engine/data/prefetch.py": "a transfer, in a thread of its own",
    "engine/data/stacking.py": "batches on a device, when a block is stacked",
    "engine/evaluate.py": "an evaluation",
    "engine/blame.py": "every result of a step that runs one operation at a time",
    "engine/operations.py": "the condition of a loop or branch that runs one operation at a time",
    "engine/loop.py": "values on the device that are given to loop.log",
    "engine/means.py": "the means of a window",
    "engine/metrics.py": "the means of a window, and MOST_PENDING unread calls",
    "engine/placement.py": "arrays that are compared, replicated or divided over processes",
    "engine/replay.py": "whether the results of a replayed step are finite, and checksums",
    "engine/snapshot.py": "the random key, at the start and in a snapshot",
    "engine/storage/orbax_trees.py": "the copy of a small state and its carries, in a save",
    "engine/storage/trees.py": "numbers that are no arrays",
    "engine/storage/writer.py": "the copy of a large state and its carries by Orbax, in a save",
    "engine/testing.py": "batches that a test compares",
}
"""The files that may read an array from the device, or wait for it, and what for. docs/loop.md says when they do."""


def imports(path, always=False):
    """Yield (module, names) of every import in a file, or of those that run when it is imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if always else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names)


def targets(module, path):
    """Yield the modules of `onstep` that one of them imports, type-checking imports included."""
    package = module.split(".")[:-1]
    for name, names in imports(path):
        if not name.startswith("."):
            outside = module == "cli" and name.startswith("onstep.callbacks")
            assert outside or not name.startswith("onstep"), f"{module} imports {name}: use a relative import"
            continue
        level = len(name) - len(name.lstrip("."))
        base = [*package[: len(package) - level + 1], *filter(None, name.lstrip(".").split("."))]
        for imported in names:
            for candidate in (".".join([*base, imported]), ".".join(base), ".".join([*base, "__init__"])):
                if candidate in ENGINE:
                    yield candidate
                    break


def test_imports_of_the_engine_point_downwards():
    rank = {name: number for number, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
    assert set(rank) == set(ENGINE), "every module has its place in LAYERS"
    upwards = {
        (module, target)
        for module, path in ENGINE.items()
        for target in targets(module, path)
        if rank[target] <= rank[module]
    }
    assert upwards == UPWARDS


def test_only_the_command_line_imports_callbacks_and_nothing_imports_it():
    for module, path in ENGINE.items():
        if module == "cli":
            continue
        names = {name for name, _ in imports(path)} | {n for _, names in imports(path) for n in names}
        assert not any(re.search(r"\bcallbacks\b", name) for name in names), module
        assert module == "__main__" or "cli" not in names, module


def test_the_engine_needs_only_jax_and_numpy_to_be_imported():
    allowed = set(sys.stdlib_module_names) | {"jax", "numpy", "__future__"}
    for module, path in ENGINE.items():
        if module not in ("config", "state", "cli"):  # imported only by users who have what they need
            for name, _ in imports(path, always=True):
                assert name.startswith(".") or name.split(".")[0] in allowed, (module, name)


def names_of(module):
    return set(importlib.import_module(module).__all__) if PUBLIC[module] is None else PUBLIC[module]


@pytest.mark.parametrize("name", [*NO_INIT, *(f"_support/{name}" for name in SUPPORT)])
def test_callbacks_import_only_public_names(name):
    path = ROOT / "callbacks" / f"{name}.py"
    for module, names in imports(path):
        if module.split(".")[0] == "onstep":
            for imported in names:
                within = f"{module}.{imported}"
                assert within in PUBLIC or imported in names_of(module), within
        elif module.startswith("."):
            inside = module.startswith("._support") or (name.startswith("_support") and module.startswith("."))
            assert inside, f"{name} imports {module}"


def private_reads(path):
    """Yield, as text, every read of a private attribute of an object that is not `self`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            named_tuple = node.attr in ("_replace", "_fields", "_asdict")  # public, whatever their names say
            if owner not in ("self", "cls", "super()", "os") and not named_tuple:
                yield f"{owner}.{node.attr}"


def test_no_class_reads_private_attributes_of_another_object():
    found = collections.Counter()
    for module, path in [*ENGINE.items(), *CALLBACKS.items(), *((f"_support.{k}", v) for k, v in SUPPORT.items())]:
        found.update((module, text) for text in private_reads(path))
    assert set(found) == set(PRIVATE)
    assert found.total() <= 10


def waits(path):
    """Whether a file refers to something that reads an array, or waits for it."""
    tree = ast.parse(path.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    ends = "block_until_ready", "device_get", "transfer_guard_device_to_host", "copied.wait"
    return bool(
        called & {"block_until_ready", "device_get", "fetch", "read", "to_float", "to_host"}
        or "np.asarray" in attributes
        or any(text.endswith(ends) for text in called | attributes)
    )


def test_only_the_listed_files_wait_for_the_device():
    paths = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in paths if waits(path)} == set(WAITS)


def test_every_folder_of_the_package_is_installed():
    with open(ROOT / "pyproject.toml", "rb") as file:
        installed = tomllib.load(file)["tool"]["setuptools"]
    folders = {
        str(init.parent.relative_to(ROOT))
        for top in ("engine", "callbacks")
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(installed["package-dir"].values()) == folders
    assert set(installed["package-dir"]) == set(installed["packages"])


def test_nothing_imports_the_folders_by_their_own_names():
    for path in [*ENGINE.values(), *CALLBACKS.values(), *SUPPORT.values(), *OUTSIDE]:
        assert not {"engine", "callbacks"} & {name.split(".")[0] for name, _ in imports(path)}


@pytest.mark.parametrize("module", ["onstep", "onstep.callbacks", "onstep.tools", "onstep.testing", "onstep.storage"])
def test_an_import_loads_no_heavy_package_prints_nothing_and_starts_nothing(module):
    code = f"""
import threading, signal, logging, sys, atexit
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
import jax
import {module}
heavy = {{"orbax", "tensorboardX", "flax", "clu", "optax", "tqdm", "tensorflow", "pydantic", "yaml", "matplotlib",
         "wandb", "mlflow", "onstep.cli"}}
heavy &= set(sys.modules)
after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.root.handlers)
assert not heavy, heavy
assert before == after
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_loop_fits_on_one_screen():
    methods = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(ENGINE["loop"].read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert methods["iterate"] <= 25
    assert methods["_run_steps"] <= 55


def test_public_modules_are_reached_by_importing_onstep_alone():
    pages = {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} - {"index", "onstep"}
    code = f"import onstep\nfor name in {sorted(pages)}: getattr(onstep, name)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="onstep has no 'shardings'"):
        onstep.shardings  # noqa: B018


def test_nothing_unsafe_is_called():
    unsafe = re.compile(r"\bpickle\b(?!\.?\")|cloudpickle|\beval\(|\bexec\(|allow_pickle=True|yaml\.load\(")
    for path in [*ENGINE.values(), *CALLBACKS.values(), *SUPPORT.values()]:
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


@pytest.mark.parametrize("name", NO_INIT)
def test_any_callback_can_be_deleted(name, tmp_path, monkeypatch):
    """The others import without it, once its two lines in `__init__` are removed."""
    package = f"without_{name}"
    folder = tmp_path / package
    (folder / "_support").mkdir(parents=True)
    for support in SUPPORT.values():
        (folder / "_support" / support.name).write_text(support.read_text())
    for other, path in CALLBACKS.items():
        if other != name:
            lines = path.read_text().splitlines(keepends=True)
            (folder / path.name).write_text("".join(line for line in lines if f"from .{name} import" not in line))
    init = folder / "__init__.py"
    imported = re.search(rf"from \.{name} import (\w+)", CALLBACKS["__init__"].read_text())
    init.write_text(init.read_text().replace(f'    "{imported[1]}",\n', ""))
    monkeypatch.syspath_prepend(tmp_path)
    rest = importlib.import_module(package)
    loaded = [module for module in sys.modules if module.partition(".")[0] == package]
    for module in loaded:
        del sys.modules[module]
    assert all(hasattr(rest, public) for public in rest.__all__)
    assert len(rest.__all__) == len(onstep.callbacks.__all__) - 1
    assert {f"{package}.{other}" for other in NO_INIT if other != name} <= set(loaded)


def test_this_process_has_no_stray_thread():
    assert all(thread is threading.main_thread() or thread.daemon for thread in threading.enumerate())
