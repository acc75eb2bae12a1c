"""Many devices, many processes: handwritten digits, with the state whole on every device or cut among all.

    python examples/distributed.py                             two processes of four virtual CPU devices, started here
    python examples/distributed.py --layout replicated         every device has the whole state
    python examples/distributed.py --processes 1 --devices 8   one process; of accelerators it takes all it finds
    srun python examples/distributed.py --cluster              started by a scheduler, once for each process

The script is the same everywhere. Without `--cluster` it starts itself once for each process, on the
loopback address, passes signals on, and ends all if one fails. With it `jax.distributed.initialize()`
asks the scheduler (SLURM, Open MPI, Kubernetes, Cloud TPU) for the others. The step and the callbacks
are those of one device. Interrupted or killed, the same command goes on; with another number of
processes or devices, or in the other layout, too.

A fifth of the 1,797 images is held out; about 98 % of them are read right. Virtual devices share the
cores of one machine: they show how many devices are used, not how fast those would be.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from onstep import Batches, Engine, processes
from onstep.callbacks import EMA, Checkpoint, Evaluate, GracefulExit, Progress, TensorBoard
from onstep.sharding import create, fsdp, make_mesh, replicated
from onstep.state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

LAYOUTS = {"replicated": replicated, "fsdp": fsdp}
PATIENCE = 30  # seconds in which the others may end by themselves once a process has failed


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


def train_step(state, batch, rng):
    """Knows nothing of devices; each of them gets its part of `batch`, and of the noise."""
    noisy = batch["image"] + 0.2 * jax.random.normal(rng, batch["image"].shape)

    def loss_fn(params):
        metrics = measure(state.apply_fn({"params": params}, noisy), batch["label"])
        return metrics["loss"], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), metrics


def eval_step(state, batch):
    return measure(state.apply_fn({"params": state.params}, batch["image"]), batch["label"])


def measure(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}


def digits():
    """What to train on, and what is held out: in every process the same, whole."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = train_test_split(images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0)
    return {"image": split[0], "label": split[2]}, {"image": split[1], "label": split[3]}


def show(state, mesh, chosen):
    """What a device holds in each layout, by shapes alone: nothing is computed, nothing lies anywhere yet."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        named[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    for name, layout in LAYOUTS.items():
        there = dict(zip(named, jax.tree.leaves(layout(mesh)(state)), strict=True))
        parts = {path: there[path].shard_shape(leaf.shape) for path, leaf in named.items()}
        size = sum(math.prod(parts[path]) * leaf.dtype.itemsize for path, leaf in named.items())
        say(f"{name:<11}{size / 1e6:.2f} MB of state on each device{', as chosen:' if name == chosen else ''}")
        for path in [path for path in named if name == chosen and "Dense_1" in path]:
            say(f"           {path}: of {named[path].shape} a device has {parts[path]}")


def say(text):
    if processes.writes():
        print(text, flush=True)


def train(args):
    epochs, least = (6, 0.93) if args.fast else (20, 0.97)
    directory = args.directory or Path("runs", "distributed-fast" if args.fast else "distributed")
    mesh = make_mesh()
    say(f"devices    {mesh.size}, {jax.devices()[0].device_kind}, of {jax.process_count()} process(es)")

    images, held_out = digits()
    batches = Batches(images, args.batch_size, seed=args.seed)
    model, optimizer = MLP(), optax.adam(optax.cosine_decay_schedule(2e-3, epochs * len(batches)))

    def new_state(key):
        variables = model.init(key, images["image"][:1])
        return TrainState.create(apply_fn=model.apply, tx=optimizer, **variables)

    init_key, run_key = jax.random.split(jax.random.key(args.seed))
    show(jax.eval_shape(new_state, init_key), mesh, args.layout)
    state = create(new_state, LAYOUTS[args.layout](mesh), init_key)

    ema = EMA(0.98)
    callbacks = [
        GracefulExit(),
        ema,
        Evaluate(eval_step, Batches(held_out, 120, shuffle=False), using=ema),
        Checkpoint(directory),
        TensorBoard(directory),
        Progress(),
    ]
    result = Engine(train_step, callbacks, log_every=20, mesh=mesh).run(state, batches, epochs=epochs, rng=run_key)

    accuracy = result.latest["val/accuracy"]  # the same number in every process
    say(f"held-out accuracy  {accuracy:.4f}" + (f", short of {least}" if accuracy < least else ""))
    return int(accuracy < least)


def launch(count):
    """Starts this script once for each process and waits; returns the first exit status that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children, failed, deadline = [], 0, math.inf
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [child.send_signal(number) for child in children])
    try:
        for process in range(count):
            command = [sys.executable, *sys.orig_argv[1:], "--join", address, str(process)]
            # A session of its own: the terminal's Ctrl-C reaches it once, through this process.
            children.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
        while None in (statuses := [child.poll() for child in children]) and time.monotonic() < deadline:
            if not failed and (failed := next(filter(None, statuses), 0)):
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    failed = failed or next(filter(None, statuses), 0)
    return failed if failed >= 0 else 128 - failed


def join(address, process, args):
    """Becomes one of the processes that `launch` started; ends with it, even where that is killed."""
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.distributed.initialize(address, args.processes, int(process), coordinator_bind_address=address)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, default="fsdp", help="of the state; default: fsdp")
    add("--processes", type=int, default=2, help="on this machine; default: 2")
    add("--devices", type=int, default=4, help="virtual CPU devices of each process; default: 4")
    add("--cluster", action="store_true", help="a scheduler has started every process")
    add("--batch-size", type=int, default=64, help="of all devices together; default: 64")
    add("--seed", type=int, default=0, help="of the weights, the order and the noise; default: 0")
    add("--fast", action="store_true", help="a short run, by default in runs/distributed-fast")
    add("--directory", type=Path, help="of one run, for all processes the same; default: runs/distributed")
    add("--join", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.join:
        join(*args.join, args)
    elif args.cluster:
        jax.distributed.initialize()
    elif args.processes > 1:
        return launch(args.processes)
    else:
        jax.config.update("jax_num_cpu_devices", args.devices)
    return train(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)
