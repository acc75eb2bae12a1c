"""The command `onstep`: look at a run's directory, check it, compare two runs, and replay a step.

    python -m onstep show runs/x                      # its checkpoints and configuration
    python -m onstep verify runs/x                    # the checksums of all checkpoints
    python -m onstep diff runs/a runs/b               # where two runs differ first
    python -m onstep report runs/x                    # a page about the run
    python -m onstep replay --step 85 train.py ...    # a step of the run of a script

Every command reads only, except that `report` writes its page, and takes `--json`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from onstep.callbacks.checkpoint import Checkpoint

from .compare import compare_runs, first_difference
from .engine import Engine
from .first_bad import BadOperation
from .replay import INTERCEPT, Moment
from .snapshot import unpack
from .storage.checkpoints import Checkpoints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status.

    Args:
        arguments: as on the command line; None for those of this process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     main(["verify", directory])
    no checkpoint in ...
    1
    """
    parser = argparse.ArgumentParser(prog="onstep", description="Look at runs, compare them, and replay their steps.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, text in (
        ("show", _show, "list the checkpoints of a run, and how it was configured"),
        ("verify", _verify, "compare all checkpoints of a run with their checksums"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        command.add_argument("directory")
        command.set_defaults(command=run)
    command = commands.add_parser("diff", help="say where two runs differ first")
    command.add_argument("one")
    command.add_argument("other")
    command.add_argument(
        "--scripts",
        nargs=2,
        metavar="COMMAND",
        help="the two scripts with their arguments, each in quotes: both are replayed to find the exact step",
    )
    command.set_defaults(command=_diff)
    command = commands.add_parser("replay", help="replay a step of the run of a script, which is not changed")
    command.add_argument("--step", type=_steps, required=True, help="the step, counted from 1; or FIRST:LAST")
    command.add_argument(
        "--run",
        metavar="DIR",
        dest="run_directory",
        help="the directory of the run, if the script has several",
    )
    command.add_argument("--checksums", action="store_true", help="print checksums of what the steps received")
    command.add_argument("--pdb", action="store_true", help="stop in a debugger in the uncompiled step")
    command.add_argument("script")
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(command=_replay)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    return options.command(options)


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last or first) + 1)


def _print(options: argparse.Namespace, values: Any, lines: Sequence[str]) -> None:
    print(json.dumps(values, indent=2) if options.json else "\n".join(lines))


def _show(options: argparse.Namespace) -> int:
    checkpoints = Checkpoints(options.directory)
    found = [_describe(checkpoints, step) for step in checkpoints.steps()]
    if not found:
        return _none(options)
    config = found[-1]["config"].get("callbacks", {})
    lines = [f"{'step':>10}  {'epoch':>6}  {'MB':>9}  recorded at this step"]
    for each in found:
        values = ", ".join(f"{name} {value:.6g}" for name, value in each["metrics"].items())
        lines.append(f"{each['step']:>10,}  {each['epoch']:>6}  {each['bytes'] / 1e6:>9.2f}  {values}".rstrip())
    if found[-1]["stopped"]:
        lines.append(f"stopped: {found[-1]['stopped']}")
    lines += [f"{name}: {text}" for name, text in config.items()]
    _print(options, found, lines)
    return 0


