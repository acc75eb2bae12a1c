"""Save checkpoints with Orbax and resume from them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import onstep
from onstep import Cadence, Callback, Loop, Record, Snapshot, every, processes
from onstep.redact import without_secrets
from onstep.storage import Checkpoints, CheckpointWriter, Lock, check_storable, load, save
from onstep.tools import check_int, check_mode, local_path, log_user, warn_missing_metric, warn_user

__all__ = ["Checkpoint", "load", "save"]


@dataclass(eq=False, repr=False)
class Checkpoint(Callback):
    """Saves the whole run in the background, and resumes from the newest checkpoint.

    A checkpoint holds the state, every callback's carry and host state, the counters, the position in the data and
    the open windows, so a resumed run ends in the same bytes as one that was never interrupted. Use one directory
    for one run: `<directory>/N` is the checkpoint of step N, with checksums that are verified when it is read.
    Running the same script again resumes a run that was interrupted, and leaves one that is finished unchanged.

    Args:
        directory: of the run.
        when: when to save; a plain int means steps. The last step is always saved.
        keep: how many of the newest checkpoints to keep.
        keep_every: a number of steps; the first checkpoint of every so many steps is a milestone, and kept for ever.
        best: a metric; the checkpoint with its best value is kept as well. Only checkpoints at whose step the metric
            was recorded compete.
        mode: whether `"min"` or `"max"` of `best` is best.
        resume: True resumes from the newest intact checkpoint, if there is one. A step or `"best"` resumes from that
            checkpoint, and moves later ones to `<directory>/archive`. False refuses a directory that holds a run.
        start: a checkpoint from which a new run starts, such as `"runs/a/200"`, or `"runs/a"` for its newest. That
            run is not changed. Once this run has a checkpoint, it resumes from its own.
        overwrite: True starts from scratch; the first save moves the checkpoints of an earlier run to
            `<directory>/archive`.
        strict: False allows callbacks with a carry to differ between runs: a new one starts from scratch, and the
            carry of a removed one is ignored.
        skip: False reads the data from the beginning after a resume, for sources without a position, such as
            simulators.
        lock: False does not lock the directory, for file systems without `flock`. Then make sure yourself that no other
            process writes to it.
        name: the callback's name.

    Raises:
        FileExistsError: the directory holds a run, and `resume` is False.
        FileNotFoundError: there is no checkpoint of the requested step.
        OSError: the file system cannot lock the directory.
        RuntimeError: another live process is writing to the directory; no checkpoint is intact; or a save failed,
            raised at the next save or at the end of the run.
        TypeError: a leaf of the state, or of a carry, cannot be stored.
        ValueError: an argument is out of range, or the checkpoint is damaged or of another run.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> directory = tempfile.TemporaryDirectory()
    >>> engine = Engine(lambda state, batch: (state + batch, {}), [Checkpoint(directory.name, when=10)])
    >>> _ = engine.run(jnp.int32(0), range(25), epochs=1)
    >>> engine.run(jnp.int32(0), range(25), epochs=2).step  # resumes from step 25
    50
    >>> int(load(directory.name, jnp.int32(0), step=25))
    300
    >>> directory.cleanup()
    """

    directory: str | os.PathLike[str]
    _: KW_ONLY
    when: Cadence | int = every(epochs=1)  # noqa: RUF009 (frozen)
    keep: int = 3
    keep_every: int | None = None
    best: str | None = None
    mode: str = "min"
    resume: bool | int | str = True
    start: str | os.PathLike[str] | None = None
    overwrite: bool = False
    strict: bool = True
    skip: bool = True
    lock: bool = True
    name: str | None = None

    def __post_init__(self) -> None:
        check_int("Checkpoint", "keep", self.keep, 1)
        if self.keep_every is not None:
            check_int("Checkpoint", "keep_every", self.keep_every, 1)
        if self.best is not None and not isinstance(self.best, str):
            raise TypeError(
                f"Checkpoint needs best= to be the name of a metric, such as 'val/loss', got {self.best!r}."
            )
        check_mode("Checkpoint", self.mode, self.best)
        if isinstance(self.resume, int) and self.resume < 0:
            raise ValueError(f"Checkpoint needs a step >= 0 for resume, got {self.resume}.")
        if not isinstance(self.resume, (bool, int)) and not (self.resume == "best" and self.best):
            raise ValueError(f"Checkpoint needs resume=True, False, a step, or 'best' with best=, got {self.resume!r}.")
        self.directory = local_path("Checkpoint", self.directory)
        self._recorded: tuple[int, float] | None = None  # the newest value of `best`, with its step

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints in the directory, for reading."""
        return Checkpoints(self.directory, best=self.best, mode=self.mode)

    def on_load(self, loop: Loop) -> None:
        self._writer = CheckpointWriter(
            self.directory, keep=self.keep, best=self.best, mode=self.mode, keep_every=self.keep_every
        )
        self._lock = Lock(self.directory)
        check_storable({"state": loop.state, "carries": loop.carries})
        if any(os.path.realpath(other.directory) == os.path.realpath(self.directory) for other in loop.checkpoints):
            raise ValueError(
                f"Checkpoint: two callbacks of this run have the directory {self.directory}. Give each its own."
            )
        loop.checkpoints.append(self._writer.checkpoints)
        if self.lock:
            processes.first(self._lock.acquire)
        step = processes.first(self._find_resume_step, loop.step)
        others = {name: each for name, each in loop.callbacks.items() if not isinstance(each, Checkpoint)}
        self._config: dict[str, Any] = {"callbacks": {name: _describe(each) for name, each in others.items()}}
        self._saved_config: dict[str, Any] = {}
        if loop.step:
            return
        if step is not None:
            self._restore(loop, self._writer.checkpoints, step)
        elif self.start is not None:
            directory, step = processes.first(self._find_start, self.start)
            self._restore(loop, Checkpoints(directory), step)
            self._saved_config["start"] = self._restored
        if "start" in self._saved_config:
            self._config["start"] = self._saved_config["start"]

    def on_run_begin(self, loop: Loop) -> None:
        self._recorded, self._saved = None, False

    def on_epoch_begin(self, loop: Loop) -> None:
        if self.best:
            warn_missing_metric("Checkpoint", self.best, loop)

    def on_log(self, loop: Loop, record: Record) -> None:
        self._compare_step(loop)
        if self.best:
            warn_missing_metric("Checkpoint", self.best, loop, record)
        if self.best in record.values:
            self._recorded = (record.step, record.values[self.best])

    def on_epoch_end(self, loop: Loop) -> None:
        if self.best and not loop.over:  # otherwise on_run_end follows
            warn_missing_metric("Checkpoint", self.best, loop)

    def on_save(self, loop: Loop) -> None:
        self._compare_step(loop)
        snapshot = loop.snapshot()
        if not self._saved:
            processes.first(self._archive, loop.start_step)
            self._saved = True
        competes = self._recorded is not None and self._recorded[0] == snapshot.step
        metrics = {self.best: self._recorded[1]} if self.best and self._recorded and competes else {}
        self._writer.save(snapshot.step, snapshot.tree, snapshot.host, metrics, self._config)

    def on_run_end(self, loop: Loop) -> None:
        try:
            self._writer.close()
            if self.best:
                warn_missing_metric("Checkpoint", self.best, loop)
                self._warn_if_none_is_best(loop, self.best)
        finally:
            self._lock.release()

    def _restore(self, loop: Loop, checkpoints: Checkpoints, step: int) -> None:
        path, tree = checkpoints.path(step), functools.partial(checkpoints.load, step, partial=not self.strict)
        try:
            loop.restore(Snapshot(step, tree, checkpoints.host(step)), strict=self.strict, skip=self.skip)
        except ValueError as error:
            remedy = " To add or remove callbacks with a carry, pass strict=False." * ("carries/" in str(error))
            raise ValueError(
                f"{error}\nCheckpoint found the saved run in {path}.{remedy} "
                "To start from scratch, pass overwrite=True or another directory."
            ) from error
        self._restored, self._saved_config = path, dict(checkpoints.manifest(step).get("config") or {})
        saved, here = self._saved_part("callbacks"), self._config["callbacks"]
        if changed := [
            f"{saved[name]} is now {here[name]}" for name in here if saved.get(name, here[name]) != here[name]
        ]:
            log_user(f"changed since {path} was saved: {'; '.join(changed)}")

    def _compare_step(self, loop: Loop) -> None:
        """Say so if the compiled step differs from that of the saved run; once, when it has been traced."""
        if "step" in self._config or loop.step == loop.start_step or not processes.writes():
            return
        self._config["step"] = here = _fingerprint(loop.traced, loop.mesh)
        saved = self._saved_part("step")
        if here and saved.get("inputs") == here["inputs"] and saved.get("program") != here["program"]:
            log_user(f"changed since {self._restored} was saved: the step function, the optimizer or a compiled half")

    def _saved_part(self, name: str) -> dict[str, str]:
        """Return a part of the configuration of the saved run, empty if it is unknown."""
        part = self._saved_config.get(name)
        return part if isinstance(part, dict) else {}

    def _warn_if_none_is_best(self, loop: Loop, best: str) -> None:
        checkpoints, over = self._writer.checkpoints, loop.error is None and loop.finished and self._saved
        if over and processes.writes() and best in loop.latest and checkpoints.best_step() is None:
            warn_user(
                f"Checkpoint: no checkpoint in {checkpoints.steps()} of {self.directory} counts as best, because "
                f"{best!r} was not recorded at a step that was saved, or was never finite. Give both the same cadence "
                "(when=...)."
            )

    def _find_resume_step(self, at: int) -> int | None:
        """Return the step to resume from, None to start from scratch. The run is at step `at`."""
        checkpoints = self._writer.checkpoints
        steps = checkpoints.steps()
        if not steps and not isinstance(self.resume, (bool, str)) and not at:
            raise FileNotFoundError(
                f"Checkpoint: no step {self.resume} in {self.directory}; it holds no checkpoint. To start from "
                "scratch, leave out resume=."
            )
        if not steps or self.overwrite:
            return None
        if at and steps[-1] > at:  # the run continues from a Result
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}, beyond step {at} of this run."
            )
        if not at and self.resume is False:
            raise FileExistsError(
                f"Checkpoint: {self.directory} holds a run at step {steps[-1]}. Resume it (resume=True), "
                "archive it (overwrite=True) or give another directory."
            )
        newest = at or self.resume is True
        step = self._newest_intact(checkpoints, steps) if newest else self._requested(checkpoints, steps)
        self._writer.resume_from(step)
        return step

    def _find_start(self, start: str | os.PathLike[str]) -> tuple[str, int]:
        """Return the directory and the step of the checkpoint from which a new run starts."""
        path = local_path("Checkpoint", start)
        directory, name = os.path.split(path)
        checkpoints = Checkpoints(directory if name.isdecimal() else path)
        steps = checkpoints.steps()
        if (int(name) not in steps) if name.isdecimal() else not steps:
            raise FileNotFoundError(
                f"Checkpoint: start={path!r} is no checkpoint; {checkpoints.directory} holds {steps}."
            )
        step = int(name) if name.isdecimal() else self._newest_intact(checkpoints, steps)
        _check_intact(checkpoints, step)
        return checkpoints.directory, step

    def _archive(self, start_step: int) -> None:
        steps = self._writer.checkpoints.steps()
        self._writer.archive([step for step in steps if step > start_step or self.overwrite])

    def _newest_intact(self, checkpoints: Checkpoints, steps: list[int]) -> int:
        for step in reversed(steps):
            damage = checkpoints.damage(step)
            if damage is None:
                return step
            warn_user(f"Checkpoint {checkpoints.path(step)} is damaged and is skipped: {damage}.")
        raise RuntimeError(f"Checkpoint: none of the checkpoints {steps} in {self.directory} is intact.")

    def _requested(self, checkpoints: Checkpoints, steps: list[int]) -> int:
        step = checkpoints.best_step() if self.resume == "best" else self.resume
        if step is None:
            raise FileNotFoundError(
                f"Checkpoint: resume='best', but no checkpoint in {self.directory} has a value of the metric "
                f"best={checkpoints.best!r}; it holds {steps}. Resume from one of these steps."
            )
        if step not in steps:
            raise FileNotFoundError(f"Checkpoint: no step {self.resume} in {self.directory}; it holds {steps}.")
        _check_intact(checkpoints, step)
        return step


