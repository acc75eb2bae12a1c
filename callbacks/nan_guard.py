"""Find the first NaN or inf, down to the step and leaf, and raise an error or undo the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Context, Loop, Result
from onstep.tools import check_int, did_you_mean, get_carry, leaves_of_type, replay_command, to_host

KINDS = ("finite", "inf", "NaN")
FINE = np.iinfo(np.int32).max


class GuardCarry(NamedTuple):
    """What `NaNGuard` keeps on the device, packed into one int32 array.

    Five arrays would be simpler, but each leaf of a carry costs about 0.9 µs per call.
    """

    step: Any  # scalar, the step to report, counted from 1; 0 for none
    code: Any  # scalar, the leaf to report: its number times 4, plus its kind
    skipped: Any  # scalar, the number of steps undone since the run first began
    in_a_row: Any  # scalar, the number of bad steps since the last good one
    exempt: Any  # (leaves,), for each float leaf of the first state: 0 if it was finite

    def pack(self) -> jax.Array:
        """Return the parts as one array of shape (4 + leaves,)."""
        return jnp.concatenate([jnp.stack(self[:4]), self.exempt])

    @classmethod
    def unpack(cls, carry: Any) -> GuardCarry:
        """Return the parts of an array that `pack` made."""
        step, code, skipped, in_a_row = carry[:4]
        return cls(step, code, skipped, in_a_row, carry[4:])


class NaNGuard(Callback):
    """Finds the first NaN or inf, down to the step and leaf, and raises an error or undoes such steps.

    The metrics, and `aux["grads"]` if the step returns it, are checked inside the compiled step. The host reads
    the result at the steps of `when`, and before every snapshot. Before a snapshot it checks the state as well, so no
    checkpoint holds a NaN. Leaves of the state that are not finite before the first step, such as the best
    value so far, are exempt.

    With `skip`, the whole step is undone in the state, including its counters and random keys, but `loop.step`
    counts it. This can need memory for a second state. The compiled halves later in the list see the
    restored state. The metrics of a bad step are kept, so a mean that includes a NaN is NaN; `train/skipped` is
    the share of steps that were undone.

    Args:
        state: True also checks the state at every step; `skip` always does.
        skip: True undoes bad steps instead of raising.
        max_skips: how many steps in a row may be undone, >= 1; the next one raises. None for no limit.
        ignore: metrics and leaves that may be NaN or inf, by name or by the first parts of the name:
            `"perplexity"`, `"grads/scale"`, `"state/opt_state"`.
        when: when the host reads the result of the checks; a plain int means steps.
        name: the callback's name.

    Raises:
        FloatingPointError: something is not finite; the message has the step and the leaf.
        ValueError: a number is out of range, there is nothing to check, or nothing matches a name to ignore;
            or, with `skip`, a callback earlier in the list has floats in its carry, which cannot be restored.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> def step(state, batch):
    ...     return state + batch, {"loss": batch}
    >>> guard, data = NaNGuard(skip=True), [1.0, float("nan"), 2.0]
    >>> result = Engine(step, [guard]).run(jnp.float32(0), data, epochs=1)
    >>> float(result.state), guard.skipped(result)
    (3.0, 1)
    >>> Engine(step, [NaNGuard()]).run(jnp.float32(0), data, epochs=1)
    Traceback (most recent call last):
    ...
    FloatingPointError: NaNGuard: non-finite loss at step 2 (NaN). Earlier checkpoints are intact. ...
    """

    def __init__(
        self,
        *,
        state: bool = False,
        skip: bool = False,
        max_skips: int | None = None,
        ignore: str | Iterable[str] = (),
        when: Cadence | int = 50,
        name: str | None = None,
    ):
        if max_skips is not None:
            check_int("NaNGuard", "max_skips", max_skips, 1)
            if not skip:
                raise ValueError(f"NaNGuard needs skip=True for max_skips={max_skips}; without it, no step is skipped.")
        self.state: bool = state
        self.skip: bool = skip
        self.max_skips: int | None = max_skips
        self.ignore: tuple[str, ...] = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.when: Cadence | int = when
        self.name: str | None = name
        self._checks_state = state or skip
        self._allowed = 0 if not skip else FINE if max_skips is None else max_skips  # bad steps in a row
        # By the names of all leaves traced so far, their numbers; the device knows a leaf by its number.
        self._numbers: dict[str, int] = {}

    def init(self, state: Any) -> jax.Array:
        none = jnp.int32(0)
        # Not `_kinds`, whose reductions take twice as long to compile, which is noticeable with hundreds of leaves.
        exempt = [~jnp.isfinite(leaf).all() for leaf in _state_floats(state).values()]
        return GuardCarry(none, none, none, none, jnp.array(exempt, jnp.int32)).pack()

    def update(self, carry: jax.Array, ctx: Context) -> tuple[jax.Array, Context]:
        step, code, skipped, in_a_row, exempt = GuardCarry.unpack(carry)
        first = self._first(ctx, exempt)
        bad = first < FINE
        in_a_row = jnp.where(bad, in_a_row + 1, 0)
        report = (in_a_row > self._allowed) & (step == 0)
        step, code = jnp.where(report, ctx.step + 1, step), jnp.where(report, first, code)
        if self.skip:
            skipped += bad.astype(jnp.int32)
            restored = jax.tree.map(lambda new, old: jnp.where(bad, old, new), ctx.state, ctx.before)
            ctx = ctx.replace(state=restored).log(skipped=bad)
        return GuardCarry(step, code, skipped, in_a_row, exempt).pack(), ctx

    def on_run_begin(self, loop: Loop) -> None:
        for name, callback in loop.callbacks.items() if self.skip else ():
            if callback is self:
                break
            if leaves_of_type(loop.carries.get(name), jnp.inexact):
                raise ValueError(
                    f"NaNGuard(skip=True) needs to come before {name} in the list of callbacks, because an undone step "
                    f"cannot be removed from {name}'s carry."
                )

    def on_step_end(self, loop: Loop) -> None:
        found = self._read(loop)
        if found.step:
            name, kind = list(self._numbers)[found.code // 4], KINDS[found.code % 4]
            skips = f", after max_skips={self.max_skips} undone steps in a row" if self.skip else ""
            undo = "" if self.skip else ", or undo such steps with NaNGuard(skip=True)"
            raise FloatingPointError(
                f"NaNGuard: non-finite {name} at step {found.step} ({kind}){skips}. Earlier checkpoints are intact. "
                f"Lower the learning rate{undo}. To find the operation that caused it:\n"
                f"    {replay_command(loop, found.step)}"
            )

    def on_snapshot(self, loop: Loop) -> None:
        self.on_step_end(loop)
        self._check_state(loop)

    def skipped(self, source: Loop | Result) -> int:
        """Return the number of steps undone since the run first began. Waits for the device."""
        return int(self._read(source).skipped)

    def _read(self, source: Loop | Result) -> GuardCarry:
        return GuardCarry.unpack(to_host(get_carry(source, self)))

    def _first(self, ctx: Context, exempt: jax.Array) -> jax.Array:
        """Return the code of the first leaf that is not finite, its number times 4 plus its kind; else `FINE`."""
        state, grads = _state_floats(ctx.state), leaves_of_type({"grads": ctx.aux.get("grads")}, jnp.inexact)
        metrics = leaves_of_type(ctx.metrics, jnp.inexact)
        names, kinds = [*metrics, *grads], _kinds([*metrics.values(), *grads.values()])
        if self._checks_state:
            names += state
            kinds = jnp.concatenate([kinds, jnp.where(exempt > 0, 0, _kinds([*state.values()]))])
        self._check_names(names, [*names, *state])
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in names], np.int32)
        return jnp.where((kinds > 0) & self._watched(names), 4 * numbers + kinds, FINE).min()

    def _check_state(self, loop: Loop) -> None:
        state, exempt = _state_floats(loop.state), self._read(loop).exempt > 0
        # One leaf a call: few shapes need compiling, where one call for all leaves takes seconds to compile.
        kinds = [_kind(leaf) for leaf in state.values()]
        for kind in kinds:
            kind.copy_to_host_async()
        kinds = np.array([to_host(kind) for kind in kinds], np.int32)
        for i in np.flatnonzero((kinds > 0) & ~exempt & self._watched(state)):
            advice = "" if self._checks_state else " NaNGuard(state=True) finds the exact step."
            raise FloatingPointError(
                f"NaNGuard: non-finite {[*state][i]} at or before step {loop.step} ({KINDS[kinds[i]]}), although "
                f"metrics and gradients are finite. Earlier checkpoints are intact.{advice}"
            )

    def _watched(self, names: Iterable[str]) -> np.ndarray:
        """Return for each name whether it is checked; names in `ignore` are not."""
        return np.array([not _within(name, *self.ignore) for name in names], bool)

    def _check_names(self, names: list[str], known: list[str]) -> None:
        for part in self.ignore:
            if not any(_within(name, part) for name in known):
                raise ValueError(f"NaNGuard found nothing named {part!r} to ignore.{did_you_mean(part, known)}")
        if not names:
            raise ValueError(
                "NaNGuard needs floats to check, but the step returns none: no metric and no aux['grads']. "
                'Return them (state, {"loss": loss}, {"grads": grads}), or check the state: NaNGuard(state=True).'
            )


def _within(name: str, *parts: str) -> bool:
    return f"{name}/".startswith(tuple(f"{part}/" for part in parts))


def _state_floats(state: Any) -> dict[str, Any]:
    """Return the leaves of a state that can be NaN, as `state/<path>`."""
    return leaves_of_type({"state": state}, jnp.inexact)


def _kinds(values: list[Any]) -> jax.Array:
    """Return for each leaf the worst kind of number in it, as an index of `KINDS`: int32[leaves]."""
    return jnp.array([_kind(leaf) for leaf in values], jnp.int32)


@jax.jit
def _kind(leaf: Any) -> jax.Array:
    """Return the worst kind of number in a leaf, as an index of `KINDS`: a uint8 scalar."""
    # In 8 bits, because that takes half the time of the plain form, isfinite(x).all().
    return jnp.where(jnp.isnan(leaf), jnp.uint8(2), jnp.isinf(leaf).astype(jnp.uint8)).max(initial=0)
