"""Train a small language model: a causal transformer that writes docstrings, character by character.

    python examples/language_model.py

The data are all docstrings of Python's standard library; every tenth module is held out. The
perplexity on held-out text is 31 for a model of character frequencies and 15 for a model of pairs of
characters. The transformer reaches 5.2 in under two minutes on two CPU cores, and continues a prompt
with text such as

    If the prefixed is a paddress for a supporter error and None for string the message.

The learning rate follows a schedule with warmup, built from a validated configuration. `LearningRate`
records it with the loss; `tensorboard --logdir runs/language-model` shows both. If you interrupt the
script, run the same command again to resume.
"""

import argparse
import ast
import math
import sys
import sysconfig
import textwrap
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from onstep import Batches, Engine, at, every
from onstep.callbacks import Checkpoint, Evaluate, GracefulExit, Progress, TensorBoard
from onstep.callbacks.learning_rate import LearningRate
from onstep.config import OptimizerConfig, SchedulerConfig
from onstep.state import TrainState

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 3, 2


class Transformer(nn.Module):
    vocabulary: int

    @nn.compact
    def __call__(self, text):
        embed = nn.Embed(self.vocabulary, WIDTH)
        x = embed(text) + nn.Embed(CONTEXT, WIDTH)(jnp.arange(text.shape[-1]))
        for _ in range(LAYERS):
            heads = nn.DenseGeneral((3, HEADS, WIDTH // HEADS), use_bias=False)(nn.LayerNorm()(x))
            query, key, value = jnp.moveaxis(heads, -3, 0)
            attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            x += nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False)(attended)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def loss_of(state, params, batch):
    """Return the mean next-character cross entropy; `batch` has the shape (windows, characters)."""
    logits = state.apply_fn({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def step(state, batch):
    loss, grads = jax.value_and_grad(loss_of, argnums=1)(state, state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


def score(state, batch):
    return {"loss": loss_of(state, state.params, batch)}


def docstrings():
    """Return the standard library's docstrings as training and held-out text, and the characters they use."""
    parts = [[], []]
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                parts[number % 10 == 0].append(ast.get_docstring(node) or "")
    texts = ["\n\n".join(filter(None, part)).encode("ascii", "ignore") for part in parts]
    characters, tokens = np.unique(np.frombuffer(b"".join(texts), np.uint8), return_inverse=True)
    train, held_out = np.split(tokens.astype(np.int32), [len(texts[0])])
    return train, held_out, characters


def windows(text):
    """Split the text into windows that overlap by one character."""
    return np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)[::CONTEXT]


def perplexities(train, held_out, vocabulary):
    """Return the held-out perplexities of models of character frequencies and of pairs of characters."""
    single = np.bincount(train, minlength=vocabulary) + 1.0
    pairs = np.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2).reshape(vocabulary, -1) + 1.0
    after, before = held_out[:, 1:], held_out[:, :-1]
    probabilities = (single / single.sum())[after], (pairs / pairs.sum(1, keepdims=True))[before, after]
    return [math.exp(-np.log(probability).mean()) for probability in probabilities]


@jax.jit
def write(state, text, key):
    """Sample the continuation of a text that is CONTEXT characters long."""

    def next_character(text, key):
        logits = state.apply_fn({"params": state.params}, text)[-1]
        new = jax.random.categorical(key, logits / 0.7)  # 0.7 is the temperature
        return jnp.append(text[1:], new), new

    return jax.lax.scan(next_character, text, jax.random.split(key, 400))[1]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, help="steps, and length of the schedule; default: 3000; 350 with --fast")
    add("--seed", type=int, default=0, help="seed of the weights, data order and sample; default: 0")
    add("--fast", action="store_true", help="a short run, by default in runs/language-model-fast")
    add("--directory", type=Path, help="directory of the run; default: runs/language-model")
    return parser.parse_args()


def main():
    args = parse_args()
    steps = args.steps or (350 if args.fast else 3000)
    directory = args.directory or Path("runs", "language-model-fast" if args.fast else "language-model")
    train, held_out, characters = docstrings()
    tests = windows(held_out)[: 400 if args.fast else None]
    print(f"data       {len(train):,} characters, {len(characters)} different ones, and {tests.size:,} held out")

    scheduler = SchedulerConfig(
        name="cosine", learning_rate=5e-3, warmup_steps=steps // 10, decay_steps=steps, end_value=1e-4
    )
    schedule = scheduler.build()
    optimizer = OptimizerConfig(name="adamw", b2=0.99, weight_decay=0.05, clip_by_global_norm=1.0).build(schedule)
    model = Transformer(len(characters))
    params = jax.jit(model.init)(jax.random.key(args.seed), tests[:1, :-1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    print(f"model      transformer of {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)

    periodically = every(max(1, steps // 5)) | at(steps)
    callbacks = [
        GracefulExit(),
        LearningRate(schedule),
        Evaluate(score, Batches(tests, 100, shuffle=False, drop_last=False), name="val", when=periodically),
        Checkpoint(directory, when=periodically),
        TensorBoard(directory),
        Progress(),
    ]
    result = Engine(step, callbacks).run(state, Batches(windows(train), 16, seed=args.seed), steps=steps)

    prompt = tests[0, :-1]
    for title, text in ("held-out", prompt), ("sampled", write(result.state, prompt, jax.random.key(args.seed))):
        print(textwrap.indent(characters[text].tobytes().decode(), f"{title:<9}| ", lambda line: True))
    reached, (unigram, bigram) = math.exp(result.latest["val/loss"]), perplexities(train, tests, len(characters))
    target = bigram if args.fast else bigram / 2
    print(f"baseline perplexity  {unigram:.2f} from characters, {bigram:.2f} from pairs")
    print(f"held-out perplexity  {reached:.2f}" + (f", above the target of {target:.2f}" if reached > target else ""))
    return int(reached > target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(130)
