"""Measure what the engine adds to a step with one step per call, compared with a bare loop.

Run: python benchmarks/overhead.py [--rounds 15]

The process is pinned to one core if the system allows it. In the first table a Python function that
does nothing replaces the compiled call, which leaves the engine's own work. The second table uses a
short real step.
"""

import argparse
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from loops import EveryStep
from measure import figures, interleaved, machine, pin
from onstep import Callback, Engine, every
from onstep.callbacks import EMA, GradNorm
from workloads import one_layer

STEPS = 20_000
BARE = "bare loop"


class Idle(Callback):
    """Handles an event that is never due here."""

    when = every(epochs=2)

    def on_step_end(self, loop):
        pass


class Acts(EveryStep):
    """Does nothing, every 100 steps."""

    when = every(100)


def bare(call, state, data):
    """Return a case: the bare loop."""

    def measure():
        now = jax.tree.map(jnp.copy, state)
        start = time.perf_counter()
        for batch in data:
            now, _ = call(now, batch)
        jax.block_until_ready(now)
        return (time.perf_counter() - start) / len(data)

    return measure


def engine(step, state, data, callbacks=(), call=None):
    """Return a case: the engine's loop, without its initial copy of the state."""
    built = Engine(step, callbacks, log_every=100, steps_per_call=1)
    built._compiled.call = call or built._compiled.call

    def measure():
        loop = built._make_loop(state, data, epochs=1, steps=None, epoch_steps=None, rng=None, donate=False)
        start = time.perf_counter()
        for _ in loop.iterate():
            pass
        jax.block_until_ready(loop.state)
        return (time.perf_counter() - start) / len(data)

    return measure


def noops():
    """Return the cases in which a no-op replaces the compiled call."""

    def noop(metrics, callbacks=()):
        call = lambda bundle, batch, rng, due: (bundle, metrics)  # noqa: E731
        return engine(lambda state, batch: (state, {}), jnp.float32(0), data, callbacks, call)

    data, ten = [np.zeros(3)] * STEPS, [*(Idle() for _ in range(8)), Acts(), Acts()]
    return {
        BARE: bare(lambda state, batch: (state, {}), jnp.float32(0), data),
        "no callbacks": noop({}),
        "10 callbacks, 2 act every 100 steps": noop({}, ten),
        "the same, and one metric read every 100 steps": noop({"loss": jnp.float32(1)}, ten),
        "one callback acts at every step": noop({}, [EveryStep()]),
    }


def short_steps():
    """Return the cases with the step of one layer."""
    work = one_layer()
    batch = {name: array[: work.batch_size] for name, array in work.arrays.items()}
    data = [batch] * (STEPS // 4)
    return {
        BARE: bare(jax.jit(lambda s, b: work.step(s, b)[:2], donate_argnums=0), work.state, data),
        "no callbacks": engine(work.step, work.state, data),
        "EMA and GradNorm in the step": engine(work.step, work.state, data, [EMA(), GradNorm()]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    logging.getLogger("onstep").disabled = True
    print("; ".join(machine(pin(1)).values()), f"; medians of {options.rounds} rounds", sep="")
    for title, cases in (("no-op", noops()), ("one layer, batch 8", short_steps())):
        print(f"\n{title:<50}{'µs/step':>10}{'adds µs':>10}{'ratio':>8}")
        for row in figures(interleaved(cases, options.rounds), BARE):
            print(f"  {row['case']:<48}{row['us']:10.2f}{row['adds']:10.2f}{row['ratio']:8.2f}")


if __name__ == "__main__":
    main()
