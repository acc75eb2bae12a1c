"""The operation that first produced a NaN or an infinity: the cause, not the consequence."""

import functools
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P
from onstep.first_bad import first_bad
from onstep.sharding import make_mesh

X = jnp.float32([1.0, 2.0, 0.0])


@jax.custom_jvp
def doubled(x):
    return 2 * jnp.log(x)


@doubled.defjvp
def _(primals, tangents):
    return doubled(*primals), 2 * tangents[0] / primals[0]


@jax.custom_vjp
def halved(x):
    return jnp.log(x) / 2


halved.defvjp(lambda x: (halved(x), x), lambda x, g: (g / (2 * x),))


def scanned(x, at=2):
    """Take the logarithm of the rows of a scan, of which one is negative."""
    return jax.lax.scan(lambda c, row: (c + jnp.log(row), row), 0.0, jnp.ones(5).at[at].set(-x[0]))[0]


WRAPPED = {
    "plain": lambda x: jnp.log(-x),
    "jit": jax.jit(lambda x: jnp.log(-x)),
    "jit in jit": jax.jit(lambda x: jax.jit(lambda y: jnp.log(y))(-x)),
    "remat": jax.checkpoint(lambda x: jnp.log(-x)),
    "custom_jvp": lambda x: doubled(-x),
    "custom_vjp": lambda x: halved(-x),
    "cond": lambda x: jax.lax.cond(x[0] > 0, lambda y: jnp.log(-y), lambda y: y, x),
    "vmap": jax.vmap(lambda x: jnp.log(-x)),
    "switch": lambda x: jax.lax.switch(x[1].astype(int), [jnp.sin, jnp.cos, lambda y: jnp.log(-y)], x),
    "evaluated jaxpr": lambda x: jax.vjp(lambda y: jnp.log(-y), x)[0],
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_operation_is_found_inside_every_kind_of_call(wrapped):
    found = first_bad(wrapped, jnp.float32([1.0, 2.0]))
    assert (found.operation, found.outputs) == ("log", ("float32[2], 2 of 2 are NaN",))
    assert found.inputs == ("float32[2], -2 to -1",)
    assert "test_first_bad.py:" in found.source


def test_iteration_of_a_scan_is_named():
    found = first_bad(scanned, X)
    assert (found.operation, found.inside) == ("log", ("scan, iteration 3 of 5",))


def test_iterations_of_a_reversed_scan_are_counted_as_they_run():
    def backwards(x):
        return jax.lax.scan(lambda c, row: (jnp.sqrt(row) + c, row), 0.0, x, reverse=True)[0]

    assert first_bad(backwards, jnp.float32([1, -1, 1, 1])).inside == ("reverse scan, iteration 3 of 4 (row 2)",)


def test_iteration_of_a_while_loop_is_named():
    def loop(x):
        return jax.lax.while_loop(lambda c: c[0] < 6, lambda c: (c[0] + 1, c[1] * c[1]), (0, x))[1]

    found = first_bad(loop, jnp.float32(1e5))
    assert (found.operation, found.inside) == ("mul", ("while loop, iteration 3",))


def test_loops_in_loops_are_named_from_the_outside():
    def outer(x):
        return jax.lax.scan(lambda c, row: (c + scanned(x * row, at=1), row), 0.0, jnp.float32([-1, 1, 1]))[0]

    assert first_bad(outer, X).inside == ("scan, iteration 2 of 3", "scan, iteration 2 of 5")


def test_infinity_that_becomes_nan_later_is_the_cause():
    found = first_bad(lambda x: jnp.exp(x) - jnp.exp(x), jnp.float32([1.0, 100.0]))
    assert (found.operation, found.became_nan.operation) == ("exp", "sub")
    assert found.outputs == ("float32[2], 2.718, 1 of 2 is inf",)


def test_cause_and_consequence_may_be_in_different_iterations():
    def loop(x):
        def body(c, row):
            return (c[0] * 1e30, c[0] * row), None

        return jax.lax.scan(body, (x[0], 0.0), jnp.float32([1, 1, 0]))[0][1]

    found = first_bad(loop, X)
    assert (found.operation, found.inside) == ("mul", ("scan, iteration 2 of 3",))
    assert found.became_nan.inside == ("scan, iteration 3 of 3",)


def masked(x):
    scores = jnp.where(x > 0, x, -jnp.inf)
    return jax.nn.softmax(scores)


@pytest.mark.parametrize(
    "fine",
    [
        masked,
        lambda x: jnp.where(x > 0, jnp.log(x), 0),
        lambda x: jnp.exp(jnp.log(x)),
        lambda x: 1 / (1 + 1 / x),
        jnp.sin,
    ],
    ids=["mask", "other branch", "log of zero", "division by infinity", "finite"],
)
def test_infinity_that_leaves_the_results_finite_is_no_fault(fine):
    assert first_bad(fine, X) is None


def test_operation_that_turns_the_infinities_of_a_mask_into_nan_is_the_cause():
    def all_masked(x):
        scores = jnp.where(x > 5, x, -jnp.inf)
        return jnp.exp(scores - scores.max())

    assert first_bad(all_masked, X).operation == "sub"


def rooted(x):
    return jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()


def test_gradient_of_a_branch_that_is_not_taken_is_found():
    found = first_bad(jax.grad(rooted), X)
    assert (found.operation, found.code) == ("div", "jnp.sqrt(x)")
    assert found.source.endswith("(rooted), in its gradient")
    assert found.outputs == ("float32[3], 0.3536 to 0.5, 1 of 3 is inf",)
    assert (found.became_nan.operation, found.became_nan.source) == ("mul", found.source)
    assert str(found).splitlines()[-2:] == [f"  it became NaN in mul at {found.source}", "  code jnp.sqrt(x)"]


def test_operation_of_the_forward_pass_is_not_called_a_gradient():
    found = first_bad(jax.value_and_grad(lambda x: (jnp.log(x - 5) * x).sum()), X)
    assert found.operation == "log"
    assert "gradient" not in found.source


def test_operation_in_the_gradient_of_nested_transforms_is_found():
    def nested(x):
        @jax.checkpoint
        def body(c, row):
            return jax.lax.cond(row["n"] > 1, lambda v: jnp.sqrt(v - v), lambda v: v * 2, c) + 1, None

        return jax.lax.scan(body, x, {"n": jnp.arange(4.0), "unused": jnp.ones(4)}, unroll=2)[0].sum()

    found = first_bad(jax.jit(jax.grad(nested)), X)
    assert (found.operation, found.code) == ("div", "jnp.sqrt(v - v)")
    assert found.inside == ("reverse scan, iteration 1 of 4 (row 4)",)
    assert "in its gradient" in found.source


def test_nan_that_the_function_received_is_named_as_its_input():
    given = {"w": jnp.float32(1), "batch": jnp.float32("nan")}
    found = first_bad(lambda given: given["w"] * given["batch"], given)
    assert (found.operation, found.source) == ("input", "batch")


def test_infinity_that_the_function_received_is_not_to_blame():
    assert first_bad(lambda x, best: (x + 1, best), X, jnp.inf) is None


def test_nan_in_the_input_that_does_not_reach_the_results_is_not_to_blame():
    found = first_bad(lambda x: jnp.where(jnp.arange(3) > 0, jnp.log(x), 0), jnp.float32([jnp.nan, -1, 1]))
    assert (found.operation, found.outputs) == ("log", ("float32[3], 0, 2 of 3 are NaN",))


def test_entries_with_different_causes_are_told_apart():
    def f(x):
        y = jnp.sqrt(x)  # NaN for -1, which the last line masks
        z = y / (x - 3)  # infinite for 3
        return jnp.where(jnp.arange(4) > 0, (z - z)[::-1][::-1], 0)

    found = first_bad(f, jnp.float32([-1, 1, 2, 3]))
    assert (found.operation, found.code) == ("div", "y / (x - 3)")
    assert found.became_nan.code == "z - z"


def test_infinity_that_is_masked_later_is_not_to_blame_for_a_nan_elsewhere():
    def f(x):
        logits = jnp.log(x)  # -inf for 0, which the last line masks
        return jnp.where(x > 0, jnp.arcsin(logits), 0).sum()

    assert first_bad(f, jnp.float32([0, 1, 50])).operation == "asin"


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_written_value_is_found_where_it_was_chosen(value):
    found = first_bad(lambda x: jnp.where(x > 1, value, x).max(), X)
    assert (found.operation, found.code) == ("select_n", "jnp.where(x > 1, value, x)")


def test_nan_that_is_written_but_not_chosen_is_not_to_blame():
    def layer(x, w):  # the code of jnp.std contains a NaN
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * w, None

    found = first_bad(lambda x: jax.lax.scan(layer, x, jnp.ones(2))[0].sum(), jnp.float32([[1, 2, 3], [1, 1, 1]]))
    assert (found.operation, found.inside) == ("div", ("scan, iteration 1 of 2",))
    assert found.code == "(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)"
    assert found.inputs[1] == "float32[2,1], 0 to 0.8165"


def test_infinite_result_is_found_if_no_result_is_nan():
    assert first_bad(lambda x: 1 / x, X).operation == "div"


def test_results_keep_their_own_causes_behind_a_barrier():
    def f(x):
        return jax.lax.optimization_barrier((jnp.sqrt(-x), x * 1e38 * 10))[0]

    assert first_bad(f, X).operation == "sqrt"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_every_float_type_is_checked(dtype):
    assert first_bad(lambda x: x / (x - x), jnp.ones(2, dtype)).operation == "div"


def test_text_shows_operands_results_and_the_consequence():
    text = str(first_bad(functools.partial(scanned, at=0), X))
    assert text.startswith("log at ")
    assert text.splitlines()[0].endswith("(<lambda>), in scan, iteration 1 of 5")
    assert text.splitlines()[1:] == ["  code jnp.log(row)", "  in   float32[], -1", "  out  float32[], 1 of 1 is NaN"]


def test_keys_and_integers_pass_through():
    def f(key, n):
        return jax.random.normal(key, (2,)) / (n - n)

    assert first_bad(f, jax.random.key(0), jnp.int32(3)).operation == "div"


def test_operation_inside_a_shard_map_is_found():
    mesh = make_mesh()
    mapped = jax.shard_map(lambda x: jnp.log(-x).sum(keepdims=True), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    found = first_bad(mapped, jax.device_put(np.arange(1, 9, dtype=np.float32), jax.NamedSharding(mesh, P("data"))))
    assert found.operation == "log"
    assert "test_first_bad.py:" in found.source


def test_operation_behind_a_collective_is_found():
    mesh = make_mesh()

    def body(x):
        total = jax.lax.psum(x, "data")
        return jax.jit(lambda y: jnp.log(-y))(total) * 2

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert first_bad(mapped, jnp.arange(1.0, 9.0)).operation == "log"


def test_loop_inside_a_shard_map_is_taken_apart():
    mesh = make_mesh()

    def body(x):
        def step(c, row):
            c = jax.lax.cond(row > 1, lambda v: jnp.log(v - 9), lambda v: v + 0 * row, c)
            return jax.lax.psum(c, "data") + 0 * x.sum(), row

        c = jax.lax.scan(step, x.sum(), jnp.arange(3.0))[0]
        return jax.lax.while_loop(lambda v: v < 0, lambda v: v + 1, c)[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    found = first_bad(mapped, -jnp.ones(8))
    assert (found.operation, found.code, found.inside) == ("log", "jnp.log(v - 9)", ("scan, iteration 3 of 3",))


def test_solver_is_taken_apart():
    found = first_bad(jnp.linalg.solve, jnp.zeros((2, 2)), jnp.ones(2))
    assert found.operation == "triangular_solve"
    found = first_bad(lambda a: jnp.linalg.cholesky(jnp.log(a)).sum(), -jnp.eye(2))
    assert found.operation == "log"


def twice(program):
    """Bind a primitive that JAX has no rules for, with a program inside."""
    primitive = Primitive("twice")
    primitive.def_abstract_eval(lambda x, jaxpr: x)
    primitive.def_impl(lambda x, jaxpr: program(program(x)))
    mlir.register_lowering(primitive, mlir.lower_fun(lambda x, jaxpr: program(program(x)), multiple_results=False))
    return lambda x: primitive.bind(x, jaxpr=jax.make_jaxpr(program)(x))


def test_unknown_operation_is_reported_as_a_whole():
    found = first_bad(jax.jit(twice(lambda x: jnp.log(-x))), X)
    assert (found.operation, found.inputs) == ("twice", ("float32[3], 0 to 2",))


def test_loop_that_cannot_be_taken_apart_is_reported_as_a_whole(monkeypatch):
    monkeypatch.setattr("onstep.operations._scan_lengths", lambda params: params["a name of the next version"])
    found = first_bad(scanned, X)
    assert (found.operation, found.inside) == ("scan", ())


def test_answer_without_private_functions_of_jax_lacks_only_the_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.source_info_util", None)
    monkeypatch.delattr("jax._src.source_info_util", raising=False)
    found = first_bad(scanned, X)
    assert (found.operation, found.source, found.code) == ("log", "an unknown line", "")
    assert found.inside == ("scan, iteration 3 of 5",)
    assert str(found).startswith("log at an unknown line, in scan, iteration 3 of 5\n  in   float32[], -1\n")


def test_line_of_the_user_is_named_next_to_that_of_a_library():
    optimizer = optax.adam(1e-2, eps=0.0)

    def step(params):
        gradient = params * 0
        return optimizer.update(gradient, optimizer.init(params))[0]

    found = first_bad(step, X)
    assert (found.operation, found.code) == ("div", "optimizer.update(gradient, optimizer.init(params))")
    assert found.source.startswith("optax/")
    assert re.search(r", called at \S*test_first_bad.py:\d+ \(step\)$", found.source)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, kernel_init=nn.initializers.zeros)(x)
        return x / jnp.linalg.norm(x)


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        x = self.linear(x)
        return x / jnp.linalg.norm(x)


def test_line_of_a_flax_module_is_that_of_the_layer():
    linen, split = LinenLayer(), nnx.split(NnxLayer(nnx.Rngs(0)))
    for function, argument in (
        (lambda params: linen.apply(params, X).sum(), linen.init(jax.random.key(0), X)),
        (lambda params: nnx.merge(split[0], params)(X).sum(), split[1]),
    ):
        found = first_bad(function, argument)
        assert (found.operation, found.code) == ("div", "x / jnp.linalg.norm(x)")
        assert found.source.endswith("(__call__)")


def test_index_out_of_range_is_shown():
    found = first_bad(lambda table, i: jnp.take(table, i, axis=0).sum(), jnp.ones((4, 2)), jnp.array([0, 7]))
    assert (found.operation, found.inputs[1]) == ("gather", "int32[2,1], 0 to 7")


def test_unusual_arrays_pass_through():
    def f(x):
        key = jax.random.split(x["key"])[0]
        empty = jnp.zeros((0, 3)).sum() + x["complex"].real + (x["int"] // (x["int"] - 3)).sum()
        eighth = x["float8"].astype(jnp.float8_e4m3fn).astype(jnp.float32)
        written, passed = jax.jit(lambda v: (2.0, v))(key)
        return eighth.astype(jnp.bfloat16) / (empty * 0).astype(jnp.bfloat16), x["bool"], passed, written

    values = {"complex": jnp.complex64(1 + 2j), "float8": jnp.ones(2, jnp.float8_e5m2), "bool": True}
    found = first_bad(f, values | {"int": jnp.int32([3, 4]), "key": jax.random.key(0)})
    assert (found.operation, found.outputs) == ("div", ("bfloat16[2], 2 of 2 are inf",))


def test_arrays_are_dropped_after_their_last_use(monkeypatch):
    alive = []
    size = 1 << 18

    def count(values):
        alive.append(sum(array.size == size for array in jax.live_arrays()))
        return values

    def f(x):
        for _ in range(6):
            x = jax.pure_callback(count, x, x * 2)
        return x

    assert first_bad(f, jnp.ones(size)) is None
    assert max(alive) - min(alive) <= 1
