"""The command `onstep`: look at the directory of a run, check it, compare two runs, and replay a step.

    python -m onstep show runs/x                      # how far the run is, and its checkpoints
    python -m onstep verify runs/x                    # the checksums of all checkpoints
    python -m onstep diff runs/a runs/b               # where two runs differ first
    python -m onstep report runs/x                    # a page about the run
    python -m onstep replay --step 85 train.py ...    # a step of the run of a script

Every command reads only, except that `report` writes its page. docs/guides/command_line.md describes the output.
This module stands above the engine and the callbacks, and uses both as any script does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from onstep.callbacks import Report
from onstep.callbacks.json_lines import read_json_lines

from .compare import compare_runs, find_parting
from .engine import Engine
from .means import merges, to_float
from .records import Record
from .replay import INTERCEPT, Moment
from .snapshot import unpack
from .storage.checkpoints import Checkpoints

FINE, FOUND, FAILED = 0, 1, 2
"""Exit statuses: nothing was found; a difference, damage or a NaN was found; the command could not do its work."""
SHOWN = 3
"""How many of the results that are not finite are named."""
BROKEN_PIPE = 141
"""The exit status if nobody reads the output to its end: as a shell reports the signal SIGPIPE."""
UNREADABLE = (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile)
"""What reading a damaged file of a checkpoint can raise."""


class CommandError(Exception):
    """The command could not do its work; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    Args:
        arguments: as on the command line; None for those of this process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(sys.stdout):
    ...     main(["verify", directory])
    onstep: ... is empty.
    2
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again when it ends
        return BROKEN_PIPE
    except CommandError as error:
        print(f"onstep: {error}", file=sys.stderr)
        return FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onstep",
        description="Look at runs, compare them, and replay their steps.",
        epilog="Exit status: 0 if all is well, 1 if a difference, damage or a NaN was found, 2 after an error.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(command=run)
        return command

    command = add("show", _show, "show how far a run is, and its checkpoints")
    command.add_argument("directory", help="the directory of the run's Checkpoint")
    command = add("verify", _verify, "compare all checkpoints of a run with their checksums")
    command.add_argument("directory", help="the directory of the run's Checkpoint")
    command = add("diff", _diff, "say where two runs differ first")
    command.add_argument("one", help="the directory of a run")
    command.add_argument("other", help="that of another one")
    command.add_argument(
        "--scripts",
        nargs=2,
        metavar="SCRIPT",
        help="both scripts with their arguments, each in quotes: they are replayed to find the exact step",
    )
    command = add("report", _report, "write a page about a run")
    command.add_argument("directory", help="the directory of the run's Checkpoint")
    command.add_argument("-o", metavar="FILE", dest="file", help="the page; by default report.html in the directory")
    command = add("replay", _replay, "replay a step of the run of a script, which is not changed")
    command.add_argument("--step", type=_steps, required=True, help="the step, counted from 1; or FIRST:LAST")
    command.add_argument("--run", metavar="DIR", help="the directory of the run, if the script makes several")
    command.add_argument("--checksums", action="store_true", help="print checksums of what each step received")
    command.add_argument("--pdb", action="store_true", help="stop in a debugger in the uncompiled step")
    command.add_argument("-m", action="store_true", dest="module", help="the script is a module, as for python -m")
    command.add_argument("script", help="the script that made the run")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the script")
    return parser


def _steps(text: str) -> range:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not steps or steps[0] < 1:
        raise argparse.ArgumentTypeError(f"needs a step from 1 on, or two as FIRST:LAST, got {text!r}")
    return steps


def _print(options: argparse.Namespace, values: Any, text: str) -> None:
    print(json.dumps(_plain(values), indent=2, allow_nan=False) if options.json else text)


