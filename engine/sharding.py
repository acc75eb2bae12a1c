"""Many devices: meshes, where a state's arrays lie, and how batches are spread.

A layout is a function `tree -> tree of shardings`, for arrays or for what `jax.eval_shape` gives:
`replicated`, `fsdp`, `by_path`. `create` makes a state that never lies anywhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .trees import Batch, leaves

DATA_AXES = ("data", "fsdp")
"""Axes of a mesh along which batches are cut, where there is more than one axis."""
SMALL = 2**14
"""Elements of a leaf that `fsdp` leaves whole: to gather it costs more than to keep it."""

Layout = Callable[[Any], Any]
"""`tree -> tree of shardings`."""


def make_mesh(**axes: int) -> Mesh:
    """A mesh of all devices of all processes: `make_mesh(data=-1, model=2)`.

    Its axes are of the type Auto: XLA cuts the computation, and ordinary model code runs unchanged.

    Args:
        axes: devices along each axis by name, in order; one may be -1, the rest. Without any: `data=-1`.

    Raises:
        ValueError: the sizes do not make up the number of devices.
    """
    axes = axes or {"data": -1}
    devices, sizes = jax.device_count(), list(axes.values())
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or devices % known or (-1 not in sizes and known != devices):
        raise ValueError(f"make_mesh needs axes that make up {devices} devices, got {axes}. One of them may be -1.")
    shape = tuple(devices // known if size == -1 else size for size in sizes)
    return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> Layout:
    """Every leaf whole on every device: data parallel."""
    return lambda tree: jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), tree)


def fsdp(mesh: Mesh, axis: str | None = None, *, small: int = SMALL) -> Layout:
    """Every leaf cut along its largest axis that divides; so parameters and optimizer state take
    1 / devices of the memory of each. Leaves that do not divide stay whole.

    Args:
        mesh: the devices.
        axis: of the mesh; by default "fsdp", or "data" where there is none.
        small: leaves of fewer elements stay whole.
    """
    axis = axis or ("fsdp" if "fsdp" in mesh.axis_names else "data")
    count = _size(mesh, axis, "fsdp")

    def cut(leaf: Any) -> NamedSharding:
        divides = [n for n, size in enumerate(leaf.shape) if size % count == 0]
        if not divides or leaf.size < small:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(divides, key=lambda n: leaf.shape[n])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, axis))

    return lambda tree: jax.tree.map(cut, tree)


def by_path(mesh: Mesh, rules: Mapping[str, PartitionSpec], otherwise: Layout | None = None) -> Layout:
    """Leaves by their paths, such as `"params/mlp/kernel"`: tensor parallel.

    An optimizer's leaves hold the parameters' paths at their end, so one rule serves both.

    Args:
        mesh: the devices.
        rules: by a regular expression that is searched for in the path, where its leaves lie; the
            first that is found holds. Leaves with fewer axes than the rule stay with `otherwise`.
        otherwise: the layout of all others; `replicated` without.

    Raises:
        ValueError: a rule that fits no leaf, or a leaf that does not divide.
    """
    rest = otherwise or replicated(mesh)

    def layout(tree: Any) -> Any:
        named, found = leaves(tree), jax.tree.leaves(rest(tree))
        used = set()
        for n, (path, leaf) in enumerate(named.items()):
            rule = next((rule for rule in rules if re.search(rule, path)), None)
            if rule is not None:
                used.add(rule)
                if len(leaf.shape) >= len(rules[rule]):
                    found[n] = NamedSharding(mesh, rules[rule])
                    _divides(mesh, rules[rule], leaf.shape, f"by_path: {path}")
        if unused := [rule for rule in rules if rule not in used]:
            raise ValueError(f"by_path: no leaf fits {unused}. The paths are {list(named)[:8]} ...")
        return jax.tree.unflatten(jax.tree.structure(tree), found)

    return layout


def create(make: Callable[..., Any], layout: Layout, *args: Any) -> Any:
    """The tree that `make(*args)` returns, computed where it shall lie: no device ever holds more
    than its part, and no process sends anything.

    Args:
        make: a function that can be compiled.
        layout: `replicated(mesh)`, `fsdp(mesh)`, `by_path(mesh, rules)`, or one of your own.
        args: of `make`, the same in all processes.
    """
    return jax.jit(make, out_shardings=layout(jax.eval_shape(make, *args)))(*args)


class Spread:
    """How a run's arrays lie on the devices of a mesh.

    Args:
        mesh: a mesh, whose batches are cut along its only axis, or its axes "data" and "fsdp"; or
            the sharding of the batches, which says so itself.

    Attributes:
        whole: the sharding of what every device has.
        shards: parts of a batch's leading axis.
        mine: the numbers of those that this process's devices hold.

    Raises:
        TypeError: neither.
        ValueError: a mesh with Explicit axes, or none that batches are cut along.
    """

    def __init__(self, mesh: Mesh | NamedSharding):
        if isinstance(mesh, Mesh):
            axes = [axis for axis in mesh.axis_names if axis in DATA_AXES or len(mesh.axis_names) == 1]
            if not axes:
                raise ValueError(
                    f"mesh needs an axis 'data' along which batches are cut, got {mesh.axis_names}. "
                    "Or give the batches' sharding: mesh=NamedSharding(mesh, PartitionSpec('your axis'))."
                )
            mesh = NamedSharding(mesh, PartitionSpec(tuple(axes)))
        elif not isinstance(mesh, NamedSharding):
            raise TypeError(f"mesh needs a jax.sharding.Mesh or a NamedSharding, got {type(mesh).__name__}.")
        if any(kind != AxisType.Auto for kind in getattr(mesh.mesh, "axis_types", None) or ()):
            raise ValueError(
                f"mesh needs axes of the type Auto, got {mesh.mesh.axis_types}: jax.make_mesh makes Explicit ones. "
                "Use onstep.sharding.make_mesh, or axis_types=(AxisType.Auto,) * number of axes."
            )
        self.batches: NamedSharding = mesh
        self.mesh: Any = mesh.mesh
        self.whole: NamedSharding = NamedSharding(self.mesh, PartitionSpec())
        self.processes: int = len({device.process_index for device in self.mesh.devices.flat})
        first = mesh.spec[0] if mesh.spec else None
        self.axes: tuple[str, ...] = (first,) if isinstance(first, str) else tuple(first or ())
        self.shards: int = math.prod(self.mesh.shape[axis] for axis in self.axes)
        along = NamedSharding(self.mesh, PartitionSpec(self.axes or None))
        parts = along.addressable_devices_indices_map((self.shards,))
        self.mine: list[int] = sorted({index[0].start or 0 for index in parts.values() if index})

    def put(self, batch: Batch, *, stacked: bool = False, ragged: bool = False) -> Batch:
        """A batch on the devices, each with its part; arrays that are on many devices stay as they are.

        Args:
            batch: the whole batch; of several processes the part of this one.
            stacked: whether several batches are stacked along a first axis.
            ragged: True keeps a batch that does not divide whole on every device, in one process.

        Raises:
            ValueError: it does not divide.
        """
        flat, structure = jax.tree.flatten(batch)
        moved = [n for n, leaf in enumerate(flat) if _on_host(leaf)]
        if stacked:  # arrays that were on the devices before lie somehow now
            flat = [self._moved(x) if isinstance(x, jax.Array) and n not in moved else x for n, x in enumerate(flat)]
        if not moved:
            return jax.tree.unflatten(structure, flat)
        where = [self.sharding(flat[n].ndim, stacked) for n in moved]
        for i, n in enumerate(moved):
            if rows := self.uneven(flat[n].shape, stacked):
                if not ragged or self.processes > 1:
                    raise self._indivisible(len(self.mine), repr(list(leaves(batch))[n]), rows)
                where[i] = self.whole
        if self.processes == 1:
            new = jax.device_put([flat[n] for n in moved], where)
        else:
            new = [self._assemble(np.asarray(flat[n]), there, stacked) for n, there in zip(moved, where, strict=True)]
        for n, leaf in zip(moved, new, strict=True):
            flat[n] = leaf
        return jax.tree.unflatten(structure, flat)

    def part(self, rows: np.ndarray) -> np.ndarray:
        """Of the rows of a whole batch those that this process feeds."""
        if len(rows) % self.shards:
            raise self._indivisible(self.shards, "one", len(rows))
        return rows.reshape(self.shards, -1)[self.mine].ravel()

    def replicate(self, tree: Any) -> Any:
        """Arrays that every process has, whole on every device."""
        return jax.tree.map(lambda leaf: everywhere(jnp.asarray(leaf), self.whole), tree)

    def _indivisible(self, parts: int, name: str, rows: int) -> ValueError:
        return ValueError(
            f"A batch needs to divide among {parts} parts along the mesh's axes {self.axes} ({self.mesh.size} "
            f"devices), got {name} with {rows} examples. Change the batch size, drop the last short batch, or pad it."
        )

    def uneven(self, shape: tuple[int, ...], stacked: bool) -> int:
        """The examples of a leaf whose number does not divide among this process's parts, else 0."""
        rows = shape[int(stacked)] if len(shape) > int(stacked) else 0
        return rows if rows % len(self.mine) else 0

    def sharding(self, ndim: int, stacked: bool) -> NamedSharding:
        """Where a leaf of a batch lies, or of several that are stacked."""
        spec = (None,) * stacked + tuple(self.batches.spec)
        return NamedSharding(self.mesh, PartitionSpec(*spec[:ndim]))

    def _moved(self, array: jax.Array) -> jax.Array:
        there = self.sharding(array.ndim, True)
        return array if array.sharding == there else jax.jit(_same, out_shardings=there)(array)

    def _assemble(self, part: np.ndarray, where: NamedSharding, stacked: bool) -> jax.Array:
        shape = list(part.shape)
        if part.ndim > int(stacked):
            shape[int(stacked)] = shape[int(stacked)] // len(self.mine) * self.shards
        return jax.make_array_from_process_local_data(where, part, tuple(shape))

    def settle(self, array: jax.Array, there: Any = None) -> jax.Array:
        """An array of the state: as it lies if it is on the mesh already, else whole on every device.

        Args:
            array: the same in all processes, if it is on one device alone.
            there: a sharding on the mesh to lie in instead.

        Raises:
            ValueError: it lies on other devices.
        """
        there = there if there is not None and len(there.device_set) > 1 else None
        if len(array.sharding.device_set) > 1 or not array.is_fully_addressable:
            if array.sharding.device_set != set(self.mesh.devices.flat):
                raise ValueError(
                    f"The state needs to lie on the mesh's {self.mesh.size} devices, got a leaf of shape {array.shape} "
                    f"on {len(array.sharding.device_set)} others. Make it with onstep.sharding.create."
                )
            return array if there in (None, array.sharding) else jax.jit(_same, out_shardings=there)(array)
        return everywhere(array, there or self.whole)


