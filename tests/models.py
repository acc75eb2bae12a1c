"""Helpers shared by several tests, and one small real run: dropout, Adam with a schedule, shuffled epochs."""

import contextlib
import importlib.util
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from onstep.testing import same_bytes as same_bytes  # for `from models import same_bytes`

EXAMPLES, BATCH = 24, 2
X = np.random.default_rng(0).normal(size=(EXAMPLES, 4)).astype(np.float32)
Y = np.argmax(X[:, :3], axis=-1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))


NET = Net()
TX = optax.adam(optax.cosine_decay_schedule(1e-2, 36))


def fresh_state():
    params = NET.init(jax.random.key(0), X[:1], train=False)["params"]
    return TrainState.create(apply_fn=NET.apply, params=params, tx=TX)


def step(state, batch, rng):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["x"], train=True, rngs={"dropout": rng})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}, {"grads": grads}


def evaluation(state, batch):
    logits = state.apply_fn({"params": state.params}, batch["x"], train=False)
    return {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["y"])}


def epoch(number, seen=None):
    """Yield the batches of an epoch in its own order; `seen` collects the numbers of the examples."""
    order = np.random.default_rng((0, number)).permutation(EXAMPLES).reshape(-1, BATCH)
    for rows in order:
        if seen is not None:
            seen.append(rows.tolist())
        yield {"x": X[rows], "y": Y[rows]}


def refilled(batches=40):
    """Yield one array over and over with new values; it is aligned, so jax could use its memory without a copy."""
    raw = np.empty(64 * 256 * 4 + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    array = raw[start : start + 64 * 256 * 4].view(np.float32).reshape(64, 256)
    for number in range(batches):
        array[:] = number
        yield array
        array[:] = -1


class Tripwire:
    """A metric or carry that records `step` in `reads` whenever the host reads its value, in whatever way.

    Waiting for it with `block_until_ready` is not a read.
    """

    dtype = np.dtype("float32")

    def __init__(self, step, reads, shape=(), value=1.0):
        self.step, self.reads, self.value = step, reads, value
        self.shape, self.ndim = shape, len(shape)

    def _read(self, *args, **kwargs):
        self.reads.append(self.step)
        return self.value

    __float__ = __int__ = __bool__ = __index__ = __format__ = __lt__ = __gt__ = __eq__ = __hash__ = _read
    item = tolist = copy_to_host_async = __repr__ = _read

    def __array__(self, *args, **kwargs):
        return np.full(self.shape, self._read(), self.dtype)

    def block_until_ready(self):
        return self


@contextlib.contextmanager
def compilations():
    """Yield a list that gets one item for each compilation inside the block, as reported by jax."""
    seen = []

    def listen(name, seconds, **more):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


EXAMPLES_FOLDER = Path(__file__).parent.parent / "examples"


def load_example(script):
    """Import an example script as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES_FOLDER / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(directory):
    """Return the modification time of every file under `directory`, by path."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def contents_below(*directories):
    """Return every file below directories with its bytes and the time of its last change, and every folder."""
    found = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            found[folder] = os.stat(folder).st_mtime_ns
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[path] = file.read(), os.stat(path).st_mtime_ns
    return found
