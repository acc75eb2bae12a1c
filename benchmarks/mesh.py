"""Many devices: the engine beside a loop written by hand, on eight virtual CPU devices of one process.

Run: python benchmarks/mesh.py [--rounds 40] [--quick] [--out DIR]

Both loops run the same jitted step with the same shardings. Every round runs 100 steps of each case in
turn, all cases stay open beside each other, so no start and no compilation is in a figure. "Host" is
the processor time of the main thread, which a busy machine disturbs less than the clock on the wall.
Then: the collectives in the compiled step, what it takes to put a batch where it belongs, and to agree
among processes. Virtual devices share the cores: a step's time says nothing about real ones.
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time

import jax

DEVICES, STEPS, QUEUE = 8, 100, 2
jax.config.update("jax_num_cpu_devices", DEVICES)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from measure import figures, interleaved, machine  # noqa: E402
from onstep import Batches, Engine, every, processes  # noqa: E402
from onstep.callbacks import EMA, GradNorm, Progress, TensorBoard  # noqa: E402
from onstep.placement import DataSharding  # noqa: E402
from onstep.sharding import fsdp, make_mesh, replicated  # noqa: E402
from workloads import digits_mlp, one_layer  # noqa: E402

BY_HAND = "by hand: device_put, then the call"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Cut:
    """One workload whose state lies in one layout."""

    def __init__(self, workload, layout, mesh):
        self.workload, self.mesh = workload, mesh
        self.batches = list(Batches(workload.arrays, workload.batch_size))[:50]
        self.places = layout(mesh)(workload.state)
        self.state = jax.device_put(workload.state, self.places)
        self.parts = NamedSharding(mesh, PartitionSpec("data"))
        step = lambda state, batch: workload.step(state, batch)[:2]  # noqa: E731
        whole = NamedSharding(mesh, PartitionSpec())
        where = {"out_shardings": (self.places, whole), "donate_argnums": 0}
        self.call = jax.jit(step, **where)
        self.taking = jax.jit(step, in_shardings=(self.places, self.parts), **where)
        both = (self.places, self.places["params"])
        self.averaging = jax.jit(self.with_average, out_shardings=(both, whole), donate_argnums=0)

    def data(self):
        return itertools.cycle(self.batches)

    def with_average(self, carry, batch):
        """What EMA and GradNorm do, written into the step."""
        state, average = carry
        new, metrics, aux = self.workload.step(state, batch)
        average = optax.incremental_update(new["params"], average, 0.001)
        return (new, average), metrics | {"grad_norm": optax.tree.norm(aux["grads"])}

    def by_hand(self, call, put, state):
        """A case: queues as many calls as the engine, and reads the losses once a round.

        A loop that never waits may hang on virtual devices, where XLA's threads wait for each other.
        """
        state, data = jax.tree.map(jnp.copy, state), self.data()

        def run():
            nonlocal state
            losses = []
            for batch in itertools.islice(data, STEPS):
                state, metrics = call(state, put(batch))
                losses.append(metrics["loss"])
                jax.block_until_ready(losses[-QUEUE - 1 : -QUEUE])
            np.mean([np.asarray(loss) for loss in losses])
            jax.block_until_ready(state)

        return run

    def engine(self, *callbacks):
        return Engine(self.workload.step, callbacks, log_every=STEPS, steps_per_call=1, in_flight=QUEUE, mesh=self.mesh)

    def onstep(self, stack, *callbacks):
        """A case: the engine's own loop, a round further at each call."""
        steps = self.engine(*callbacks).steps(self.state, self.data(), steps=10**9, when=every(STEPS))
        turns = iter(stack.enter_context(steps))
        return lambda: jax.block_until_ready(next(turns).state)

    def cases(self, stack):
        put = lambda batch: jax.device_put(batch, self.parts)  # noqa: E731
        progress = Progress(file=io.StringIO())
        logs = TensorBoard(stack.enter_context(tempfile.TemporaryDirectory()))
        return {
            BY_HAND: self.by_hand(self.call, put, self.state),
            "by hand: numpy into a call with in_shardings": self.by_hand(self.taking, lambda batch: batch, self.state),
            "by hand: average and norm in the step": self.by_hand(
                self.averaging, put, (self.state, self.state["params"])
            ),
            "onstep": self.onstep(stack),
            "onstep: EMA, GradNorm, TensorBoard, Progress": self.onstep(stack, EMA(), GradNorm(), logs, progress),
        }

    def collectives(self):
        """By case, how many of each the compiled step has."""
        batch = self.batches[0]
        plain = self.call.lower(self.state, jax.device_put(batch, self.parts))
        return {"by hand": counted(plain)} | {
            f"onstep{name}": counted(self.lowered(*callbacks))
            for name, callbacks in {"": (), ", EMA": (EMA(),), ", EMA and GradNorm": (EMA(), GradNorm())}.items()
        }

    def lowered(self, *callbacks):
        engine = self.engine(*callbacks)
        result = engine.run(self.state, self.batches, steps=1)
        compiled = engine._compiled
        bundle = compiled.bundle(result.state, compiled.init(result.state), 0)
        return compiled.call.trace(bundle, self.batches[0], None, None).lower()


