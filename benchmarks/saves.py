"""Measure what a save costs, and its parts.

Run: python benchmarks/saves.py [--states one-layer,digits,50MB] [--rounds 20] [--folder DIR]

The states are those of one layer, of the digits example (a network with Adam and an average of its weights), and one of
50 MB. Every round saves each of them once in every way, so a slow moment of the machine affects all ways:

- onstep: a `CheckpointWriter` that keeps 3 checkpoints. "loop" is how long the training waits for `save`, without the
  wait for the save before it.
- Orbax alone: an `AsyncCheckpointer` for the same tree.
- one file: `numpy.savez`, a checksum, `fsync` and a rename, the least that a save with the same guarantees costs.

Times are medians in ms. CPU time is that of all threads of the process. --folder decides on which disk it saves: the
time for `fsync` differs most between machines.
"""

import argparse
import collections
import functools
import os
import shutil
import statistics
import tempfile
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep.snapshot import pack
from onstep.storage import CheckpointWriter
from onstep.storage import writer as writing
from workloads import dense

PARTS = {
    "detach": "copy to the host",
    "write": "Orbax: write",
    "finalize": "Orbax: merge",
    "write_file": "host.npz",
    "describe_files": "checksums",
    "write_manifest": "manifest",
    "prune": "delete the oldest",
}
"""What a save consists of: the functions, of the module of the writer or of its class, and what they do."""


def one_layer():
    params = dense([64, 10])
    return {"state": {"params": params}, "carries": {"EMA": {"average": params, "updates": jnp.int32(0)}}}


def digits():
    params = dense([64, 128, 10])
    state = {"step": jnp.int32(0), "params": params, "opt_state": optax.adam(3e-3).init(params)}
    return {"state": state, "carries": {"EMA": {"average": params, "updates": jnp.int32(0)}}}


def large():
    keys = jax.random.split(jax.random.key(0), 12)
    return {"state": {str(i): jax.random.normal(key, (1024, 1024)) for i, key in enumerate(keys)}}


STATES = {"one-layer": one_layer, "digits": digits, "50MB": large}
HOST = pack({"step": 100, "callbacks": {str(number): {"best": 0.5} for number in range(8)}}, "a benchmark")


class Parts:
    """Times functions by name while it is a context."""

    def __init__(self):
        self.times = collections.defaultdict(list)

    def __enter__(self):
        self.replaced = []
        for name in PARTS:
            owner = writing if hasattr(writing, name) else CheckpointWriter
            function = getattr(owner, name)
            self.replaced.append((owner, name, function))
            setattr(owner, name, self.timed(PARTS[name], function))
        return self.times

    def __exit__(self, *error):
        for owner, name, function in self.replaced:
            setattr(owner, name, function)

    def timed(self, name, function):
        @functools.wraps(function)
        def call(*args):
            began = time.perf_counter(), time.process_time()
            try:
                return function(*args)
            finally:
                self.times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))

        return call


def one_file(folder, step, trees):
    """Save trees in one file that is durable, checked and complete when it has its name."""
    path = os.path.join(folder, "saving")
    with open(path, "wb") as file:
        np.savez(file, **{str(number): leaf for number, leaf in enumerate(jax.tree.leaves(trees))})
    with open(path, "r+b") as file:
        crc = zlib.crc32(file.read())
        file.write(crc.to_bytes(4, "little"))
        file.flush()
        os.fsync(file.fileno())
    os.rename(path, os.path.join(folder, f"{step}.npz"))


def measured(trees, rounds, folder):
    """Return the times (wait of the loop, wall, CPU) of all rounds by way, and those of onstep's parts."""
    import orbax.checkpoint as ocp

    writer, orbax = CheckpointWriter(f"{folder}/onstep", keep=3), ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
    ways = {
        "onstep": (lambda step: writer.save(step, trees, HOST), writer.wait),
        "Orbax alone": (
            lambda step: orbax.save(f"{folder}/orbax/{step}", args=ocp.args.StandardSave(trees)),
            orbax.wait_until_finished,
        ),
        "one file": (functools.partial(one_file, folder, trees=trees), lambda: None),
    }
    times = {way: [] for way in ways}
    with Parts() as parts:
        for step in range(rounds + 4):  # the first ones create threads and delete nothing
            for way, (save, wait) in ways.items():
                began, cpu = time.perf_counter(), time.process_time()
                save(step)
                returned = time.perf_counter()
                wait()
                times[way].append((returned - began, time.perf_counter() - began, time.process_time() - cpu))
    writer.close()
    orbax.close()
    return {way: medians(found[4:]) for way, found in times.items()}, {
        name: medians(found[-rounds:]) for name, found in parts.items()
    }


def medians(rows):
    return [1e3 * statistics.median(column) for column in zip(*rows, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", default=",".join(STATES), help="comma-separated states")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", help="where to save; by default where temporary files are")
    options = parser.parse_args()
    for name in options.states.split(","):
        trees = STATES[name]()
        leaves = jax.tree.leaves(trees)
        folder = tempfile.mkdtemp(dir=options.folder)
        try:
            ways, parts = measured(trees, options.rounds, folder)
        finally:
            shutil.rmtree(folder)
        size = sum(leaf.nbytes for leaf in leaves) / 1e6
        print(f"\n{name}: {len(leaves)} arrays, {size:.2f} MB{'loop':>22}{'wall':>9}{'CPU':>9}")
        for way, (blocked, wall, cpu) in ways.items():
            print(f"  {way:<32}{blocked:15.1f}{wall:9.1f}{cpu:9.1f}")
        print("  parts of onstep's save")
        for part in PARTS.values():
            wall, cpu = parts[part]
            print(f"    {part:<30}{'':15}{wall:9.1f}{cpu:9.1f}")


if __name__ == "__main__":
    main()
