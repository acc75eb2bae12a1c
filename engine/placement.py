"""Where a run's arrays are: on one device, or divided over the devices of a mesh."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .checks import check_state
from .messages import warn_user
from .processes import SameShapes
from .trees import Batch, State, check_not_shared, named_leaves, signature, strip_weak_types

DATA_AXES = ("data", "fsdp")
"""Axes of a mesh over which batches are divided, if it has more than one axis."""


class SingleDevice:
    """One device: everything stays where JAX, or the caller, put it.

    Attributes:
        batches: the sharding of batches: None, because they are not divided.
        processes: 1.
        blocks_by_default: whether `steps_per_call="auto"` may run several steps in one call.
        context: returns a context in which to call what is compiled: an empty one.
    """

    batches: Any = None
    processes: int = 1
    blocks_by_default: bool = True
    context: Callable[[], Any] = nullcontext
    _devices: int = 1  # on which the state is

    def place(self, tree: Any, what: str, *, copy: bool = True, like: Any = None) -> Any:
        """Return the tree as arrays that are not shared with the caller, committed to their device.

        They are committed because restored arrays are, so a resumed run reuses the executable.

        Args:
            tree: arrays and numbers.
            what: its name, for errors.
            copy: False copies only leaves that must be converted or that occur twice.
            like: ignored here; see `DataSharding.place`.

        Raises:
            TypeError: a leaf is neither an array nor a number; the message names it.
        """
        device = device_of(tree)
        arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        self._devices = max((len(array.sharding.device_set) for array in arrays), default=1)

        def commit(array: jax.Array, _: Any) -> jax.Array:
            return array if array.committed or device is None else jax.device_put(array, device)

        return _own(tree, what, copy, commit, None)

    def place_carries(self, carries: Any) -> Any:
        """Return the first carries, which the compiled `init` has already put on the device of the state."""
        return carries

    def key(self, rng: Any) -> Any:
        """Return the run's random key."""
        return rng

    def scalar(self, value: int, state: State) -> jax.Array:
        """Return a counter, an int32 scalar on the device of the state."""
        return put_small(np.int32(value), device_of(state))

    def constant_sharding(self, bundle: Any) -> Any:
        """Return the sharding of the small constants of a call: the device of the run."""
        return device_of(bundle)

    def begin(self, source: str) -> None:
        """Begin to read a source of batches."""

    def place_batch(self, batch: Batch, *, ragged: bool = False) -> Batch:
        """Return a batch for a compiled call, unchanged: JAX transfers it faster itself."""
        if self._devices > 1 and all(_on_host(leaf) for leaf in jax.tree.leaves(batch)):
            warn_user(
                f"The state is on {self._devices} devices, but the engine has no mesh, so every device computes the "
                "whole batch. Divide the batches with Engine(..., mesh=mesh)."
            )
        return batch

    def prefetcher(self, bundle: Any) -> Callable[[Batch], Batch]:
        """Return a function that transfers a batch to the device of a run before it is used."""
        return functools.partial(jax.device_put, device=device_of(bundle))

    def layout(self, bundle: Any) -> Any:
        """Return what a compiled call depends on besides its function: nothing."""
        return None

    def pin(self, call: Any, function: Callable[..., Any], layout: Any, *, stacked: bool, jit: bool) -> Any:
        """Return the compiled call."""
        return call

    def compile_evaluation(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled evaluation step. JAX caches by function, so wrapping again is free."""
        if jit_is_disabled():  # then `jax.jit` would pass on arrays of numpy as they are
            return lambda state, batch, *key: step(state, jax.tree.map(jnp.asarray, batch), *key)
        return jax.jit(step)

    def rows(self, start: int, stop: int) -> Any:
        """Return which of the rows from `start` to `stop` this process reads: all of them."""
        return slice(start, stop)

    def divides(self, rows: int) -> bool:
        """Return whether every process can read its own part of this many rows."""
        return True

    def replicate(self, tree: Any) -> Any:
        """Replicate arrays that every process holds."""
        return tree


class DataSharding:
    """A mesh of devices: batches are divided over it, and the state keeps its sharding.

    Args:
        mesh: a mesh, whose batches are divided over its only axis or its axes "data" and "fsdp"; or the sharding
            of the batches; or a tree prefix of a batch with a sharding for each part.

    Attributes:
        batches: the sharding of batches, or a tree prefix of a batch with shardings.
        mesh: the mesh.
        replicated: the sharding of arrays that every device holds whole.
        processes: how many processes have devices in the mesh.
        axes: the axes of the mesh over which batches are divided.
        shards: the number of parts of a batch.
        own_shards: the indices of the parts that the devices of this process hold.
        context: returns a context for compiled calls: that of a mesh with Explicit axes, otherwise an empty one.
        blocks_by_default: whether `steps_per_call="auto"` may run several steps in one call.

    Raises:
        TypeError: `mesh` is neither a mesh nor a sharding nor a tree of shardings.
        ValueError: the mesh has no axis over which batches are divided, or shardings have different meshes.
    """

    blocks_by_default: bool = False  # not measured on many devices

    def __init__(self, mesh: Any):
        if isinstance(mesh, Mesh):
            axes = [axis for axis in mesh.axis_names if axis in DATA_AXES or len(mesh.axis_names) == 1]
            if not axes:
                raise ValueError(
                    f"mesh needs an axis 'data' over which batches are divided, got {mesh.axis_names}. "
                    "Or pass the sharding of the batches: mesh=NamedSharding(mesh, PartitionSpec('your axis'))."
                )
            mesh = NamedSharding(mesh, PartitionSpec(tuple(axes)))
        shardings = jax.tree.leaves(mesh)
        for sharding in shardings or [None]:
            if not isinstance(sharding, NamedSharding):
                raise TypeError(
                    f"mesh needs a jax.sharding.Mesh, a NamedSharding or a tree of them, got {type(sharding).__name__}."
                )
            if sharding.mesh != shardings[0].mesh:
                raise ValueError(f"mesh needs shardings over one mesh, got {sharding.mesh} and {shardings[0].mesh}.")
        self.batches: Any = mesh
        self.mesh: Any = shardings[0].mesh
        self.replicated: NamedSharding = NamedSharding(self.mesh, PartitionSpec())
        self.processes: int = len({device.process_index for device in self.mesh.devices.flat})
        self._splits: dict[tuple[str, ...], tuple[int, list[int]]] = {}
        self.axes: tuple[str, ...] = next((axes for sharding in shardings if (axes := _axes(sharding.spec))), ())
        self.shards: int
        self.own_shards: list[int]
        self.shards, self.own_shards = self._split(self.axes)
        explicit = any(kind == AxisType.Explicit for kind in getattr(self.mesh, "axis_types", None) or ())
        self.context: Callable[[], Any] = functools.partial(jax.set_mesh, self.mesh) if explicit else nullcontext
        self._same: SameShapes | None = None

    def place(self, tree: Any, what: str, *, copy: bool = True, like: Any = None) -> Any:
        """Return the tree as arrays that are not shared with the caller, on the devices of the mesh.

        A leaf on many devices keeps its sharding; a leaf on one device is replicated.

        Args:
            tree: arrays and numbers; with several processes, leaves on one device must be the same in all.
            what: its name, for errors.
            copy: False copies only leaves that must be converted or that occur twice.
            like: a tree of arrays; each leaf gets the sharding of its counterpart there.

        Raises:
            TypeError: a leaf is neither an array nor a number; the message names it.
            ValueError: a leaf is on devices outside the mesh.
        """
        return _own(tree, what, copy, self._settle, like)

    def place_carries(self, carries: Any) -> Any:
        """Return the first carries, on the devices of the mesh."""
        return self.place(carries, "A carry", copy=False)

    def _settle(self, array: jax.Array, sharding: Any = None) -> jax.Array:
        """Return an array of the state on the mesh, with the given sharding if that is on many devices."""
        sharding = sharding if sharding is not None and len(sharding.device_set) > 1 else None
        if len(array.sharding.device_set) > 1 or not array.is_fully_addressable:
            if array.sharding.device_set != set(self.mesh.devices.flat):
                raise ValueError(
                    f"The state needs to be on the mesh's {self.mesh.size} devices, got a leaf of shape {array.shape} "
                    f"on {len(array.sharding.device_set)} others. Create it with onstep.sharding.create."
                )
            return array if sharding in (None, array.sharding) else _reshard(array, sharding)
        return replicate(array, sharding or self.replicated)

    def key(self, rng: Any) -> Any:
        """Return the run's random key, replicated."""
        return None if rng is None else self._settle(rng)

    def scalar(self, value: int, state: State) -> jax.Array:
        """Return a counter, an int32 scalar on every device."""
        return put_small(np.int32(value), self.replicated)

    def constant_sharding(self, bundle: Any) -> Any:
        """Return the sharding of the small constants of a call: replicated."""
        return self.replicated

    def begin(self, source: str) -> None:
        """Begin to read a source of batches; from now on they must have the same shapes in all processes."""
        self._same = SameShapes(source) if self.processes > 1 else None

    def place_batch(self, batch: Batch, *, stacked: bool = False, ragged: bool = False) -> Batch:
        """Return a batch divided over the devices; arrays already on many devices are unchanged.

        Args:
            batch: the whole batch; with several processes, the part of this one.
            stacked: whether several batches are stacked along a first axis.
            ragged: True replicates a batch that does not divide evenly, in one process.

        Raises:
            ValueError: the batch does not divide evenly.
        """
        flat, structure = jax.tree.flatten(batch)
        moved = [n for n, leaf in enumerate(flat) if _on_host(leaf)]
        if not moved:
            return batch
        specs = self.specs(batch)
        where = [self.sharding(specs[n], flat[n].ndim, stacked) for n in moved]
        for i, n in enumerate(moved):
            if rows := self.uneven(specs[n], flat[n].shape, stacked):
                if not ragged or self.processes > 1:
                    raise self._indivisible(specs[n], repr(list(named_leaves(batch))[n]), rows)
                where[i] = self.replicated
        if self._same is not None:
            self._same.check(
                [(flat[n].shape, flat[n].dtype) for n in moved],
                lambda: ", ".join(f"{name}: {kind}" for name, kind in signature(batch).items()),
            )
        if self.processes == 1:
            new = jax.device_put([flat[n] for n in moved], where)
        else:
            new = [self._assemble(np.asarray(flat[n]), there, stacked) for n, there in zip(moved, where, strict=True)]
        for n, leaf in zip(moved, new, strict=True):
            flat[n] = leaf
        return jax.tree.unflatten(structure, flat)

    def prefetcher(self, bundle: Any) -> Callable[[Batch], Batch]:
        """Return a function that divides a batch over the devices before it is used."""
        return self.place_batch

    def layout(self, bundle: Any) -> Any:
        """Return the shardings of a bundle, which a compiled call keeps."""
        return jax.tree.map(lambda leaf: leaf.sharding, bundle)

    def pin(self, call: Any, function: Callable[..., Any], layout: Any, *, stacked: bool, jit: bool) -> Any:
        """Return a call that divides its batches and keeps the sharding of the bundle."""
        return ShardedCall(function if jit else call, self, layout, stacked, jit)

    def compile_evaluation(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled evaluation step, whose metrics are replicated. Call it inside `context()`."""
        return jax.jit(step, out_shardings=self.replicated)

    def rows(self, start: int, stop: int) -> Any:
        """Return which rows this process reads of a whole batch, the rows from `start` to `stop`.

        Raises:
            ValueError: they do not divide evenly over the devices.
        """
        if self.processes == 1:
            return slice(start, stop)
        if not self.divides(stop - start):
            raise self._indivisible(PartitionSpec(self.axes), "a batch", stop - start, self.shards)
        return np.arange(start, stop).reshape(self.shards, -1)[self.own_shards].ravel()

    def divides(self, rows: int) -> bool:
        """Return whether every process can read its own part of this many rows."""
        return self.processes == 1 or rows % self.shards == 0

    def replicate(self, tree: Any) -> Any:
        """Replicate arrays that every process holds."""
        return jax.tree.map(lambda leaf: replicate(jnp.asarray(leaf), self.replicated), tree)

    def specs(self, batch: Batch) -> list[PartitionSpec]:
        """Return how each leaf of a batch is divided.

        Raises:
            ValueError: the shardings are not a tree prefix of the batch.
        """
        if isinstance(self.batches, NamedSharding):
            return [self.batches.spec] * len(jax.tree.leaves(batch))
        try:
            tree = jax.tree.map(lambda there, part: jax.tree.map(lambda _: there, part), self.batches, batch)
        except ValueError as error:
            raise ValueError(
                f"mesh needs shardings for a batch with the leaves {list(named_leaves(batch))}, got them for "
                f"{list(named_leaves(self.batches))}: one for each, or one for all below a path."
            ) from error
        return [there.spec for there in jax.tree.leaves(tree)]

    def uneven(self, spec: PartitionSpec, shape: tuple[int, ...], stacked: bool) -> int:
        """Return the number of rows of a leaf if it does not divide evenly over this process's devices, else 0."""
        rows = shape[int(stacked)] if len(shape) > int(stacked) else 0
        return rows if rows % len(self._split(_axes(spec))[1]) else 0

    def sharding(self, spec: PartitionSpec, ndim: int, stacked: bool) -> NamedSharding:
        """Return the sharding of a leaf of a batch, or of several batches that are stacked."""
        return NamedSharding(self.mesh, PartitionSpec(*((None,) * stacked + tuple(spec))[:ndim]))

    def _split(self, axes: tuple[str, ...]) -> tuple[int, list[int]]:
        """Return the number of parts along axes of the mesh, and the indices of those of this process."""
        if axes not in self._splits:
            count = math.prod(self.mesh.shape[axis] for axis in axes)
            along = NamedSharding(self.mesh, PartitionSpec(axes or None))
            indices = along.addressable_devices_indices_map((count,)).values()
            self._splits[axes] = count, sorted({index[0].start or 0 for index in indices if index})
        return self._splits[axes]

    def _indivisible(self, spec: PartitionSpec, name: str, rows: int, parts: int | None = None) -> ValueError:
        axes = _axes(spec)
        return ValueError(
            f"A batch needs to divide into {parts or len(self._split(axes)[1])} parts along the mesh's axes {axes} "
            f"({self.mesh.size} devices), got {name} with {rows} examples. Change the batch size, drop the last short "
            "batch, or pad it."
        )

    def _assemble(self, part: np.ndarray, where: NamedSharding, stacked: bool) -> jax.Array:
        """Return a global array from the part of this process."""
        shape = list(part.shape)
        if part.ndim > int(stacked):
            count, own = self._split(_axes(where.spec[int(stacked) :]))
            shape[int(stacked)] = shape[int(stacked)] // len(own) * count
        return jax.make_array_from_process_local_data(where, part, tuple(shape))


def jit_is_disabled() -> bool:
    """Return whether JAX runs everything uncompiled now, because of `JAX_DISABLE_JIT` or `jax.disable_jit()`."""
    config: Any = jax.config  # its attributes have no types
    return config.jax_disable_jit


Placement = SingleDevice | DataSharding


def make_placement(mesh: Any) -> Placement:
    """Return the placement for an engine's or an evaluation's `mesh` argument."""
    return SingleDevice() if mesh is None else DataSharding(mesh)


class ShardedCall:
    """A compiled call `(bundle, batch, rng, due) -> (bundle, metrics)` on many devices.

    The bundle keeps its sharding, whatever XLA would prefer, and metrics are replicated.
    Batches of numpy arrays go into the call directly, which is faster than a `device_put` before it.

    Args:
        function: the call, not compiled yet unless `jit` is False.
        sharding: how batches are divided.
        layout: the shardings of the bundle.
        stacked: whether each call takes several batches, stacked.
        jit: whether to compile it.
    """

    def __init__(self, function: Callable[..., Any], sharding: DataSharding, layout: Any, stacked: bool, jit: bool):
        self._function, self._sharding, self._layout = function, sharding, layout
        self._stacked, self._jit = stacked, jit
        self._calls: dict[Any, Any] = {}
        if jit:
            self.trace: Any = self._trace

    def __call__(self, bundle: Any, batch: Batch, rng: Any, due: Any) -> Any:
        """Run the call with a batch on the host or on the devices."""
        call, batch = self._prepare(batch)
        if self._sharding.context is nullcontext:
            return call(bundle, batch, rng, due)
        with self._sharding.context():
            return call(bundle, batch, rng, due)

    def _trace(self, bundle: Any, batch: Batch, *rest: Any) -> Any:
        call, batch = self._prepare(batch)
        with self._sharding.context():
            return call.trace(bundle, batch, *rest)

    def _prepare(self, batch: Batch) -> tuple[Any, Batch]:
        """Return the call for a batch, and the batch in the form that the call takes."""
        flat, structure = jax.tree.flatten(batch)
        sharding, kinds = self._sharding, None
        direct = self._jit and sharding.processes == 1 and all(type(leaf) is np.ndarray for leaf in flat)
        specs = sharding.specs(batch) if direct else []
        pairs = zip(specs, flat, strict=True) if direct else ()
        if direct and not any(sharding.uneven(spec, leaf.shape, self._stacked) for spec, leaf in pairs):
            kinds = (structure, *(leaf.ndim for leaf in flat))
        else:
            batch = sharding.place_batch(batch, stacked=self._stacked)
        if kinds not in self._calls:
            where = None
            if kinds is not None:
                pairs = zip(specs, flat, strict=True)
                where = jax.tree.unflatten(structure, [sharding.sharding(s, x.ndim, self._stacked) for s, x in pairs])
            self._calls[kinds] = self._compile(where) if self._jit else self._function
        return self._calls[kinds], batch

    def _compile(self, where: Any) -> Any:
        inputs: dict[str, Any] = {} if where is None else {"in_shardings": (self._layout, where, None, None)}
        outputs = (self._layout, self._sharding.replicated)
        return jax.jit(self._function, donate_argnums=0, out_shardings=outputs, **inputs)


def _own(tree: Any, what: str, copy: bool, settle: Callable[[jax.Array, Any], jax.Array], like: Any) -> Any:
    """Return a tree of arrays not shared with the caller, each placed by `settle(array, sharding in like)`."""
    check_state(tree, what)
    check_not_shared(tree, what)
    flat, structure = jax.tree.flatten(tree)
    shardings = [None] * len(flat) if like is None else [leaf.sharding for leaf in jax.tree.leaves(like)]
    seen: set[int] = set()
    out = []
    for leaf, sharding in zip(flat, shardings, strict=True):
        owned = not copy and isinstance(leaf, jax.Array) and id(leaf) not in seen
        seen.add(id(leaf))
        # An explicit transfer, because `jax.transfer_guard` may forbid implicit ones.
        array = leaf if isinstance(leaf, jax.Array) else jax.device_put(leaf)
        out.append(settle(strip_weak_types(array if owned else jnp.copy(array)), sharding))
    return jax.tree.unflatten(structure, out)


def device_of(tree: Any) -> jax.sharding.Sharding | None:
    """Return the device that a tree is committed to: None for several devices, the default device for none."""
    committed = {x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.committed}
    if any(len(sharding.device_set) > 1 for sharding in committed):
        return None
    return next(iter(committed), None) or jax.device_put(np.int32(0)).sharding


def replicate(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return an array that each process holds as one global array."""
    if len({device.process_index for device in sharding.device_set}) == 1:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = replicate(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = read(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """Return a random key folded with a number, like `jax.random.fold_in`, with an explicit transfer of the number.

    Use it between steps, so that a run works under `jax.transfer_guard("disallow")`.

    >>> key = jax.random.key(0)
    >>> with jax.transfer_guard("disallow"):
    ...     key = fold_in(key, 3)
    >>> bool(key == jax.random.fold_in(jax.random.key(0), 3))
    True
    """
    return jax.random.fold_in(key, put_small(np.uint32(number), key.sharding))


def read(array: Any) -> np.ndarray:
    """Return an array as a numpy array, in a read that `jax.transfer_guard` permits.

    Not `jax.device_get`: with several processes of which one has failed, it kept the others from ending.
    """
    with jax.transfer_guard_device_to_host("allow"):
        return np.asarray(array)


def put_small(value: Any, sharding: Any) -> jax.Array:
    """Return a numpy scalar or array on a device, or whole on every device, by an explicit transfer.

    With several processes, `jax.device_put` would compare the value over all of them, by a collective that a failing
    process leaves the others waiting in.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: Any) -> np.ndarray:
    """Return an array as a numpy array, waiting for the device.

    If this process holds only a part of it, all processes must call this.

    >>> to_host(jnp.arange(3)).tolist()
    [0, 1, 2]
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        there: Any = array.sharding
        array = _reshard(array, NamedSharding(there.mesh, PartitionSpec()))
    return read(array)


def replicated_checksums(tree: Any) -> dict[str, int]:
    """Return, by path, checksums of the fully replicated leaves. One leaf at a time is copied to the host."""

    def checksum(leaf: jax.Array) -> int:
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return zlib.crc32(np.ascontiguousarray(read(data.addressable_data(0))).view(np.uint8).data)

    return {name: checksum(leaf) for name, leaf in named_leaves(tree).items() if leaf.is_fully_replicated}


def _reshard(array: jax.Array, sharding: Any) -> jax.Array:
    return jax.jit(_identity, out_shardings=sharding)(array)


def _identity(x: Any) -> Any:
    return x


def _axes(spec: Any) -> tuple[str, ...]:
    """Return the axes of the mesh over which the leading axis of an array is divided."""
    first = spec[0] if len(spec) else None
    return (first,) if isinstance(first, str) else tuple(first or ())


def _on_host(leaf: Any) -> bool:
    """Return whether a leaf is an array that is not yet on several devices."""
    if isinstance(leaf, jax.Array):
        return len(leaf.sharding.device_set) == 1 and leaf.is_fully_addressable
    return isinstance(leaf, (np.ndarray, np.generic))
