"""Callback: the events it can answer, and the half that is compiled into the step."""

from __future__ import annotations

import dataclasses
import inspect
import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from . import checks
from .cadence import ALWAYS, Cadence, as_cadence
from .representation import call_text
from .snapshot import pack, unpack
from .trees import Batch, State

if TYPE_CHECKING:
    from .loop import Loop
    from .records import Record

Carry = Any
"""What a callback's pure half keeps on the device: any pytree of arrays."""


class Callback:
    """Something done around, or inside, the steps of a run. Override what you need.

    The host half answers events between steps; the pure half (`init`, `update`) is compiled
    into the step. At an event, order of effects is order in the engine's list.

    Attributes:
        name: unique among an engine's callbacks; by default the class name, numbered if repeated.
        when: when `on_step_begin`, `on_step_end` and `on_save` are due; a plain int means steps.
        update_when: when the pure half is due; by step number (or epoch, where its length is known).

    Raises:
        TypeError: when a subclass is defined with a method that is no event, or with wrong arguments.
    """

    name: str | None = None
    when: Cadence | int = ALWAYS
    update_when: Cadence | int = ALWAYS
    _plain: str | None = None  # the name to number, where it is not the class's
    _fresh: bytes | None = None  # the host half as an engine saw it first

    def on_load(self, loop: Loop) -> None:
        """Before anything else; a saved run may take the place of the fresh one: `loop.restore(...)`."""

    def on_run_begin(self, loop: Loop) -> None:
        """The run begins, fresh or restored; from here on `on_run_end` is owed."""

    def on_epoch_begin(self, loop: Loop) -> None:
        """An epoch starts, no batch of it is drawn; not called for an epoch that a resume continues."""

    def on_step_begin(self, loop: Loop) -> None:
        """Step `loop.step + 1` is next, with `loop.batch`; after a stop asked for here it does not run."""

    def on_step_end(self, loop: Loop) -> None:
        """Step `loop.step` is done: `loop.state`, `loop.metrics` and the carries include it."""

    def on_log(self, loop: Loop, record: Record) -> None:
        """Numbers are ready: a training window, an epoch mean, or what was handed to `loop.log`."""

    def on_epoch_end(self, loop: Loop) -> None:
        """Epoch `loop.epoch` is complete and counted; its means are in `loop.latest`."""

    def on_save(self, loop: Loop) -> None:
        """All that is due at this step has run and agrees: the one place to save, once a step."""

    def on_snapshot(self, loop: Loop) -> None:
        """A snapshot of the run is about to be made; an error raised here prevents it."""

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        """The run is ending because of `error`, which goes on to the caller afterwards."""

    def on_run_end(self, loop: Loop) -> None:
        """The run is over, however it ended (`loop.error`); called in reverse order, always."""

    def init(self, state: State) -> Carry:
        """The first carry, from the state before the first step."""
        return ()

    def update(self, carry: Carry, ctx: Context) -> tuple[Carry, Context]:
        """After a step, inside the compiled call: the new carry, and `ctx` as it is or replaced."""
        return carry, ctx

    def get_state(self) -> dict[str, Any]:
        """What the host half must remember: JSON values, numpy arrays, bytes. Saved and restored,
        and put back to what it was before the first run whenever a run starts afresh.
        """
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes back what `get_state` gave."""

    def _reset(self) -> None:
        """Puts the host half back to what it was when an engine saw it first."""
        if own(self, "get_state"):
            who = f"{self.name or type(self).__name__}.get_state"
            if self._fresh is None:
                self._fresh = pack(self.get_state(), who)
            self.set_state(unpack(self._fresh))

    def __repr__(self) -> str:
        named = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return call_text(type(self), {name: getattr(self, name) for name in named})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, found in vars(cls).items():
            if name.startswith("on_") and name not in EVENTS:
                raise TypeError(f"{cls.__name__}.{name} is not an event.{checks.nearest(name, EVENTS)}")
            if name in _ARGUMENTS:
                checks.arguments(found, ("self", *_ARGUMENTS[name]), f"{cls.__name__}.{name}")
        for one, other in (("get_state", "set_state"), ("set_state", "get_state"), ("init", "update")):
            if getattr(cls, one) is not getattr(Callback, one) and getattr(cls, other) is getattr(Callback, other):
                raise TypeError(f"{cls.__name__} has {one} without {other}; define both.")


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""The events, in the order in which a run meets them first."""

_ARGUMENTS = dict.fromkeys(EVENTS, ("loop",)) | {
    "on_log": ("loop", "record"),
    "on_exception": ("loop", "error"),
    "init": ("state",),
    "update": ("carry", "ctx"),
    "get_state": (),
    "set_state": ("state",),
}


def own(callback: Callback, name: str) -> Any:
    """The callback's own method of that name, None where it is Callback's empty one."""
    found = getattr(callback, name)
    return None if getattr(found, "__func__", None) is getattr(Callback, name) else found


class Function(Callback):
    """A function as a callback: it answers one event."""

    def __init__(self, event: str, function: Any, when: Cadence | int):
        method = event if event.startswith("on_") else f"on_{event}"
        if method not in EVENTS:
            names = [name.removeprefix("on_") for name in EVENTS]
            raise ValueError(f"{event!r} is not an event.{checks.nearest(method.removeprefix('on_'), names)}")
        checks.arguments(function, _ARGUMENTS[method], getattr(function, "__name__", "The function"))
        self._plain = getattr(function, "__name__", "function")
        self.when: Cadence | int = as_cadence(when, f"{self._plain}.when")
        setattr(self, method, function)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pure half sees; `replace` and `log` return a new one.

    Attributes:
        step: steps completed before this one, an int32 scalar.
        before: the state before the step.
        state: the state after it, and after the pure halves earlier in the list.
        batch: the step's batch.
        metrics: the step's metrics, and what earlier pure halves have logged.
        aux: the step's third result; `{}` if it has none.
    """

    step: jax.Array
    before: State
    state: State
    batch: Batch
    metrics: dict[str, Any]
    aux: dict[str, Any]
    _key: Any = None
    _who: str = ""

    @property
    def rng(self) -> jax.Array:
        """A key of this callback at this step: the run's, folded with the step and the name."""
        if self._key is None:
            raise ValueError(f"{self._who} needs a random key. Pass one to the run: rng=jax.random.key(0).")
        return jax.random.fold_in(self._key, zlib.crc32(self._who.encode()))

    def replace(self, **changes: Any) -> Context:
        """The same with another `state`, `metrics` or `aux`."""
        wrong = set(changes) - {"state", "metrics", "aux"}
        if wrong:
            raise TypeError(f"{self._who} can replace state, metrics and aux of its ctx, got {sorted(wrong)}.")
        return dataclasses.replace(self, **changes)

    def log(self, values: dict[str, Any] | None = None, /, **named: Any) -> Context:
        """The same with more metrics: scalars, by name. A name that is taken is an error."""
        new = {name: jnp.asarray(value) for name, value in {**(values or {}), **named}.items()}
        for name, value in new.items():
            if name in self.metrics:
                raise ValueError(f"{self._who} logs {name!r}, which is taken. The metrics are {sorted(self.metrics)}.")
            if value.ndim:
                raise ValueError(f"{self._who} needs to log scalars, got shape {value.shape} for {name!r}.")
        return dataclasses.replace(self, metrics={**self.metrics, **new})
