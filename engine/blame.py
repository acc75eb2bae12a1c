"""Which operation is to blame for the entries of an array that are NaN or infinite.

Every value of a program carries, for each cause, the entries that are bad because of it. After an operation with bad
operands, experiments tell which of them made which entry of its results bad: the operation runs again with ordinary
numbers instead of the bad entries of all causes, or of all but one. So no rules for single operations are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .placement import to_host

Run = Callable[[list[Any]], Sequence[Any]]
Mask = np.ndarray
"""Booleans on the host, one for each entry of an array."""

MOST_CAUSES = 8
"""The most causes with which an operation is run again; entries that none of them explains count as the first's."""

MATRIX_OPERATIONS = {"cholesky", "eig", "eigh", "lu", "qr", "geqrf", "schur", "svd", "triangular_solve"}
"""Operations that may fail for a matrix with replaced entries, which says nothing about the operation."""


@dataclass(frozen=True, eq=False)
class Operation:
    """Something that can be run as a whole and, if it consists of other operations, taken apart.

    Attributes:
        name: its name in JAX.
        place: where in the program it is.
        run: takes and returns lists of arrays.
        take_apart: runs it one part at a time, and returns who is to blame for each result; None if it has no parts.
    """

    name: str
    place: Any
    run: Run
    take_apart: Callable[[list[Value]], list[Blame]] | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """An array, and the causes of what is not finite in it.

    Attributes:
        array: the array.
        blame: the entries that are not finite, by their causes.
        constant: True if it was computed from literals alone.
    """

    array: Any
    blame: Blame = field(default_factory=dict)
    constant: bool = False


@dataclass(frozen=True, eq=False)
class Execution:
    """An operation with its operands and results.

    Attributes:
        number: orders executions by time. It starts with the number of the earliest that may be to blame instead.
    """

    operation: Operation
    operands: list[Value]
    results: Sequence[Any]
    number: tuple[int, int]

    @functools.cached_property
    def parts(self) -> list[Blame]:
        """The causes inside the operation for each of its results; [] if it cannot be taken apart."""
        if self.operation.take_apart is None:
            return []
        try:
            return self.operation.take_apart(self.operands)
        except Exception:  # another version of JAX may represent it in another way
            return []


@dataclass(frozen=True, eq=False)
class Cause:
    """An execution that made entries of one of its results bad.

    Attributes:
        execution: the execution, None for GIVEN and LITERAL.
        position: the position of the result.
        entries: the entries of the result.
        given: True for an infinity that was not computed but written, such as that of a mask.
        became_nan: for an infinity, the cause that made a NaN of it later.
    """

    execution: Execution | None
    position: int = 0
    entries: Mask = field(default_factory=lambda: np.array(True))
    given: bool = False
    became_nan: Cause | None = None

    @property
    def order(self) -> tuple[float, ...]:
        """Sorts causes by time. All results of one execution are equal."""
        return (math.inf,) if self.execution is None else self.execution.number

    def inside(self) -> Blame:
        """Return the causes inside the operation, {} if it has no parts."""
        return self.execution.parts[self.position] if self.execution and self.execution.parts else {}


Blame = dict[Cause, Mask]
"""The bad entries of an array by their causes."""

GIVEN = Cause(None, given=True)
"""The cause of an infinity that the function received."""

LITERAL = Cause(None, given=True)
"""The cause of what is not finite in a literal, as long as only other literals have met it."""

_numbers = itertools.count()


def literal(array: Any) -> Value:
    """Return a number or an array that is written in the program."""
    return Value(array, {} if is_finite(array) else {LITERAL: not_finite(array)}, constant=True)


def argument(array: Any, name: str, place: Any) -> Value:
    """Return an argument of the function. Its infinities are given; of a NaN it is the cause itself."""
    if is_finite(array):
        return Value(array)
    number, nan = next(_numbers), is_nan(array)
    received = Execution(Operation(name, place, lambda _: []), [], [array], (number, number))
    return Value(array, _nonempty({Cause(received, 0, nan): nan, GIVEN: not_finite(array) & ~nan}))


def apply(operation: Operation, operands: list[Value]) -> list[Value]:
    """Run an operation, and find out for each bad entry of its results what is to blame."""
    results = list(operation.run([value.array for value in operands]))
    constant = all(value.constant for value in operands)
    finite = [is_finite(result) for result in results]
    trial = None if all(finite) else _Trial(operation, operands, results, constant)
    return [
        Value(result, {} if trial is None or good else trial.blame(position), constant)
        for position, (result, good) in enumerate(zip(results, finite, strict=True))
    ]


