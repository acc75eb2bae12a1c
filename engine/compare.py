"""Compare two runs: where they differ first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .snapshot import unpack
from .storage.checkpoints import Checkpoints
from .trees import named_leaves

NOT_COMPARED = "time/"
"""Records whose names begin so say how fast a machine was."""


@dataclass(frozen=True)
class Difference:
    """Where something that two runs keep by step differs first. Only steps that both kept are compared.

    Attributes:
        equal_until: the last step before that at which all of it is equal, None if there is none.
        differs_at: the first step at which it differs, None if it is equal at all steps.
        what: what differs at that step, by name, and how.
    """

    equal_until: int | None
    differs_at: int | None
    what: dict[str, str]

    def text(self, kept: str) -> str:
        """Return the difference as lines of text.

        Args:
            kept: what is compared, such as `"records"`.

        >>> print(Difference(10, 20, {"state/w": "1 of 4 differs"}).text("checkpoints"))
        checkpoints: equal up to step 10, different at step 20:
          state/w: 1 of 4 differs
        """
        parts = [] if self.equal_until is None else [f"equal up to step {self.equal_until}"]
        parts += [] if self.differs_at is None else [f"different at step {self.differs_at}"]
        rest = [f"  {name}: {how}" for name, how in self.what.items()]
        return "\n".join([f"{kept}: {', '.join(parts)}{':' * bool(rest)}", *rest])


@dataclass(frozen=True)
class Parting:
    """The step at which two runs part, from a replay of both.

    Attributes:
        step: the step.
        received: the names of the arrays that it received and that differ: the batch, the random key, or the state.
        returned: if it received the same, the names of the arrays that it returned and that differ.
    """

    step: int
    received: list[str]
    returned: list[str]

    def __str__(self) -> str:
        if self.received:
            return f"replay: step {self.step} is the first that received other values: {', '.join(self.received)}"
        return (
            f"replay: step {self.step} received the same values and returned others: {', '.join(self.returned)}\n"
            "  The step, or a callback that changes the state, has other code, or is not deterministic."
        )


@dataclass(frozen=True)
class Comparison:
    """Where two runs differ first.

    Attributes:
        one, other: their directories.
        configuration: by name, how the arguments of callbacks, or the compiled step, differ.
        key: whether the random keys differ.
        damaged: by path, what is wrong with checkpoints that were left out.
        records: the recorded values, None if the runs have no step in common.
        fingerprints: the hashes of `Fingerprint`, None if the runs have no step in common.
        checkpoints: the checkpoints, None if the runs have no step in common.
        parting: the exact step, if it was looked for.
    """

    one: str
    other: str
    configuration: dict[str, str]
    key: bool
    damaged: dict[str, str]
    records: Difference | None
    fingerprints: Difference | None
    checkpoints: Difference | None
    parting: Parting | None = None

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not (self.configuration or self.key or any(kept.differs_at for kept in self._kept().values()))

    def values(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {"equal": self.equal, **asdict(self)}

    def _kept(self) -> dict[str, Difference]:
        """Return what was compared by step."""
        kept = {"records": self.records, "fingerprints": self.fingerprints, "checkpoints": self.checkpoints}
        return {name: difference for name, difference in kept.items() if difference}

    def __str__(self) -> str:
        lines = [f"configuration, {name}: {how}" for name, how in self.configuration.items()]
        lines += ["random keys: different"] if self.key else []
        lines += [f"{path} is damaged and left out: {damage}" for path, damage in self.damaged.items()]
        lines += [difference.text(name) for name, difference in self._kept().items()]
        lines += [str(self.parting)] if self.parting else []
        return "\n".join(lines)


def compare_runs(
    one: str | os.PathLike[str],
    other: str | os.PathLike[str],
    records: tuple[Mapping[int, Mapping[str, float]], Mapping[int, Mapping[str, float]]] = ({}, {}),
) -> Comparison:
    """Return where two runs differ first. Nothing is written.

    Args:
        one, other: the directories of the runs.
        records: of both runs, the recorded values by step and name.

    Raises:
        ValueError: a run has no intact checkpoint, or there is nothing that both runs have at the same step.

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
    checkpoints: equal up to step 2, different at step 3:
      state/w: 1 of 1 differs, by up to 6
    >>> directory.cleanup()
    """
    runs, damaged, steps = (Checkpoints(one), Checkpoints(other)), dict[str, str](), list[list[int]]()
    for run in runs:
        states = {step: run.damage(step) for step in run.steps()}
        damaged |= {run.path(step): damage for step, damage in states.items() if damage}
        steps.append([step for step, damage in states.items() if not damage])
        if not steps[-1]:
            raise ValueError(f"{run.directory} has no intact checkpoint to compare.")
    configurations = [_configuration(run, saved[-1]) for run, saved in zip(runs, steps, strict=True)]
    hosts = [unpack(run.host(saved[-1])) for run, saved in zip(runs, steps, strict=True)]
    found = Comparison(
        runs[0].directory,
        runs[1].directory,
        _differing_values(*configurations),
        hosts[0]["rng"] != hosts[1]["rng"],
        damaged,
        first_difference(*map(_comparable, records)),
        first_difference(*map(_fingerprints, hosts)),
        _first_differing_checkpoint(*runs, sorted(set(steps[0]) & set(steps[1]))),
    )
    if not (found.records or found.fingerprints or found.checkpoints):
        raise ValueError(
            f"{found.one} and {found.other} have no checkpoint, record or fingerprint of the same step. They have "
            f"checkpoints of the steps {steps[0]} and {steps[1]}. Save both runs at the same steps."
        )
    return found


def first_difference(one: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> Difference | None:
    """Return where numbers that two runs keep by step and name differ first, None without a common step.

    NaN is equal to NaN.

    >>> first_difference({1: {"loss": 0.5}, 2: {"loss": 0.25}}, {1: {"loss": 0.5}, 2: {"loss": 0.125}, 3: {}})
    Difference(equal_until=1, differs_at=2, what={'loss': '0.25 and 0.125'})
    """
    equal_until, steps = None, sorted(one.keys() & other.keys())
    for step in steps:
        if what := _differing_values(one[step], other[step]):
            return Difference(equal_until, step, what)
        equal_until = step
    return Difference(equal_until, None, {}) if steps else None


def find_parting(
    one: Mapping[int, Mapping[str, int]], other: Mapping[int, Mapping[str, int]], checkpoints: Difference | None
) -> Parting | None:
    """Return the step at which two runs part, None if they are equal.

    Args:
        one, other: by step, the checksums of what it received, from the last step at which the runs are equal to the
            first one at which they differ.
        checkpoints: where their checkpoints differ.

    >>> find_parting({1: {"batch": 5, "state": 7}}, {1: {"batch": 6, "state": 7}}, None)
    Parting(step=1, received=['batch'], returned=[])
    >>> find_parting({1: {"state": 7}, 2: {"state": 8}}, {1: {"state": 7}, 2: {"state": 9}}, None)
    Parting(step=1, received=[], returned=['state'])
    """
    found = first_difference(one, other)
    if found is None or found.differs_at is None:  # what the last step received is equal
        if checkpoints is None or checkpoints.differs_at is None:
            return None
        return Parting(checkpoints.differs_at, [], list(checkpoints.what))
    given = [name for name in found.what if name.partition("/")[0] in ("batch", "rng")]
    if given or found.equal_until is None:
        return Parting(found.differs_at, given or list(found.what), [])
    return Parting(found.equal_until, [], list(found.what))


def _first_differing_checkpoint(one: Checkpoints, other: Checkpoints, steps: list[int]) -> Difference | None:
    equal_until = None
    for step in steps:
        a, b = unpack(one.host(step)), unpack(other.host(step))
        what = _differing_arrays(one, other, step, a["tree"], b["tree"])
        what |= _differing_values(_host_values(a), _host_values(b))
        if what:
            return Difference(equal_until, step, what)
        equal_until = step
    return Difference(equal_until, None, {}) if steps else None


def _differing_arrays(
    one: Checkpoints, other: Checkpoints, step: int, kinds: dict[str, str], other_kinds: dict[str, str]
) -> dict[str, str]:
    """Return how the arrays of two checkpoints differ, by name.

    Args:
        one, other: the checkpoints of two runs.
        step: that of the checkpoints.
        kinds, other_kinds: dtype and shape of their arrays, by name.
    """
    found = _differing_values(kinds, other_kinds)
    common = [name for name, kind in kinds.items() if name not in found and not re.search(r"[\[,]0[,\]]", kind)]
    for (name, x), (_, y) in zip(one.arrays(step, common), other.arrays(step, common), strict=True):
        if x.tobytes() != y.tobytes():
            found[name] = _describe_difference(x, y)
    return found


def _describe_difference(x: np.ndarray, y: np.ndarray) -> str:
    """Return how many numbers of two arrays of the same dtype and shape differ, and by how much.

    >>> _describe_difference(np.float32([1, 2, 3]), np.float32([1, 2.5, np.nan]))
    '2 of 3 differ, by up to 0.5, 1 not finite in one of the runs'
    """
    bits = [np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, -1) for array in (x, y)]
    differs = (bits[0] != bits[1]).any(axis=1)
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    a, b = (array.ravel()[differs].astype(wide) for array in (x, y))
    finite = np.isfinite(a) & np.isfinite(b)
    count = int(differs.sum())
    by = f", by up to {np.abs(a - b, where=finite, out=np.zeros(count)).max():.3g}" if finite.any() else ""
    rest = "" if finite.all() else f", {count - int(finite.sum())} not finite in one of the runs"
    return f"{count} of {x.size} {'differs' if count == 1 else 'differ'}{by}{rest}"


def _differing_values(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """Return how values differ, by name. NaN is equal to NaN."""
    found = dict.fromkeys(sorted(one.keys() ^ other.keys()), "only in one of the runs")
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape):
            if a.tobytes() != b.tobytes():
                found[name] = _describe_difference(a, b)
        elif repr(a) != repr(b):
            found[name] = f"{a} and {b}"
    return found


def _host_values(host: dict[str, Any]) -> dict[str, Any]:
    """Return, by name, what a checkpoint holds besides arrays and the states of callbacks."""
    kept = {name: host[name] for name in ("latest", "windows", "data", "epoch", "epoch_step")}
    kept["latest"] = {name: value for name, value in host["latest"].items() if not name.startswith(NOT_COMPARED)}
    return named_leaves(kept)


def _comparable(records: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Return records by step without those that say how fast a machine was."""
    kept = {
        step: {name: value for name, value in values.items() if not name.startswith(NOT_COMPARED)}
        for step, values in records.items()
    }
    return {step: values for step, values in kept.items() if values}


def _configuration(checkpoints: Checkpoints, step: int) -> dict[str, str]:
    """Return how a run was configured, by name. The name of its own directory does not count."""
    config = checkpoints.manifest(step).get("config") or {}
    own = re.compile(rf"'(?:[^']*/)?{re.escape(os.path.basename(checkpoints.directory))}(?=['/])")
    callbacks = {name: own.sub("'DIRECTORY", text) for name, text in (config.get("callbacks") or {}).items()}
    return callbacks | {f"the {part} of the compiled step": text for part, text in (config.get("step") or {}).items()}


def _fingerprints(host: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Return what `Fingerprint` has kept: hashes of the batch and of the state, by step."""
    found: dict[int, dict[str, int]] = {}
    for kept in host["callbacks"].values():
        if isinstance(kept, dict) and kept.keys() >= {"fingerprint_steps", "batch", "state"}:
            rows = zip(*(kept[name].tolist() for name in ("fingerprint_steps", "batch", "state")), strict=True)
            found |= {step: {"batch": batch, "state": state} for step, batch, state in rows}
    return found
