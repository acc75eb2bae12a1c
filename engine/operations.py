"""The operations of a traced program: run one at a time, with loops that can be taken apart."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .blame import Blame, Cause, Operation, Run, Value, apply, is_nan, literal
from .source_lines import is_backward


@dataclass(frozen=True)
class Place:
    """Where an operation is.

    Attributes:
        equations: the equation, after those of the calls around it.
        inside: the loops around it, such as `"scan, iteration 3 of 12"`.
        gradient: whether its results are used by the backward pass alone.
        mesh: the mesh of the shard_map around it. Inside, arrays have one row for each device.
        check_vma: whether that shard_map checks what varies over devices.
    """

    equations: tuple[Any, ...] = ()
    inside: tuple[str, ...] = ()
    gradient: bool = False
    mesh: Any = None
    check_vma: bool = True

    def at(self, eqn: Any, gradient: bool) -> Place:
        """Return the place of an equation of the program at this place."""
        return dataclasses.replace(self, equations=(*self.equations, eqn), gradient=gradient)

    def within(self, loop: str) -> Place:
        """Return a place in a loop."""
        return dataclasses.replace(self, inside=(*self.inside, loop))

    def literal(self, array: Any) -> Value:
        """Return a literal of the program at this place."""
        if self.mesh is not None:
            array = jnp.broadcast_to(array, (self.mesh.size, *np.shape(array)))
        return literal(array)

    def of_every_device(self, run: Run) -> Run:
        """Return a function of arrays as they are at this place."""
        if self.mesh is None:
            return run
        rows = PartitionSpec(self.mesh.axis_names)
        own = lambda *parts: [result[None] for result in run([part[0] for part in parts])]  # noqa: E731
        mapped = jax.shard_map(own, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=self.check_vma)
        return lambda arrays: mapped(*arrays)

    def number(self, value: Value) -> int:
        """Return an integer or boolean that the program branches on."""
        (number,) = set(np.ravel(value.array).tolist())  # a ValueError if the devices disagree
        return int(number)


class Found(Exception):
    """Ends a program early: `cause` made a result NaN, and nothing earlier can have."""

    def __init__(self, cause: Cause):
        self.cause = cause


@dataclass(frozen=True)
class Use:
    """What becomes of a result of a program.

    Attributes:
        gradient: the backward pass alone uses it.
        final: it is a result of the whole function. If it is NaN, the rest need not run.
    """

    gradient: bool = False
    final: bool = False


def run_program(
    program: Any, operands: list[Value], place: Place, uses: Sequence[Use], others: Sequence[Value] = ()
) -> list[Value]:
    """Run the equations of a program one after the other.

    Args:
        program: a jaxpr, with or without its constants.
        operands: its arguments.
        place: where it is.
        uses: what becomes of its results.
        others: values that the program around it still needs.

    Raises:
        Found: a final result is NaN.
    """
    jaxpr, consts = _open(program)
    values = dict(zip(jaxpr.invars, operands, strict=True))
    values |= {var: place.literal(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}
    last_use = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in _variables(eqn.invars)}
    kept = set(_variables(jaxpr.outvars))
    final = {
        var for var, use in zip(jaxpr.outvars, uses, strict=True) if use.final and not isinstance(var, jex.Literal)
    }
    backward = _backward(jaxpr, uses)

    def read(var: Any) -> Value:
        return place.literal(var.val) if isinstance(var, jex.Literal) else values[var]

    for i, eqn in enumerate(jaxpr.eqns):
        arguments = [read(var) for var in eqn.invars]
        for var in set(_variables(eqn.invars)) - kept:
            if last_use[var] == i:
                del values[var]
        needed = [*values.values(), *others]
        results = _run_equation(
            eqn, arguments, place, [Use(var in backward, var in final) for var in eqn.outvars], needed
        )
        values |= {
            var: result for var, result in zip(eqn.outvars, results, strict=True) if var in last_use or var in kept
        }
        for var in final & set(eqn.outvars):
            _stop_if_found(values[var], [*values.values(), *others])
    return [read(var) for var in jaxpr.outvars]


def _stop_if_found(result: Value, others: Sequence[Value]) -> None:
    causes = [cause for cause, mask in result.blame.items() if is_nan(result.array)[mask].any()]
    alive = {cause.order for value in others for cause in value.blame if not cause.given}
    for cause in causes:
        if cause.order == min(alive):
            raise Found(cause)


def _run_equation(eqn: Any, operands: list[Value], outer: Place, uses: list[Use], others: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in _IDENTITIES:
        return operands
    place = outer.at(eqn, all(use.gradient for use in uses))
    if name in _CALLS and (call := _CALLS[name](eqn, operands, place)) is not None:
        program, arguments = call
        return run_program(program, arguments, place, uses, others)
    take_apart = None
    if name in _LOOPS:
        inside = [Use(use.gradient) for use in uses]
        take_apart = functools.partial(_LOOPS[name], eqn, place, inside)
    return apply(Operation(name, place, place.of_every_device(_as_a_whole(eqn)), take_apart), operands)


def _as_a_whole(eqn: Any) -> Run:
    def run(arrays: list[Any]) -> Sequence[Any]:
        params = eqn.primitive.get_bind_params(eqn.params)
        with getattr(getattr(eqn, "ctx", None), "manager", nullcontext()):
            results = eqn.primitive.bind(*arrays, **params)
        return results if eqn.primitive.multiple_results else [results]

    return run


def _open(program: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr and its constants. Since JAX 0.12, every jaxpr has its own."""
    return (program.jaxpr, program.consts) if isinstance(program, jex.ClosedJaxpr) else (program, ())


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]


