"""The operation that first produced a NaN or an infinity: the cause, not the consequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

    assert first_bad(backwards, jnp.float32([1, -1, 1, 1])).inside == ("scan, iteration 3 of 4",)


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


def test_gradient_of_a_branch_that_is_not_taken_is_found():
    found = first_bad(jax.grad(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()), X)
    assert (found.operation, found.became_nan.operation) == ("div", "mul")


def test_nan_that_the_function_received_is_named_as_its_input():
    given = {"w": jnp.float32(1), "batch": jnp.float32("nan")}
    found = first_bad(lambda given: given["w"] * given["batch"], given)
    assert (found.operation, found.source) == ("input", "batch")


def test_infinity_that_the_function_received_is_not_to_blame():
    assert first_bad(lambda x, best: (x + 1, best), X, jnp.inf) is None


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
    assert text.splitlines()[1:] == ["  in   float32[], -1", "  out  float32[], 1 of 1 is NaN"]


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
