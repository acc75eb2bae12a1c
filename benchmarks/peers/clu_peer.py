"""A hand-written loop with hooks after every step, as with clu's periodic actions.

`clu.periodic_actions` cannot be imported without tensorflow, so the class below copies what
`PeriodicAction` of clu 0.0.12 does at a step: read the clock, check that no step was skipped, and
test whether it is due. Comparable: everything else is the bare loop. The two hooks represent
ReportProgress and Profile, which act every minute and every hour, so never in these short runs.
"""

import time

import timing


class PeriodicAction:
    def __init__(self, act, *, every_steps=None, every_secs=None):
        self.act, self.every_steps, self.every_secs = act, every_steps, every_secs
        self.previous_time = self.last_step = None

    def check(self, step, t):
        if self.last_step is None:
            self.previous_time = t
        elif self.every_steps is not None and step - self.last_step != 1:
            raise ValueError(f"A hook was called at step {step} after step {self.last_step}.")
        self.last_step = step

    def due(self, step, t):
        if self.every_steps is not None and step % self.every_steps == 0:
            return True
        return self.every_secs is not None and t - self.previous_time > self.every_secs

    def __call__(self, step):
        t = time.monotonic()
        self.check(step, t)
        if self.due(step, t):
            self.act()
            self.previous_time = t


def runner(log):
    def run(step, state, data):
        metrics = None
        hooks = [PeriodicAction(print, every_secs=seconds) for seconds in (60, 3600)]
        if log:
            hooks.append(PeriodicAction(lambda: float(metrics["loss"]), every_steps=timing.LOG_EVERY))
        for number, batch in enumerate(data, 1):
            state, metrics = step(state, batch)
            for hook in hooks:
                hook(number)

    return run


if __name__ == "__main__":
    cases = {"two hooks": runner(False), f"and a third reads the loss every {timing.LOG_EVERY} steps": runner(True)}
    timing.main("clu", "after 0.0.12", lambda workload: cases)
