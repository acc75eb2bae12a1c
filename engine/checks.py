"""What can be known to be wrong before the first step."""

from __future__ import annotations

import difflib
import inspect
import itertools
import numbers
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from . import processes
from .trees import compare, fewer_rows, local_bytes

if TYPE_CHECKING:
    from .callback import Callback
    from .events import Events
    from .feed import Feed
    from .loop import Loop


def whole(who: str, name: str, value: Any, least: int) -> int:
    """The value of `name`, if it is a whole number >= `least`; else ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{who} needs {name} >= {least}, a whole number, got {value!r}.")
    return int(value)


def nearest(name: str, among: Iterable[str]) -> str:
    """` Did you mean ...?`, or `""` where nothing is near."""
    found = difflib.get_close_matches(name, list(among), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def arguments(method: Any, names: tuple[str, ...], who: str) -> None:
    """Raises TypeError unless `method` can be called with these positional arguments."""
    if isinstance(method, (staticmethod, classmethod)) or not callable(method):
        raise TypeError(f"{who} needs to be a plain method, got {type(method).__name__}.")
    try:
        signature = inspect.signature(method)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*names)
    except TypeError:
        raise TypeError(f"{who} needs the arguments ({', '.join(names)}), got {signature}.") from None


def takes_rng(step: Callable[..., Any], who: str = "The step") -> bool:
    """Whether a step has a third required argument, which is a random key.

    Raises:
        TypeError: it has another number of required arguments.
    """
    try:
        parameters = inspect.signature(step).parameters.values()
    except ValueError:  # some builtins have none
        return False
    except TypeError:
        raise TypeError(f"{who} needs to be a function (state, batch), got {type(step).__name__}.") from None
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    named = [p.name for p in required]
    if any(p.kind is p.KEYWORD_ONLY for p in required) or not (len(named) in (2, 3) or (takes_any and len(named) < 2)):
        raise TypeError(f"{who} needs the arguments (state, batch) or (state, batch, rng), got ({', '.join(named)}).")
    return len(named) == 3


def random_key(rng: Any, needed: bool) -> None:
    """Raises unless `rng` is a random key, or None where none is needed."""
    if rng is None and needed:
        raise ValueError("The step takes a random key as its third argument. Pass one: rng=jax.random.key(0).")
    kind = getattr(rng, "dtype", None)
    if rng is not None and not (kind == jnp.uint32 or (kind and jnp.issubdtype(kind, jax.dtypes.prng_key))):
        raise TypeError(f"rng needs a random key such as jax.random.key(0), got {rng!r:.80}.")


def named(callbacks: Iterable[Callback], kind: type[Callback]) -> dict[str, Callback]:
    """The callbacks by name: their own, or the class name, numbered where it is repeated.

    Raises:
        TypeError: something is no callback.
        ValueError: a name or a callback occurs twice.
    """
    callbacks = list(callbacks)
    for callback in callbacks:
        if not isinstance(callback, kind):
            call = f" Did you mean {callback.__name__}(...)?" if isinstance(callback, type) else ""
            raise TypeError(f"An engine needs callbacks, got {callback!r:.80}.{call}")
    given = [callback.name for callback in callbacks if callback.name is not None]
    names: dict[str, Callback] = {}
    for callback in callbacks:
        if any(callback is known for known in names.values()) or given.count(callback.name or "") > 1:
            who = callback.name or type(callback).__name__
            raise ValueError(f"Two callbacks are named {who!r}, or one is listed twice. Give each a name of its own.")
        plain = callback._plain or type(callback).__name__
        numbered = (plain if n == 1 else f"{plain}_{n}" for n in itertools.count(1))
        names[callback.name or next(n for n in numbered if n not in names and n not in given)] = callback
    return names


def targets(epochs: Any, steps: Any, epoch_steps: Any) -> None:
    """Raises ValueError unless there is a target, and all are whole numbers."""
    if epochs is None and steps is None:
        raise ValueError("A run needs a target: epochs=, steps= or both.")
    for name, value, least in (("epochs", epochs, 0), ("steps", steps, 0), ("epoch_steps", epoch_steps, 1)):
        if value is not None:
            whole("A run", name, value, least)


def reachable(loop: Loop) -> None:
    """Raises ValueError where a run that goes on stands beyond its target."""
    for unit, at, target in (
        ("step", loop.step, loop.steps),
        ("epoch", loop.epoch + (loop.epoch_step > 0), loop.epochs),
    ):
        if target is not None and at > target:
            raise ValueError(f"The saved run is at {unit} {at}, beyond the target of {target} {unit}s.")


def epochs_known(events: Events, feed: Feed, updates: dict[str, Any], *, steps: int | None) -> None:
    """Cadences in epochs, where epochs are not known before they end, or may never end.

    Raises:
        ValueError: a method that must know before the step waits for the end of an epoch.
    """
    kind = type(feed.data).__name__
    begins = {answer.name: answer.due for answer in events.answers["on_step_begin"]}
    for what, dues in (("on_step_begin", begins), ("update", updates)):
        for name, due in dues.items():
            if due.cadence.epochs and feed.length is None:
                raise ValueError(
                    f"{name}.{what} is due {due.cadence}, which must be known before a step, but a {kind} has no len. "
                    "Give run epoch_steps=."
                )
    answers = [answer for event in ("on_step_end", "on_save") for answer in events.answers[event]]
    waiting = dict.fromkeys(answer.name for answer in answers if answer.due.cadence.epochs)
    if waiting and feed.length is None and feed.one_shot and steps is not None:
        warnings.warn(
            f"{', '.join(waiting)} wait for the end of an epoch, which may never come: the data is a {kind}. "
            "Give run epoch_steps=, or a cadence in steps.",
            stacklevel=2,
        )


def watched(who: str, metric: str, loop: Loop) -> None:
    """Warns at the end of the first epoch of a metric that is not recorded, unless it may still come.

    It may where a callback of its first name has recorded nothing yet, as an evaluation of every
    second epoch, and where its training window is still open.
    """
    first, _, rest = metric.partition("/")
    silent = first in loop.callbacks and not any(name.startswith(f"{first}/") for name in loop.latest)
    opened = first == "train" and f"epoch/{rest}" in loop.latest
    if loop.epoch == 1 and metric not in loop.latest and not (silent or opened):
        warnings.warn(_unseen(who, metric, loop), stacklevel=3)


def appeared(who: str, metric: str, loop: Loop) -> None:
    """Raises ValueError if a run has reached its target and a metric was never recorded."""
    reached = loop.step > loop._began and loop.finished and loop.stopped is None and loop.error is None
    if reached and metric not in loop.latest:
        raise ValueError(_unseen(who, metric, loop))


def _unseen(who: str, metric: str, loop: Loop) -> str:
    records = f"{who} watches {metric!r}, but the records hold {sorted(loop.latest)}."
    return f"{records} Add Evaluate(...) or watch one of these."


def same_everywhere(loop: Loop, log_every: int) -> None:
    """Raises a ValueError unless all processes run the same: they stop and communicate at the same steps."""
    if loop._peers.count == 1:
        return
    if loop.mesh is None:
        raise ValueError("Several processes need a mesh: Engine(..., mesh=onstep.sharding.make_mesh()).")
    cadences = {name: f"{type(cb).__name__} {cb.when} {cb.update_when}" for name, cb in loop.callbacks.items()}
    processes.same(
        {
            "the list of callbacks": cadences,
            "log_every": log_every,
            "the target": f"epochs={loop.epochs}, steps={loop.steps}",
            "the number of batches to an epoch": loop.epoch_length,
            "the mesh": str(loop.mesh),
            "the tree of the state": loop._signature,
            **{
                f"the checksum of the state at {name}": zlib.crc32(data)
                for name, data in local_bytes(loop.state).items()
            },
        }
    )


def same_mode(saved: str | None, here: str | None) -> None:
    """Raises a ValueError if a saved run was executed in another mode."""
    if None not in (saved, here) and saved != here:
        raise ValueError(
            f"The saved run has the execution mode {saved!r}, this run {here!r}, and their bits may differ. "
            f"Give steps_per_call={'1' if saved == 'plain' else '2 or more'}, or start anew."
        )


def same_batches(saved: dict[str, str] | None, here: dict[str, str]) -> None:
    """Raises a ValueError if a saved run's batches had other leaves, dtypes or ranks, or fewer rows.

    Fewer here may be the last ones of an epoch, and other axes may vary, as sequences do: those
    are compiled for, with a warning.
    """
    if saved is not None and (changed := compare(saved, fewer_rows(here, saved))):
        raise ValueError(f"The saved run's batches were others than this run's (saved, then here): {changed}.")
