"""A kit for tests that kill processes: start one small real run in a process, watch it, kill it, compare its end."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FLIPS = 60
"""Tests that flip one bit in the newest checkpoint, in each of its files in turn."""
SEEDS, KILLS = 6, 8
"""Seeds of random kills, and kills with each seed."""

# Children are forked from a server that has imported these packages and has not initialised a device. Starting one
# takes milliseconds instead of seconds, so a test can afford many kills.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flax.training.train_state", "optax", "orbax.checkpoint", "tensorboardX", "onstep"])


class Child:
    """A process that runs `train` on a directory.

    Args:
        directory: the run's.
        when: steps between two saves.
        pace: minimum seconds per step.
        cache: directory of compiled programs, which the next child reuses.
    """

    def __init__(self, directory, *, when=2, pace=0.0, cache):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._steps = self.directory / "steps"
        self._steps.write_bytes(b"")
        self.process = CONTEXT.Process(target=train, args=(str(self.directory), when, pace, str(cache)))
        self.process.start()

    def wait_for_steps(self, count):
        """Wait until the run has completed `count` steps, or has ended."""
        while self.process.is_alive() and self._steps.stat().st_size < count:
            time.sleep(0.002)

    def kill(self, after):
        """Kill the process after some seconds; return whether it was still alive."""
        self.process.join(after)
        alive = self.process.exitcode is None
        self.process.kill()
        self.process.join()
        return alive and self.process.exitcode != 0

    def end(self, timeout=120):
        """Wait until the process ends; return its exit code and what it wrote to stderr."""
        self.process.join(timeout)
        return self.process.exitcode, (self.directory / "stderr").read_text()


def result(directory):
    """Return what a finished run wrote: every byte of its state, its carries and its host state."""
    with np.load(Path(directory) / "result.npz") as arrays:
        return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}


def points(directory):
    """Return every point that TensorBoard shows of a run: (tag, step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(Path(directory) / "events"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(tag, e.step, e.value) for tag in reader.Tags()["scalars"] for e in reader.Scalars(tag)]


def script(code, *arguments):
    """Start a script in a new process, as a user would."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def mounted(directory, *options):
    """Mount something until the end of the block; yield None, or the reason why it is not permitted."""
    done = subprocess.run(["mount", *options, str(directory)], capture_output=True, text=True, check=False)
    try:
        yield done.stderr.strip() if done.returncode else None
    finally:
        if not done.returncode:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def train(directory, when, pace, cache):
    """Run in a child: dropout, shuffled epochs, an average, an early stop, host state, event files."""
    directory = Path(directory)
    stderr = os.open(directory / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from models import X, Y, epoch, evaluation, fresh_state, step
    from onstep import Batches, Callback, Engine, every
    from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate, TensorBoard

    class Draws(Callback):
        def __init__(self):
            self.generator, self.drawn = np.random.default_rng(3), []

        def on_step_end(self, loop):
            self.drawn.append(int(self.generator.integers(1000)))
            with open(directory / "steps", "ab") as file:
                file.write(b".")  # for `Child.wait_for_steps`

        def get_state(self):
            return {"generator": self.generator.bit_generator.state, "drawn": self.drawn}

        def set_state(self, state):
            self.generator.bit_generator.state, self.drawn = state["generator"], list(state["drawn"])

    def paced(number):
        for batch in epoch(number):
            time.sleep(pace)
            yield batch

    ema = EMA(0.9, warmup=3)
    validation = Batches({"x": X, "y": Y}, 12, shuffle=False)
    callbacks = [
        Checkpoint(directory / "run", when=every(when)),
        ema,
        Draws(),
        Evaluate(evaluation, validation, using=ema, when=every(3)),
        EarlyStopping("val/accuracy", patience=4, mode="max"),
        TensorBoard(directory / "events", flush_seconds=0),
    ]
    run = Engine(step, callbacks, log_every=1).run(jax.jit(fresh_state)(), paced, epochs=3, rng=jax.random.key(7))
    leaves = {f"leaf{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(run.snapshot.tree))}
    host = np.frombuffer(run.snapshot.host, np.uint8)
    np.savez(directory / "result.npz", host=host, stopped=np.array(str(run.stopped)), **leaves)
