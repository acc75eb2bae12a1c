"""Keras 3 on jax: `fit`, with 1 and with 32 steps per execution.

Comparable: the same layers, loss and optimizer as the bare loop's step, on the same batches, and
Keras donates its variables too. Not comparable: Keras owns the step, which also keeps the mean of
the loss. So a row shows the cost of its step and its loop together; only the no-op row, where the
compiled function is replaced, shows the loop alone. A callback with a batch event makes `fit`
convert every loss to a float; without one, threads do it.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import timing

WIDTHS = {"no-op": [10], "W1": [10], "W3": [256, 256, 256, 10]}


class NoOp(keras.Sequential):
    """A model whose compiled step returns constants."""

    def make_train_function(self, force=False):
        logs = {"loss": keras.ops.ones(())}
        self.train_function = self._make_function(lambda state, batch: (logs, state))


class ReadLoss(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % timing.LOG_EVERY == 0:
            float(logs["loss"])


def compiled(workload, steps_per_execution):
    *hidden, classes = WIDTHS[workload]
    layers = [keras.layers.Dense(width, activation="relu") for width in hidden] + [keras.layers.Dense(classes)]
    model = (NoOp if workload == "no-op" else keras.Sequential)([keras.Input((64,)), *layers])
    model.compile(
        keras.optimizers.Adam(1e-3) if workload == "W3" else keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
        jit_compile=True,
    )
    return model


def runner(workload, *callbacks, steps_per_execution=1):
    model = compiled(workload, steps_per_execution)

    def run(step, state, data):
        pairs = ((batch["x"], batch["y"]) for batch in data)
        model.fit(pairs, steps_per_epoch=len(data), shuffle=False, verbose=0, callbacks=list(callbacks))

    return run


def cases(workload):
    return {
        "no callbacks": runner(workload),
        f"loss read every {timing.LOG_EVERY} steps": runner(workload, ReadLoss()),
        f"no callbacks, steps_per_execution={timing.CALL}": runner(workload, steps_per_execution=timing.CALL),
    }


if __name__ == "__main__":
    timing.main("keras", keras.__version__, cases)
