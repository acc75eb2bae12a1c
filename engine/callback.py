"""Callback: the events that it can handle, and the half that is compiled into the step."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .cadence import ALWAYS, Cadence, as_cadence
from .checks import CheckedCall, check_plain, check_signature, did_you_mean
from .messages import warn_user
from .records import Record
from .representation import call_text
from .snapshot import pack, unpack
from .spans import Observer
from .storage.checkpoints import Checkpoints
from .trees import Batch, State

if TYPE_CHECKING:
    # The one import that points upwards: every event is given the loop, and its signature says so.
    from .loop import Loop as Loop

Carry = Any
"""What the compiled half of a callback keeps on the device: any pytree of arrays."""


class _CadenceAttribute:
    """An attribute that is checked where it is assigned, so the error points at the line that creates the callback."""

    def __init__(self, name: str, default: Cadence | int):
        self._name, self._default = name, default

    def __get__(self, callback: Callback | None, kind: type) -> Cadence | int:
        return self._default if callback is None else vars(callback).get(self._name, self._default)

    def __set__(self, callback: Callback, value: Cadence | int) -> None:
        who = f"{type(callback).__name__}.{self._name}"
        if as_cadence(value, who).seconds and self._name == "update_when":
            raise ValueError(f"{who} needs a cadence in steps or epochs, got {value}. It is compiled and has no clock.")
        vars(callback)[self._name] = value


def _cadence_attribute(name: str, default: Cadence | int) -> Any:
    """Return the attribute; `Any`, because a class that is read or assigned sees a cadence."""
    return _CadenceAttribute(name, default)


class Callback(CheckedCall):
    """Something to do around or inside the steps of a run. Override the methods you need.

    A callback has two halves. The host half handles events between steps. The compiled half (`init` and `update`)
    runs inside the compiled step. At an event, callbacks take effect in the order of the engine's list.

    At every event, `loop.epoch` counts complete epochs. The last step of an epoch completes it before `on_step_end`; if
    the data has no length, its end is noticed only after the events of that step. `loop.batch` is the batch of the
    last step, or None before the first, with two exceptions: in `on_step_begin` it is the next batch, also for the
    records that are logged there, and after a failed call it is the batch of that call.

    Attributes:
        name: unique among an engine's callbacks; by default the class name, numbered if it is repeated.
        when: when `on_step_begin`, `on_step_end` and `on_save` are due; a plain int means steps.
        update_when: when the compiled half is due, in steps (or in epochs, if their length is known).

    Raises:
        TypeError: a subclass is defined with a method that is not an event, or with the wrong arguments.

    >>> from onstep import Engine, every
    >>> class PrintState(Callback):
    ...     when = every(steps=2)
    ...     def on_step_end(self, loop):
    ...         print(loop.step, int(loop.state))
    >>> engine = Engine(lambda state, batch: (state + batch, {}), [PrintState()])
    >>> result = engine.run(jnp.int32(0), [1, 1, 1, 1], epochs=1)
    2 2
    4 4
    """

    name: str | None = None
    when: Cadence | int = _cadence_attribute("when", ALWAYS)
    update_when: Cadence | int = _cadence_attribute("update_when", ALWAYS)
    _initial: bytes | None = None  # the host half when an engine first saw it

    @property
    def checkpoints(self) -> Checkpoints | None:
        """The checkpoints of the run, if this callback saves them; `engine.replay` reads them."""
        return None

    def on_load(self, loop: Loop) -> None:
        """Called first: restore a saved run here, and only here, with `loop.restore(...)`.

        `loop.state` is the state given to `run`, `loop.step` is 0 and `loop.metrics` is empty. If an earlier callback
        has restored a run, or `run` was given a Result, state and step are those of that run.
        """

    def on_run_begin(self, loop: Loop) -> None:
        """The run begins. `on_run_end` will be called, even for a callback of which only `on_load` was reached.

        `loop.state` and `loop.step` are those from which it begins, fresh or restored; `loop.metrics` is empty.
        """

    def on_epoch_begin(self, loop: Loop) -> None:
        """An epoch begins, and none of its batches has been drawn. Not called when a resumed run continues an epoch.

        `loop.epoch` epochs and `loop.step` steps are complete. `loop.state` and `loop.metrics` are of that step;
        the metrics are empty until this session has run a step.
        """

    def on_step_begin(self, loop: Loop) -> None:
        """Step `loop.step + 1` is next, with `loop.batch`, which you may replace.

        `loop.state` is what the step will receive. `loop.metrics` are those of the step before, empty before the first
        step of a session. If a stop is requested here, the step does not run.
        """

    def on_step_end(self, loop: Loop) -> None:
        """Step `loop.step` was called; its results may still be computed on the device.

        `loop.state`, `loop.metrics` (on the device) and the carries include it, and `loop.batch` is its batch.
        """

    def on_log(self, loop: Loop, record: Record) -> None:
        """Numbers are ready: the means of a training window or an epoch, or the values given to `loop.log`.

        `record.values` are numbers on the host, and `loop.latest` has them. `loop.state` and `loop.metrics` are
        those of step `loop.step`; the metrics are empty until this session has run a step.
        """

    def on_epoch_end(self, loop: Loop) -> None:
        """Epoch `loop.epoch` is complete, and its means are in `loop.latest`.

        `loop.state`, `loop.step` and `loop.metrics` are those of its last step. The metrics are empty if a resumed run
        only found its epoch complete.
        """

    def on_save(self, loop: Loop) -> None:
        """Everything that is due at step `loop.step` has run. Save only here; called at most once per step.

        `loop.state`, `loop.metrics` and the carries include the step and what handlers assigned.
        """

    def on_snapshot(self, loop: Loop) -> None:
        """A snapshot is about to be made of `loop.state`, the carries and the counters. An error here prevents it.

        `loop.state` and `loop.metrics` are those of step `loop.step`; the metrics are empty if this session has run
        no step.
        """

    def on_exception(self, loop: Loop, error: BaseException) -> None:
        """The run is ending because of `error`, which `run` raises afterwards.

        `loop.step` is the last step that was called without an error, and `loop.state` and `loop.metrics` are those of
        it. If a compiled call failed, the arrays of `loop.state` were donated to it and can no longer be read. An error
        on the device is noticed when the host waits for it, so a few later steps may have been counted by then.
        """

    def on_run_end(self, loop: Loop) -> None:
        """The run is over, whether it ended well, by a stop or by an error (`loop.error`). Called in reverse order.

        Guaranteed for every callback whose `on_load` or `on_run_begin` was reached. `loop.state`, `loop.step` and
        `loop.metrics` are those of the last step (the metrics are empty if this session has run none). After an error,
        see `on_exception`.
        """

    def observer(self, loop: Loop) -> Observer | None:
        """Return an observer of the whole run, or None.

        This is called before the first `on_load`, and the observer is closed after the last `on_run_end`. An observer
        that is needed later is registered with `loop.observe`.
        """
        return None

    def init(self, state: State) -> Carry:
        """Return the first carry, from the state before the first step."""
        return ()

    def update(self, carry: Carry, ctx: Context) -> tuple[Carry, Context]:
        """After a step, inside the compiled call: return the new carry, and `ctx` unchanged or replaced."""
        return carry, ctx

    def get_state(self) -> dict[str, Any]:
        """Return what the host half must remember: JSON values, numpy arrays and bytes.

        It is saved and restored with the run. When a run starts from scratch, the callback gets back the state that
        it had before its first run.
        """
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned."""

    def _reset(self) -> None:
        """Reset the host half to what it was when an engine first saw it."""
        if overridden(self, "get_state"):
            who = f"{self.name or type(self).__name__}.get_state"
            if self._initial is None:
                self._initial = pack(self.get_state(), who)
            self.set_state(unpack(self._initial))

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return call_text(type(self), {name: getattr(self, name) for name in names})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("when", "update_when"):
            if isinstance(vars(cls).get(name), (Cadence, int, float, str)):
                default: Any = vars(cls)[name]
                as_cadence(default, f"{cls.__name__}.{name}")
                setattr(cls, name, _cadence_attribute(name, default))
        mixins = [vars(base) for base in cls.__mro__[1:-1] if not issubclass(base, Callback)]
        for name, found in dict(item for names in (*mixins, vars(cls)) for item in names.items()).items():
            _check_event_name(name, found, cls.__name__)
            if callable(found) and not hasattr(Callback, name) and (similar := _similar_method(found, name)):
                warn_user(f"{cls.__name__}.{name} is never called by the engine. Did you mean {similar}?")
            if name in _ARGUMENTS:
                _check_method(found, ("self", *_ARGUMENTS[name]), f"{cls.__name__}.{name}")
        for one, other in (("get_state", "set_state"), ("set_state", "get_state"), ("init", "update")):
            if getattr(cls, one) is not getattr(Callback, one) and getattr(cls, other) is getattr(Callback, other):
                raise TypeError(f"{cls.__name__} has {one} without {other}; define both, or neither.")


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""The events, in the order in which a run first reaches them."""

BY_CADENCE = ("on_step_begin", "on_step_end", "on_save")
"""The events that `when` governs. The others reach every callback that handles them."""

_ARGUMENTS = dict.fromkeys(EVENTS, ("loop",)) | {
    "on_log": ("loop", "record"),
    "on_exception": ("loop", "error"),
    "observer": ("loop",),
    "init": ("state",),
    "update": ("carry", "ctx"),
    "get_state": (),
    "set_state": ("state",),
}


def _check_method(method: Any, names: tuple[str, ...], who: str) -> None:
    """Raise a TypeError unless a method has these arguments, and runs when it is called."""
    check_signature(method, names, who)
    check_plain(method, who)
    if "loop" in names:
        given = [p.name for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_POSITIONAL]
        if given[names.index("loop") :][:1] and given[names.index("loop")] in _NOT_THE_LOOP:
            raise TypeError(
                f"{who} needs the arguments ({', '.join(names)}), got {inspect.signature(method)}. An event is given "
                "the loop: loop.epoch, loop.step, loop.state, loop.latest."
            )


_NOT_THE_LOOP = {"batch", "epoch", "logs", "metrics", "model", "params", "state", "step", "trainer"}
"""Names of an event's first argument which show that its author expects something else, as in other engines."""


