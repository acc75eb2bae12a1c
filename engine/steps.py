"""Steps: iterate over a run yourself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cadence import Cadence
from .events import note_kept
from .loop import Loop
from .result import Result


class Steps:
    """Iterate over a run yourself: `for loop in steps`, once whenever `when` is due. Made by `engine.steps`.

    Leaving the `with` early, by `break` for example, stops the run so that it can be resumed. An error raised inside
    it ends the run like an error in a callback.

    Attributes:
        result: the Result, once the `with` has ended.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> with engine.steps(jnp.int32(0), range(5), epochs=1, when=2) as steps:
    ...     print([int(loop.state) for loop in steps])
    [1, 6]
    >>> int(steps.result.state)
    10
    """

    def __init__(self, loop: Loop, when: Cadence):
        self._loop, self._iterator, self._open = loop, loop.iterate(when), False
        self.result: Result | None = None

    def __enter__(self) -> Steps:
        self._open = True
        return self

    def __iter__(self) -> Iterator[Loop]:
        if not self._open:
            raise RuntimeError("engine.steps needs a with: with engine.steps(...) as steps: for loop in steps: ...")
        return self._iterator

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._open = False
        if error is not None:
            try:
                note_kept(error)
                self._iterator.throw(error)  # type: ignore[attr-defined]
            except BaseException as raised:
                if raised is not error:
                    raise
            return
        if not self._loop.over:
            self._loop.stop("the for loop was left early", final=False)
        for _ in self._iterator:
            pass
        self.result = self._loop.result()
