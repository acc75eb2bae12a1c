"""The step and the pure halves as one compiled call."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import blocks, checks
from .cadence import ALWAYS, as_cadence
from .callback import Callback, Carry, Context, own
from .events import Due
from .means import Rows
from .messages import log_duration
from .metrics import Metrics, as_metrics
from .sharding import Spread, Spreading
from .trees import Batch, State, compare, difference, home, place, signature, strong

Step = Callable[..., Any]
"""`(state, batch) -> (state, metrics)`; a third argument is a random key, a third result `aux`."""

Bundle = tuple[State, dict[str, Carry], Any]
"""What a call takes and gives back, donated: the state, the carries, and the number of steps
completed (an int32 scalar; None where nothing compiled asks for it)."""


class Program:
    """One step and the pure halves of some callbacks as one compiled call.

    `call(bundle, batch, rng, due) -> (bundle, metrics)` is the seam to the device: whatever
    takes its place sees every step.

    Args:
        step: the user's step.
        callbacks: by name; those with an `update` are compiled in, in this order.
        steps_per_call: the most steps in a call; "auto" leaves that to `blocks.choose`.
        jit: False runs the same uncompiled, under `jax.disable_jit()`.
        spread: over many devices.

    Attributes:
        rows: the most steps in a block, 0 where steps are called one by one, None where that
            is not decided yet.
        auto: whether that is chosen here.
    """

    def __init__(self, step: Step, callbacks: dict[str, Callback], steps_per_call: int | str, jit: bool, spread: Any):
        halves = {name: half for name, half in callbacks.items() if own(half, "update")}
        cadences = {name: as_cadence(half.update_when, f"{name}.update_when") for name, half in halves.items()}
        for name, cadence in cadences.items():
            if cadence.seconds:
                raise ValueError(f"{name}.update_when needs steps or epochs, got {cadence}: it is compiled in.")
        self.at_times: dict[str, Due] = {n: Due(c, time.monotonic) for n, c in cadences.items() if c != ALWAYS}
        self.takes_rng: bool = checks.takes_rng(step)
        self.counted: bool = self.takes_rng or bool(halves)
        self._traced = Traced(step, halves, list(self.at_times), self.takes_rng)
        self._one = jax.jit(self._traced, donate_argnums=0, inline=True)
        self.auto: bool = jit and steps_per_call == "auto"
        self.spread: Spread | None = spread
        self._jit = jit
        self.call: Any
        self._calls: dict[Any, Any] = {}
        self._saved: dict[str, Any] = {"mode": None, "batch": None}
        self.rows: int | None = None
        if not self.auto:
            self._decide(0 if steps_per_call == 1 or not jit else int(steps_per_call))
        self._example: Any = None  # the shapes of the run's first batch
        self._init = jax.jit(self._traced.init) if jit else self._traced.init

    def init(self, state: State) -> dict[str, Carry]:
        """The first carries, which lie where the state does."""
        carries = self._init(state)
        return carries if self.spread is None else place(carries, "A carry", copy=False, spread=self.spread)

    def _decide(self, rows: int) -> None:
        if rows not in self._calls:
            one = self._one if self._jit else functools.partial(_uncompiled, self._traced)
            block = functools.partial(blocks.several, self._one, rows)
            self._calls[rows] = jax.jit(block, donate_argnums=0) if rows else one
        self.rows, self.call = rows, self._calls[rows]

    def _spread_out(self, spread: Spread, bundle: Bundle) -> None:
        """Batches go where they belong; what a call gives back lies as what it took, whatever XLA would choose."""
        layout = jax.tree.map(lambda leaf: leaf.sharding, bundle)
        key = (self.rows, *jax.tree.leaves(layout))
        if key not in self._calls:
            one = functools.partial(blocks.several, self._one, self.rows) if self.rows else self._traced
            self._calls[key] = Spreading(one if self._jit else self.call, spread, layout, bool(self.rows), self._jit)
        self.call = self._calls[key]

    def start(self, step: int, saved: dict[str, Any]) -> None:
        """A run begins with `step` steps completed, or goes on from what `describe` once gave.

        Raises:
            ValueError: that was another mode than the one that was asked for.
        """
        self._saved, self._traced.expected = saved, saved["batch"]
        if self.auto:
            self.rows = None
        checks.same_mode(saved["mode"], self.describe()["mode"])
        for due in self.at_times.values():
            due.start(step)

    def describe(self) -> dict[str, Any]:
        """What a run that goes on must share, as JSON values: the mode in which steps are compiled,
        "plain" or "block", and the signature of the first batch; None where not known.
        """
        mode = self._saved["mode"] if self.rows is None or not self._jit else "block" if self.rows else "plain"
        return {"mode": mode, "batch": self._traced.expected}

    def prepare(self, bundle: Bundle, batch: Batch, rng: Any) -> None:
        """Compiles for the run's first batch; other shapes are worth a warning from now on.

        Raises:
            ValueError: a saved run's batches had other leaves, dtypes or ranks, or fewer rows.
        """
        began, traced, saved = time.perf_counter(), self._traced.times, self._saved
        whole = batch if self.spread is None else self.spread.put(batch)
        checks.same_batches(saved["batch"], signature(whole))
        self._traced.expected = saved["batch"] or signature(whole)
        self._example = jax.eval_shape(lambda x: x, whole)
        never = (False,) * len(self.at_times)
        if self.rows is None:
            mode = saved["mode"] or ("plain" if self.spread is not None else None)  # blocks there: not measured
            rows = 0
            if mode != "plain":
                like = jax.eval_shape(lambda x: x, whole)
                rows = blocks.choose(self._one.trace(bundle, like, rng, self._due([never], 1)).jaxpr, batch)
            self._decide(max(rows, 2) if mode == "block" else rows)
        if self.spread is not None:
            self._spread_out(self.spread, bundle)
        if hasattr(self.call, "trace"):
            batch = blocks.Stack(batch, self.rows).batches() if self.rows else batch
            self.call.trace(bundle, batch, rng, self._due([never], 1)).lower().compile()
            if self._traced.times > traced:
                several = f", up to {self.rows} to a call," if self.rows else ""
                log_duration(f"compiled the step{several}", time.perf_counter() - began)

    def traced(self, bundle: Bundle, rng: Any) -> Any:
        """One step as it was traced for the run's first batch, None before that or if nothing is compiled."""
        if self._example is None or not self._jit:
            return None
        never = np.zeros(len(self.at_times), bool) if self.at_times else None
        return self._one.trace(bundle, self._example, rng if self.counted else None, never)

    def bundle(self, state: State, carries: dict[str, Carry], step: int) -> Bundle:
        """What the first call takes, with `step` steps completed."""
        if not self.counted:
            return state, carries, None
        count, there = jnp.asarray(step, jnp.int32), home(state) if self.spread is None else self.spread.whole
        return state, carries, count if there is None else jax.device_put(count, there)

    def advance(
        self, bundle: Bundle, batch: Batch, rng: Any, step: int, count: int, epoch: int
    ) -> tuple[Bundle, Metrics]:
        """One call where it runs several steps or some halves are not always due: what those that
        are not would have logged is left out of the metrics.

        Args:
            bundle, rng: as for `call`.
            batch: as for `call`, or the stacked batches of a block.
            step: steps completed before it.
            count: steps that it runs.
            epoch: the epoch that the last of them completes, 0 if it completes none.
        """
        epochs, halves = [0] * (count - 1) + [epoch], self.at_times.values()
        dues = [tuple(half.now(n, e) for half in halves) for n, e in enumerate(epochs, step + 1)] if halves else []
        bundle, metrics = self.call(bundle, batch, rng, self._due(dues, count))
        flags = zip(self.at_times, zip(*dues, strict=True), strict=True)
        present = {name: now for half, now in flags for name in self._traced.logged[half]}
        last, columns = metrics if self.rows else (metrics, {})
        last = {name: value for name, value in last.items() if present.get(name, (True,))[-1]}
        return bundle, Rows(last, columns, count, present) if self.rows else last

    def _due(self, dues: list[tuple[bool, ...]], count: int) -> Any:
        """Which halves are due at which steps, as a call takes it: (halves,) of one step or None;
        of a block (rows, halves), and beside it the number of steps.
        """
        if not self.rows:
            return np.array(dues[0]) if self.at_times else None
        rest = [(False,) * len(self.at_times)] * (self.rows - len(dues))
        return np.array(dues + rest) if self.at_times else None, np.int32(count)


