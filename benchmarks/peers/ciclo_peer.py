"""ciclo's loop around the jitted step.

Comparable: the step, its donation and the batches are the same as in the bare loop. Not comparable: ciclo
needs a version of jax from 2023 (see the requirements), so compare the time it adds, not the time per
step. It also keeps logged values in a history on the host, and reads them at that step.
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
