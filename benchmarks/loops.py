"""The loops to compare: a bare jit loop, `lax.scan`, two hand-written training loops, and onstep."""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep import Batches, Callback, Engine, every
from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate, GradNorm, Progress, TensorBoard
from tensorboardX import SummaryWriter

LOG, EVALUATE, SAVE = 100, 1000, 5000  # steps


class EveryStep(Callback):
    """Does nothing at every step."""

    def on_step_end(self, loop):
        pass


class CountSaves(Callback):
    """Counts the saves of a run that returns: it waits for all of them, and fails if one fails."""

    when = every(SAVE)

    def __init__(self):
        self.count = 0

    def on_run_begin(self, loop):
        self.count = 0

    def on_save(self, loop):
        self.count += 1


def copied(state):
    return jax.tree.map(jnp.copy, state)


class Loops:
    """All loops over one workload. Each case is a method, or is returned by one, and returns seconds per step.

    The usual callbacks are: an average of the parameters and the gradient norm in the step, TensorBoard
    and progress every 100 steps, an evaluation every 1,000 steps, and a checkpoint in the background
    every 5,000 steps and at the end.

    Attributes:
        saves: how many checkpoints the last case has completed.
    """

    def __init__(self, workload, steps):
        self.workload, self.steps = workload, steps
        self.data = Batches(workload.arrays, workload.batch_size)
        self.ready = list(self.data)  # numpy batches, prepared in advance
        held_out = jax.tree.map(lambda a: a[: 4 * workload.batch_size], workload.arrays)
        self.held_out = Batches(held_out, workload.batch_size, shuffle=False)
        self.folder, self.saves = tempfile.mkdtemp(), 0
        self.jitted = jax.jit(lambda s, b: workload.step(s, b)[:2], donate_argnums=0)
        self.score = jax.jit(workload.score)
        self.scanned = jax.jit(self._scan, donate_argnums=0)
        self.careful = jax.jit(self._with_average, donate_argnums=0)
        self.gradients = jax.jit(workload.step)

    def close(self):
        shutil.rmtree(self.folder)

    def batches(self):
        """Yield a ready batch for every step."""
        for number in range(self.steps):
            yield self.ready[number % len(self.ready)]

    def timed(self, run):
        start = time.perf_counter()
        jax.block_until_ready(run())
        return (time.perf_counter() - start) / self.steps

    def bare(self):
        """The baseline: a donated jit loop that reads no metrics."""

        def run(state):
            for batch in self.batches():
                state, _ = self.jitted(state, batch)
            return state

        return self.timed(functools.partial(run, copied(self.workload.state)))

    def _scan(self, state, batches):
        return jax.lax.scan(lambda s, b: self.workload.step(s, b)[:2], state, batches)

    def scan(self):
        """`lax.scan` over stacks of 100 ready batches, with the least possible work on the host."""
        batches = [self.ready[n % len(self.ready)] for n in range(LOG)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

        def run(state):
            for _ in range(self.steps // LOG):
                state, _ = self.scanned(state, stacked)
            return state

        return self.timed(functools.partial(run, copied(self.workload.state)))

    def _with_average(self, carry, batch):
        state, average = carry
        new, metrics, aux = self.workload.step(state, batch)
        average = optax.incremental_update(new["params"], average, 0.001)
        norm = optax.tree.norm(aux.get("grads", ()))
        return (new, average), metrics | {"grad_norm": norm}

    def by_hand(self):
        """The usual work in a careful hand-written loop: one call per step, metrics read together every 100 steps."""
        import orbax.checkpoint as ocp

        folder = tempfile.mkdtemp(dir=self.folder)

        def run(state):
            carry, pending = (state, copied(state["params"])), []
            with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as saver, SummaryWriter(folder) as writer:
                for number, batch in enumerate(self.batches(), 1):
                    carry, metrics = self.careful(carry, batch)
                    pending.append(metrics)
                    if number % LOG == 0:
                        for name in metrics:
                            mean = np.mean([np.asarray(step[name]) for step in pending])
                            writer.add_scalar(f"train/{name}", mean, number)
                        print(number, mean, file=io.StringIO())
                        pending = []
                    if number % EVALUATE == 0:
                        averaged = carry[0] | {"params": carry[1]}
                        losses = [self.score(averaged, batch)["loss"] for batch in self.held_out]
                        writer.add_scalar("val/loss", np.mean(jax.device_get(losses)), number)
                    if number % SAVE == 0 or number == self.steps:
                        saver.save(os.path.join(folder, str(number)), args=ocp.args.StandardSave(carry))
            self.saves = len(os.listdir(folder)) - 1  # beside the event file
            return carry

        return self.timed(functools.partial(run, copied(self.workload.state)))

    def naive(self):
        """The usual in-step work in a naive loop: eager average and norm, and the loss read at every step."""

        def run(state):
            average = copied(state["params"])
            for batch in self.batches():
                state, metrics, aux = self.gradients(state, batch)
                average = jax.tree.map(lambda a, p: 0.999 * a + 0.001 * p, average, state["params"])
                float(metrics["loss"]), float(optax.tree.norm(aux.get("grads", ())))
            return state, average

        return self.timed(functools.partial(run, copied(self.workload.state)))

    def onstep(self, *, usual=False, saves=True, ready=False, more=(), **options):
        """Return a case that runs onstep on `Batches` or on the ready batches; `options` go to the engine."""
        counter = [CountSaves()] if usual and saves else []
        engine = self.engine(usual, options, [*more, *counter], saves)

        def measure():
            shutil.rmtree(os.path.join(self.folder, "run"), ignore_errors=True)
            data = self.batches() if ready else self.data
            seconds = self.timed(lambda: engine.run(self.workload.state, data, steps=self.steps).state)
            self.saves = sum(each.count for each in counter)
            return seconds

        return measure

    def engine(self, usual, options, more=(), saves=True):
        """Create an engine for the workload, with or without the usual callbacks, and with `more`."""
        if not usual:
            return Engine(self.workload.step, more, log_every=LOG, **options)
        folder, ema = os.path.join(self.folder, "run"), EMA(0.999)
        progress = Progress(file=io.StringIO())
        progress.when = every(LOG)
        norm = [GradNorm()] if "leaves" not in self.workload.name else []
        callbacks = [
            ema,
            *norm,
            Evaluate(self.workload.score, self.held_out, using=ema, when=min(EVALUATE, self.steps)),
            EarlyStopping("val/loss", patience=10**6),
            *([Checkpoint(f"{folder}/checkpoints", when=SAVE)] if saves else []),
            TensorBoard(f"{folder}/logs"),
            progress,
            *more,
        ]
        return Engine(self.workload.step, callbacks, log_every=LOG, **options)
