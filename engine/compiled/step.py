"""CompiledStep: the user's step and the compiled halves of callbacks as one compiled call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cadence import ALWAYS, Trigger, as_cadence
from ..callback import Callback, Carry, overridden
from ..checks import takes_rng
from ..data.stacking import BatchStacker
from ..means import BlockMetrics, NoMetrics
from ..messages import log_duration
from ..metrics import Metrics
from ..placement import Placement, put_small
from ..processes import check_same
from ..trees import Batch, State, compare_signatures, ignore_sizes, signature
from . import blocks
from .function import Bundle, Step, StepFunction

MOST_CONSTANTS = 1024
"""The most flags and counts that are kept on the device."""


class CompiledStep:
    """The user's step and the compiled halves of callbacks as one compiled call.

    `call(bundle, batch, rng, due) -> (bundle, metrics)` is the only way to the device: every step goes through it.

    Args:
        step: the user's step.
        callbacks: by name; those with an `update` are compiled in, in this order.
        steps_per_call: maximum number of steps in a call; "auto" leaves that to `blocks.choose_block_size`.
        jit: False runs the same code uncompiled, under `jax.disable_jit()`.
        placement: where arrays are.

    Attributes:
        block_size: the most steps in a block, 0 if every call runs one step, None if not decided yet.
        auto: whether `steps_per_call` is "auto", decided with the first batch; False with `jit=False`.
        conditional: by name, the triggers of compiled halves that are not due at every step.
        takes_rng: whether the step takes a random key.
        needs_step: whether anything compiled needs the number of steps completed.
        function: the function that is compiled.
        jit: whether the step is compiled.
        placement: as given.
    """

    def __init__(
        self,
        step: Step,
        callbacks: dict[str, Callback],
        steps_per_call: int | str,
        jit: bool,
        placement: Placement,
    ):
        transforms = {name: callback for name, callback in callbacks.items() if overridden(callback, "update")}
        cadences = {name: as_cadence(half.update_when, f"{name}.update_when") for name, half in transforms.items()}
        for name, cadence in cadences.items():
            if cadence.seconds:
                raise ValueError(
                    f"{name}.update_when needs a cadence in steps or epochs, got {cadence}. "
                    "It is compiled and has no clock."
                )
        self.conditional: dict[str, Trigger] = {
            name: Trigger(cadence, time.monotonic) for name, cadence in cadences.items() if cadence != ALWAYS
        }
        self.takes_rng: bool = takes_rng(step)
        self.needs_step: bool = self.takes_rng or bool(transforms)
        self.auto: bool = jit and steps_per_call == "auto"
        self.block_size: int | None = None
        self.call: Any = None
        self.function: StepFunction = StepFunction(step, transforms, list(self.conditional), self.takes_rng)
        self._single_step = jax.jit(self.function, donate_argnums=0, inline=True)
        self._init = jax.jit(self.function.init) if jit else self.function.init
        self.jit: bool = jit
        self.placement: Placement = placement
        self._calls: dict[Any, Any] = {}
        self._saved: dict[str, Any] = {"mode": None, "batch": None}
        self._device: Any = None  # the sharding of the constants
        self._constants: dict[Any, jax.Array] = {}
        self._example: Any = None  # the shapes of the run's first batch
        self._example_signature: dict[str, str] = {}
        if not self.auto:
            self.block_size = 0 if steps_per_call == 1 or not jit else int(steps_per_call)
            self._select_call(None)

    def init(self, state: State) -> dict[str, Carry]:
        """Return the first carries, on the devices of the state."""
        return self.placement.place_carries(self._init(state))

    def bundle(self, state: State, carries: dict[str, Carry], step: int) -> Bundle:
        """Return what the next call takes, with `step` steps completed."""
        return state, carries, self.placement.scalar(step, state) if self.needs_step else None

    def begin(self, step: int, saved: dict[str, Any]) -> None:
        """Begin a run with `step` steps completed, fresh or resumed from what `describe` returned.

        Raises:
            ValueError: the saved run had a different execution mode from the one that was asked for.
        """
        self._saved, self.function.expected = saved, saved["batch"]
        if self.auto:
            self.block_size = None
        _check_mode(saved["mode"], self.describe()["mode"])
        for trigger in self.conditional.values():
            trigger.start(step)

    def describe(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one, as JSON values.

        That is the execution mode, "plain" or "block", and the signature of the first batch; None if unknown.
        """
        undecided = self.block_size is None or not self.jit
        mode = self._saved["mode"] if undecided else "block" if self.block_size else "plain"
        return {"mode": mode, "batch": self.function.expected}

    def prepare(self, bundle: Bundle, batch: Batch, rng: Any) -> None:
        """Compile for the run's first batch. From now on a batch of a different shape causes a warning.

        Raises:
            ValueError: the saved run's batches had other leaves, dtypes or ranks, or fewer rows.
        """
        began, traced, saved = time.perf_counter(), self.function.trace_count, self._saved
        whole = self.placement.place_batch(batch)
        here = signature(whole)
        _check_batches(saved["batch"], here)
        self.function.expected = saved["batch"] or here
        if self._example is None or self._example_signature != here:
            self._example, self._example_signature = jax.eval_shape(lambda x: x, whole), here
        if self._device != (device := self.placement.constant_sharding(bundle)):
            self._device, self._constants = device, {}
        layout = self.placement.layout(bundle)
        if self.block_size is None:
            self.block_size = self.choose_block_size(bundle, self._example, batch, rng, saved["mode"])[0]
            self._select_call(layout)
        elif layout is not None:
            self._select_call(layout)
        for count in range(1, min(self.block_size or 0, blocks.MOST) + 1):  # now, so that a run leaves no array behind
            self._constant(count)
        if hasattr(self.call, "trace"):
            batch = BatchStacker(batch, self.block_size).batches() if self.block_size else batch
            lowered = self.call.trace(bundle, batch, rng, self._due((self._never,), 1)).lower()
            if self.placement.processes > 1:
                check_same({"the first batch": here, "the compiled step": lowered.as_text()})
            lowered.compile()
            if self.function.trace_count > traced:
                several = f", up to {self.block_size} steps a call," if self.block_size else ""
                log_duration(f"compiled the step{several}", time.perf_counter() - began)

    def choose_block_size(
        self, bundle: Bundle, shapes: Any, batch: Batch, rng: Any, mode: str | None
    ) -> tuple[int, str]:
        """Return the most steps in a call as "auto" chooses it (0 for one step a call), and why.

        Args:
            bundle, rng: as for a call, or their shapes.
            shapes: of one whole batch.
            batch: one batch, or the part of this process.
            mode: the execution mode of the saved run, None for a fresh run.
        """
        if mode is None and not self.placement.blocks_by_default:
            return 0, "several steps per call have not been measured on many devices"
        if mode == "plain":
            return 0, "the saved run ran one step a call"
        jaxpr = self._single_step.trace(bundle, shapes, rng, np.array(self._never) if self.conditional else None).jaxpr
        size, why = blocks.choose_block_size(jaxpr, batch)
        return (max(size, 2) if mode == "block" else size), why

    def traced(self, bundle: Bundle, rng: Any) -> Any:
        """Return one step as it was traced for the run's first batch, or None before that or if nothing is compiled."""
        if self._example is None or not self.jit:
            return None
        return self._single_step.trace(bundle, self._example, rng, np.array(self._never) if self.conditional else None)

    def advance(
        self, bundle: Bundle, batch: Batch, rng: Any, step: int, count: int, epoch: int
    ) -> tuple[Bundle, Metrics]:
        """Make one call that runs several steps, or in which some compiled halves are not due.

        The metrics leave out what the halves that are not due would have logged.

        Args:
            bundle, rng: as for `call`.
            batch: as for `call`, or the stacked batches of a block.
            step: steps completed before the call.
            count: steps that the call runs.
            epoch: the epoch that the last of them completes, 0 if it completes none.
        """
        epochs, triggers = [0] * (count - 1) + [epoch], self.conditional.values()
        due = tuple(tuple(t.fires(n, e) for t in triggers) for n, e in enumerate(epochs, step + 1)) if triggers else ()
        bundle, metrics = self.call(bundle, batch, rng, self._due(due, count))
        flags = zip(self.conditional, zip(*due, strict=True), strict=True)
        present = {name: due_steps for half, due_steps in flags for name in self.function.logged[half]}
        last, columns = metrics if self.block_size else (metrics, {})
        last_metrics = {name: value for name, value in last.items() if present.get(name, (True,))[-1]}
        if self.block_size:
            return bundle, BlockMetrics(last_metrics, columns, count, present)
        return bundle, last_metrics or NoMetrics(next(iter(last.values()))) if last else last

    def trial(self, bundle: Bundle, batch: Batch, rng: Any) -> tuple[Bundle, Metrics]:
        """Run one step on a copy of the bundle, with the executable of the run. No conditional half is due.

        Args:
            bundle, rng: as for `call`.
            batch: one batch.
        """
        if self.block_size:
            batch = BatchStacker(batch, self.block_size).batches()
        bundle, metrics = self.call(jax.tree.map(jnp.copy, bundle), batch, rng, self._due((self._never,), 1))
        return bundle, metrics[0] if self.block_size else metrics

    @property
    def _never(self) -> tuple[bool, ...]:
        """The flags of a step at which no conditional half is due."""
        return (False,) * len(self.conditional)

    def _due(self, flags: tuple[tuple[bool, ...], ...], count: int) -> Any:
        """Return which conditional halves are due at which steps, as a call takes it.

        For one step: an array (halves,), or None without conditional halves. For a block: an array
        (block size, halves) or None, and the number of steps.
        """
        if not self.block_size:
            return self._constant(flags[0]) if self.conditional else None
        rest = (self._never,) * (self.block_size - len(flags))
        return self._constant(flags + rest) if self.conditional else None, self._constant(count)

    def _constant(self, value: Any) -> jax.Array:
        """Return flags or a count as an array on the device.

        The same values recur, so each is transferred only once. An explicit transfer costs about 40 µs, and an implicit
        one would fail under `jax.transfer_guard("disallow")`.
        """
        if value not in self._constants:
            if len(self._constants) == MOST_CONSTANTS:
                self._constants.clear()
            array = np.int32(value) if isinstance(value, int) else np.array(value)
            self._constants[value] = put_small(array, self._device)
        return self._constants[value]

    def _select_call(self, layout: Any) -> None:
        key = (self.block_size, *jax.tree.leaves(layout))
        if key not in self._calls:
            function: Any = self.function
            call: Any = self._single_step if self.jit else functools.partial(_run_uncompiled, function)
            if self.block_size:
                function = functools.partial(blocks.run_block, self._single_step, self.block_size)
                call = jax.jit(function, donate_argnums=0, compiler_options=blocks.COMPILER_OPTIONS)
            if layout is not None:
                call = self.placement.pin(call, function, layout, stacked=bool(self.block_size), jit=self.jit)
            self._calls[key] = call
        self.call = self._calls[key]


