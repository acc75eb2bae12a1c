"""A run as a snapshot, and a snapshot in the place of a run."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import jax

from .batches import Batches
from .callback import own
from .snapshot import Snapshot, describe_key, pack, unpack
from .trees import compare, place

if TYPE_CHECKING:
    from .loop import Loop


def take(loop: Loop) -> Snapshot:
    """The run as it stands; see `Loop.snapshot`."""
    host = {
        "rng": describe_key(loop.rng),
        "tree": loop._signature,
        "carries": list(loop.carries),
        "program": loop._program.describe(),
        "step": loop.step,
        "epoch": loop.epoch,
        "epoch_step": loop.epoch_step,
        "processes": jax.process_count(),
        "data": loop._feed.position(),
        "windows": loop._meter.get_state(),
        "latest": loop.latest,
        "stopped": loop.stopped,
        "final": loop._final,
        "callbacks": {name: cb.get_state() for name, cb in loop.callbacks.items() if own(cb, "get_state")},
    }
    return Snapshot(loop.step, {"state": loop.state, "carries": loop.carries}, pack(host, "A snapshot"))


def put_back(loop: Loop, snapshot: Snapshot, strict: bool, skip: bool) -> None:
    """Puts a saved run in the place of the one that loads; see `Loop.restore`."""
    host = unpack(snapshot.host)
    key = describe_key(loop.rng)
    if host["rng"] != key:
        raise ValueError(
            f"The saved run has the random key (rng) {host['rng']}, this run {key}. Give the same, or start anew."
        )
    saved, here, carries = host["tree"], loop._signature, dict(loop.carries)
    if not strict:
        carries = {name: carry for name, carry in carries.items() if name in host["carries"]}
        left = tuple(f"carries/{name}/" for name in {*host["carries"], *loop.carries} - set(carries))
        saved, here = ({n: k for n, k in s.items() if not f"{n}/".startswith(left)} for s in (saved, here))
    if changed := compare(saved, here):
        raise ValueError(f"The saved run does not fit this one (saved, then here): {changed}.")
    like, loads = {"state": loop.state, "carries": carries}, callable(snapshot.tree)
    tree = snapshot.tree(like) if loads else snapshot.tree
    tree = {"state": tree["state"], "carries": {name: tree["carries"][name] for name in carries}}
    tree = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))
    tree = place(tree, "The saved run", copy=not loads, spread=loop._program.spread, like=like)
    fresh = {} if strict else loop._program.init(tree["state"])
    loop._bundle = loop._program.bundle(tree["state"], fresh | tree["carries"], host["step"])
    loop.step, loop.epoch, loop.epoch_step = host["step"], host["epoch"], host["epoch_step"]
    loop.latest, loop._restored = host["latest"], True
    if host["final"]:
        loop.stopped = host["stopped"]
    loop._meter.set_state(host["windows"])
    loop._saved = host["program"]
    if skip:
        _same_processes(host.get("processes", 1), loop._feed.data, host["data"]["loader"])
        loop._feed.seek(host["data"])
    keepers = {name: callback for name, callback in loop.callbacks.items() if own(callback, "set_state")}
    for name, state in host["callbacks"].items():
        if name in keepers:
            keepers[name].set_state(state)
        else:
            warnings.warn(
                f"The saved run holds the state of {name}, which this run has not; it is left out.", stacklevel=4
            )


def _same_processes(saved: int, data: Any, loader: Any) -> None:
    """Raises a ValueError if a loader of each process would go on where those of another number of them stood."""
    if saved != jax.process_count() and loader is not None and not isinstance(data, Batches):
        raise ValueError(
            f"The saved run's position in the data is of {saved} processes, here are {jax.process_count()}, and each "
            "loader knows its own part alone. Start as many, or read the data from their beginning (skip=False)."
        )