class Spreading:
    """A compiled call `(bundle, batch, rng, due) -> (bundle, metrics)` on many devices.

    What it gives back lies as what it took, whatever XLA would choose, and metrics are whole. Batches of
    numpy arrays go into the call as they are, which is quicker than to put them on the devices first.

    Args:
        function: the call, not compiled yet unless `jit` is False.
        spread: over the devices.
        layout: of the bundle.
        stacked: whether a batch is several that are stacked.
        jit: whether to compile it.
    """

    def __init__(self, function: Callable[..., Any], spread: Spread, layout: Any, stacked: bool, jit: bool):
        self._function, self._spread, self._layout, self._stacked, self._jit = function, spread, layout, stacked, jit
        self._calls: dict[Any, Any] = {}
        if jit:
            self.trace: Any = self._traced

    def __call__(self, bundle: Any, batch: Batch, rng: Any, due: Any) -> Any:
        """Calls it with a batch that lies anywhere."""
        call, batch = self._ready(batch)
        return call(bundle, batch, rng, due)

    def _traced(self, bundle: Any, batch: Batch, *rest: Any) -> Any:
        call, batch = self._ready(batch)
        return call.trace(bundle, batch, *rest)

    def _ready(self, batch: Batch) -> tuple[Any, Batch]:
        """The call for a batch, and the batch as that takes it."""
        flat, structure = jax.tree.flatten(batch)
        spread, kinds = self._spread, None
        as_it_is = self._jit and spread.processes == 1 and all(type(leaf) is np.ndarray for leaf in flat)
        if as_it_is and not any(spread.uneven(leaf.shape, self._stacked) for leaf in flat):
            kinds = (structure, *(leaf.ndim for leaf in flat))
        else:
            batch = spread.put(batch, stacked=self._stacked)
        if kinds not in self._calls:
            where = None
            if kinds is not None:
                where = jax.tree.unflatten(structure, [spread.sharding(leaf.ndim, self._stacked) for leaf in flat])
            self._calls[kinds] = self._function if not self._jit else self._compiled(where)
        return self._calls[kinds], batch

    def _compiled(self, where: Any) -> Any:
        there: dict[str, Any] = {} if where is None else {"in_shardings": (self._layout, where, None, None)}
        return jax.jit(self._function, donate_argnums=0, out_shardings=(self._layout, self._spread.whole), **there)


