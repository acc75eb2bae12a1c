"""The operation of a function that first produced a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .blame import Cause, argument, is_float, is_nan
from .operations import Found, Place, Use, run_program
from .source_lines import Line, lines_of, own_lines
from .trees import named_leaves


@dataclass(frozen=True)
class BadOperation:
    """The operation that first produced a NaN or an infinity from finite numbers.

    Attributes:
        operation: its name in JAX, such as `"log"`, or `"input"` if the function already received a NaN.
        source: file, line and function of the code that asked for it.
        code: the expression there, if it is known.
        inside: the loops around it, such as `("scan, iteration 3 of 12",)`.
        inputs: dtype, shape and range of its operands.
        outputs: the same of its results.
        became_nan: for an infinity that turned into a NaN later, the operation that did that.

    >>> print(first_bad(lambda x: jnp.log(x - 1).sum(), 1.0))
    log at ...
      code jnp.log(x - 1)
      in   float32[], 0
      out  float32[], 1 of 1 is -inf
    """

    operation: str
    source: str
    code: str
    inside: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    became_nan: BadOperation | None = None

    def __str__(self) -> str:
        lines = _place_lines(self)
        lines += [f"  in   {text}" for text in self.inputs] + [f"  out  {text}" for text in self.outputs]
        if self.became_nan is not None:
            title, *code = _place_lines(self.became_nan)
            lines += [f"  it became NaN in {title}", *code]
        return "\n".join(lines)


def _place_lines(bad: BadOperation) -> list[str]:
    title = f"{bad.operation} at {bad.source}" + "".join(f", in {loop}" for loop in reversed(bad.inside))
    return [title, f"  code {bad.code}"] if bad.code else [title]


def first_bad(function: Callable[..., Any], *args: Any) -> BadOperation | None:
    """Return the operation that first produced a NaN or an infinity in the results of a function, None if none did.

    The function is run one operation at a time. A loop runs as a whole first, and is taken apart only if it turned
    finite numbers into others. An infinity that leaves the results finite, such as that of a mask, is not reported. An
    infinity that becomes a NaN later is reported as the cause.

    Args:
        function: takes and returns pytrees of arrays.
        args: its arguments, as concrete arrays.

    >>> def loss(w):
    ...     return (jnp.exp(w) - jnp.exp(w)).sum()
    >>> found = first_bad(loss, jnp.float32([1.0, 100.0]))
    >>> found.operation, found.became_nan.operation
    ('exp', 'sub')
    """
    program = jax.make_jaxpr(function)(*args)
    names = named_leaves(args[0] if len(args) == 1 else args)
    leaves = jax.tree.leaves(args)
    values = [argument(leaf, "input", name) for leaf, name in zip(leaves, names, strict=True)]
    try:
        results = run_program(program, values, Place(), [Use(final=True)] * len(program.out_avals))
    except Found as found:
        return _describe(*_innermost(found.cause))
    causes = [(cause, is_nan(value.array)[mask].any()) for value in results for cause, mask in value.blame.items()]
    nan = any(made_nan for _, made_nan in causes)
    cause = _first(cause for cause, made_nan in causes if made_nan or not nan)
    return None if cause is None else _describe(*_innermost(cause))


def _first(causes: Iterable[Cause]) -> Cause | None:
    """Return the first cause, one that was computed if there is one."""
    known = [cause for cause in causes if cause.execution is not None]
    return min(known, key=lambda cause: (cause.given, cause.order), default=None)


def _innermost(cause: Cause) -> tuple[Cause, Cause | None]:
    """Take loops apart until the cause is a single operation; return it, and where its infinity became NaN."""
    became = _innermost_nan(cause)
    while (inner := _inside(cause)) is not None:
        became = _innermost_nan(inner) or became
        if inner.given and became is not None:  # nothing is wrong with an infinity in a mask until it becomes NaN
            inner, became = became, None
        cause = inner
    return cause, became


def _inside(cause: Cause) -> Cause | None:
    """Return the cause inside an operation that has parts."""
    blame = cause.inside()
    return _first(inner for inner, mask in blame.items() if (mask & cause.entries).any()) or _first(blame)


def _innermost_nan(cause: Cause) -> Cause | None:
    """Return the innermost operation in which an infinity became NaN."""
    found: Any = None
    became = cause.became_nan
    while became is not None:
        found = became
        became = _first(c.became_nan for c in found.inside() if c.execution is cause.execution and c.became_nan)
    return found


def _describe(cause: Cause, became: Cause | None) -> BadOperation:
    execution: Any = cause.execution  # only what was given, which is never described, has none
    operation, place = execution.operation, execution.operation.place
    inputs = tuple(_text(value.array) for value in execution.operands)
    outputs = tuple(map(_text, execution.results))
    nan = None if became is None else _describe(became, None)
    if not isinstance(place, Place):
        return BadOperation(operation.name, place, "", (), inputs, outputs)
    lines = next(filter(None, map(lines_of, reversed(place.equations))), [])
    own = own_lines(lines)
    source, code = _source(lines, own)
    source += ", in its gradient" if place.gradient else ""
    return BadOperation(operation.name, source, code, place.inside, inputs, outputs, nan)


def _source(lines: list[Line], own: list[Line]) -> tuple[str, str]:
    """Return where an operation was asked for, with the user's line if that is another, and the code there."""
    if not lines:
        return "an unknown line", ""
    if not own or own[0] is lines[0]:
        return str(lines[0]), lines[0].code
    return f"{lines[0]}, called at {own[0]}", own[0].code


def _text(array: Any) -> str:
    """Return dtype, shape, range and the number of bad entries: `float32[32,16], -3.77 to 1e+30, 2 of 512 are NaN`."""
    kind = f"{jnp.result_type(array)}[{','.join(map(str, np.shape(array)))}]"
    if not jnp.issubdtype(jnp.result_type(array), jnp.number) or not np.size(array):
        return kind
    if not is_float(array):
        array = jnp.asarray(array)
        return f"{kind}, {_range(int(array.min()), int(array.max()))}"
    low, high, *counts = (number.item() for number in _statistics(array))
    parts = [_range(low, high)] if low <= high else []
    for name, count in zip(("NaN", "inf", "-inf"), counts, strict=True):
        if count:
            parts.append(f"{count} of {np.size(array)} {'is' if count == 1 else 'are'} {name}")
    return ", ".join([kind, *parts])


def _range(low: float, high: float) -> str:
    first, last = f"{low:.4g}", f"{high:.4g}"
    return first if first == last else f"{first} to {last}"


@jax.jit
def _statistics(array: Any) -> tuple[jax.Array, ...]:
    """Return the range of the finite entries, and the numbers of the others; for complex numbers, of their modulus."""
    array = jnp.abs(array) if jnp.iscomplexobj(array) else array
    array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    finite = jnp.isfinite(array)
    low, high = jnp.where(finite, array, jnp.inf).min(), jnp.where(finite, array, -jnp.inf).max()
    return low, high, jnp.isnan(array).sum(), (array == jnp.inf).sum(), (array == -jnp.inf).sum()
