"""Public helpers for many devices: meshes, and how the arrays of a state are divided over them.

A layout is a function `tree -> tree of shardings`, for arrays or for the shapes that `jax.eval_shape` returns:
`replicated`, `fsdp`, `by_path`. `create` makes a state directly in a layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .trees import named_leaves

SMALL = 2**14
"""Leaves with fewer elements than this are replicated by `fsdp`: gathering them costs more than storing them."""

Layout = Callable[[Any], Any]
"""`tree -> tree of shardings`."""


def make_mesh(**axes: int) -> Mesh:
    """Return a mesh over all devices of all processes.

    Its axes have the type Auto: XLA divides the computation, and ordinary model code runs unchanged.

    Args:
        axes: the number of devices along each axis by name, in order. One may be -1, for the rest. Default:
            `data=-1`.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    >>> make_mesh(data=-1, model=1).axis_names
    ('data', 'model')
    """
    axes = axes or {"data": -1}
    devices, sizes = jax.device_count(), list(axes.values())
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or devices % known or (-1 not in sizes and known != devices):
        raise ValueError(f"make_mesh needs axes that make up {devices} devices, got {axes}. One of them may be -1.")
    shape = tuple(devices // known if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> Layout:
    """Return the layout of data parallel training: every device holds every leaf.

    >>> layout = replicated(make_mesh())
    >>> tuple(layout({"w": jax.ShapeDtypeStruct((4,), "float32")})["w"].spec)
    ()
    """
    return lambda tree: jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), tree)


def fsdp(mesh: Mesh, axis: str | None = None, *, small: int = SMALL) -> Layout:
    """Return the layout of fully sharded data parallel training: every leaf is divided along its largest axis.

    Parameters and optimizer state then take 1 / devices of the memory on each device. Leaves that do not divide
    evenly are replicated (Rajbhandari et al., "ZeRO", 2020, arXiv:1910.02054).

    Args:
        mesh: the devices.
        axis: the axis of the mesh; by default "fsdp", or "data" if it has no such axis.
        small: leaves with fewer elements are replicated.

    Raises:
        ValueError: the mesh has no such axis.

    >>> layout = fsdp(make_mesh(), small=1)
    >>> tuple(layout({"w": jax.ShapeDtypeStruct((3, 64), "float32")})["w"].spec)
    (None, 'data')
    """
    axis = axis or ("fsdp" if "fsdp" in mesh.axis_names else "data")
    count = _size(mesh, axis, "fsdp")

    def divide(leaf: Any) -> NamedSharding:
        divides = [n for n, size in enumerate(leaf.shape) if size % count == 0]
        if not divides or leaf.size < small:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(divides, key=lambda n: leaf.shape[n])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, axis))

    return lambda tree: jax.tree.map(divide, tree)


def by_path(mesh: Mesh, rules: Mapping[str, PartitionSpec], otherwise: Layout | None = None) -> Layout:
    """Return a layout by the paths of leaves, such as `"params/mlp/kernel"`: tensor parallel training.

    The paths of an optimizer's leaves end with those of the parameters, so one rule serves both.

    Args:
        mesh: the devices.
        rules: by a regular expression that is searched for in the path, the partition of the leaves it matches.
            The first match wins. Leaves with fewer axes than the rule follow `otherwise`.
        otherwise: the layout of all other leaves; `replicated` by default.

    Raises:
        ValueError: a rule matches no leaf, or a leaf does not divide evenly.

    >>> layout = by_path(make_mesh(model=-1), {"mlp/kernel": PartitionSpec(None, "model")})
    >>> tuple(layout({"mlp": {"kernel": jax.ShapeDtypeStruct((4, 64), "float32")}})["mlp"]["kernel"].spec)
    (None, 'model')
    """
    rest = otherwise or replicated(mesh)

    def layout(tree: Any) -> Any:
        leaves, shardings = named_leaves(tree), jax.tree.leaves(rest(tree))
        used = set()
        for n, (path, leaf) in enumerate(leaves.items()):
            rule = next((rule for rule in rules if re.search(rule, path)), None)
            if rule is not None:
                used.add(rule)
                if len(leaf.shape) >= len(rules[rule]):
                    shardings[n] = NamedSharding(mesh, rules[rule])
                    _check_divides(mesh, rules[rule], leaf.shape, f"by_path: {path}")
        if unused := [rule for rule in rules if rule not in used]:
            raise ValueError(f"by_path: no leaf matches {unused}. The paths are {list(leaves)[:8]} ...")
        return jax.tree.unflatten(jax.tree.structure(tree), shardings)

    return layout


def create(make: Callable[..., Any], layout: Layout, *args: Any) -> Any:
    """Return the tree that `make(*args)` returns, computed directly in a layout.

    No device ever holds more than its part, and nothing is communicated.

    Args:
        make: a function that can be compiled.
        layout: `replicated(mesh)`, `fsdp(mesh)`, `by_path(mesh, rules)`, or your own function.
        args: the arguments of `make`, the same in all processes.

    >>> import jax.numpy as jnp
    >>> state = create(lambda: {"w": jnp.zeros((64, 3))}, fsdp(make_mesh(), small=1))
    >>> tuple(state["w"].sharding.spec)
    ('data',)
    """
    return jax.jit(make, out_shardings=layout(jax.eval_shape(make, *args)))(*args)


def _size(mesh: Mesh, axis: str, who: str) -> int:
    if axis not in mesh.axis_names:
        raise ValueError(f"{who} needs an axis of the mesh, got {axis!r}; it has {mesh.axis_names}.")
    return mesh.shape[axis]


def _check_divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], who: str) -> None:
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        count = math.prod(_size(mesh, axis, who) for axis in names)
        if size % count:
            raise ValueError(
                f"{who} has an axis of size {size}, which does not divide evenly over {count} devices ({axes!r})."
            )
