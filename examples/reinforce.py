"""Reinforcement learning with the environment in the loop: REINFORCE balances a pole on a cart.

    python examples/reinforce.py         learns to keep the pole upright, in a few seconds

The run has no data source. Before every step, a callback plays 16 episodes with the newest policy and
assigns them to `loop.batch`. The environment is plain NumPy and runs on the host, like a Gymnasium
environment would; the policy is a compiled function of `loop.state.params`. Each batch has its own
random seed, derived from the step, so there is no random state to save. If you interrupt the script,
run it again: it resumes and ends in the same bytes.

An episode ends when the pole falls, when the cart leaves the track, or after 200 moves. A random policy
lasts about 22 moves. At the end the best action of the trained policy is played in 100 new episodes, and
lasts 200 moves in nearly all of them. `runs/reinforce/reinforce.png` shows the length of the episodes.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from onstep import Callback, Engine
from onstep.callbacks import Checkpoint, GracefulExit, Progress
from onstep.state import TrainState

EPISODES, MOVES, DISCOUNT = 16, 200, 0.99
POLICY = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(2)])  # four observed numbers to the logits of left and right


class CartPole:
    """Several carts with a pole each, as described by Barto, Sutton and Anderson (1983).

    Attributes:
        state: position, velocity, angle and angular velocity of each cart, with shape (carts, 4).
    """

    def __init__(self, generator, carts):
        self.state = generator.uniform(-0.05, 0.05, (carts, 4))

    def move(self, right):
        """Push each cart to the right or to the left for 0.02 s; return which poles are still up, shape (carts,)."""
        _, speed, angle, spin = self.state.T
        force, sin, cos = np.where(right, 10.0, -10.0), np.sin(angle), np.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1  # masses: cart 1, pole 0.1; half the length of the pole: 0.5
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        change = np.stack([speed, push - 0.05 * turn * cos / 1.1, spin, turn], axis=-1)
        self.state = self.state + 0.02 * change
        return (abs(self.state[:, 0]) < 2.4) & (abs(self.state[:, 2]) < np.pi / 15)


@jax.jit
def logits(params, observed):
    return POLICY.apply(params, observed)


def play(params, generator, episodes, *, greedy=False):
    """Play episodes with a policy; return arrays of shape (MOVES, episodes), where `alive` is 0 after the end."""
    carts, alive = CartPole(generator, episodes), np.ones(episodes, bool)
    batch = {
        "observed": np.zeros((MOVES, episodes, 4), np.float32),
        "right": np.zeros((MOVES, episodes), np.int32),
        "alive": np.zeros((MOVES, episodes), np.float32),
    }
    for number in range(MOVES):
        observed = carts.state.astype(np.float32)
        left, right = np.asarray(logits(params, observed)).T
        noise = 0.0 if greedy else generator.logistic(size=episodes)  # so that right has the policy's probability
        action = right - left > noise
        for name, value in {"observed": observed, "right": action, "alive": alive}.items():
            batch[name][number] = value
        alive = alive & carts.move(action)
        if not alive.any():
            break
    return batch


class Actor(Callback):
    """Play with the newest policy before every step; the episodes are the batch of the step."""

    def __init__(self, seed):
        self.seed = seed

    def on_step_begin(self, loop):
        loop.batch = play(loop.state.params, np.random.default_rng((self.seed, loop.step)), EPISODES)


def train_step(state, batch):
    """Make moves more likely that were followed by a higher return than the other episodes had from that move on."""
    alive = batch["alive"]

    def add(later, reward):
        total = reward + DISCOUNT * later
        return total, total

    _, returns = jax.lax.scan(add, jnp.zeros(EPISODES), alive, reverse=True)  # each move that is played earns 1
    advantage = (returns - returns.mean(1, keepdims=True)) * alive
    advantage = advantage / (advantage.std() + 1e-6)

    def loss_fn(params):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["observed"]), batch["right"])
        return (loss * advantage).sum() / alive.sum()

    grads = jax.grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"moves": alive.sum(0).mean()}


def new_state(seed):
    params = POLICY.init(jax.random.key(seed), jnp.zeros(4))
    return TrainState.create(apply_fn=POLICY.apply, params=params, tx=optax.adam(1e-2))


def draw(path, history):
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(history.steps("train/moves"), history["train/moves"], ".-")
    axes.set(title="length of the episodes in training", xlabel="step", ylabel="moves", ylim=(0, MOVES * 1.05))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="default: 100; 60 with --fast")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and episodes; default: 0")
    parser.add_argument("--fast", action="store_true", help="a short run, by default in runs/reinforce-fast")
    parser.add_argument("--directory", type=Path, help="directory of the run; default: runs/reinforce")
    args = parser.parse_args()
    steps, target = (60, 150) if args.fast else (100, 190)
    directory = args.directory or Path("runs", "reinforce-fast" if args.fast else "reinforce")
    callbacks = [GracefulExit(), Actor(args.seed), Checkpoint(directory, when=20), Progress()]
    result = Engine(train_step, callbacks, log_every=5).run(new_state(args.seed), steps=args.steps or steps)
    if result.history:  # empty if the run was already complete
        draw(directory / "reinforce.png", result.history)

    generator = np.random.default_rng(args.seed)
    lasts = play(result.state.params, generator, 100, greedy=True)["alive"].sum(0)
    print(f"picture         {directory}/reinforce.png")
    print(f"training        {result.latest['train/moves']:.1f} moves in the last episodes")
    print(f"new episodes    {(lasts == MOVES).sum()} of 100 upright to the end")
    moves = lasts.mean()
    print(
        f"average length  {moves:.2f} of {MOVES} moves" + (f", below the target of {target}" if moves < target else "")
    )
    return int(moves < target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