def _describe(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    manifest, host = checkpoints.manifest(step), unpack(checkpoints.host(step))
    size = sum(entry[0] for entry in manifest["files"].values())
    names = "epoch", "epoch_step", "stopped"
    return {"step": step, **{name: host[name] for name in names}, "bytes": size} | {
        name: manifest.get(name) or {} for name in ("metrics", "config")
    }


def _verify(options: argparse.Namespace) -> int:
    checkpoints = Checkpoints(options.directory)
    found = {step: checkpoints.damage(step) for step in checkpoints.steps()}
    if not found:
        return _none(options)
    _print(options, found, [f"{step}: {damage or 'intact'}" for step, damage in found.items()])
    return int(any(found.values()))


def _none(options: argparse.Namespace) -> int:
    _print(options, [], [f"no checkpoint in {options.directory}"])
    return 1


def _diff(options: argparse.Namespace) -> int:
    found = compare_runs(options.one, options.other)
    if options.scripts and found.differs_at is not None:
        steps = f"{(found.equal_until or 0) + 1}:{found.differs_at}"
        pairs = zip(options.scripts, (options.one, options.other), strict=True)
        found = dataclasses.replace(found, step=first_difference(*(_checksums(*pair, steps) for pair in pairs)))
    _print(options, found.values(), [str(found)])
    return int(not found.equal)


def _checksums(script: str, directory: str, steps: str) -> dict[int, dict[str, int]]:
    """Return the checksums of what some steps of the run of a script received."""
    command = [sys.executable, "-m", "onstep", "replay", "--json", "--checksums", "--step", steps, "--run", directory]
    done = subprocess.run([*command, *shlex.split(script)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script} could not be replayed; its error is above.")
    return {int(step): found for step, found in json.loads(done.stdout.splitlines()[-1]).items()}


class _Replayed(SystemExit):
    """Ends the script after the replay."""


def _replay(options: argparse.Namespace) -> int:
    wanted = None if options.run_directory is None else os.path.realpath(options.run_directory)

    def replay(engine: Engine, arguments: dict[str, Any]) -> None:
        directory = next((cb.directory for cb in engine.callbacks.values() if isinstance(cb, Checkpoint)), None)
        if wanted is None or (directory is not None and os.path.realpath(directory) == wanted):
            moments = engine.replay(directory=directory, step=options.step, **arguments)
            if options.checksums:
                found = {moment.step: moment.checksums() for moment in moments}
                lines = [f"{step}  {name}  {value:08x}" for step, each in found.items() for name, value in each.items()]
                print(json.dumps(found) if options.json else "\n".join(lines))
            else:
                for moment in moments:
                    _report_moment(options, moment)
            raise _Replayed(0)

    with _script(options.script, options.arguments), _intercepted(replay):
        try:
            runpy.run_path(options.script, run_name="__main__")
        except _Replayed:
            return 0
    where = "" if wanted is None else f" with the directory {options.run_directory}"
    print(f"{options.script} made no run{where}, so there is no step to replay.", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _script(path: str, arguments: list[str]) -> Iterator[None]:
    """Let a script see its own arguments and its own folder, as `python script.py` does."""
    argv, paths = sys.argv, sys.path[:]
    sys.argv = [path, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, paths


@contextlib.contextmanager
def _intercepted(replay: Any) -> Iterator[None]:
    token = INTERCEPT.set(replay)
    try:
        yield
    finally:
        INTERCEPT.reset(token)


def _report_moment(options: argparse.Namespace, moment: Moment) -> None:
    start = "the initial state" if moment.checkpoint is None else f"checkpoint {moment.checkpoint}"
    bad, found = moment.bad_results(), None
    if options.pdb:
        print(f"step {moment.step}, from {start}: stopping in the uncompiled step", file=sys.stderr)
        moment.debug()
        return
    if bad:
        found = moment.first_bad()
        lines = [f"step {moment.step}, from {start}: not finite: {', '.join(bad)}"]
        if found is None:
            lines.append("The uncompiled step stays finite. The compiled one rounds differently.")
        else:
            lines.append(f"first bad operation: {found}")
    else:
        values = ", ".join(f"{name} {float(value):.6g}" for name, value in moment.run()[1].items())
        lines = [f"step {moment.step}, from {start}: all results are finite", values]
    _print(options, {"step": moment.step, "checkpoint": moment.checkpoint, "bad": bad, "first": _values(found)}, lines)


def _values(found: BadOperation | None) -> Any:
    return None if found is None else dataclasses.asdict(found)
