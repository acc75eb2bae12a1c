"""Check that a replay gives back what a step of a run received, byte by byte, and that it changes no file.

    python benchmarks/replays.py             # ten random steps of each of eleven kinds of runs
    python benchmarks/replays.py --short     # two of each, without several processes
    python benchmarks/replays.py --seed 1    # other steps

Every kind of run trains for 60 steps with a callback that keeps what some random steps received and returned. Then a
new engine replays these steps. A replay is equal if state, carries, batch and key have the bytes that the step
received, if running the step again gives the bytes that it returned, and if every file and folder in the directory of
the run kept its name, its bytes and the time of its last change. The exit status is the number of replays that are not
equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep import Batches, Callback, Engine, at, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GradNorm, NaNGuard
from onstep.sharding import create, fsdp, make_mesh
from onstep.testing import FakeLoader, StopAt, same_bytes

STEPS, EPOCH, BATCH = 60, 12, 16
EXAMPLES = np.random.default_rng(0).normal(size=(EPOCH * BATCH, 8)).astype(np.float32)
LABELS = np.argmax(EXAMPLES[:, :4], axis=1)
TX = optax.adam(1e-2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        step, state, data: of the run; the last two as functions, because every replay is a new script.
        callbacks: returns its callbacks, without `Checkpoint`.
        options: of the engine.
        target: of `engine.run`.
        stops: steps at which the run is interrupted, and resumed by a new engine.
    """

    step: Callable[..., Any]
    state: Callable[[], Any]
    data: Callable[[], Any]
    callbacks: Callable[[], list[Callback]] = lambda: [EMA(0.9), NaNGuard(when=10)]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    target: dict[str, Any] = dataclasses.field(default_factory=lambda: {"steps": STEPS})
    stops: tuple[int, ...] = ()

    def engine(self, directory: Path, *more: Callback) -> Engine:
        callbacks = [*self.callbacks(), Checkpoint(directory, when=every(7), keep=4), *more]
        return Engine(self.step, callbacks, log_every=5, **self.options)


class Keep(Callback):
    """Keeps what some steps received and returned. It is the last callback, so it sees what others change."""

    def __init__(self, steps):
        self.when, self.received, self.returned = at(*steps), {}, {}

    def on_step_begin(self, loop):
        self.received[loop.step + 1] = host((loop.state, loop.carries, loop.batch))

    def on_step_end(self, loop):
        self.returned[loop.step] = host((loop.state, loop.carries, dict(loop.metrics)))


def host(tree):
    """Return copies of the parts of all arrays that this process holds."""

    def copy(leaf):
        if not isinstance(leaf, jax.Array):
            return np.array(leaf)
        return [np.array(shard.data) for shard in leaf.addressable_shards]

    return jax.tree.map(copy, tree)


def files(directory):
    """Return the time of the last change of every folder and file, and the bytes of every file."""
    paths = [directory, *sorted(directory.rglob("*"))]
    return {str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths}


def params(sizes=(8, 32, 4)):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    return [{"w": jax.random.normal(key, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])} for key, *shape in shapes]


def mlp(layers, x):
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def apply_updates(state, grads):
    updates, opt_state = TX.update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}


def fresh(sizes=(8, 32, 4)):
    return {"params": params(sizes), "opt_state": TX.init(params(sizes))}


def classify(state, batch, rng):
    """Train an MLP with dropout on its inputs."""

    def loss_fn(layers):
        kept = jax.random.bernoulli(rng, 0.9, batch["x"].shape)
        logits = mlp(layers, batch["x"] * kept)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    return apply_updates(state, grads), {"loss": loss}, {"grads": grads}


def score(state, batch):
    logits = mlp(state["params"], batch["x"])
    return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()}


def batches(epoch=0):
    order = np.random.default_rng((0, epoch)).permutation(len(EXAMPLES)).reshape(-1, BATCH)
    return [{"x": EXAMPLES[rows], "y": LABELS[rows]} for rows in order]


