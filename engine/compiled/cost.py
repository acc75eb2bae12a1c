"""What a program costs: its equations, and the operations of its matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yield every equation of a jaxpr and of the programs inside it, with a lower bound on how often it runs."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(part, "eqns"):
                yield from equations(part, inner)


def product_flops(equation: Any) -> int:
    """Return the floating-point operations of one `dot_general`, 0 for any other operation."""
    if equation.primitive.name != "dot_general":
        return 0
    ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def count_flops(jaxpr: Any) -> float:
    """Return the floating-point operations of the matrix products and convolutions in a jaxpr.

    The body of a `scan` is counted once per iteration. (XLA's own cost analysis counts it once.)

    Args:
        jaxpr: such as `loop.traced.jaxpr`, or what `jax.make_jaxpr` returns.

    >>> import jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(lambda a, b: a @ b)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    48
    """
    return sum(times * (product_flops(equation) + _convolution_flops(equation)) for equation, times in equations(jaxpr))


def _convolution_flops(equation: Any) -> float:
    if equation.primitive.name != "conv_general_dilated":
        return 0
    kernel, out, given = equation.invars[1].aval, equation.outvars[0].aval, equation.params
    features = kernel.shape[given["dimension_numbers"].rhs_spec[0]]
    # Multiplying inserted zeros is not counted.
    return 2 * out.size * kernel.size / features / math.prod(given["lhs_dilation"])
