"""Q-learning with a replay buffer and a target network, as in DQN, checked against the exact values.

    python examples/target_network.py            finds the way through four rooms, in half a minute
    python examples/target_network.py --rate 1   no target network: the values diverge

Every 16 steps the host half of a callback acts with the current parameters and adds the transitions
to its replay buffer. The data source draws batches from the buffer. Both have `get_state` and
`set_state`, so a resumed run ends in the same bytes, including the buffer and the environments. The
target network is a field of the state; `Target` moves it towards the parameters after every step.

Value iteration gives the exact values of the optimal policy. At the end the learned values differ
from them by at most 0.005 (by 37 without a target network), and the learned policy reaches 99.9 % of
the optimal return. `runs/target-network/target-network.png` shows both value functions and policies.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from onstep import Callback, Engine, every
from onstep.callbacks import Checkpoint, Evaluate, GracefulExit, Progress, TensorBoard
from onstep.callbacks.target import Target
from onstep.state import TrainState

ROOMS = [
    ".....#.....",
    ".....#.....",
    "...........",
    ".....#.....",
    ".....#.....",
    "#.####.....",
    ".....###.##",
    ".....#.....",
    ".....#.....",
    "...........",
    ".....#....+",
]
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # up, right, down, left
SLIP, GAMMA = 0.1, 0.99  # probability of a random move instead of the chosen one; discount
CELLS = np.argwhere(np.array([list(row) for row in ROOMS]) != "#")
GOAL = len(CELLS) - 1  # the last cell; an episode ends there with a reward of 1
NUMBER = {tuple(cell): number for number, cell in enumerate(CELLS.tolist())}
NEXT = np.array([[NUMBER.get(tuple(cell + move), NUMBER[tuple(cell)]) for move in MOVES] for cell in CELLS])
ONE_HOT = np.concatenate([np.eye(11)[CELLS[:, 0]], np.eye(11)[CELLS[:, 1]]], axis=1)  # row and column of a cell
CHANCE = (1 - SLIP) * np.eye(len(CELLS))[NEXT] + SLIP * np.eye(len(CELLS))[NEXT].mean(1, keepdims=True)

ENVIRONMENTS, ACT, BATCH, CAPACITY = 32, 16, 64, 20_000
NETWORK = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(4)])


class State(TrainState):
    target: Any


def new_state(key, steps):
    params, optimizer = NETWORK.init(key, ONE_HOT[:1]), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    return State.create(apply_fn=NETWORK.apply, params=params, target=params, tx=optimizer)


def values(params, cells):
    """Return the values of the four moves in each cell, with shape (cells, 4)."""
    return NETWORK.apply(params, jnp.asarray(ONE_HOT)[cells])


def train_step(state, batch):
    targets = jnp.where(batch["after"] == GOAL, 1.0, GAMMA * values(state.target, batch["after"]).max(-1))

    def loss_fn(params):
        taken = jnp.take_along_axis(values(params, batch["cell"]), batch["move"][:, None], axis=1)[:, 0]
        return optax.squared_error(taken, targets).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


@jax.jit
def move(params, cells, epsilon, key):
    """Make one move in each environment; an environment at the goal starts a new episode in a random cell."""
    keys = jax.random.split(key, 5)
    cells = jnp.where(cells == GOAL, jax.random.randint(keys[0], cells.shape, 0, GOAL), cells)
    explores, slips = (jax.random.bernoulli(keys[n], p, cells.shape) for n, p in ((1, epsilon), (2, SLIP)))
    moves = jnp.where(explores, jax.random.randint(keys[3], cells.shape, 0, 4), values(params, cells).argmax(-1))
    executed = jnp.where(slips, jax.random.randint(keys[4], cells.shape, 0, 4), moves)
    return {"cell": cells, "move": moves, "after": jnp.asarray(NEXT)[cells, executed]}


class Actor(Callback):
    """Acts with the current parameters; `seen` is the replay buffer."""

    when = every(ACT)

    def __init__(self, seed):
        self.key, self.moves, self.cells = jax.random.key(seed), 0, np.full(ENVIRONMENTS, GOAL)
        self.seen = {name: np.zeros(CAPACITY, np.int32) for name in ("cell", "move", "after")}

    def on_run_begin(self, loop):
        if self.moves == 0:  # a resumed run has a buffer already
            self.act(loop.state.params, 1.0)

    def on_step_end(self, loop):
        self.act(loop.state.params, max(0.2, 1 - loop.step / 5_000))

    def act(self, params, epsilon):
        new = move(params, self.cells, epsilon, jax.random.fold_in(self.key, self.moves))
        rows = (self.moves * ENVIRONMENTS + np.arange(ENVIRONMENTS)) % CAPACITY
        for name, column in self.seen.items():
            column[rows] = new[name]
        self.moves, self.cells = self.moves + 1, np.asarray(new["after"])

    def get_state(self):
        return {"moves": self.moves, "cells": self.cells, "seen": self.seen}

    def set_state(self, state):
        self.moves, self.cells, self.seen = state["moves"], state["cells"], state["seen"]


class Replay(Iterator):
    """Endless random batches from the replay buffer of an actor."""

    def __init__(self, actor, seed):
        self.actor, self.generator = actor, np.random.default_rng(seed)

    def __next__(self):
        rows = self.generator.integers(min(self.actor.moves * ENVIRONMENTS, CAPACITY), size=BATCH)
        return {name: column[rows] for name, column in self.actor.seen.items()}

    def get_state(self):
        return self.generator.bit_generator.state

    def set_state(self, state):
        self.generator.bit_generator.state = state


def optimal_values():
    """Return the values of the moves under the optimal policy, from value iteration."""
    q = np.zeros((GOAL, 4))
    for _ in range(2_000):
        q = CHANCE[:GOAL, :, GOAL] + GAMMA * CHANCE[:GOAL, :, :GOAL] @ q.max(1)
    return q


def policy_values(moves):
    """Return the value of each cell under a policy: the solution of v = r + gamma P v."""
    chance = jnp.asarray(CHANCE)[jnp.arange(GOAL), moves]
    return jnp.linalg.solve(jnp.eye(GOAL) - GAMMA * chance[:, :GOAL], chance[:, GOAL])


def draw(path, best, learned, history):
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *left, right = figure.subplots(1, 3)
    for axes, (name, q) in zip(left, {"optimal": best, "learned": learned}.items(), strict=True):
        grid = np.full((11, 11), np.nan)
        grid[tuple(CELLS.T)] = np.append(q.max(1), 1)
        shown = axes.imshow(grid, vmin=best.max(1).min(), vmax=1)
        down, across = MOVES[q.argmax(1)].T
        axes.quiver(*CELLS[:GOAL, ::-1].T, across, -down, color="white", pivot="mid", scale=18, width=0.006)
        axes.plot(*CELLS[GOAL, ::-1], "k*", markersize=12)
        axes.set(title=f"{name} values and moves", xticks=[], yticks=[], facecolor="0.2")
    figure.colorbar(shown, ax=left, label="value of a cell")
    figure.get_layout_engine().set(wspace=0.04)
    right.semilogy(history.steps("val/error"), history["val/error"], ".-")
    right.set(title="error of the values", xlabel="step", ylabel="largest error over all cells")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.01, help="update rate of the target network; default: 0.01")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, moves and batches; default: 0")
    parser.add_argument(
        "--fast", action="store_true", help="8,000 steps instead of 20,000, in runs/target-network-fast"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        help="directory of the run; delete it to start from scratch; default: runs/target-network",
    )
    args = parser.parse_args()
    steps, target = (8_000, 0.02) if args.fast else (20_000, 0.01)
    directory = args.directory or Path("runs", "target-network-fast" if args.fast else "target-network")
    best, cells = optimal_values(), np.arange(GOAL)

    def score(state, cells):
        q = values(state.params, cells)
        error = jnp.abs(q.max(1) - best.max(1)).max()
        return {"error": error, "return": policy_values(q.argmax(1)).mean() / best.max(1).mean()}

    actor, periodically = Actor(args.seed), every(steps // 40)
    callbacks = [
        GracefulExit(),
        actor,
        Target(rate=args.rate),
        Evaluate(score, [cells], when=periodically),
        Checkpoint(directory, when=periodically),
        TensorBoard(directory),
        Progress(),
    ]
    state, data = new_state(jax.random.key(args.seed), steps), Replay(actor, args.seed)
    # With `epoch_steps` the engine draws no batch ahead of its step, so batches include the latest transitions.
    result = Engine(train_step, callbacks, log_every=500).run(state, data, steps=steps, epoch_steps=500)
    if result.history:  # empty if the run was already complete
        draw(directory / "target-network.png", best, np.asarray(values(result.state.params, cells)), result.history)

    error, share = result.latest["val/error"], result.latest["val/return"]
    print(f"moves          {actor.moves * ENVIRONMENTS:,} in {ENVIRONMENTS} environments")
    print(f"picture        {directory}/target-network.png")
    print(f"policy         {share:.4f} of the optimal return" + ("" if share > 0.98 else ", below the target of 0.98"))
    print(f"largest error  {error:.4f}" + ("" if error < target else f", above the target of {target}"))
    return int(not (error < target and share > 0.98))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
