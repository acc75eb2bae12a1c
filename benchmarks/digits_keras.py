"""Train the same network on the same digits with onstep and with Keras 3 on JAX, and time both.

Run: python benchmarks/digits_keras.py [--rounds 5] [--epochs 40] [--json FILE]

Each run is a process of its own, and the two libraries take turns, so a slow moment of the machine affects both. Keras
has the environment of `benchmarks/peers/run.py`, which is created at the first run.

The same in both: the images and their number in each batch, the layers, the loss, Adam and its rate, an average of the
weights that is evaluated after every epoch, early stopping (with a patience that lets every run reach its last epoch),
and a backup from which the run can be resumed. Every backup is complete before the time ends. TensorBoard is left out,
because Keras needs TensorFlow to write its files.

Not the same: Keras saves weights and optimizer in one HDF5 file, and resumes at the start of an epoch. onstep saves the
whole run with checksums, in the background, and resumes at the step. Keras decides the number of steps in a compiled
call by `steps_per_execution`, which is 1 unless it is given.

"first" is the time from the start of the process to the end of the first epoch with its evaluation, imports and
compilation included. "epoch" is the mean of the epochs after it, up to the return of `fit` or `run`. Both are medians
of the rounds. "lines" counts the lines of the script below, without empty ones.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent
BATCH, TRAINED = 64, 1408  # 22 full batches, so no step has another shape

DATA = """
import numpy as np
data = np.load("digits.npz")
train_x, train_y, val_x, val_y = (data[name] for name in ("train_x", "train_y", "val_x", "val_y"))
"""

ONSTEP_CLOCK = """
import time
from onstep import Callback
class Clock(Callback):
    def on_epoch_end(self, loop):
        if loop.epoch == 1:
            self.first = time.time()
clock = Clock()
"""

ONSTEP = """
import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState
from onstep import Batches, Engine, every
from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate
train = Batches({"x": train_x, "y": train_y}, 64)
held_out = Batches({"x": val_x, "y": val_y}, 60, shuffle=False)
model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
def loss_fn(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch["x"]), batch["y"]).mean()
def step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}
def score(state, batch):
    return {"accuracy": (model.apply(state.params, batch["x"]).argmax(-1) == batch["y"]).mean()}
params = model.init(jax.random.key(0), train_x[:1])
state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-3))
ema = EMA(0.98)
engine = Engine(step, [
    ema,
    Evaluate(score, held_out, using=ema),
    EarlyStopping("val/accuracy", patience=EPOCHS, mode="max"),
    SAVE
    clock,
])
result = engine.run(state, train, epochs=EPOCHS)
accuracy = result.latest["val/accuracy"]
"""

KERAS_CLOCK = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import time
import keras
class Clock(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            self.first = time.time()
clock = Clock()
"""

KERAS = """
import keras
model = keras.Sequential([
    keras.Input((64,)),
    keras.layers.Dense(128, activation="relu"),
    keras.layers.Dense(10),
])
model.compile(
    keras.optimizers.Adam(3e-3, use_ema=True, ema_momentum=0.98),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    STEPS
)
history = model.fit(train_x, train_y, batch_size=64, epochs=EPOCHS, validation_data=(val_x, val_y),
                    validation_batch_size=60, verbose=0, callbacks=[
    keras.callbacks.SwapEMAWeights(),
    keras.callbacks.EarlyStopping("val_accuracy", patience=EPOCHS, mode="max"),
    SAVE
    clock,
])
accuracy = history.history["val_accuracy"][-1]
"""

REPORT = """
import json
print(json.dumps({"first": clock.first, "end": time.time(), "accuracy": float(accuracy)}))
"""

SAVES = {  # (how often, what onstep's list gets, what Keras's list gets)
    "none": ("", ""),
    "10 epochs": (
        'Checkpoint("run", when=every(epochs=10)),',
        'keras.callbacks.BackupAndRestore("run", save_freq=220, delete_checkpoint=False),',
    ),
    "epoch": ('Checkpoint("run"),', 'keras.callbacks.BackupAndRestore("run", delete_checkpoint=False),'),
}


def script(library, saves, epochs, execution):
    """Return the part of a script that is counted."""
    text = (ONSTEP if library == "onstep" else KERAS).replace("EPOCHS", str(epochs))
    text = text.replace("SAVE", SAVES[saves][library == "keras"])
    return text.replace("STEPS", f"steps_per_execution={execution}," if execution > 1 else "")


def lines(text):
    """Return the number of lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines())


def timed(python, library, saves, epochs, execution):
    """Run one script in a process of its own, and return its times in seconds and its accuracy."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        trained = {"train_x": images[360:][:TRAINED], "train_y": labels[360:][:TRAINED]}
        np.savez(Path(folder, "digits.npz"), **trained, val_x=images[:360], val_y=labels[:360])
        clock = ONSTEP_CLOCK if library == "onstep" else KERAS_CLOCK
        program = DATA + clock + script(library, saves, epochs, execution) + REPORT
        start = time.time()
        done = subprocess.run([python, "-c", program], cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    seconds = {"first": found["first"] - start, "epoch": (found["end"] - found["first"]) / (epochs - 1)}
    return seconds | {"accuracy": found["accuracy"]}


def keras_python():
    """Return the interpreter of the environment with Keras; create the environment if there is none."""
    spec = importlib.util.spec_from_file_location("peers_run", HERE / "peers" / "run.py")
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    return peers.python_of("keras")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--saves", choices=SAVES, nargs="+", default=list(SAVES), help="how often to save")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    pythons = {"onstep": sys.executable, "keras": str(keras_python())}
    cases = [
        (library, saves, execution)
        for saves in options.saves
        for library, execution in (("onstep", 1), ("keras", 1), ("keras", TRAINED // BATCH))
    ]
    found = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            library, saves, execution = case
            found[case].append(timed(pythons[library], library, saves, options.epochs, execution))

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; medians of {options.rounds} rounds,")
    print(f"{options.epochs} epochs of {TRAINED // BATCH} steps\n")
    print(f"{'saves every':<14}{'library':<32}{'lines':>6}{'first s':>9}{'epoch s':>9}{'accuracy':>10}")
    rows = []
    for (library, saves, execution), times in found.items():
        name = library + (f", steps_per_execution={execution}" if execution > 1 else "")
        row = {key: statistics.median(each[key] for each in times) for key in times[0]}
        count = lines(script(library, saves, options.epochs, execution))
        rows.append({"saves": saves, "library": name, "lines": count, **row, "rounds": times})
        print(f"{saves:<14}{name:<32}{count:>6}{row['first']:>9.2f}{row['epoch']:>9.4f}{row['accuracy']:>10.4f}")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