def _backward(jaxpr: Any, uses: Sequence[Use]) -> set[Any]:
    """Return the variables that the backward pass alone computes or uses."""
    users: dict[Any, list[bool]] = {}
    for var, use in zip(jaxpr.outvars, uses, strict=True):
        if not isinstance(var, jex.Literal):
            users.setdefault(var, []).append(use.gradient)
    found = set[Any]()
    for eqn in reversed(jaxpr.eqns):
        computed = is_backward(eqn)
        found.update(var for var in eqn.outvars if computed or (var in users and all(users[var])))
        backward = all(var in found for var in eqn.outvars if var in users)
        for var in _variables(eqn.invars):
            users.setdefault(var, []).append(backward)
    return found


# Calls: their programs run as part of the program around them.

_Call = tuple[Any, list[Value]]
"""A program and its arguments."""


def _call(eqn: Any, operands: list[Value], place: Place) -> _Call | None:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return eqn.params[name], operands
    return None


def _cond(eqn: Any, operands: list[Value], place: Place) -> _Call | None:
    branches = eqn.params["branches"]
    try:
        index = place.number(operands[0])
    except ValueError:  # the devices take different branches
        return None
    return branches[min(max(index, 0), len(branches) - 1)], operands[1:]


def _linear_solve(eqn: Any, operands: list[Value], place: Place) -> _Call:
    lengths = eqn.params["const_lengths"]
    first = lengths.matvec + lengths.vecmat
    right_sides = operands[sum(lengths) :]
    return eqn.params["jaxprs"].solve, [*operands[first : first + lengths.solve], *right_sides]


_CALLS: dict[str, Callable[[Any, list[Value], Place], _Call | None]] = {
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
} | dict.fromkeys(
    (
        *("jit", "pjit", "core_call", "closed_call", "eval_jaxpr", "checkpoint", "remat", "remat2"),
        *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    ),
    _call,
)

_IDENTITIES = {"optimization_barrier", "pvary", "pcast"}
"""Operations whose results are their operands, one by one."""


# Loops: they run as a whole first, and are taken apart only to find a cause.


