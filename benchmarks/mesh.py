"""Compare the engine with a hand-written loop on eight virtual CPU devices of one process.

Run: python benchmarks/mesh.py [--rounds 40] [--quick] [--out DIR]

Both loops run the same jitted step with the same shardings. Every round runs 100 steps of each case in
turn. All cases stay open during the measurement, so the times include no start and no compilation.
"Host" is the processor time of the main thread, which depends less on other load than wall-clock time.
The script also counts the collectives in the compiled step, and measures the placement of a batch and
the agreement between processes. Virtual devices share the cores, so the time of a step does not
transfer to real devices.
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
from onstep import Batches, Engine, every  # noqa: E402
from onstep.callbacks import EMA, GradNorm, Progress, TensorBoard  # noqa: E402
from onstep.placement import DataSharding  # noqa: E402
from onstep.processes import ProcessGroup  # noqa: E402
from onstep.sharding import fsdp, make_mesh, replicated  # noqa: E402
from workloads import digits_mlp, one_layer  # noqa: E402

BY_HAND = "by hand: device_put, then the call"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class ShardedWorkload:
    """A workload whose state has a given layout."""

    def __init__(self, workload, layout, mesh):
        self.workload, self.mesh = workload, mesh
        self.batches = list(Batches(workload.arrays, workload.batch_size))[:50]
        self.layout = layout(mesh)(workload.state)
        self.state = jax.device_put(workload.state, self.layout)
        self.batch_sharding = NamedSharding(mesh, PartitionSpec("data"))
        step = lambda state, batch: workload.step(state, batch)[:2]  # noqa: E731
        replicated_sharding = NamedSharding(mesh, PartitionSpec())
        options = {"out_shardings": (self.layout, replicated_sharding), "donate_argnums": 0}
        self.call = jax.jit(step, **options)
        self.call_with_shardings = jax.jit(step, in_shardings=(self.layout, self.batch_sharding), **options)
        shardings = ((self.layout, self.layout["params"]), replicated_sharding)
        self.call_with_average = jax.jit(self.with_average, out_shardings=shardings, donate_argnums=0)

    def data(self):
        return itertools.cycle(self.batches)

    def with_average(self, carry, batch):
        """The step with the work of EMA and GradNorm."""
        state, average = carry
        new, metrics, aux = self.workload.step(state, batch)
        average = optax.incremental_update(new["params"], average, 0.001)
        return (new, average), metrics | {"grad_norm": optax.tree.norm(aux["grads"])}

    def by_hand(self, call, put, state):
        """Return a case that queues as many calls as the engine and reads the losses once per round.

        A loop that never waits can deadlock on virtual devices, because XLA's threads wait for each other.
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
        """Return a case that runs the engine for one more round at each call."""
        steps = self.engine(*callbacks).steps(self.state, self.data(), steps=10**9, when=every(STEPS))
        iterator = iter(stack.enter_context(steps))
        return lambda: jax.block_until_ready(next(iterator).state)

    def cases(self, stack):
        put = lambda batch: jax.device_put(batch, self.batch_sharding)  # noqa: E731
        progress = Progress(file=io.StringIO())
        logs = TensorBoard(stack.enter_context(tempfile.TemporaryDirectory()))
        return {
            BY_HAND: self.by_hand(self.call, put, self.state),
            "by hand: numpy into a call with in_shardings": self.by_hand(
                self.call_with_shardings, lambda batch: batch, self.state
            ),
            "by hand: average and norm in the step": self.by_hand(
                self.call_with_average, put, (self.state, self.state["params"])
            ),
            "onstep": self.onstep(stack),
            "onstep: EMA, GradNorm, TensorBoard, Progress": self.onstep(stack, EMA(), GradNorm(), logs, progress),
        }

    def collectives(self):
        """Count the collectives in the compiled step of each case."""
        batch = self.batches[0]
        plain = self.call.lower(self.state, jax.device_put(batch, self.batch_sharding))
        return {"by hand": count_collectives(plain)} | {
            f"onstep{name}": count_collectives(self.lowered(*callbacks))
            for name, callbacks in {"": (), ", EMA": (EMA(),), ", EMA and GradNorm": (EMA(), GradNorm())}.items()
        }

    def lowered(self, *callbacks):
        engine = self.engine(*callbacks)
        result = engine.run(self.state, self.batches, steps=1)
        compiled = engine._compiled
        bundle = compiled.bundle(result.state, compiled.init(result.state), 0)
        return compiled.call.trace(bundle, self.batches[0], None, None).lower()


def count_collectives(lowered):
    text = lowered.compile().as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def timed(cases, rounds):
    """Measure wall-clock time and the processor time of the main thread."""
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
        {**{k: row[k] for k in ("case", "us", "ratio")}, "host us": busy["us"], "host ratio": busy["ratio"]}
        for row, busy in zip(figures(wall, base), figures({n: t[1:] for n, t in host.items()}, base), strict=True)
    ]


def placement_cases(workload):
    """Return cases that place a batch on the devices `STEPS` times."""
    sharding = DataSharding(workload.mesh)

    def case(put):
        def run():
            for batch in itertools.islice(workload.data(), STEPS):
                jax.block_until_ready(put(batch))

        return run

    return {
        "jax.device_put": case(lambda batch: jax.device_put(batch, workload.batch_sharding)),
        "onstep: DataSharding.place_batch": case(sharding.place_batch),
    }


def agreement(count=2):
    """Return the median time in µs of 200 agreements between processes, as at a host stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--join", address, str(count)]
    children = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
        return float(outputs[0].splitlines()[-1])
    finally:
        for child in children:
            child.kill()


def agree(address, count, process):
    """Run one of the processes that `agreement` starts."""
    jax.distributed.initialize(address, int(count), int(process))
    group, times = ProcessGroup(time.monotonic), []
    for step in range(220):
        start = time.perf_counter()
        group.should_stop()
        group.agree_on_stop(step, None)
        times.append(time.perf_counter() - start)
    print(1e6 * float(np.median(times[20:])))


def table(title, rows):
    print(f"\n{title:<56}{'µs':>8}{'ratio':>7}{'host µs':>9}{'ratio':>7}")
    for row in rows:
        print(f"  {row['case']:<54}{row['us']:8.0f}{row['ratio']:7.2f}{row['host us']:9.0f}{row['host ratio']:7.2f}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one round, to check that the script runs")
    parser.add_argument("--out", help="folder for the results as JSON")
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
        sharded = ShardedWorkload(make(), layout, mesh)
        name = f"{sharded.workload.name}, {layout.__name__}"
        with contextlib.ExitStack() as stack:
            found["steps"][name] = timed(sharded.cases(stack), rounds)
        table(name, found["steps"][name])
        found["put"][name] = timed(placement_cases(sharded), rounds)
        table("  placement of a batch", found["put"][name])
        found["collectives"][name] = sharded.collectives()
        for case, counts in found["collectives"][name].items():
            print(f"  {case:<54}{', '.join(f'{n} {kind}' for kind, n in counts.items() if n)}", flush=True)
    found["agreement us"] = {count: agreement(count) for count in ((2,) if options.quick else (2, 4, 8))}
    for count, us in found["agreement us"].items():
        print(f"\nagreement of {count} processes on this machine: {us:.0f} µs at each host stop")
    if options.out:
        os.makedirs(options.out, exist_ok=True)
        path = os.path.join(options.out, f"mesh-{about['device']}-{about['date']}.json")
        with open(path, "w") as file:
            json.dump(about | {"rounds": rounds} | found, file, indent=1)


if __name__ == "__main__":
    main()