def everywhere(array: jax.Array, there: NamedSharding) -> jax.Array:
    """An array that each process has, as one array on the devices of all."""
    if len({device.process_index for device in there.device_set}) == 1:
        return jax.device_put(array, there)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(everywhere(jax.random.key_data(array), there), impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, there, lambda index: host[index])


def to_host(array: Any) -> np.ndarray:
    """An array on the host, also one of which this process has a part alone; then all processes must call it."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        there: Any = array.sharding
        array = jax.jit(_same, out_shardings=NamedSharding(there.mesh, PartitionSpec()))(array)
    return np.asarray(array)


def _same(x: Any) -> Any:
    return x


def _on_host(leaf: Any) -> bool:
    """Whether a leaf is an array that is not yet on several devices."""
    if isinstance(leaf, jax.Array):
        return len(leaf.sharding.device_set) == 1 and leaf.is_fully_addressable
    return isinstance(leaf, (np.ndarray, np.generic))


def _size(mesh: Mesh, axis: str, who: str) -> int:
    if axis not in mesh.axis_names:
        raise ValueError(f"{who} needs an axis of the mesh, got {axis!r}; it has {mesh.axis_names}.")
    return mesh.shape[axis]


def _divides(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], who: str) -> None:
    for size, axes in zip(shape, spec, strict=False):
        named = (axes,) if isinstance(axes, str) else axes or ()
        count = math.prod(_size(mesh, axis, who) for axis in named)
        if size % count:
            raise ValueError(f"{who} has an axis of {size}, which does not divide among {count} devices ({axes!r}).")
