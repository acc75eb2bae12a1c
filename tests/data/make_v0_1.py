"""A run with every kind of carry and host state, and how `v0_1/` was made from it.

`v0_1/` was written by onstep 0.1.0 with jax 0.10.2 and orbax-checkpoint 0.12.8, in an environment where this printed
0.1.0 for `onstep.__version__`:

    python tests/data/make_v0_1.py

It holds the run's directory and record files after an interruption at step 7, and in `expected.*` what 0.1.0 had in
memory then and at the end of an uninterrupted run. `tests/test_v0_1.py` resumes it with the onstep of today. Do not
write `v0_1/` again: version 0.1 is what users have on disk.

All arithmetic is on multiples of powers of two and exact in float32, so the results do not depend on the version of
JAX. Not part of the run: MLflow and WandB, which save the id of a run on a server; Timing, whose records are times.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Batches, Callback, Engine, at, every
from onstep.callbacks import (
    CSV,
    EMA,
    SWA,
    Checkpoint,
    ClipWeights,
    EarlyStopping,
    Evaluate,
    GradNorm,
    Histograms,
    JSONLines,
    LearningRate,
    NaNGuard,
    Progress,
    Report,
    Scalars,
    Table,
    Target,
)

DATA = Path(__file__).parent / "v0_1"
INTERRUPTED, EPOCHS = 7, 3
"""The step of the checkpoint: inside an epoch of 5 steps, and inside a log window of 4."""


class Momentum(NamedTuple):
    """The state of an optimizer, with an optional part that is not used."""

    trace: Any
    count: Any
    extra: Any = None


def initial_state():
    params = {"dense": {"w": jnp.full((2, 4), 0.5), "b": jnp.zeros(8)}}
    return {
        "params": params,
        "target": params,
        "opt_state": Momentum(jax.tree.map(jnp.zeros_like, params), jnp.int32(0)),
        "half": jnp.array([1.5, -0.25], jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(5),
        "noise": jnp.uint32(0),
    }


def step(state, batch, rng):
    value = batch["x"][0]  # one example of five is NaN
    grads = {"dense": {"w": value * jnp.array([[1.0, -1.0] * 2] * 2), "b": value * jnp.array([1.0, -1.0] * 4)}}
    trace = jax.tree.map(lambda old, grad: old / 2 + grad, state["opt_state"].trace, grads)
    params = jax.tree.map(lambda param, change: param - change / 2, state["params"], trace)
    new = state | {
        "params": params,
        "opt_state": Momentum(trace, state["opt_state"].count + 1),
        "key": jax.random.fold_in(state["key"], 1),
        "noise": state["noise"] ^ jax.random.bits(rng, dtype=jnp.uint32),
    }
    return new, {"loss": value}, {"grads": grads}


def evaluation(state, batch):
    return {"loss": jnp.abs(state["params"]["dense"]["w"][0, 0]) + batch["x"].mean()}


def schedule(count):
    return jnp.where(count < 8, 0.5, 0.25)


def callbacks(directory):
    """Return the callbacks of the run; they read and write files in one directory."""
    directory = Path(directory)
    ema = EMA(0.5, name="ema")
    validation = [{"x": np.ones(2, np.float32)}, {"x": np.full(2, 2, np.float32)}]
    return [
        Report(directory / "report.html"),
        Checkpoint(directory / "run", when=at(INTERRUPTED), best="val/loss"),
        NaNGuard(skip=True, when=1),
        ClipWeights(-4, 4),
        Target(rate=0.5),
        ema,
        EMA(0.5, of=("params", "half"), warmup=1, start=2, when=2, name="warmup"),
        SWA(start=5, when=at(5, 10)),
        GradNorm(),
        Histograms(directory / "events", grads=True, when=1),
        Histograms(directory / "events", when=5, name="plain"),
        Evaluate(evaluation, validation, when=every(3) | at(INTERRUPTED)),
        Evaluate(evaluation, validation, when=every(3), using=ema, name="average"),
        EarlyStopping("val/loss", patience=20),
        LearningRate(schedule),
        Scalars("noise"),
        Table(best={"val/loss": "min"}, when=5, file=io.StringIO()),
        Progress(file=io.StringIO()),
        JSONLines(directory / "records.jsonl"),
        CSV(directory / "records.csv"),
    ]


def run(directory, *extra):
    """Start or resume the run."""
    data = Batches({"x": np.array([1, -2, np.nan, 4, -1], np.float32)}, 1, seed=3)
    engine = Engine(step, [*callbacks(directory), *extra], log_every=4, steps_per_call=1)
    return engine.run(initial_state(), data, epochs=EPOCHS, rng=jax.random.key(7))


def leaves(tree):
    """Return the leaves by name, as numpy arrays."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if typed else leaf)
        named[jax.tree_util.keystr(path, simple=True, separator="/")] = array
    return named


def describe(array):
    return f"{array.dtype}{list(array.shape)}"


def records(result):
    """Return the recorded values after the interruption, each with its step."""
    points = {name: zip(result.history.steps(name), result.history[name], strict=True) for name in result.history}
    return {name: [[step, value] for step, value in points[name] if step > INTERRUPTED] for name in sorted(points)}


class Interrupt(Callback):
    when = at(INTERRUPTED)

    def on_step_end(self, loop):
        loop.stop("interrupted", final=False)


def main():
    shutil.rmtree(DATA, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        first, other = Path(work, "interrupted"), Path(work, "whole")
        interrupted, whole = run(first, Interrupt()), run(other)
        shutil.copytree(first, DATA, ignore=shutil.ignore_patterns("events", "report.html"))
        csv = (other / "records.csv").read_text()
    arrays, kinds = {}, {}
    for moment, result in (("interrupted", interrupted), ("end", whole)):
        for name, array in leaves(result.snapshot.tree).items():
            kinds[f"{moment}/{name}"] = describe(array)
            arrays[f"{moment}/{name}"] = np.frombuffer(array.tobytes(), np.uint8)
    np.savez_compressed(DATA / "expected.npz", **arrays)
    expected = {"leaves": kinds, "records": records(whole), "csv": csv}
    (DATA / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
