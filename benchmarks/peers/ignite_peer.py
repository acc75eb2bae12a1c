"""pytorch-ignite's Engine around the jitted step.

Comparable: the step, its donation and the batches are the same as in the bare loop; ignite
fires its five events per step in every case. Not comparable: nothing is moved to a device or logged to a file.
"""

import importlib.metadata

import timing
from ignite.engine import Engine, Events


def runner(log):
    def run(step, state, data):
        def update(engine, batch):
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        engine = Engine(update)
        if log:
            every = Events.ITERATION_COMPLETED(every=timing.LOG_EVERY)
            engine.add_event_handler(every, lambda engine: float(engine.state.output["loss"]))
        engine.run(data, max_epochs=1)

    return run


if __name__ == "__main__":
    cases = {"no handlers": runner(False), f"loss read every {timing.LOG_EVERY} steps": runner(True)}
    timing.main("ignite", importlib.metadata.version("pytorch-ignite"), lambda workload: cases)