class _Trial:
    """The experiments with an operation that has a bad result."""

    def __init__(self, operation: Operation, operands: list[Value], results: list[Any], constant: bool):
        self.constant, self.has_parts = constant, operation.take_apart is not None
        bad = [value for value in operands if value.blame]
        nan = {cause for value in bad for cause, mask in value.blame.items() if (is_nan(value.array) & mask).any()}
        # The results of one execution are tried together. One of them, with a NaN if there is one, stands for all.
        causes = dict.fromkeys(cause for value in bad for cause in value.blame)  # in the order of the operands
        ordered = sorted(causes, key=lambda cause: cause not in nan)
        first = {id(cause.execution or cause): cause for cause in reversed(ordered)}
        self.causes = sorted(first.values(), key=lambda cause: (cause.given, cause.order))
        self.computed = [cause for cause in self.causes if not cause.given]
        self.infinities = set(self.causes) - nan
        number = next(_numbers)
        earliest = [cause.order[0] for cause in self.causes if cause.execution] if self.has_parts else []
        self.execution = Execution(operation, operands, results, (int(min([*earliest, number])), number))

    @functools.cached_property
    def repaired(self) -> Sequence[Any]:
        """The results with ordinary numbers instead of all bad entries; a loop keeps the infinities of its masks."""
        return self._run(self.causes[len(self.computed) :] if self.has_parts and self.computed else [])

    @functools.cached_property
    def alone(self) -> list[Sequence[Any]]:
        """The results with the bad entries of each cause alone."""
        if len(self.causes) < 2 or self.has_parts:
            return [self.execution.results]
        return [self._run([cause]) for cause in self.causes[:MOST_CAUSES]]

    def _run(self, kept: list[Cause]) -> Sequence[Any]:
        executions = {id(cause.execution or cause) for cause in kept}
        arrays = []
        for value in self.execution.operands:
            masks = [mask for cause, mask in value.blame.items() if id(cause.execution or cause) not in executions]
            arrays.append(_replace(value.array, np.any(masks, 0)) if masks else value.array)
        return self.execution.operation.run(arrays)

    def blame(self, position: int) -> Blame:
        """Return the bad entries of a result by their causes."""
        result = self.execution.results[position]
        nan, bad = is_nan(result), not_finite(result)
        made = self._made(position, bad)
        left, found = bad & ~made, dict[Cause, Mask]()
        for is_bad in (is_nan, not_finite) if left.any() else ():
            for cause, results in zip(self.causes, self.alone, strict=False):
                entries = left & is_bad(results[position])
                found[cause] = found.get(cause, False) | entries
                left = left & ~entries
        if left.any():  # several causes had to come together
            found[self.causes[0]] = found[self.causes[0]] | left
        return self._develop(made, _nonempty(found), nan, position)

    def _made(self, position: int, bad: Mask) -> Mask:
        """Return the entries of a result that the operation itself may have made bad."""
        if not self.causes or (self.has_parts and len(self.computed) > 1):
            return bad  # if it has parts, they tell more
        if not self.has_parts:
            for value in self.execution.operands:
                if value.blame and self.execution.operation.name in MATRIX_OPERATIONS:
                    return np.zeros_like(bad)
                if value.blame and np.shape(value.array) == bad.shape:
                    bad = bad & ~not_finite(value.array)
        return bad & not_finite(self.repaired[position]) if bad.any() else bad

    def _develop(self, made: Mask, found: Blame, nan: Mask, position: int) -> Blame:
        """Split off the entries with which something new happened: an infinity became NaN, or a literal met data."""
        chosen, out = np.zeros_like(nan), Blame()
        for cause, entries in found.items():
            changed = entries & nan & (cause in self.infinities)
            if cause is LITERAL and not self.constant:
                made, chosen = made | (entries & nan), entries & ~nan
            elif cause.given:
                made, out[cause] = made | changed, entries & ~changed
            else:
                became = Cause(self.execution, position, changed)
                out |= {cause: entries & ~changed, dataclasses.replace(cause, became_nan=became): changed}
        out |= {
            Cause(self.execution, position, made): made,
            Cause(self.execution, position, chosen, given=True): chosen,
        }
        return _nonempty(out)


def _nonempty(blame: Blame) -> Blame:
    return {cause: mask for cause, mask in blame.items() if mask.any()}


def is_float(array: Any) -> bool:
    """Return whether an array can hold a NaN."""
    return not isinstance(array, jax.Ref) and jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def is_finite(array: Any) -> bool:
    """Return whether all entries of an array are finite."""
    if not is_float(array):
        return True
    if isinstance(array, jax.Array) and any(device.platform != "cpu" for device in array.devices()):
        return bool(_all_finite(array))  # it stays on the device
    return bool(np.isfinite(to_host(array)).all())


def not_finite(array: Any) -> Mask:
    """Return which entries of an array are NaN or infinite."""
    return ~np.isfinite(to_host(array))


def is_nan(array: Any) -> Mask:
    """Return which entries of an array are NaN."""
    return np.isnan(to_host(array))


@jax.jit
def _all_finite(array: Any) -> jax.Array:
    return jnp.isfinite(array).all()


def _replace(array: Any, mask: Mask) -> Any:
    """Replace entries by numbers that are neither special nor all equal."""
    host = to_host(array)
    numbers = np.linspace(0.25, 0.75, max(1, host.size)).reshape(host.shape)
    new = np.where(mask, numbers.astype(host.dtype), host)
    if not isinstance(array, jax.Array):
        return new
    return jax.device_put(new, array.sharding if array.committed else None)
