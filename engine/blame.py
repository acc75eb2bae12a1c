"""Which operation is to blame for the entries of an array that are NaN or infinite.

Every value of a program carries, for each cause, the entries that are bad because of it. After an operation with bad
operands, experiments tell which of them made which entry of its results bad: the operation runs again with the bad
entries of one cause only, and with none, replaced by ordinary numbers. So no rules for single operations are needed.
"""

from __future__ import annotations

import dataclasses
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
        take_apart: runs it one part at a time, with and to values; None if it has no parts.
    """

    name: str
    place: Any
    run: Run
    take_apart: Callable[[list[Value]], list[Value]] | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """An array, and the causes of what is not finite in it.

    Attributes:
        array: the array.
        blame: the entries that are not finite, by their causes.
        constant: True if it was computed from literals alone.
    """

    array: Any
    blame: dict[Cause, Mask] = field(default_factory=dict)
    constant: bool = False


@dataclass(frozen=True, eq=False)
class Cause:
    """An operation that made entries of one of its results bad; it may have parts that say more.

    Attributes:
        operation: the operation, None for GIVEN and LITERAL.
        operands: its operands.
        results: its results.
        position: the position of the result.
        entries: the entries of the result that it made bad.
        number: orders causes by time: the number of the earliest operation that may be to blame, and its own.
        given: True for an infinity that was not computed but written, such as that of a mask.
        became_nan: for an infinity, the operation that made a NaN of it later.
    """

    operation: Operation | None
    operands: list[Value] = field(default_factory=list)
    results: Sequence[Any] = ()
    position: int = 0
    entries: Mask = field(default_factory=lambda: np.array(True))
    number: tuple[float, float] = (math.inf, 0)
    given: bool = False
    became_nan: Cause | None = None


GIVEN = Cause(None, given=True)
"""The cause of an infinity that the function received."""

LITERAL = Cause(None, number=(math.inf, 1), given=True)
"""The cause of what is not finite in a literal, as long as only other literals have met it."""

_numbers = itertools.count()


def literal(array: Any) -> Value:
    """Return a number or an array that is written in the program."""
    return Value(array, {} if is_finite(array) else {LITERAL: not_finite(array)}, constant=True)


def argument(array: Any, name: str, place: Any) -> Value:
    """Return an argument of the function. Its infinities are given; of a NaN it is the cause itself."""
    if is_finite(array):
        return Value(array)
    nan, number = is_nan(array), next(_numbers)
    source = Cause(Operation(name, place, lambda _: []), results=[array], entries=nan, number=(number, number))
    return Value(array, _nonempty({source: nan, GIVEN: not_finite(array) & ~nan}))


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
        self.operation, self.operands, self.results, self.constant = operation, operands, results, constant
        nan = {cause for value in operands for cause, mask in value.blame.items() if (is_nan(value.array) & mask).any()}
        causes = {cause for value in operands for cause in value.blame}
        # The results of one operation share a number. One of them, with a NaN if there is one, stands for all.
        ordered = sorted(causes, key=lambda cause: (cause.number, cause not in nan))
        first = {cause.number: cause for cause in reversed(ordered)}
        self.causes = sorted(first.values(), key=lambda cause: cause.number)
        self.infinite = set(self.causes) - nan
        earliest = self.causes[0].number[0] if self.causes and operation.take_apart is not None else math.inf
        number = next(_numbers)
        self.number = (min(number, earliest), number)
        self.repaired = self._run(None) if causes else results
        few = len(self.causes) < 2 or operation.take_apart is not None
        self.alone = [results] if few else [self._run(cause) for cause in self.causes[:MOST_CAUSES]]

    def _run(self, kept: Cause | None) -> Sequence[Any]:
        """Run the operation with ordinary numbers instead of all bad entries, except those that `kept` caused."""
        arrays = []
        for value in self.operands:
            masks = [mask for cause, mask in value.blame.items() if kept is None or cause.number != kept.number]
            arrays.append(_replace(value.array, np.any(masks, 0)) if masks else value.array)
        return self.operation.run(arrays)

    def blame(self, position: int) -> dict[Cause, Mask]:
        """Return the bad entries of a result by their causes."""
        left = not_finite(self.results[position])
        found = {self._cause(position): left & self._made(position)}
        left = left & ~self._made(position)
        for is_bad in (is_nan, not_finite):
            for cause, results in zip(self.causes, self.alone, strict=False):
                entries = left & is_bad(results[position])
                found[cause] = found.get(cause, False) | entries
                left = left & ~entries
        if self.causes:  # several causes had to come together
            found[self.causes[0]] = found[self.causes[0]] | left
        developed = self._develop(_nonempty(found), is_nan(self.results[position]), position)
        return {
            dataclasses.replace(cause, entries=mask) if cause.number == self.number else cause: mask
            for cause, mask in developed.items()
        }

    def _made(self, position: int) -> Mask:
        """Return the entries of a result that the operation itself may have made bad."""
        if self.operation.take_apart is not None and len(self.causes) > 1:
            return not_finite(self.results[position])  # its parts tell more
        made = not_finite(self.repaired[position])
        if self.operation.take_apart is None:
            for value in self.operands:
                if value.blame and self.operation.name in MATRIX_OPERATIONS:
                    return np.zeros_like(made)
                if value.blame and np.shape(value.array) == made.shape:
                    made = made & ~not_finite(value.array)
        return made

    def _develop(self, found: dict[Cause, Mask], nan: Mask, position: int) -> dict[Cause, Mask]:
        """Split off the entries with which something new happened: an infinity became NaN, or a literal met data."""
        out = dict[Cause, Mask]()
        for cause, entries in found.items():
            changed, rest = np.zeros_like(nan), cause
            if cause is LITERAL and not self.constant:
                changed, rest = entries & nan, self._cause(position, given=True)
                out[self._cause(position)] = changed
            elif cause in self.infinite:
                changed, here = entries & nan, self._cause(position)
                out[here if cause.given else dataclasses.replace(cause, became_nan=here)] = changed
            out[rest] = entries & ~changed
        return _nonempty(out)

    def _cause(self, position: int, given: bool = False) -> Cause:
        return Cause(self.operation, self.operands, self.results, position, number=self.number, given=given)


def _nonempty(blame: dict[Cause, Mask]) -> dict[Cause, Mask]:
    return {cause: mask for cause, mask in blame.items() if mask.any()}


def is_float(array: Any) -> bool:
    """Return whether an array can hold a NaN."""
    return not isinstance(array, jax.Ref) and jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def is_finite(array: Any) -> bool:
    """Return whether all entries of an array are finite."""
    if not is_float(array):
        return True
    if isinstance(array, jax.Array) and array.sharding.memory_kind != "unpinned_host":  # do not copy it to the host
        return bool(_all_finite(array))
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
    return jax.device_put(new, array.sharding) if isinstance(array, jax.Array) else new
