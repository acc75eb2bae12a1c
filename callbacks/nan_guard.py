"""Find the first NaN or inf, to the step and the leaf: raise, or undo the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onstep import Cadence, Callback, Context, Loop, Result
from onstep.checks import nearest, whole
from onstep.trees import leaves

KINDS = ("finite", "inf", "NaN")
FINE = np.iinfo(np.int32).max


class NaNGuard(Callback):
    """Finds the first NaN or inf, to the step and the leaf, and raises; or undoes such steps.

    The check of the metrics, and of `aux["grads"]` where the step returns them, is compiled into
    the step. The host reads what it found when due, and whenever a snapshot is made; then it
    checks the state too, so none with a NaN is saved, and the last good checkpoint stays. Leaves
    of the state that are not finite before the first step, such as a best value so far, are exempt.

    With `skip` nothing of such a step stays in the state, counters and keys included; `loop.step`
    goes on. It can take the memory of one more state. Pure halves later in the list see the state
    restored. The metrics of such a step stay as they are, so a mean with a NaN in it is NaN;
    `train/skipped` is the share of steps that were undone.

    Args:
        state: True checks the state at every step too; `skip` always does.
        skip: True undoes the steps instead of raising.
        max_skips: steps in a row that may be undone, >= 1; one more raises. None: any number.
        ignore: metrics and leaves that need not be finite, by name or its first part:
            `"perplexity"`, `"grads/scale"`, `"state/opt_state"`.
        when: when the host reads; a plain int means steps.
        name: the callback's name.

    Raises:
        FloatingPointError: something is not finite; the message has the step and the leaf.
        ValueError: a number out of range, nothing to check, or nothing of a name to ignore; or,
            with `skip`, a callback earlier in the list keeps floats, which cannot be restored.
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
            whole("NaNGuard", "max_skips", max_skips, 1)
            if not skip:
                raise ValueError(f"NaNGuard needs skip=True for max_skips={max_skips}: without it nothing is skipped.")
        self.state: bool = state or skip
        self.skip: bool = skip
        self.max_skips: int | None = max_skips
        self.when: Cadence | int = when
        self.name: str | None = name
        self.ignore: tuple[str, ...] = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self._most = 0 if not skip else FINE if max_skips is None else max_skips  # steps in a row without an error
        self._numbers: dict[str, int] = {}  # of every leaf that was traced: on the device it goes by its number
        self._loop: Loop | None = None

    def init(self, state: Any) -> jax.Array:
        # One array, as a call costs by the leaf: the step and the code to report, steps undone in all
        # and in a row, and then the kind of each leaf of the state.
        return jnp.concatenate([jnp.zeros(4, jnp.int32), _kinds([*_floats({"state": state}).values()])])

    def update(self, carry: jax.Array, ctx: Context) -> tuple[jax.Array, Context]:
        step, code, skipped, row = carry[:4]
        first = self._first(ctx, carry[4:])
        bad = first < FINE
        row = jnp.where(bad, row + 1, 0)
        report = (row > self._most) & (step == 0)
        step, code = jnp.where(report, ctx.step + 1, step), jnp.where(report, first, code)
        if self.skip:
            skipped += bad
            restored = jax.tree.map(lambda new, old: jnp.where(bad, old, new), ctx.state, ctx.before)
            ctx = ctx.replace(state=restored).log(skipped=bad)
        return jnp.concatenate([jnp.stack([step, code, skipped, row]), carry[4:]]), ctx

    def on_run_begin(self, loop: Loop) -> None:
        for name, callback in loop.callbacks.items() if self.skip else ():
            if callback is self:
                break
            if _floats(loop.carries.get(name)):
                raise ValueError(
                    f"NaNGuard(skip=True) needs to stand before {name} in the list: "
                    f"what {name} keeps of a step that is undone cannot be restored."
                )
        self._loop = loop

    def on_step_end(self, loop: Loop) -> None:
        step, code, *_ = np.asarray(loop.carry(self)).tolist()
        if step:
            name = list(self._numbers)[code // 4]
            skips = f", after max_skips={self.max_skips} in a row" if self.skip else ""
            advice = "" if self.skip else ", or undo such steps with NaNGuard(skip=True)"
            raise FloatingPointError(
                f"NaNGuard: non-finite {name} at step {step} ({KINDS[code % 4]}){skips}. What was saved before stands. "
                f"Look into the step with Engine(..., jit=False), lower the learning rate{advice}."
            )

    def on_run_end(self, loop: Loop) -> None:
        self._loop = None

    def get_state(self) -> dict[str, Any]:
        if self._loop is not None:  # somebody makes a snapshot of the run
            self.on_step_end(self._loop)
            self._check_state(self._loop)
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def skipped(self, source: Loop | Result) -> int:
        """Steps that were undone since the run first began; waits for the device."""
        return int(np.asarray(source.carry(self))[2])

    def _first(self, ctx: Context, exempt: jax.Array) -> jax.Array:
        """The first leaf that is not finite, as a code: its number times 4 and its kind; `FINE` if there is none."""
        state = _floats({"state": ctx.state})
        seen = [*_floats(ctx.metrics).items(), *_floats({"grads": ctx.aux.get("grads")}).items()]
        kinds = _kinds([leaf for _, leaf in seen])
        if self.state:
            kinds = jnp.concatenate([kinds, jnp.where(exempt > 0, 0, _kinds([*state.values()]))])
            seen += state.items()
        names = [name for name, _ in seen]
        self._refuse(names, [*names, *state])
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in names], np.int32)
        return jnp.where((kinds > 0) & self._heeded(names), 4 * numbers + kinds, FINE).min()

    def _check_state(self, loop: Loop) -> None:
        state, exempt = _floats({"state": loop.state}), np.asarray(loop.carry(self))[4:] > 0
        kinds = np.asarray(_kinds([*state.values()]))
        for i in np.flatnonzero((kinds > 0) & ~exempt & self._heeded(state)):
            advice = "" if self.state else " NaNGuard(state=True) finds the exact step."
            raise FloatingPointError(
                f"NaNGuard: non-finite {[*state][i]} at step {loop.step} or before ({KINDS[kinds[i]]}), with finite "
                f"metrics and gradients. What was saved before stands.{advice}"
            )

    def _heeded(self, names: Iterable[str]) -> np.ndarray:
        """By name, whether it is not one to ignore."""
        return np.array([not _within(name, *self.ignore) for name in names], bool)

    def _refuse(self, names: list[str], known: list[str]) -> None:
        for part in self.ignore:
            if not any(_within(name, part) for name in known):
                raise ValueError(f"NaNGuard finds nothing named {part!r} to ignore.{nearest(part, known)}")
        if not names:
            raise ValueError(
                "NaNGuard needs floats to check, but the step returns none: no metric and no aux['grads']. "
                'Return them (state, {"loss": loss}, {"grads": grads}), or check the state: NaNGuard(state=True).'
            )


def _within(name: str, *parts: str) -> bool:
    return f"{name}/".startswith(tuple(f"{part}/" for part in parts))


def _floats(tree: Any) -> dict[str, Any]:
    """The leaves that can be NaN, by name."""
    return {name: leaf for name, leaf in leaves(tree).items() if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)}


@jax.jit
def _kinds(values: list[Any]) -> jax.Array:
    """By leaf the worst that is in it, as an index of `KINDS`."""
    # In 8 bits this takes half the time of isfinite(x).all().
    two = jnp.uint8(2)
    return jnp.array([jnp.where(jnp.isnan(x), two, jnp.isinf(x)).max(initial=0) for x in values], jnp.int32)
