"""ciclo's loop around the jitted step.

Comparable: the step, its donation and the batches are those of the bare loop. Not comparable: it
runs on a jax of 2023 (see the requirements), so compare what it adds, not what its steps take;
and it keeps what is logged in a history on the host, which reads it at that step.
"""

import importlib.metadata
import warnings

import timing

warnings.simplefilter("ignore")
import ciclo  # noqa: E402


def runner(log):
    def run(step, state, data):
        metrics = None

        def train(state, batch):
            nonlocal metrics
            state, metrics = step(state, batch)
            return state

        def report(state, batch):
            return ciclo.logs(metrics=metrics)

        tasks = {ciclo.every(1): train}
        if log:
            tasks[ciclo.every(log)] = report
        ciclo.loop(state, data, tasks)

    return run


if __name__ == "__main__":
    cases = {
        "no callbacks": runner(None),
        f"loss logged every {timing.LOG_EVERY} steps": runner(timing.LOG_EVERY),
        "loss logged every step": runner(1),
    }
    timing.main("ciclo", importlib.metadata.version("ciclo"), lambda workload: cases)
