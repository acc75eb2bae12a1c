"""The loop as a `for` of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .loop import Loop
from .result import Result


class Steps:
    """The loop as a `for` of one's own: a turn at each due point.

    Leaving the `with` early, by `break` say, is a stop that can be resumed; an error raised in
    it ends the run like one of a callback.

    Attributes:
        result: the Result, once the `with` is left.

    >>> import jax.numpy as jnp
    >>> from onstep import Engine
    >>> engine = Engine(lambda state, batch: (state + batch, {}))
    >>> with engine.steps(jnp.int32(0), range(5), epochs=1, when=2) as steps:
    ...     print([int(loop.state) for loop in steps])
    [1, 6]
    """

    def __init__(self, loop: Loop, turns: Iterator[Loop]):
        self._loop, self._turns, self._open = loop, turns, False
        self.result: Result | None = None

    def __enter__(self) -> Steps:
        self._open = True
        return self

    def __iter__(self) -> Iterator[Loop]:
        if not self._open:
            raise RuntimeError("engine.steps needs a with: `with engine.steps(...) as steps: for loop in steps: ...`.")
        return self._turns

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._open = False
        if error is not None:
            try:
                self._turns.throw(error)  # type: ignore[attr-defined]
            except BaseException as raised:
                if raised is not error:
                    raise
            return
        if not self._loop.over:
            self._loop.stop("the for was left early", final=False)
        for _ in self._turns:
            pass
        self.result = self._loop._result()
