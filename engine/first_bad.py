"""The operation of a step that first produced a NaN or an infinity."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .trees import named_leaves

FINITE, INF, NAN = range(3)


@dataclass(frozen=True)
class BadOperation:
    """The operation that first produced a NaN or an infinity from finite numbers.

    Attributes:
        operation: its name in JAX, such as `"log"`, or `"input"` if the function already received a NaN.
        source: file, line and function of the code that asked for it.
        inside: the loops around it, such as `("scan, iteration 3 of 12",)`.
        inputs: dtype, shape and range of its operands.
        outputs: the same of its results.
        became_nan: for an infinity that turned into a NaN later, the operation that did that.

    >>> print(first_bad(lambda x: jnp.log(x - 1).sum(), 1.0))
    log at ...
      in   float32[], 0
      out  float32[], 1 of 1 is -inf
    """

    operation: str
    source: str
    inside: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    became_nan: BadOperation | None = None

    def __str__(self) -> str:
        where = "".join(f", in {loop}" for loop in reversed(self.inside))
        lines = [f"{self.operation} at {self.source}{where}"]
        lines += [f"  in   {text}" for text in self.inputs] + [f"  out  {text}" for text in self.outputs]
        if self.became_nan is not None:
            later = self.became_nan
            where = "".join(f", in {loop}" for loop in reversed(later.inside))
            lines.append(f"  it became NaN in {later.operation} at {later.source}{where}")
        return "\n".join(lines)


def first_bad(function: Callable[..., Any], *args: Any) -> BadOperation | None:
    """Return the operation that first produced a NaN or an infinity in the results of a function, None if none did.

    The function is run one operation at a time. A loop or a compiled function runs as a whole first, and is taken
    apart only if it turned finite numbers into others. An infinity that leaves the results finite, such as that of a
    mask, is not reported. An infinity that becomes a NaN later is reported as the cause.

    Args:
        function: takes and returns pytrees of arrays.
        args: its arguments, as concrete arrays.

    >>> def loss(w):
    ...     return (jnp.exp(w) - jnp.exp(w)).sum()
    >>> found = first_bad(loss, jnp.float32([1.0, 100.0]))
    >>> found.operation, found.became_nan.operation
    ('exp', 'sub')
    """
    closed = jax.make_jaxpr(function)(*args)
    names = named_leaves(args[0] if len(args) == 1 else args)
    values = [
        _Value(leaf, _origin_of_input(leaf, name)) for leaf, name in zip(jax.tree.leaves(args), names, strict=True)
    ]
    results = _run(closed.jaxpr, closed.consts, values, _Place("an unknown line"))
    worst = max((value.kind for value in results), default=FINITE)
    causes = [value.cause for value in results if value.kind == worst and isinstance(value.cause, _Cause)]
    return min(causes, key=lambda cause: cause.number).resolve() if causes else None


class _Given:
    """The cause of an infinity that was not computed: a literal, a constant or an input. No operation is to blame."""


GIVEN = _Given()


@dataclass
class _Value:
    """An array, and the cause of what is not finite in it."""

    array: Any
    cause: _Cause | _Given | None

    @property
    def kind(self) -> int:
        return FINITE if self.cause is None else _kind(self.array)


@dataclass
class _Operation:
    """Something that can be run as a whole and, if it consists of other operations, taken apart."""

    name: str
    place: _Place
    run: _Run
    take_apart: Callable[[list[_Value]], list[_Value]] | None


_Run = Callable[[list[Any]], Sequence[Any]]

_numbers = itertools.count()


@dataclass
class _Cause:
    """An operation that turned finite numbers into others, with its operands."""

    operation: _Operation
    operands: list[_Value]
    results: list[Any]
    position: int  # of the result that is not finite
    became_nan: tuple[_Operation, list[_Value], list[Any]] | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    def resolve(self) -> BadOperation:
        """Return the innermost operation, taking compiled functions and loops apart."""
        if self.operation.take_apart is not None:
            inner = self.operation.take_apart(self.operands)[self.position].cause
            if isinstance(inner, _Cause):  # otherwise it stays finite when it is taken apart
                inner.became_nan = inner.became_nan or self.became_nan
                return inner.resolve()
        return _describe(self.operation, self.operands, self.results, self._resolve_nan())

    def _resolve_nan(self) -> BadOperation | None:
        while self.became_nan is not None:
            operation, operands, results = self.became_nan
            if operation.take_apart is None:
                return _describe(operation, operands, results, None)
            self.became_nan = None
            operation.take_apart([_Value(v.array, self if v.cause is not None else None) for v in operands])
            if self.became_nan is None:
                return _describe(operation, operands, results, None)
        return None


def _describe(
    operation: _Operation, operands: list[_Value], results: Sequence[Any], became_nan: BadOperation | None
) -> BadOperation:
    inputs, outputs = tuple(_text(v.array) for v in operands), tuple(map(_text, results))
    place = operation.place
    return BadOperation(operation.name, place.source, place.inside, inputs, outputs, became_nan)


def _origin_of_input(leaf: Any, name: str) -> _Cause | _Given | None:
    kind = _kind(leaf)
    if kind == NAN:
        return _Cause(_Operation("input", _Place(name), lambda values: [], None), [], [leaf], 0)
    return GIVEN if kind == INF else None


# Running a program one operation at a time.


def _run(jaxpr: Any, consts: Sequence[Any], args: list[_Value], place: _Place) -> list[_Value]:
    """Run the equations of a jaxpr one after the other; return its results with their causes."""
    values = dict(zip(jaxpr.invars, args, strict=True))
    values |= {
        var: _Value(const, GIVEN if _kind(const) else None) for var, const in zip(jaxpr.constvars, consts, strict=True)
    }
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, jex.Literal)}
    kept = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}

    def read(var: Any) -> _Value:
        if isinstance(var, jex.Literal):
            return _Value(var.val, GIVEN if _kind(var.val) else None)
        return values[var]

    for i, eqn in enumerate(jaxpr.eqns):
        results = _apply(_operation(eqn, place), [read(var) for var in eqn.invars])
        values |= zip(eqn.outvars, results, strict=True)
        for var in {v for v in eqn.invars if not isinstance(v, jex.Literal)} - kept:
            if last_use[var] == i:
                del values[var]
    return [read(var) for var in jaxpr.outvars]


def _apply(operation: _Operation, operands: list[_Value]) -> list[_Value]:
    """Run an operation, and find out for each result whether it, or an operand, is the cause of what is not finite."""
    if operation.name in _IDENTITIES:
        return operands
    results = list(operation.run([value.array for value in operands]))
    bad = [value for value in operands if value.cause is not None]
    nans = [value.cause for value in bad if value.kind == NAN]
    computed = [value.cause for value in bad if isinstance(value.cause, _Cause)]
    out = []
    for position, result in enumerate(results):
        kind = _kind(result)
        cause: _Cause | _Given | None = None
        if kind == NAN and nans:
            cause = nans[0]
        elif kind == NAN and computed:
            cause = computed[0]
            cause.became_nan = cause.became_nan or (operation, operands, results)
        elif kind == INF and bad:
            cause = computed[0] if computed else GIVEN
        elif kind:
            cause = _Cause(operation, operands, results, position)
        out.append(_Value(result, cause))
    return out


@dataclass(frozen=True)
class _Place:
    """Where an operation is: the code that asked for it, and the loops around it."""

    source: str
    inside: tuple[str, ...] = ()
    mesh: Any = None  # of the shard_map around them, and whether it checks what varies over devices

    def of(self, eqn: Any) -> _Place:
        """Return the place of an equation in this program. Code inside JAX counts as the code that called it."""
        return dataclasses.replace(self, source=_source(eqn) or self.source)

    def within(self, loop: str) -> _Place:
        """Return a place in a loop."""
        return dataclasses.replace(self, inside=(*self.inside, loop))


def _operation(eqn: Any, outer: _Place) -> _Operation:
    place = outer.of(eqn)

    def run(values: list[Any]) -> Sequence[Any]:
        params = eqn.primitive.get_bind_params(eqn.params)
        with getattr(getattr(eqn, "ctx", None), "manager", nullcontext()):
            results = eqn.primitive.bind(*values, **params)
        return results if eqn.primitive.multiple_results else [results]

    take_apart = _PARTS.get(eqn.primitive.name, None if _inner(eqn) is None else _take_call_apart)
    if place.mesh is not None and take_apart is not _take_call_apart:
        take_apart = None  # loops in a shard_map run as a whole
    parts = None if take_apart is None else functools.partial(take_apart, eqn, place)
    return _Operation(eqn.primitive.name, place, run if place.mesh is None else _per_device(run, *place.mesh), parts)


def _inner(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """Return the program inside an equation that calls one with its own operands, and its constants."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        program, consts = eqn.params.get(name), ()
        if isinstance(program, jex.ClosedJaxpr):
            program, consts = program.jaxpr, program.consts
        if (
            isinstance(program, jex.Jaxpr)
            and len(program.invars) == len(eqn.invars)
            and len(program.outvars) == len(eqn.outvars)
        ):
            return program, consts
    return None