def _check_intact(checkpoints: Checkpoints, step: int) -> None:
    """Raise a ValueError if a checkpoint that was asked for is damaged."""
    if damage := checkpoints.damage(step):
        raise ValueError(f"Checkpoint {checkpoints.path(step)} is damaged: {damage}.")


def _describe(callback: Callback) -> str:
    """Return the call that makes a callback, the same in every process that makes it."""
    try:
        with jax.transfer_guard_device_to_host("allow"):  # an argument may be an array
            return _stable(without_secrets(repr(callback)))
    except Exception:  # a repr of the user's that fails must not end the run
        return type(callback).__name__


def _fingerprint(traced: Any, mesh: Any) -> dict[str, str] | None:
    """Return hashes of a traced step: of its program, and of what the program depends on besides the user's code.

    The program is the same in every process that runs the same script. The values of arrays that it closes over do not
    count.
    """
    if traced is None:  # nothing is compiled
        return None
    inputs = f"{jax.__version__} {onstep.__version__} {traced.jaxpr.in_avals} {mesh}"
    program = traced.jaxpr.pretty_print(use_color=False)  # JAX colours `str` if stdout is a terminal
    texts = {"program": _stable(program), "inputs": inputs}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def _stable(text: str) -> str:
    """Return a repr without what differs between two processes: addresses, the order of sets, folders of paths."""
    text = re.sub(r"\b0x[0-9a-f]+", "0x", text)
    text = re.sub(r"\{('[^{}:]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)
    return re.sub(r"'/[^']*/([^'/]*)'", r"'\1'", text)