def counted(lowered):
    text = lowered.compile().as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def timed(cases, rounds):
    """Figures by the clock on the wall and by the main thread's processor time."""
    host = {name: [] for name in cases}

    def measure(name, run):
        wall, busy = time.perf_counter(), time.thread_time()
        run()
        host[name].append((time.thread_time() - busy) / STEPS)
        return (time.perf_counter() - wall) / STEPS

    runs = {name: lambda name=name, run=run: measure(name, run) for name, run in cases.items()}
    wall = interleaved(runs, rounds)
    base = next(iter(cases))
    return [
        {**{k: row[k] for k in ("case", "us", "ratio")}, "host us": there["us"], "host ratio": there["ratio"]}
        for row, there in zip(figures(wall, base), figures({n: t[1:] for n, t in host.items()}, base), strict=True)
    ]


def putting(cut):
    """Cases that put one batch where it belongs, `STEPS` times."""
    sharding = DataSharding(cut.mesh)

    def case(put):
        def run():
            for batch in itertools.islice(cut.data(), STEPS):
                jax.block_until_ready(put(batch))

        return run

    return {
        "jax.device_put": case(lambda batch: jax.device_put(batch, cut.parts)),
        "onstep: DataSharding.place_batch": case(sharding.place_batch),
    }


def agreement(count=2):
    """Microseconds that processes take to agree on what a host stop asks: the median of 200."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--join", address, str(count)]
    children = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
    try:
        said = [child.communicate(timeout=120)[0] for child in children]
        return float(said[0].splitlines()[-1])
    finally:
        for child in children:
            child.kill()


def agree(address, count, process):
    """One of the processes that `agreement` starts."""
    jax.distributed.initialize(address, int(count), int(process))
    times = []
    for step in range(220):
        began = time.perf_counter()
        processes.agree({"step": step, "stop": None, "clock": began})
        times.append(time.perf_counter() - began)
    print(1e6 * float(np.median(times[20:])))


def table(title, rows):
    print(f"\n{title:<56}{'µs':>8}{'ratio':>7}{'host µs':>9}{'ratio':>7}")
    for row in rows:
        print(f"  {row['case']:<54}{row['us']:8.0f}{row['ratio']:7.2f}{row['host us']:9.0f}{row['host ratio']:7.2f}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    parser.add_argument("--out", help="a folder for the figures")
    parser.add_argument("--join", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join:
        return agree(*options.join)
    logging.getLogger("onstep").disabled = True
    rounds = 1 if options.quick else options.rounds
    about = machine(f"{os.cpu_count()} cores") | {"devices": f"{DEVICES} virtual", "load": os.getloadavg()[0]}
    print("; ".join(map(str, about.values())), f"; medians of {rounds} rounds of {STEPS} steps", sep="")
    found = {"steps": {}, "collectives": {}, "put": {}}
    mesh = make_mesh()
    for make, layout in ((one_layer, replicated), (digits_mlp, replicated), (digits_mlp, fsdp)):
        cut = Cut(make(), layout, mesh)
        name = f"{cut.workload.name}, {layout.__name__}"
        with contextlib.ExitStack() as stack:
            found["steps"][name] = timed(cut.cases(stack), rounds)
        table(name, found["steps"][name])
        found["put"][name] = timed(putting(cut), rounds)
        table("  a batch put where it belongs", found["put"][name])
        found["collectives"][name] = cut.collectives()
        for case, counts in found["collectives"][name].items():
            print(f"  {case:<54}{', '.join(f'{n} {kind}' for kind, n in counts.items() if n)}", flush=True)
    found["agreement us"] = agreement()
    print(f"\nto agree once, 2 processes of this machine: {found['agreement us']:.0f} µs at each host stop")
    if options.out:
        os.makedirs(options.out, exist_ok=True)
        path = os.path.join(options.out, f"mesh-{about['device']}-{about['date']}.json")
        with open(path, "w") as file:
            json.dump(about | {"rounds": rounds} | found, file, indent=1)


if __name__ == "__main__":
    main()