def _take_call_apart(eqn: Any, place: _Place, operands: list[_Value]) -> list[_Value]:
    program, consts = _inner(eqn) or ((), ())
    return _run(program, consts, operands, place)


def _take_scan_apart(eqn: Any, place: _Place, operands: list[_Value]) -> list[_Value]:
    p, program = eqn.params, eqn.params["jaxpr"]
    first_column = p["num_consts"] + p["num_carry"]
    consts, carry, columns = (
        operands[: p["num_consts"]],
        operands[p["num_consts"] : first_column],
        operands[first_column:],
    )
    body = jax.jit(jex.jaxpr_as_fun(program))
    rows_out: list[list[_Value]] = []
    indices = range(p["length"])
    for n, i in enumerate(reversed(indices) if p["reverse"] else indices, 1):
        rows = [_Value(column.array[i], column.cause) for column in columns]
        rows = [_Value(row.array, row.cause if _kind(row.array) else None) for row in rows]
        iteration = _iteration(eqn, program, body, place.within(f"scan, iteration {n} of {p['length']}"))
        results = _apply(iteration, [*consts, *carry, *rows])
        carry = results[: p["num_carry"]]
        rows_out.append(results[p["num_carry"] :])
    # For the cause alone, the worst row stands for its column. The first of them wins.
    worst = [max(column, key=lambda row: row.kind) for column in zip(*rows_out, strict=True)]
    return [*carry, *worst]