def _plain(value: Any) -> Any:
    """Return JSON values with strings in place of NaN and infinities, as `JSONLines` writes them."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


# What a directory holds.


def _open(directory: str) -> Checkpoints:
    """Return the checkpoints in a directory, of which there is at least one."""
    try:
        checkpoints = Checkpoints(directory)
        names = sorted(os.listdir(checkpoints.directory))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{directory} cannot be read: {reason}.") from None
    if checkpoints.steps():
        return checkpoints
    if not names:
        raise CommandError(f"{directory} is empty.")
    if os.path.basename(checkpoints.directory) in map(str, (above := Checkpoints(checkpoints.path(".."))).steps()):
        raise CommandError(f"{directory} is one checkpoint. Give the directory of its run: {above.directory}.")
    runs = [os.path.join(directory, name) for name in names if Checkpoints(checkpoints.path(name)).steps()]
    advice = f"Runs in it are {', '.join(runs)}." if runs else f"It holds {', '.join(names[:9])}."
    raise CommandError(f"{directory} holds no checkpoint. {advice}")


def _newest(checkpoints: Checkpoints) -> dict[str, Any]:
    """Return what the newest intact checkpoint holds besides arrays."""
    for step in reversed(checkpoints.steps()):
        if not _damage(checkpoints, step):
            return unpack(checkpoints.host(step))
    raise CommandError(f"{checkpoints.directory} holds no intact checkpoint.")


def _damage(checkpoints: Checkpoints, step: int) -> str | None:
    try:
        return checkpoints.damage(step)
    except ValueError as error:  # a newer version wrote it
        raise CommandError(str(error)) from None


def _records(directory: str) -> list[Record]:
    """Return what `JSONLines` has recorded in files in a directory; nothing if there are none."""
    records = []
    for name in sorted(os.listdir(directory)):
        if name.endswith(".jsonl") and not re.search(r"\.\d+\.jsonl$", name):  # a number: that of an earlier run
            with contextlib.suppress(*UNREADABLE, TypeError, AttributeError):  # other lines of JSON
                history = read_json_lines(os.path.join(directory, name))
                points = [
                    (step, key, value)
                    for key in history
                    for step, value in zip(history.steps(key), history[key], strict=True)
                ]
                records += [Record(step, 0, {key: value}) for step, key, value in points]
    return records


def _by_step(records: Sequence[Record]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in records:
        found.setdefault(record.step, {}).update(record.values)
    return found


# The commands, in the order of the parser. Each prints, and returns the exit status.


def _show(options: argparse.Namespace) -> int:
    checkpoints = _open(options.directory)
    rows, manifest, host = [], dict[str, Any](), dict[str, Any]()
    for step in checkpoints.steps():
        try:
            manifest, host = checkpoints.manifest(step), unpack(checkpoints.host(step))
            size = sum(size for size, _ in manifest["files"].values())
            row = {"epoch": host["epoch"], "bytes": size, "metrics": manifest["metrics"], "damage": None}
        except UNREADABLE as error:
            row = {"epoch": None, "bytes": None, "metrics": {}, "damage": str(error) or type(error).__name__}
        rows.append({"step": step, **row})
    metric, mode = manifest.get("best") or (None, None)
    found = {
        "directory": checkpoints.directory,
        "step": host.get("step"),
        "epoch": host.get("epoch"),
        "ended": "stopped" if host.get("stopped") else "finished" if host.get("finished") else None,
        "reason": host.get("stopped"),
        "resumable": not (host.get("finished") or (host.get("stopped") and host["final"])),
        "best": {"metric": metric, "mode": mode, "step": checkpoints.best_step()} if metric else None,
        "checkpoints": rows,
        "values": host.get("latest", {}),
        "config": manifest.get("config") or {},
    }
    _print(options, found, "\n".join(_show_lines(options.directory, found)))
    return FOUND if any(row["damage"] for row in rows) else FINE


def _show_lines(directory: str, found: dict[str, Any]) -> Iterator[str]:
    best = found["best"] or {"metric": "", "step": None}
    if found["step"] is not None:
        at = f"at step {found['step']:,} (epoch {found['epoch']:,})"
        ends = {"stopped": f"stopped {at}: {found['reason']}{' (resumable)' * found['resumable']}"}
        ends |= {"finished": f"finished {at}", None: f"saved {at}; the run goes on from here, or it was interrupted"}
        yield f"{directory}: {ends[found['ended']]}\n"
    yield f"{'step':>10}  {'epoch':>6}  {'MB':>9}  {best['metric']}".rstrip()
    for row in found["checkpoints"]:
        if row["damage"]:
            yield f"{row['step']:>10,}  damaged: {row['damage']}"
        else:
            value = f"{row['metrics'][best['metric']]:.6g}" if best["metric"] in row["metrics"] else ""
            marked = f"{value:<{len(best['metric'])}}  best" if row["step"] == best["step"] else value
            yield f"{row['step']:>10,}  {row['epoch']:>6,}  {row['bytes'] / 1e6:>9.2f}  {marked}".rstrip()
    if found["values"]:
        yield f"\nlatest values: {', '.join(f'{name} {value:.6g}' for name, value in found['values'].items())}"
    if callbacks := found["config"].get("callbacks"):
        yield f"callbacks: {', '.join(callbacks.values())}"


def _verify(options: argparse.Namespace) -> int:
    checkpoints = _open(options.directory)
    found = {step: _damage(checkpoints, step) for step in checkpoints.steps()}
    lines = [f"{step}: {damage or 'intact'}" for step, damage in found.items()]
    _print(options, {"directory": checkpoints.directory, "damage": found}, "\n".join(lines))
    return FOUND if any(found.values()) else FINE


def _diff(options: argparse.Namespace) -> int:
    one, other = _open(options.one), _open(options.other)
    try:
        found = compare_runs(
            one.directory, other.directory, (_by_step(_records(one.directory)), _by_step(_records(other.directory)))
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    if options.scripts and not found.equal:
        first, last = 1, min(one.steps()[-1], other.steps()[-1])
        if found.checkpoints is not None:
            first, last = (found.checkpoints.equal_until or 0) + 1, found.checkpoints.differs_at or last
        pairs = zip(options.scripts, (one.directory, other.directory), strict=True)
        a, b = [_checksums(script, directory, f"{first}:{last}") for script, directory in pairs]
        found = dataclasses.replace(found, parting=find_parting(a, b, found.checkpoints))
    _print(options, found.values(), str(found))
    return FINE if found.equal and not found.damaged else FOUND


def _checksums(script: str, directory: str, steps: str) -> dict[int, dict[str, int]]:
    """Return the checksums of what some steps of the run of a script received."""
    command = [sys.executable, "-m", "onstep", "replay", "--json", "--checksums", "--step", steps, "--run", directory]
    done = subprocess.run([*command, *shlex.split(script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandError(f"{script} could not be replayed; its error is above.")
    return {found["step"]: found["checksums"] for found in json.loads(done.stdout)["steps"]}


def _report(options: argparse.Namespace) -> int:
    checkpoints = _open(options.directory)
    file = options.file or checkpoints.path("report.html")
    if options.file is None and os.path.lexists(file):
        raise CommandError(f"{file} exists. Pass -o FILE to write another page, or the same to replace it.")
    host = _newest(checkpoints)
    metric, mode = checkpoints.manifest(host["step"]).get("best") or (None, "min")
    Report(file).write_saved(Checkpoints(options.directory, best=metric, mode=mode), host, _records(options.directory))
    _print(
        options, {"file": os.path.abspath(file), "step": host["step"]}, f"{file}: the run up to step {host['step']:,}"
    )
    return FINE


class _Replayed(SystemExit):
    """Ends the script after the replay."""


class _Replay:
    """What replaces the runs of a script: the wanted one is replayed, and the others run as usual.

    Attributes:
        found: what was found about each step.
        done: whether the replay is over.
        error: why the step could not be replayed.
        passed: the directories of the runs that were not replayed, None for a run without a Checkpoint.
    """

    def __init__(self, options: argparse.Namespace):
        self.found: list[dict[str, Any]] = []
        self.done: bool = False
        self.error: CommandError | None = None
        self.passed: list[str | None] = []
        self._options = options
        self._wanted = None if options.run is None else os.path.realpath(options.run)

    def __call__(self, engine: Engine, arguments: dict[str, Any]) -> None:
        """Replay a run if it is the wanted one, and end the script."""
        if self.done:  # the script has caught its end
            raise _Replayed
        saved = [each for callback in engine.callbacks.values() if (each := callback.checkpoints) is not None]
        directory = saved[0].directory if saved else None
        if self._wanted is not None and (directory is None or os.path.realpath(directory) != self._wanted):
            self.passed.append(directory)
            return
        try:
            for moment in engine.replay(directory=directory, step=self._options.step, **arguments):
                self._add(moment)
        except (RuntimeError, ValueError) as error:
            if not _raised_by_onstep(error):
                raise
            self.error = CommandError(str(error))
        self.done = True
        raise _Replayed

    def _add(self, moment: Moment) -> None:
        start = "the initial state" if moment.checkpoint is None else f"checkpoint {moment.checkpoint}"
        found: dict[str, Any] = {"step": moment.step, "checkpoint": moment.checkpoint}
        if self._options.pdb:
            print(f"step {moment.step}, from {start}: stopping in the uncompiled step", file=sys.stderr)
            moment.debug()
            return
        if self._options.checksums:
            found["checksums"] = moment.checksums()
            text = "\n".join(f"{moment.step}  {name}  {value:08x}" for name, value in found["checksums"].items())
        else:
            bad = moment.bad_results()
            first = moment.first_bad() if bad else None
            metrics = {name: to_float(value, name) for name, value in moment.run()[1].items() if not merges(value)}
            found |= {"metrics": metrics, "bad": bad, "first_bad": first and dataclasses.asdict(first)}
            values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            text = f"step {moment.step}, from {start}: all results are finite\n{values}"
            if bad:
                cause = "The uncompiled step stays finite. The compiled one rounds differently."
                more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
                text = f"step {moment.step}, from {start}: not finite: {', '.join(bad[:SHOWN])}{more}\n"
                text += f"first bad operation: {first}" if first else cause
        self.found.append(found)
        if not self._options.json and jax.process_index() == 0:
            print(text)


def _replay(options: argparse.Namespace) -> int:
    if options.run is not None:
        _open(options.run)
    if not options.module and not os.path.isfile(options.script):
        raise CommandError(f"{options.script} is no file. Give the script that made the run, after all options.")
    replay = _Replay(options)
    _run_script(options, replay)
    if replay.error:
        raise replay.error
    if not replay.done:
        runs = [directory or "a run without a Checkpoint" for directory in replay.passed]
        where = "" if options.run is None else f" with the directory {options.run}; it made {', '.join(runs) or 'none'}"
        raise CommandError(f"{options.script} made no run{where}. There is no step to replay.")
    if options.json and jax.process_index() == 0:
        print(json.dumps(_plain({"script": options.script, "steps": replay.found}), indent=2, allow_nan=False))
    return FOUND if any(found.get("bad") for found in replay.found) else FINE


def _run_script(options: argparse.Namespace, replay: _Replay) -> None:
    """Run a script as `python` does, with its runs intercepted. What it prints is not part of a JSON document."""
    argv, path, token = sys.argv, sys.path[:], INTERCEPT.set(replay)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, os.getcwd() if options.module else os.path.dirname(os.path.abspath(options.script)))
    output = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    try:
        with output:
            if options.module:
                runpy.run_module(options.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(options.script, run_name="__main__")
    except _Replayed:
        pass
    except SystemExit as error:
        if error.code:
            raise CommandError(f"{options.script} ended before its run, with exit status {error.code}.") from None
    except Exception as error:
        traceback.print_exc()
        raise CommandError(f"{options.script} failed, so there is no step to replay; its error is above.") from error
    finally:
        sys.argv, sys.path[:] = argv, path
        INTERCEPT.reset(token)


def _raised_by_onstep(error: BaseException) -> bool:
    """Return whether an error was raised in a line of onstep, so that its message says what to do."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").partition(".")[0] == "onstep"