_OTHER_WORDS = {"batch": "step", "train": "run", "fit": "run", "start": "begin", "finish": "end", "stop": "end"}
"""The words of other engines for events, with ours."""


def _in_our_words(name: str) -> str:
    return "_".join(_OTHER_WORDS.get(word, word) for word in name.replace("train_batch", "batch").split("_"))


def _check_event_name(name: str, found: Any, who: str) -> None:
    """Raise a TypeError for a method that looks like an event but is none."""
    plain = {event.replace("_", ""): event for event in EVENTS}
    meant = plain.get(name.lower().replace("_", ""))
    if name.startswith("on_") and name not in EVENTS:
        raise TypeError(f"{who}.{name} is not an event.{did_you_mean(_in_our_words(name), EVENTS)}")
    if meant is None and "_" in name:  # not `log` or `save`, which are common names of methods
        meant = plain.get(f"on{name.lower().replace('_', '')}")
    if meant not in (None, name) and callable(found):
        raise TypeError(f"{who}.{name} is never called. The event is {meant}.")


def _similar_method(found: Any, name: str) -> str | None:
    """Return the callback method that this one was probably meant to override."""
    similar = difflib.get_close_matches(name, [method for method in _ARGUMENTS if method not in EVENTS], 1, 0.8)
    with contextlib.suppress(TypeError, ValueError):
        if similar and list(inspect.signature(found).parameters)[1:] == list(_ARGUMENTS[similar[0]]):
            return similar[0]
    return None