def _take_while_apart(eqn: Any, place: _Place, operands: list[_Value]) -> list[_Value]:
    p, n_cond, n_body = eqn.params, eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = (jax.jit(jex.jaxpr_as_fun(p[name])) for name in ("cond_jaxpr", "body_jaxpr"))
    of_cond, of_body, carry = operands[:n_cond], operands[n_cond : n_cond + n_body], operands[n_cond + n_body :]
    for n in itertools.count(1):
        if not condition(*[value.array for value in (*of_cond, *carry)])[0]:
            break
        iteration = _iteration(eqn, p["body_jaxpr"], body, place.within(f"while loop, iteration {n}"))
        carry = _apply(iteration, [*of_body, *carry])
    return carry


def _iteration(eqn: Any, program: Any, body: Callable[..., Any], place: _Place) -> _Operation:
    """Return an iteration of a loop as one operation."""
    parts = functools.partial(_run, program.jaxpr, program.consts)
    return _Operation(eqn.primitive.name, place, lambda values: body(*values), lambda operands: parts(operands, place))


def _take_cond_apart(eqn: Any, place: _Place, operands: list[_Value]) -> list[_Value]:
    branches = eqn.params["branches"]
    branch = branches[int(np.clip(int(operands[0].array), 0, len(branches) - 1))]
    return _run(branch.jaxpr, branch.consts, operands[1:], place)


