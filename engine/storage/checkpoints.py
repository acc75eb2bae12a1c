"""Read-only access to the checkpoints of a run."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..checks import check_mode, local_path
from ..records import improves
from .files import names_in
from .manifest import MANIFEST, NewerFormatError, find_damage, read_manifest
from .orbax_trees import METADATA, read_arrays, restore

HOST = "host.npz"


def host_name(process: int) -> str:
    """Return the name of the file with the host state of a process."""
    return HOST if process == 0 else f"host.{process}.npz"


class Checkpoints:
    """The checkpoints in a run's directory, for listing, checking and loading. Nothing is locked, written or moved.

    Use it in scripts and notebooks, also during the run; a checkpoint appears once it is complete.
    `loop.checkpoints` lists those of a run's `Checkpoint` callbacks.

    Args:
        directory: the directory of the run, which need not exist.
        best: the metric of `best_step`; None for the metric that the newest checkpoint was saved with.
        mode: whether `"min"` or `"max"` of that metric is best.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from onstep.storage import CheckpointWriter
    >>> directory = tempfile.TemporaryDirectory()
    >>> with contextlib.closing(CheckpointWriter(directory.name)) as writer:
    ...     writer.save(10, {"state": jnp.int32(45)})
    ...     writer.save(20, {"state": jnp.int32(190)})
    >>> checkpoints = Checkpoints(directory.name)
    >>> checkpoints.steps()
    [10, 20]
    >>> checkpoints.damage(20) is None
    True
    >>> int(checkpoints.load(20, {"state": jnp.int32(0)})["state"])
    190
    >>> directory.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], *, best: str | None = None, mode: str = "min"):
        check_mode("Checkpoints", mode)
        self.directory: str = local_path("Checkpoints", directory)
        self.best: str | None = best
        self.mode: str = mode

    def __repr__(self) -> str:
        by = "" if self.best is None else f", best={self.best!r}, mode={self.mode!r}"
        return f"Checkpoints({self.directory!r}{by})"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, damaged ones included, in ascending order. Links do not count."""
        steps = [int(name) for name in names_in(self.directory) if re.fullmatch(r"0|[1-9]\d*", name)]
        # What Orbax writes identifies a checkpoint whose manifest is lost; version 0.1 left the second name.
        markers = {MANIFEST, METADATA, "_CHECKPOINT_METADATA"}
        return sorted(n for n in steps if not os.path.islink(self.path(n)) and markers & names_in(self.path(n)))

    def path(self, *parts: int | str) -> str:
        """Return a path in the directory: `path(20)` is the checkpoint of step 20."""
        return os.path.join(self.directory, *map(str, parts))

    def best_step(self) -> int | None:
        """Return the step with the best value of the metric, or None if there is none. The earliest wins a tie."""
        manifests = {}
        for step in self.steps():
            with contextlib.suppress(OSError, ValueError):  # a damaged manifest is ignored
                manifests[step] = self.manifest(step)
        used = [manifest["best"] for manifest in manifests.values() if manifest.get("best")]
        metric, mode = (self.best, self.mode) if self.best or not used else used[-1]
        best_step, best_value = None, None
        for step, manifest in manifests.items():
            value = manifest["metrics"].get(metric)
            if value is not None and improves(value, best_value, mode=mode):
                best_step, best_value = step, value
        return best_step

    def manifest(self, step: int) -> dict[str, Any]:
        """Return what was recorded about a checkpoint at commit.

        Returns:
            `run` (an id), `step`, `best` (None, or metric and mode), `metrics` (by name, the values recorded at this
            step), `files` (by name, size in bytes and CRC-32) and `config` (how the run was configured, if the writer
            was told).

        Raises:
            OSError: the manifest cannot be read.
            ValueError: it is damaged, or belongs to another step.
        """
        manifest = read_manifest(self.path(step))
        if manifest["step"] != step:
            raise ValueError(f"it belongs to step {manifest['step']}")
        return manifest

    def damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, None if it is intact.

        Raises:
            ValueError: a newer version of onstep wrote it in another format.
        """
        try:
            return find_damage(self.path(step), self.manifest(step)["files"])
        except NewerFormatError:
            raise
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (OSError, ValueError) as error:
            return f"{MANIFEST} is damaged ({error})"

    def load(self, step: int, likes: dict[str, Any] | None = None, *, partial: bool = False) -> dict[str, Any]:
        """Load trees of a checkpoint by name. All processes must call it. Checksums are not verified; see `damage`.

        Args:
            step: the step of the checkpoint.
            likes: by name, a tree of the same structure, shapes and dtypes, of arrays or `jax.ShapeDtypeStruct`;
                None instead of a tree loads nested dicts, and None instead of `likes` loads all trees. Arrays that say
                no placement get the saved one. That is the default device for small trees on one device, and where the
                saved devices do not exist. A run saves the trees `"state"` and `"carries"`.
            partial: True allows the checkpoint to hold more than `likes`.

        Raises:
            ValueError: a tree has another structure or other shapes.
        """
        return restore(self.path(step), likes, partial=partial)

    def arrays(self, step: int, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield arrays of a checkpoint one by one, so that it need not fit into memory. Random keys come as their data.

        Args:
            step: the step of the checkpoint.
            names: the paths of the arrays, such as `"state/params/w"`, in the order in which they are yielded.

        Raises:
            KeyError: the checkpoint has no array of that name. Arrays of size 0 are not stored.

        >>> import tempfile
        >>> from onstep.storage import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory, {"w": np.arange(3), "b": np.float32(0.5)}, step=7)
        ...     for name, array in Checkpoints(directory).arrays(7, ["state/w", "state/b"]):
        ...         print(name, array.tolist())
        state/w [0, 1, 2]
        state/b 0.5
        """
        for tree, inside in itertools.groupby(names, lambda name: name.partition("/")[0]):
            yield from read_arrays(self.path(step), tree, list(inside))

    def host(self, step: int) -> bytes:
        """Return the bytes saved with the trees: this process's own if the number of processes is the same."""
        names = [host_name(process) for process in range(jax.process_count())]
        present = names_in(self.path(step))
        as_many = set(names) <= present and host_name(len(names)) not in present
        with open(self.path(step, names[jax.process_index()] if as_many else HOST), "rb") as file:
            return file.read()
