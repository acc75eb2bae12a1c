"""A run's directory: read its checkpoints, write new ones, lock it, and save or load a single pytree.

`<directory>/N` is always a complete checkpoint of step N: an Orbax checkpoint of one tree, which holds all trees by
name, with the host state and a manifest with checksums beside it. It is written under `.saving` and moved into place by
one rename. `archive/` holds checkpoints that were moved to make room for others.

| you want to | use |
|---|---|
| list, check or load the checkpoints of a run | `Checkpoints(directory)` |
| save checkpoints from your own callback or loop | `CheckpointWriter(directory)`, and `Lock(directory)` |
| check early that a pytree can be saved | `check_storable(tree)` |
| save or load one pytree, without a run | `save(directory, tree)`, `load(directory, like)` |

Orbax is imported when something is saved or loaded. With several processes, all call `save`, `load`, `wait` and
`close` on a shared file system; process 0 does the rest.
"""

from .checkpoints import Checkpoints
from .lock import Lock
from .orbax_trees import check_storable
from .trees import load, save
from .writer import CheckpointWriter

__all__ = ["CheckpointWriter", "Checkpoints", "Lock", "check_storable", "load", "save"]