def check_when(callback: Callback, name: str) -> None:
    """Raise a ValueError unless `when` and `update_when` are cadences, and govern something of the callback."""
    when = as_cadence(callback.when, f"{name}.when")
    update_when = as_cadence(callback.update_when, f"{name}.update_when")
    handled = [event for event in EVENTS if overridden(callback, event)]
    compiled = bool(overridden(callback, "update"))
    for method in vars(callback).keys() & _ARGUMENTS.keys():  # assigned to the object instead of defined in its class
        _check_method(vars(callback)[method], _ARGUMENTS[method], f"{name}.{method}")
    if update_when != ALWAYS and not compiled:
        raise ValueError(
            f"{name}.update_when={update_when} has no effect, because {name} has no compiled half (update)."
        )
    governs = set(handled) & set(BY_CADENCE) or (compiled and update_when == when)
    if when == ALWAYS or governs or not (handled or compiled):
        return
    if handled:
        raise ValueError(
            f"{name}.when={when} has no effect on {', '.join(handled)}: it governs {', '.join(BY_CADENCE)}. Handle "
            "one of these; on_step_end can be due by epochs, as in every(epochs=5)."
        )
    raise ValueError(f"{name}.when={when} has no effect on update. Its cadence is update_when.")


def overridden(callback: Callback, name: str) -> Any:
    """Return the callback's override of a method, or None if the method is not overridden."""
    found = getattr(callback, name)
    return None if getattr(found, "__func__", None) is getattr(Callback, name) else found