def _uncompiled(function: Callable[..., Any], bundle: Bundle, batch: Batch, rng: Any, due: Any) -> tuple[Bundle, Any]:
    with jax.disable_jit():
        return function(bundle, jax.tree.map(jnp.asarray, batch), rng, due)


class Traced:
    """What is compiled: pure but for what it notes while it is traced.

    Attributes:
        at_times: the halves that are not always due, in the order of the `due` flags.
        logged: by such a half, the metrics that it adds.
        expected: the signature of the run's first batch.
        times: how often it was traced.
    """

    def __init__(self, step: Step, halves: dict[str, Callback], at_times: list[str], takes_rng: bool):
        self.step: Step = step
        self.halves: dict[str, Callback] = halves
        self.at_times: list[str] = at_times
        self.takes_rng: bool = takes_rng
        self.logged: dict[str, list[str]] = {}
        self.expected: dict[str, str] | None = None
        self.times: int = 0

    def init(self, state: State) -> dict[str, Carry]:
        """The first carries."""
        carries = {name: half.init(state) for name, half in self.halves.items()}
        return jax.tree.map(jnp.copy, strong(carries))  # copied: no carry may share a buffer with the state

    def __call__(self, bundle: Bundle, batch: Batch, key: Any, due: Any) -> tuple[Bundle, Metrics]:
        """One step; what it checks costs nothing afterwards."""
        self.times += 1
        state, carries, count = bundle
        self._compare(batch)
        folded = None if key is None else jax.random.fold_in(key, count)
        new, metrics, aux = self._results(self.step(state, batch, *([folded] if self.takes_rng else [])), state)
        # Without this, what observers compute could change how the step itself is fused, and so its bits.
        new, metrics = jax.lax.optimization_barrier((new, metrics))
        ctx = Context(count, state, new, batch, metrics, aux, folded)
        carries = dict(carries)
        for name, half in self.halves.items():
            ctx = dataclasses.replace(ctx, _who=name)
            now = due[self.at_times.index(name)] if name in self.at_times else None
            carries[name], ctx = self._update(name, half, carries[name], ctx, now)
        return (ctx.state, carries, None if count is None else count + 1), ctx.metrics

    def _results(self, results: Any, state: State) -> tuple[State, Metrics, dict[str, Any]]:
        if not isinstance(results, tuple) or len(results) not in (2, 3):
            got = f"{len(results)} results" if type(results) is tuple else type(results).__name__
            raise TypeError(f"The step needs to return (state, metrics) or (state, metrics, aux), got {got}.")
        new, metrics, aux = (*results, {})[:3]
        if not isinstance(aux, dict):
            raise TypeError(f"The step needs a dict as its third result, aux, got {type(aux).__name__}.")
        return self._kept(state, new, "The step"), as_metrics(metrics, "The step"), aux

    @staticmethod
    def _kept(old: Any, new: Any, who: str, what: str = "state") -> Any:
        new = strong(new)
        if changed := difference(old, new):
            raise ValueError(f"{who} needs to return a {what} like the one it got: {changed}.")
        return new

    def _update(self, name: str, half: Callback, carry: Carry, ctx: Context, now: Any) -> tuple[Carry, Context]:
        """One pure half; behind a branch where it is not always due."""

        def due() -> tuple[Carry, State, Metrics]:
            out = half.update(carry, ctx)
            if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Context)):
                raise TypeError(f"{name}.update needs to return (carry, ctx), got {out!r:.80}.")
            new, after = out
            state = ctx.state if after.state is ctx.state else self._kept(ctx.state, after.state, f"{name}.update")
            return self._kept(carry, new, f"{name}.update", "carry"), state, as_metrics(after.metrics, name)

        def not_due() -> tuple[Carry, State, Metrics]:
            zero = {n: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), m) for n, m in shapes.items()}
            return carry, ctx.state, zero | ctx.metrics

        if now is None:
            out = due()
        else:
            shapes = jax.eval_shape(due)[2]
            self.logged[name] = [n for n in shapes if n not in ctx.metrics]
            out = jax.lax.cond(now, due, not_due)
        carry, state, metrics = jax.lax.optimization_barrier(out)  # no half changes another's bits
        return carry, ctx.replace(state=state, metrics=metrics)

    def _compare(self, batch: Batch) -> None:
        if self.expected is not None and (changed := compare(self.expected, signature(batch))):
            warnings.warn(
                f"A batch has another shape than the run's first, so the step is compiled again: {changed}. "
                "Batches of one shape spare that (drop the last short one, or pad it).",
                stacklevel=2,
            )
