"""StepFunction: the user's step and the compiled halves of callbacks as one function, which is compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ..callback import Callback, Carry, Context
from ..means import NoMetrics
from ..messages import warn_user
from ..metrics import Metrics, as_metrics, describe_result
from ..trees import (
    Batch,
    State,
    compare_signatures,
    copy_containers,
    difference,
    dtype_advice,
    ignore_sizes,
    same_leaves,
    signature,
    strip_weak_types,
)
from .origin import call_signature, function_name, note_origin

Step = Callable[..., Any]
"""`(state, batch) -> (state, metrics)`; an optional third argument is a random key, an optional third result `aux`."""

Bundle = tuple[State, dict[str, Carry], Any]
"""`(state, carries, step)`: donated to, and returned by, every compiled call. `step` is the number of steps
completed, an int32 scalar, or None if nothing compiled asks for it."""


class StepFunction:
    """The function that is compiled. It is pure, except for what it records while it is traced.

    Attributes:
        step: the user's step.
        transforms: the compiled halves by name.
        conditional: the names of halves that are not always due, in the order of the `due` flags.
        logged: by name of such a half, the metrics that it adds.
        expected: the signature of the run's first batch.
        trace_count: how many times it was traced.
        weak: the dtypes, by name, that leaves of the state got because the caller gave them none.
    """

    def __init__(self, step: Step, transforms: dict[str, Callback], conditional: list[str], takes_rng: bool):
        self.step: Step = step
        self.transforms: dict[str, Callback] = transforms
        self.conditional: list[str] = conditional
        self.takes_rng: bool = takes_rng
        self.logged: dict[str, list[str]] = {}
        self.expected: dict[str, str] | None = None
        self.trace_count: int = 0
        self.weak: dict[str, str] = {}
        # JAX names the compiled function and its arguments in errors: they should be the user's.
        self.__name__: str = function_name(step)
        self.__wrapped__: Step = step
        self.__signature__: inspect.Signature = call_signature(step)

    def init(self, state: State) -> dict[str, Carry]:
        """Return the first carries."""
        carries = {}
        for name, half in self.transforms.items():
            with note_origin(f"{name}.init", half.init), _check_attributes(f"{name}.init", half):
                carries[name] = half.init(copy_containers(state))
        # A carry must not share a buffer with the state, since both are donated. The results of a compiled function do
        # not share any with its arguments, and with `jit=False` nothing is donated.
        return strip_weak_types(carries)

    def __call__(self, bundle: Bundle, batch: Batch, key: Any, due: Any) -> tuple[Bundle, Metrics]:
        """Run one step. Its checks run only while it is traced."""
        self.trace_count += 1
        state, carries, count = bundle
        self._warn_if_reshaped(batch)
        folded = None if key is None else jax.random.fold_in(key, count)
        with note_origin(f"the step {self.__name__}", self.step), _note_weak_types(self.weak):
            results = self.step(*copy_containers((state, batch)), *([folded] if self.takes_rng else []))
            results = self._results(results, state)
        # Observers must not change a bit of the results. XLA fuses a value into its consumers, and rounds a product and
        # a sum that are fused once instead of twice, so a new consumer of one result could change another one. `aux`
        # belongs inside as well: a gradient norm would otherwise change how gradients and parameters are fused.
        new, metrics, aux = isolate(results)
        ctx = Context(count, state, new, batch, metrics, aux, folded)
        carries = dict(carries)
        for name, half in self.transforms.items():
            ctx = dataclasses.replace(ctx, _who=name)
            is_due = due[self.conditional.index(name)] if name in self.conditional else None
            carries[name], ctx = self._update(name, half, carries[name], ctx, is_due)
        # The host waits for metrics, because they are never donated. Without any, it needs something else to wait for.
        metrics = ctx.metrics or NoMetrics(jnp.int32(0))
        return (ctx.state, carries, None if count is None else count + 1), metrics

    def _results(self, results: Any, state: State) -> tuple[State, Metrics, dict[str, Any]]:
        if not isinstance(results, tuple) or len(results) not in (2, 3):
            got = f"{len(results)} results" if type(results) is tuple else describe_result(results)
            raise TypeError(f"The step needs to return (state, metrics) or (state, metrics, aux), got {got}.")
        new, metrics, aux = (*results, {})[:3]
        if not isinstance(aux, dict):
            raise TypeError(f"The step needs a dict as its third result, aux, got {type(aux).__name__}.")
        if isinstance(new, dict) and difference(state, new) and not difference(state, metrics):
            raise TypeError("The step needs to return (state, metrics), got (metrics, state). Swap them.")
        return _check_unchanged(state, new, "The step"), as_metrics(metrics, "The step"), aux

    def _update(self, name: str, half: Callback, carry: Carry, ctx: Context, is_due: Any) -> tuple[Carry, Context]:
        """Run one compiled half, behind a branch if it is not always due.

        What it leaves as it is does not pass through the branch, which would copy it.
        """

        def update() -> tuple[Carry, Any, Metrics, Any]:
            given = _with_own_containers(ctx)
            with note_origin(f"{name}.update", half.update):
                with _check_attributes(f"{name}.update", half):
                    out = half.update(copy_containers(carry), given)
                if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Context)):
                    raise TypeError(f"{name}.update needs to return (carry, ctx), got {describe_result(out)}.")
                new, after = out
                if after.dropped:
                    raise ValueError(
                        f"{name}.update logs {after.dropped[0]!r}, but does not return the context that ctx.log "
                        "returned. Write ctx = ctx.log(...), or return carry, ctx.log(...)."
                    )
                state = None
                if not same_leaves(ctx.state, after.state):
                    state = _check_unchanged(ctx.state, after.state, f"{name}.update")
                carried = _check_unchanged(carry, new, f"{name}.update", "carry")
                aux = None if after.aux is given.aux else after.aux
                if aux is not None and is_due is not None:
                    _check_unchanged(ctx.aux, aux, f"{name}.update, which is not due at every step,", "dict as aux")
                return carried, state, as_metrics(after.metrics, name), aux

        def skip() -> tuple[Carry, Any, Metrics, Any]:
            zero = {n: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), m) for n, m in shapes.items()}
            kept = None if new_state is None else ctx.state, None if new_aux is None else ctx.aux
            return carry, kept[0], zero | ctx.metrics, kept[1]

        if is_due is None:
            carry, state, metrics, aux = update()
        else:
            _, new_state, shapes, new_aux = jax.eval_shape(update)
            self.logged[name] = [n for n in shapes if n not in ctx.metrics]
            carry, state, metrics, aux = jax.lax.cond(is_due, update, skip)
        changed = {"state": state, "aux": aux}
        return carry, ctx.replace(metrics=metrics, **{n: new for n, new in changed.items() if new is not None})

    def _warn_if_reshaped(self, batch: Batch) -> None:
        here = signature(batch)
        if self.expected is not None and (changed := compare_signatures(self.expected, here)):
            short = not compare_signatures(self.expected, ignore_sizes(here, self.expected, rows_only=True))
            advice = (
                "To avoid this, give all batches the same shape: drop the short last one, or pad it."
                if short
                else "If you mean this, as with buckets of lengths, silence it: "
                'warnings.filterwarnings("ignore", message="A batch\'s shape differs").'
            )
            warn_user(
                f"A batch's shape differs from the first one's, so the step is compiled again: {changed}. {advice}"
            )


@contextlib.contextmanager
def _note_weak_types(weak: dict[str, str]) -> Iterator[None]:
    """Add a note to an error about types, if leaves of the state had no dtype of their own."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = str(error)
        others = [f"{name} ({dtype})" for name, dtype in weak.items() if f"{name}: " not in message]
        if others and ("types" in message or "became" in message):
            error.add_note(
                f"onstep: the state began with Python numbers, which have no dtype, at {', '.join(others)}. "
                "Start them as arrays with the dtype that the step computes with, such as jnp.bfloat16(0.5)."
            )
        raise