def _take_shard_map_apart(eqn: Any, place: _Place, operands: list[_Value]) -> list[_Value]:
    mesh, program = eqn.params["mesh"], eqn.params["jaxpr"]
    spread = jax.shard_map(
        lambda *values: [value[None] for value in values],
        mesh=mesh,
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )
    parts = spread(*[value.array for value in operands])
    values = [_Value(part, old.cause) for part, old in zip(parts, operands, strict=True)]
    return _run(program, (), values, dataclasses.replace(place, mesh=(mesh, eqn.params["check_vma"])))


def _per_device(run: _Run, mesh: Any, check: bool) -> _Run:
    """Return a function of arrays that have one row for each device, which runs an operation in a shard_map."""
    rows = PartitionSpec(mesh.axis_names)

    def run_all(values: list[Any]) -> Sequence[Any]:
        # A literal has no row for each device yet.
        values = [jnp.broadcast_to(value, mesh.size) if jnp.ndim(value) == 0 else value for value in values]
        own = lambda *parts: [result[None] for result in run([part[0] for part in parts])]  # noqa: E731
        return jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check)(*values)

    return run_all


_IDENTITIES = ("optimization_barrier", "pvary", "pcast")
"""Operations whose results are their operands, one by one."""

_PARTS = {
    "shard_map": _take_shard_map_apart,
    "scan": _take_scan_apart,
    "while": _take_while_apart,
    "cond": _take_cond_apart,
}


# Descriptions.


def _kind(array: Any) -> int:
    """Return the worst kind of number in an array."""
    if not jnp.issubdtype(jnp.result_type(array) if not hasattr(array, "dtype") else array.dtype, jnp.inexact):
        return FINITE
    if bool(jnp.isfinite(array).all()):
        return FINITE
    return NAN if bool(jnp.isnan(array).any()) else INF


def _text(array: Any) -> str:
    """Return dtype, shape, range and the number of bad entries: `float32[32,16], -3.77 to 1e+30, 2 of 512 are NaN`."""
    kind = f"{jnp.result_type(array)}[{','.join(map(str, np.shape(array)))}]"
    if not jnp.issubdtype(jnp.result_type(array), jnp.inexact) or not np.size(array):
        return kind
    flat = (
        np.asarray(array).astype(np.float64).ravel()
        if not jnp.iscomplexobj(array)
        else np.abs(np.asarray(array)).ravel()
    )
    finite, parts = flat[np.isfinite(flat)], []
    if finite.size:
        low, high = f"{finite.min():.4g}", f"{finite.max():.4g}"
        parts.append(low if low == high else f"{low} to {high}")
    for name, found in (("NaN", np.isnan(flat)), ("inf", flat == np.inf), ("-inf", flat == -np.inf)):
        if count := int(found.sum()):
            parts.append(f"{count} of {flat.size} {'is' if count == 1 else 'are'} {name}")
    return ", ".join([kind, *parts])


_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))


def _source(eqn: Any) -> str:
    """Return file, line and function of the code that asked for an operation, and the user's line if that is another.

    JAX has no public function for this.
    """
    try:
        from jax._src import source_info_util

        frames = list(source_info_util.user_frames(eqn.source_info.traceback))
        backward = "transpose" in str(eqn.source_info.name_stack)
    except Exception:
        return ""
    if not frames:
        return ""
    lines = [f"{frame.file_name}:{frame.start_line} ({frame.function_name.split('.')[-1]})" for frame in frames]
    own = [line for line in lines if not line.startswith(_LIBRARIES)]
    text = lines[0] if not own or own[0] == lines[0] else f"{lines[0]}, called at {own[0]}"
    return f"{text}, in its gradient" if backward else text