def _take_scan_apart(eqn: Any, place: Place, uses: list[Use], operands: list[Value]) -> list[Blame]:
    length, reverse, program = (eqn.params[name] for name in ("length", "reverse", "jaxpr"))
    n_consts, n_carry = _scan_lengths(eqn.params)
    consts, carry, columns = operands[:n_consts], operands[n_consts:][:n_carry], operands[n_consts + n_carry :]
    axis = 0 if place.mesh is None else 1
    body = _body(eqn, program, place, uses)
    rows_out: list[list[Value]] = []
    indices = range(length)
    for n, i in enumerate(reversed(indices) if reverse else indices, 1):
        text = (
            f"reverse scan, iteration {n} of {length} (row {i + 1})" if reverse else f"scan, iteration {n} of {length}"
        )
        results = apply(body(text), [*consts, *carry, *_row(columns, i, axis)])
        carry = results[:n_carry]
        rows_out.append(results[n_carry:])
    if reverse:
        rows_out.reverse()
    return [*_blame(carry), *(_stack(column, axis) for column in zip(*rows_out, strict=True))]


def _scan_lengths(params: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of constants and of carried values of a scan."""
    if "num_carry" in params:  # before JAX 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _row(columns: list[Value], i: int, axis: int) -> list[Value]:
    arrays = _take([column.array for column in columns], i, axis)
    blames = [{cause: mask.take(i, axis) for cause, mask in column.blame.items()} for column in columns]
    blames = [{cause: mask for cause, mask in blame.items() if mask.any()} for blame in blames]
    return [Value(array, blame) for array, blame in zip(arrays, blames, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _take(arrays: list[Any], i: int, axis: int) -> list[Any]:
    return [jax.lax.dynamic_index_in_dim(array, i, axis, keepdims=False) for array in arrays]


def _stack(rows: Sequence[Value], axis: int) -> Blame:
    causes = {cause for row in rows for cause in row.blame}
    clean = np.zeros(np.shape(rows[0].array), bool)
    return {cause: np.stack([row.blame.get(cause, clean) for row in rows], axis) for cause in causes}


def _blame(values: list[Value]) -> list[Blame]:
    return [value.blame for value in values]


def _take_while_apart(eqn: Any, place: Place, uses: list[Use], operands: list[Value]) -> list[Blame]:
    p, n_cond, n_body = eqn.params, eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carry = operands[:n_cond], operands[n_cond:][:n_body], operands[n_cond + n_body :]
    condition = _compiled(p["cond_jaxpr"], place)
    body = _body(eqn, p["body_jaxpr"], place, uses)
    for n in itertools.count(1):
        if not place.number(Value(condition([value.array for value in (*of_cond, *carry)])[0])):
            return _blame(carry)
        carry = apply(body(f"while loop, iteration {n}"), [*of_body, *carry])
    raise AssertionError


def _body(eqn: Any, program: Any, place: Place, uses: list[Use]) -> Callable[[str], Operation]:
    """Return a function that makes an iteration of a loop an operation."""
    run = _compiled(program, place)

    def iteration(text: str) -> Operation:
        inner = place.within(text)
        return Operation(
            eqn.primitive.name, inner, run, lambda values: _blame(run_program(program, values, inner, uses))
        )

    return iteration


def _compiled(program: Any, place: Place) -> Run:
    run = jax.jit(jex.jaxpr_as_fun(program))
    return place.of_every_device(lambda arrays: run(*arrays))


def _take_shard_map_apart(eqn: Any, place: Place, uses: list[Use], operands: list[Value]) -> list[Blame]:
    mesh, p = eqn.params["mesh"], eqn.params

    def spread(arrays: Any, specs: Any) -> Any:
        return jax.shard_map(
            lambda *values: [value[None] for value in values],
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )(*arrays)

    arrays = spread([value.array for value in operands], tuple(p["in_specs"]))
    values = []
    for array, value, spec in zip(arrays, operands, p["in_specs"], strict=True):
        masks = spread(list(value.blame.values()), (spec,) * len(value.blame)) if value.blame else []
        values.append(Value(array, dict(zip(value.blame, masks, strict=True))))
    inner = dataclasses.replace(place, mesh=mesh, check_vma=p["check_vma"])
    return _blame(run_program(p["jaxpr"], values, inner, uses))


_LOOPS = {"scan": _take_scan_apart, "while": _take_while_apart, "shard_map": _take_shard_map_apart}