def _run_uncompiled(function: Callable[..., Any], bundle: Bundle, batch: Batch, rng: Any, due: Any) -> Any:
    with jax.disable_jit():
        return function(bundle, jax.tree.map(jnp.asarray, batch), rng, due)


def _check_mode(saved: str | None, here: str | None) -> None:
    """Raise a ValueError if a saved run had a different execution mode."""
    if None not in (saved, here) and saved != here:
        raise ValueError(
            f"The saved run has the execution mode {saved!r}, this run {here!r}, so results may not match exactly. "
            f"Pass steps_per_call={'1' if saved == 'plain' else '2 or more'}, or start from scratch."
        )


def _check_batches(saved: dict[str, str] | None, here: dict[str, str]) -> None:
    """Raise a ValueError if a saved run's batches had other leaves, dtypes or ranks, or fewer rows.

    A batch with fewer rows may be the short last batch of an epoch, and other axes may vary, as with sequences; such
    batches are compiled for, with a warning.
    """
    if saved is not None and (changed := compare_signatures(saved, ignore_sizes(here, saved))):
        raise ValueError(
            f"The batches differ from those of the saved run (saved, then here): {changed}. Pass the same data and "
            "batch size. To go on with other data, read it from the beginning: Checkpoint(..., skip=False)."
        )