def endless():
    """Yield batches that are never the same again."""
    for epoch in range(STEPS):
        yield from batches(epoch)


def shuffled():
    return Batches({"x": EXAMPLES, "y": LABELS}, BATCH, seed=5)


# A GAN, whose generator and penalty are compiled halves on cadences.


def new_gan():
    return {"disc": fresh((8, 32, 1)), "gen": fresh((4, 32, 8))}


def discriminate(state, batch, rng):
    fake = mlp(state["gen"]["params"], jax.random.normal(rng, (BATCH, 4)))

    def loss_fn(disc):
        return (jax.nn.softplus(-mlp(disc, batch["x"])) + jax.nn.softplus(mlp(disc, fake))).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["disc"]["params"])
    return state | {"disc": apply_updates(state["disc"], grads)}, {"disc_loss": loss}


class Generator(Callback):
    update_when = every(2)

    def update(self, carry, ctx):
        noise = jax.random.normal(ctx.rng, (BATCH, 4))

        def loss_fn(gen):
            return jax.nn.softplus(-mlp(ctx.state["disc"]["params"], mlp(gen, noise))).mean()

        loss, grads = jax.value_and_grad(loss_fn)(ctx.state["gen"]["params"])
        return carry, ctx.replace(state=ctx.state | {"gen": apply_updates(ctx.state["gen"], grads)}).log(gen_loss=loss)


class Penalty(Callback):
    update_when = every(8)

    def update(self, carry, ctx):
        def loss_fn(disc):
            slopes = jax.grad(lambda x: mlp(disc, x).sum())(ctx.batch["x"])
            return (slopes**2).sum(-1).mean()

        loss, grads = jax.value_and_grad(loss_fn)(ctx.state["disc"]["params"])
        return carry, ctx.replace(state=ctx.state | {"disc": apply_updates(ctx.state["disc"], grads)}).log(penalty=loss)


# Reinforcement learning: the host half plays with the newest policy, with a random generator that is saved.


class Actor(Callback):
    def __init__(self):
        self.generator = np.random.default_rng(7)

    def on_step_begin(self, loop):
        x = self.generator.normal(size=(BATCH, 8)).astype(np.float32)
        logits = np.asarray(mlp(loop.state["params"], x))
        loop.batch = {"x": x, "y": (logits + self.generator.gumbel(size=logits.shape)).argmax(-1)}

    def get_state(self):
        return {"generator": json.dumps(self.generator.bit_generator.state)}

    def set_state(self, state):
        self.generator.bit_generator.state = json.loads(state["generator"])


class Reinitialize(Callback):
    """Changes the state between steps, when an evaluation says so."""

    when = every(9)

    def on_step_end(self, loop):
        if loop.latest.get("val/loss", 0) > 0.1:
            loop.state = loop.state | {"opt_state": TX.init(loop.state["params"])}


def changing():
    return [EMA(0.9), Evaluate(score, batches()[:2], when=9), Reinitialize(), GradNorm(when=3)]


def sharded():
    return create(fresh, fsdp(make_mesh(), small=0))


