"""One small real run for the tests that compare bytes: dropout, Adam with a schedule, shuffled epochs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

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
    """An epoch's batches, in an order of its own; `seen` collects the examples' numbers."""
    order = np.random.default_rng((0, number)).permutation(EXAMPLES).reshape(-1, BATCH)
    for rows in order:
        if seen is not None:
            seen.append(rows.tolist())
        yield {"x": X[rows], "y": Y[rows]}


def same_bytes(one, other):
    """Whether two trees have the same structure and the same bytes in every leaf."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(_bytes(a) == _bytes(b) for a, b in pairs)


def _bytes(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def refilled(batches=40):
    """A source that fills one array again and again, which begins where jax would read it as it lies."""
    raw = np.empty(64 * 256 * 4 + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    array = raw[start : start + 64 * 256 * 4].view(np.float32).reshape(64, 256)
    for number in range(batches):
        array[:] = number
        yield array
        array[:] = -1