def isolate(tree: Any) -> Any:
    """Return the tree with a barrier between the computation of its arrays and their consumers."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [number for number, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    for number, array in zip(arrays, jax.lax.optimization_barrier([leaves[n] for n in arrays]), strict=True):
        leaves[number] = array
    return jax.tree.unflatten(structure, leaves)


def _with_own_containers(ctx: Context) -> Context:
    """Return a context whose dicts, lists and modules a compiled half may change in place."""
    names = ("before", "state", "batch", "metrics", "aux")
    return dataclasses.replace(ctx, **{name: copy_containers(getattr(ctx, name)) for name in names})


@contextlib.contextmanager
def _check_attributes(who: str, half: Callback) -> Iterator[None]:
    """Catch a compiled half that assigns attributes, which happens only while it is traced.

    Attributes that describe what was traced, such as the names of leaves, are fine.

    Raises:
        TypeError: an attribute is an array of the compiled step.
    """
    before = dict(vars(half))
    yield
    for name, value in vars(half).items():
        old = before.get(name, getattr(type(half), name, None))
        if value is old:
            continue
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value)):
            raise TypeError(
                f"{who} sets self.{name} to a traced array, which has no value outside the compiled step. Keep it "
                f"in the carry, and read it with loop.carry(self); or log it: ctx.log({name}=...)."
            )
        if isinstance(value, (int, float)) and isinstance(old, (int, float)) and value != old:
            warn_user(
                f"{who} changes self.{name} from {old} to {value}. It runs only while the step is compiled, "
                "not at every step. Count in the carry instead."
            )


def _check_unchanged(old: Any, new: Any, who: str, what: str = "state") -> Any:
    """Return a new state or carry, which must have the tree, shapes and dtypes of the old one."""
    new = strip_weak_types(new)
    if changed := difference(old, new):
        raise ValueError(f"{who} needs to return a {what} like the one it got: {changed}.{dtype_advice(old, new)}")
    return new
