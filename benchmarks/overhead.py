"""What the engine adds to a step, measured beside a bare loop in the same process.

Run: python benchmarks/overhead.py [--rounds 15] [--json FILE]

Pinned to one core where the system allows it. Each round times every case once, one after the
other, so that a slow moment of the machine meets all of them; figures are medians over rounds
of the difference to, or the ratio with, the bare loop of the same round.
"""

import argparse
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import onstep
from onstep import Callback, Engine, every
from onstep.callbacks import EMA, GradNorm

STEPS = 20_000


class Idle(Callback):
    """Answers an event that does not come."""

    when = every(epochs=2)

    def on_step_end(self, loop):
        pass


class Acts(Callback):
    """Does nothing, every so many steps."""

    def __init__(self, steps):
        self.when = every(steps)

    def on_step_end(self, loop):
        pass


class Same:
    """An epoch of one batch, again and again: data that cost nothing."""

    def __init__(self, batch, steps=STEPS):
        self.batches = [batch] * steps

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def noop_engine(callbacks, metrics, log_every=100):
    """An engine with a plain Python function in the compiled call's place."""
    engine = Engine(lambda state, batch: (state, {}), callbacks, log_every=log_every, steps_per_call=1)
    engine._program.call = lambda bundle, batch, rng, due: (bundle, metrics)
    return engine


def time_engine(engine, state, data):
    loop = engine._prepare(state, data, None, False, epochs=1, steps=None, epoch_steps=None)
    start = time.perf_counter()
    for _ in engine._turns(loop, None):
        pass
    jax.block_until_ready(loop.state)
    return (time.perf_counter() - start) / len(data)


def time_bare(call, state, data):
    start = time.perf_counter()
    for batch in data:
        state, _ = call(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / len(data)


def small_step(state, batch):
    """One layer, 64 to 10, batch 8, plain gradient descent: about 20 µs a call."""

    def loss_fn(params):
        logits = batch["x"] @ params["w"] + params["b"]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["y"], 10), -1))

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
    return {"params": params}, {"loss": loss}, {"grads": grads}


def cases():
    """By name: a function that times the case, and the name of its baseline."""
    ten = [Idle() for _ in range(8)] + [Acts(100), Acts(100)]
    same, scalar = Same(np.zeros(3)), jnp.float32(1)
    bare = noop_engine([], {})._program.call
    noops = {
        "no callbacks": noop_engine([], {}),
        "10 callbacks, 2 act every 100 steps": noop_engine(ten, {}),
        "the same, and one metric read every 100 steps": noop_engine(ten, {"loss": scalar}),
        "one callback acts every step": noop_engine([Acts(1)], {}),
    }
    yield "noop", "bare loop", lambda: time_bare(lambda s, b: bare(s, b, None, None), None, same)
    for name, engine in noops.items():
        yield "noop", name, lambda engine=engine: time_engine(engine, jnp.float32(0), same)

    random = np.random.default_rng(0)
    batch = {"x": random.normal(size=(8, 64)).astype(np.float32), "y": random.integers(0, 10, 8)}
    state = {"params": {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}}
    data = Same(batch, STEPS // 4)
    jitted = jax.jit(lambda s, b: small_step(s, b)[:2], donate_argnums=0)
    steps = {
        "no callbacks": Engine(small_step, steps_per_call=1),
        "EMA and GradNorm in the step": Engine(small_step, [EMA(), GradNorm()], steps_per_call=1),
    }
    yield "small step", "bare loop", lambda: time_bare(jitted, jax.tree.map(jnp.copy, state), data)
    for name, engine in steps.items():
        yield "small step", name, lambda engine=engine: time_engine(engine, state, data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, pinned to one"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, onstep {onstep.__version__}"
    print(f"{machine}; {versions}; {jax.default_backend()}; medians of {options.rounds} rounds\n")

    rows = list(cases())
    for _, _, measure in rows:
        measure()  # compiles
    times = {(kind, name): [] for kind, name, _ in rows}
    for _ in range(options.rounds):
        for kind, name, measure in rows:
            times[kind, name].append(measure())
    figures = []
    for (kind, name), found in times.items():
        base = times[kind, "bare loop"]
        adds = statistics.median(t - b for t, b in zip(found, base, strict=True)) * 1e6
        ratio = statistics.median(t / b for t, b in zip(found, base, strict=True))
        figures.append({"step": kind, "case": name, "us": statistics.median(found) * 1e6, "adds": adds, "ratio": ratio})
    print(f"{'step':<12}{'case':<48}{'µs a step':>10}{'adds µs':>10}{'ratio':>8}")
    for row in figures:
        ratio = f"{row['ratio']:8.2f}" if row["step"] != "noop" else ""
        print(f"{row['step']:<12}{row['case']:<48}{row['us']:10.2f}{row['adds']:10.2f}{ratio}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "versions": versions, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