class FunctionCallback(Callback):
    """A function as a callback that handles one event; made by `engine.on`.

    Args:
        event: with or without `on_`.
        function: takes what the event takes.
        when: as `Callback.when`.
    """

    def __init__(self, event: str, function: Any, when: Cadence | int):
        method = event if event.startswith("on_") else f"on_{event}"
        if method not in EVENTS:
            names = [name.removeprefix("on_") for name in EVENTS]
            raise ValueError(
                f"{event!r} is not an event.{did_you_mean(_in_our_words(method).removeprefix('on_'), names)}"
            )
        self.event: str = method
        self.function: Any = function
        self.plain_name: str = getattr(function, "__name__", "function")
        _check_method(function, _ARGUMENTS[method], getattr(function, "__name__", "The function"))
        self.when: Cadence | int = as_cadence(when, f"{self.plain_name}.when")
        setattr(self, method, function)
        check_when(self, self.plain_name)


def name_callbacks(callbacks: Iterable[Callback]) -> dict[str, Callback]:
    """Return the callbacks by `name`, which defaults to the class name, numbered if it is repeated.

    Raises:
        TypeError: an item is not a callback.
        ValueError: a name or a callback occurs twice.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        advice = f" Write Engine(step, [{type(callbacks).__name__}(...)])." if isinstance(callbacks, Callback) else ""
        raise TypeError(f"An engine needs a list of callbacks, got {callbacks!r:.80}.{advice}")
    callbacks = list(callbacks.values() if isinstance(callbacks, Mapping) else callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"An engine needs callbacks, got {callback!r:.80}.{_how_to_make_a_callback(callback)}")
    given = [callback.name for callback in callbacks if callback.name is not None]
    names: dict[str, Callback] = {}
    for callback in callbacks:
        if not isinstance(callback.name, (str, type(None))):
            raise TypeError(f"The name of {type(callback).__name__} needs to be text, got {callback.name!r}.")
        kind = callback.plain_name if isinstance(callback, FunctionCallback) else type(callback).__name__
        if any(callback is known for known in names.values()) or given.count(callback.name or "") > 1:
            who, listed = callback.name or type(callback).__name__, f"{type(callback).__name__}(..., name="
            if sum(callback is other for other in callbacks) > 1:
                raise ValueError(f"The callback {who} is listed twice. List it once, or make another one.")
            raise ValueError(f"Two callbacks are named {who!r}. Give each its own name: {listed}'another').")
        numbered = (kind if n == 1 else f"{kind}_{n}" for n in itertools.count(1))
        names[callback.name or next(n for n in numbered if n not in names and n not in given)] = callback
    return _Callbacks(names)


def _how_to_make_a_callback(given: Any) -> str:
    """Return what to do with something in the list of callbacks that is none."""
    if isinstance(given, type):
        if issubclass(given, Callback):
            return f" Did you mean {given.__name__}(...)?"
        return f" Derive it from onstep.Callback: class {given.__name__}(Callback)."
    if given is None:
        return " Leave it out of the list."
    if isinstance(given, (list, tuple)):
        return " Put its callbacks into the list one by one: [*callbacks, another]."
    if callable(given) and hasattr(given, "__name__"):
        return (
            f' To call a function at an event: engine.on("step_end")({given.__name__.replace("<lambda>", "function")}).'
        )
    if any(hasattr(given, name) for name in (*EVENTS, "update")):
        return f" Derive its class from onstep.Callback: class {type(given).__name__}(Callback)."
    return ""


def _refuse_change(*_: Any, **__: Any) -> Any:
    raise TypeError("The callbacks of an engine cannot be changed. Make another Engine with those that you want.")


class _Callbacks(dict[str, Callback]):
    """The callbacks of an engine by name, in order. It cannot be changed: an engine is configuration."""

    _refuse: Any = staticmethod(_refuse_change)
    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def reset(callbacks: dict[str, Callback]) -> None:
    """Reset the host halves of callbacks to what they were when an engine first saw them."""
    for callback in callbacks.values():
        callback._reset()


def find_carry(carries: dict[str, Carry], callbacks: dict[str, Callback], callback: Callback) -> Carry:
    """Return the carry of a callback, among the carries of a run by name.

    Raises:
        ValueError: the callback is not one of the run's, or has no compiled half.
    """
    name = next((name for name, known in callbacks.items() if known is callback), None)
    if name is None:
        advice = "" if isinstance(callback, Callback) else " Pass the callback itself."
        raise ValueError(f"This {type(callback).__name__} is not among the run's callbacks {list(callbacks)}.{advice}")
    if name not in carries:
        raise ValueError(f"{name} has no carry: it does not override update.")
    return carries[name]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a compiled half sees of a step. `replace` and `log` return a new one.

    Attributes:
        step: steps completed before this one, an int32 scalar.
        before: the state before the step.
        state: the state after it, and after the compiled halves earlier in the list.
        batch: the batch of the step.
        metrics: the metrics of the step, and what earlier compiled halves have logged.
        aux: the third result of the step; `{}` if it has none.

    >>> from onstep import Callback, Engine
    >>> class UpdateSize(Callback):
    ...     def update(self, carry, ctx):
    ...         return carry, ctx.log(update_size=abs(ctx.state - ctx.before))
    >>> engine = Engine(lambda state, batch: (state + batch, {}), [UpdateSize()], log_every=1)
    >>> engine.run(jnp.float32(0), [1.0, -2.0], epochs=1).history["train/update_size"]
    [1.0, 2.0]
    """

    step: jax.Array
    before: State
    state: State
    batch: Batch
    metrics: dict[str, Any]
    aux: dict[str, Any]
    _key: Any = None
    _who: str = ""
    _logged: list[str] = dataclasses.field(
        default_factory=list, init=False, repr=False
    )  # by calls of `log` on this one

    @property
    def rng(self) -> jax.Array:
        """The random key of this callback at this step: the run's key, folded with the step and the name."""
        if self._key is None:
            raise ValueError(f"{self._who} needs a random key. Pass one to the run: rng=jax.random.key(0).")
        return jax.random.fold_in(self._key, zlib.crc32(self._who.encode()))

    @property
    def dropped(self) -> list[str]:
        """Names that were logged through this context; only the context that `log` returned has them."""
        return list(self._logged)

    def replace(self, **changes: Any) -> Context:
        """Return the context with another `state`, `metrics` or `aux`.

        Raises:
            TypeError: another field was given.
        """
        wrong = set(changes) - {"state", "metrics", "aux"}
        if wrong:
            raise TypeError(f"ctx.replace of {self._who} accepts only state, metrics and aux, got {sorted(wrong)}.")
        return dataclasses.replace(self, **changes)

    def log(self, values: dict[str, Any] | None = None, /, **named: Any) -> Context:
        """Return the context with more metrics: scalars by name.

        Raises:
            ValueError: a name is taken, or a value is not a scalar.
        """
        new = {name: jnp.asarray(value) for name, value in {**(values or {}), **named}.items()}
        for name, value in new.items():
            if name in self.metrics:
                raise ValueError(f"{self._who} logs {name!r}, which is taken. The metrics are {sorted(self.metrics)}.")
            if value.ndim:
                raise ValueError(f"{self._who} needs to log scalars, got shape {value.shape} for {name!r}.")
        self._logged.extend(new)
        return dataclasses.replace(self, metrics={**self.metrics, **new})