def kinds():
    spread = {"mesh": make_mesh()}
    return {
        "MLP, one step a call": Kind(classify, fresh, batches, options={"steps_per_call": 1}),
        "MLP, blocks": Kind(classify, fresh, batches, options={"steps_per_call": 16}),
        "Batches, shuffled": Kind(classify, fresh, shuffled, target={"epochs": STEPS // EPOCH}),
        "a generator": Kind(classify, fresh, endless, target={"steps": STEPS, "epoch_steps": EPOCH}),
        "a loader with a state": Kind(classify, fresh, lambda: FakeLoader(batches())),
        "a callable": Kind(classify, fresh, lambda: batches),
        "a GAN": Kind(discriminate, new_gan, batches, lambda: [Generator(), Penalty(), EMA(0.9, of="gen.params")]),
        "reinforcement learning": Kind(classify, fresh, lambda: None, lambda: [Actor(), EMA(0.9)]),
        "interrupted, and changed between steps": Kind(classify, fresh, shuffled, changing, stops=(10, 33)),
        "8 devices, FSDP": Kind(classify, sharded, shuffled, options=spread),
        PROCESSES: Kind(classify, sharded, shuffled, options=spread | {"steps_per_call": 8}),
    }


PROCESSES = "2 processes of 4 devices"


def check(name: str, count: int, seed: int, directory: Path) -> dict[str, Any]:
    """Train a kind of run, replay some of its steps, and return how many replays are equal and how long they took."""
    kind, key = kinds()[name], jax.random.key(3)
    steps = sorted(random.Random(f"{name} {seed}").sample(range(1, STEPS + 1), count))
    keep = Keep(steps)
    for stop in (*kind.stops, None):
        more = [] if stop is None else [StopAt(stop, final=False)]
        kind.engine(directory, *more, keep).run(kind.state(), kind.data(), rng=key, **kind.target)
    before, equal, seconds, engine = files(directory), 0, [], kind.engine(directory)
    for step in steps:
        began = time.perf_counter()
        moment = engine.replay(kind.state(), kind.data(), step=step, rng=key, **kind.target)
        seconds.append(time.perf_counter() - began)
        wrong = [
            what
            for what, one, other in zip(
                ("state", "carries", "batch"),
                host((moment.state, moment.carries, moment.batch)),
                keep.received[step],
                strict=True,
            )
            if not same_bytes(one, other)
        ]
        wrong += [] if same_bytes(moment.rng, jax.random.fold_in(key, step - 1)) else ["key"]
        state, metrics, _ = moment.run()
        changed = isinstance(kind.callbacks()[-2], Reinitialize) and step % 9 == 0  # after the step, by a callback
        if not changed and not same_bytes(host(state), keep.returned[step][0]):
            wrong.append("state after the step")
        if not same_bytes(host(metrics), keep.returned[step][2]):
            wrong.append("metrics")
        if files(directory) != before:
            wrong.append("files")
        if wrong:
            print(
                f"{name}, step {step}, from checkpoint {moment.checkpoint}: {', '.join(wrong)} differ", file=sys.stderr
            )
        equal += not wrong
    return {"replays": count, "equal": equal, "seconds": statistics.median(seconds)}


def start_processes(count: int, seed: int, directory: Path) -> dict[str, Any]:
    """Run `check` in two processes; a replay is equal if it is so in both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--count", str(count), "--seed", str(seed), "--directory", str(directory)]
    started = [subprocess.Popen([*command, "--join", str(port), str(process)]) for process in range(2)]
    statuses = [process.wait() for process in started]
    if any(statuses):
        return {"replays": count, "equal": 0, "seconds": float("nan")}
    found = [json.loads((directory / f"{process}.json").read_text()) for process in range(2)]
    return found[0] | {"equal": min(each["equal"] for each in found)}


def join(options: argparse.Namespace) -> int:
    """Be one of the two processes."""
    port, process = options.join
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    found = check(PROCESSES, options.count, options.seed, options.directory / "run")
    (options.directory / f"{process}.json").write_text(json.dumps(found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="two replays of each kind, without several processes")
    parser.add_argument("--count", type=int, default=10, help="replays of each kind; default: 10")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the steps; default: 0")
    parser.add_argument("--only", default="", help="the kinds whose name contains this text")
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--join", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join:
        return join(options)
    jax.config.update("jax_num_cpu_devices", 8)
    count, different = (2 if options.short else options.count), 0
    print(f"{'':<40}{'replays':>8}{'equal':>7}{'s each':>8}")
    for name in kinds():
        if options.only not in name or (options.short and name == PROCESSES):
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = start_processes if name == PROCESSES else check
            arguments = (
                (count, options.seed, Path(folder))
                if name == PROCESSES
                else (name, count, options.seed, Path(folder, "run"))
            )
            found = run(*arguments)
        print(f"{name:<40}{found['replays']:>8}{found['equal']:>7}{found['seconds']:>8.2f}", flush=True)
        different += found["replays"] - found["equal"]
    print(f"{different} replays differ from their runs")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
