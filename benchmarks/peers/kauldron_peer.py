"""kauldron's Trainer around the jitted step.

Comparable: the step, its donation and the batches are the same as in the bare loop; the step is
wrapped in a custom TrainStep. Not comparable: kauldron places each batch on the device with a sharding
before the step, which the bare loop leaves to jit. Profiler, checkpoints and files are off.
"""

import importlib.metadata
import os
import tempfile
import types

os.environ["TQDM_DISABLE"] = "1"

import optax
import timing
from flax import linen as nn
from kauldron import kd
from kauldron.data.iterators import NonCheckpointableIterator
from kauldron.train.metric_writer import NoopWriter

NEVER = 10**9


class ReadLoss(NoopWriter):
    def write_step_metrics(self, *, aux, **_):
        float(aux["loss"])


def runner(writer, log_every):
    def run(step, state, data):
        class Data(kd.data.Pipeline):
            def __iter__(self):
                return NonCheckpointableIterator(source=self, iter=iter(data))

        class Step(kd.train.TrainStep):
            def init(self, elem_spec, **_):
                return types.SimpleNamespace(step=0, params=state)

            def step(self, state, batch, **_):
                state.params, metrics = step(state.params, batch)
                return state, metrics

        with tempfile.TemporaryDirectory() as directory:
            kd.train.Trainer(
                workdir=directory,
                train_ds=Data(batch_size=len(data.around[0]["x"])),
                model=nn.Dense(1),
                optimizer=optax.sgd(0.1),
                trainstep=Step(),
                num_train_steps=len(data) - 1,
                log_metrics_every=log_every,
                log_summaries_every=NEVER,
                writer=writer,
                profiler=None,
            ).train()

    return run


if __name__ == "__main__":
    cases = {
        "nothing logged": runner(NoopWriter(), NEVER),
        f"loss read every {timing.LOG_EVERY} steps": runner(ReadLoss(), timing.LOG_EVERY),
    }
    timing.main("kauldron", importlib.metadata.version("kauldron"), lambda workload: cases)
