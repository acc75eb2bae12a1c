"""Compare two runs: where they differ first."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .snapshot import unpack
from .storage.checkpoints import Checkpoints
from .trees import named_leaves


@dataclass(frozen=True)
class Comparison:
    """Where two runs differ first.

    Attributes:
        configuration: by name, the arguments of callbacks, or the step, that differ.
        key: whether the random keys differ.
        equal_until: the last step at which both have a checkpoint and all of it is equal, None if there is none.
        differs_at: the first step at which their checkpoints differ, None if all are equal.
        leaves: the leaves that differ there, with the number of entries that differ and the largest difference.
        fingerprint: the first step at which the fingerprints differ, and whether it is in the batch or in the state.
        records: the values recorded at `differs_at` that differ, of both.
        step: the first step that received other values, if it was looked for, and the leaves in which it did.
    """

    one: str
    other: str
    configuration: dict[str, tuple[str, str]] = field(default_factory=dict)
    key: bool = False
    equal_until: int | None = None
    differs_at: int | None = None
    leaves: dict[str, str] = field(default_factory=dict)
    fingerprint: tuple[int, str] | None = None
    records: dict[str, tuple[float, float]] = field(default_factory=dict)
    step: tuple[int, list[str]] | None = None

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not (self.configuration or self.key or self.differs_at is not None or self.fingerprint)

    def values(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return vars(self) | {"equal": self.equal}

    def __str__(self) -> str:
        lines = [f"{name} differs: {a}, {b}" for name, (a, b) in self.configuration.items()]
        if self.key:
            lines.append("the random keys differ")
        if self.fingerprint is not None:
            step, what = self.fingerprint
            lines.append(f"step {step} is the first whose fingerprint differs: the {what}")
        if self.equal_until is not None:
            lines.append(f"the checkpoints are equal up to step {self.equal_until}")
        if self.differs_at is not None:
            lines.append(f"the checkpoints of step {self.differs_at} differ:")
            lines += [f"  {name}: {text}" for name, text in self.leaves.items()]
            lines += [f"  {name}: {a:.9g}, {b:.9g}" for name, (a, b) in self.records.items()]
        if self.step is not None:
            step, names = self.step
            lines.append(f"step {step} is the first that received other values: {', '.join(names)}")
        return "\n".join(lines) if lines else "no difference found"


def compare_runs(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> Comparison:
    """Return where two runs differ first, from their checkpoints. Nothing is written.

    Args:
        one, other: the directories of the runs.

    Raises:
        ValueError: the runs have no checkpoint at the same step.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> from onstep.callbacks import Checkpoint
    >>> directory = tempfile.TemporaryDirectory()
    >>> for name, data in (("a", [1, 2, 3, 4]), ("b", [1, 2, 9, 4])):
    ...     path = os.path.join(directory.name, name)
    ...     engine = Engine(lambda s, b: ({"w": s["w"] + b}, {}), [Checkpoint(path, when=1, keep=9)])
    ...     _ = engine.run({"w": jnp.int32(0)}, data, epochs=1)
    >>> print(compare_runs(os.path.join(directory.name, "a"), path))
    the checkpoints are equal up to step 2
    the checkpoints of step 3 differ:
      state/w: 1 of 1 differs, by up to 6
    >>> directory.cleanup()
    """
    runs = Checkpoints(one), Checkpoints(other)
    steps = sorted(set(runs[0].steps()) & set(runs[1].steps()))
    if not steps:
        raise ValueError(
            f"{runs[0].directory} and {runs[1].directory} have no checkpoint of the same step: "
            f"{runs[0].steps()} and {runs[1].steps()}. Save both runs with the same cadence."
        )
    equal_until, differs_at, leaves, records = None, None, {}, {}
    for step in steps:
        hosts = [unpack(run.host(step)) for run in runs]
        leaves = _differing_leaves(*(run.load(step) for run in runs))
        latest = [host["latest"] for host in hosts]
        records = {
            name: (latest[0][name], latest[1][name])
            for name in sorted(latest[0].keys() & latest[1].keys())
            if latest[0][name] != latest[1][name] and not name.startswith("time/")
        }
        if leaves or records:
            differs_at = step
            break
        equal_until = step
    last = [unpack(run.host(steps[-1])) for run in runs]
    return Comparison(
        runs[0].directory,
        runs[1].directory,
        _differing_configuration(*(run.manifest(steps[-1]).get("config") or {} for run in runs)),
        last[0]["rng"] != last[1]["rng"],
        equal_until,
        differs_at,
        leaves,
        _differing_fingerprint(*last),
        records,
    )


def _differing_leaves(one: Any, other: Any) -> dict[str, str]:
    a, b = named_leaves(one), named_leaves(other)
    found = dict.fromkeys(sorted(a.keys() ^ b.keys()), "only in one of the runs")
    for name in a.keys() & b.keys():
        x, y = np.asarray(a[name]), np.asarray(b[name])
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            found[name] = f"{x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        elif x.tobytes() != y.tobytes():
            bits = [np.frombuffer(z.tobytes(), np.uint8).reshape(z.size, -1) for z in (x, y)]
            count = int((bits[0] != bits[1]).any(axis=1).sum())
            by = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
            found[name] = f"{count} of {x.size} {'differs' if count == 1 else 'differ'}, by up to {by:.3g}"
    return dict(sorted(found.items()))


def _differing_configuration(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[str, str]]:
    a, b = one.get("callbacks") or {}, other.get("callbacks") or {}
    found = {name: (a.get(name, "none"), b.get(name, "none")) for name in {**a, **b} if a.get(name) != b.get(name)}
    if one.get("step") != other.get("step"):
        found["the compiled step"] = ("one program", "another one")
    return found


def _differing_fingerprint(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, str] | None:
    """Return the first step at which the fingerprints of two runs differ, and what differs."""
    for name in one["callbacks"].keys() & other["callbacks"].keys():
        a, b = one["callbacks"][name], other["callbacks"][name]
        if not all({"fingerprint_steps", "batch", "state"} <= kept.keys() for kept in (a, b)):
            continue
        rows = [
            {step: pair for step, *pair in zip(kept["fingerprint_steps"], kept["batch"], kept["state"], strict=True)}
            for kept in (a, b)
        ]
        for step in sorted(rows[0].keys() & rows[1].keys()):
            for what, x, y in zip(("batch", "state"), rows[0][step], rows[1][step], strict=True):
                if x != y:
                    return int(step), what
    return None


def first_difference(one: dict[int, dict[str, int]], other: dict[int, dict[str, int]]) -> tuple[int, list[str]] | None:
    """Return the first step at which the checksums of two runs differ, and the names of the leaves.

    Args:
        one, other: by step, the checksums of the leaves that it received.

    >>> first_difference({1: {"batch": 5, "state/w": 7}}, {1: {"batch": 6, "state/w": 7}})
    (1, ['batch'])
    """
    for step in sorted(one.keys() & other.keys()):
        a, b = one[step], other[step]
        if names := sorted(name for name in {**a, **b} if a.get(name) != b.get(name)):
            return step, names
    return None
