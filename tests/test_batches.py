"""Batches of arrays in memory: their order, their sizes, and resuming in the middle of an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Batches, Engine
from onstep.data.stacking import aligned_empty


def served(batches, epoch=0):
    """Return the examples of an epoch, batch by batch."""
    return [batch.tolist() for batch in batches(epoch)]


def examples(batches, epoch):
    return [example for batch in served(batches, epoch) for example in batch]


def mean_step(state, batch):
    return state + batch.sum(), {"mean": batch.mean()}


def test_order_depends_only_on_seed_and_epoch():
    first = served(Batches(np.arange(40), 4, seed=7), epoch=3)
    batches = Batches(np.arange(40), 4, seed=7)
    served(batches, epoch=0)
    next(iter(batches))
    assert served(batches, epoch=3) == first
    assert served(Batches(np.arange(40), 4, seed=8), epoch=3) != first


def test_epochs_differ_and_each_has_every_example_once():
    batches = Batches(np.arange(40), 4)
    epochs = [examples(batches, epoch) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_iterating_yields_the_first_epoch():
    batches = Batches(np.arange(12), 4)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in batches] == served(batches, 0)


def test_run_reads_another_order_every_epoch():
    seen = []
    batches = Batches(np.arange(12), 4)
    engine = Engine(mean_step)

    @engine.on("step_end")
    def note(loop):
        seen.append(loop.batch.tolist())

    engine.run(jnp.int32(0), batches, epochs=2)
    assert seen == served(batches, 0) + served(batches, 1)


def test_without_shuffle_every_epoch_keeps_the_order_of_the_arrays():
    batches = Batches(np.arange(6), 2, shuffle=False)
    assert served(batches, 0) == served(batches, 5) == [[0, 1], [2, 3], [4, 5]]


def test_leaves_of_a_tree_stay_aligned():
    arrays = {"x": np.arange(10), "y": (np.arange(10) * 10, jnp.arange(20).reshape(10, 2))}
    for batch in Batches(arrays, 3):
        assert (batch["y"][0] == batch["x"] * 10).all()
        assert (batch["y"][1][:, 0] == batch["x"] * 2).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_keep_shape_and_dtype_of_the_arrays(shuffle):
    (batch,) = Batches({"x": np.ones((4, 2, 3), np.float16)}, 4, shuffle=shuffle)
    assert (batch["x"].shape, batch["x"].dtype) == ((4, 2, 3), np.float16)


@pytest.mark.parametrize(
    ("examples", "size", "drop_last", "sizes", "dropped"),
    [
        pytest.param(7, 3, True, [3, 3], 1, id="remainder dropped"),
        pytest.param(7, 3, False, [3, 3, 1], 0, id="remainder kept"),
        pytest.param(6, 3, True, [3, 3], 0, id="no remainder to drop"),
        pytest.param(6, 3, False, [3, 3], 0, id="no remainder to keep"),
        pytest.param(3, 3, True, [3], 0, id="one batch"),
        pytest.param(2, 3, False, [2], 0, id="one short batch"),
    ],
)
def test_short_last_batch_is_dropped_or_kept(examples, size, drop_last, sizes, dropped):
    batches = Batches(np.arange(examples), size, drop_last=drop_last)
    assert [len(batch) for batch in batches] == sizes
    assert (len(batches), batches.dropped) == (len(sizes), dropped)


def test_dropped_examples_differ_between_epochs():
    batches = Batches(np.arange(7), 3)
    left_out = {tuple(set(range(7)) - set(examples(batches, epoch))) for epoch in range(10)}
    assert len(left_out) > 1


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"], ids=repr)
def test_batch_size_that_is_not_a_positive_int_is_refused(size):
    with pytest.raises(ValueError, match=f"Batches needs batch_size to be a whole number >= 1, got {size!r}"):
        Batches(np.arange(8), size)


def test_batch_size_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"batch_size <= .*\b3\b.*, got 4; or drop_last=False"):
        Batches(np.arange(3), 4)


def test_arrays_with_different_numbers_of_examples_are_refused_by_name():
    with pytest.raises(ValueError, match=r"the same number of examples in all arrays: x has 640, y has 639\."):
        Batches({"x": np.zeros((640, 4)), "y": np.zeros(639)}, 2)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({}, "at least one example, got no arrays"),
        ({"x": np.zeros((0, 4))}, "at least one example, got {'x': 0}"),
        ({"x": np.arange(3), "y": np.float32(1)}, r"arrays of shape \(examples, \.\.\.\), got a single number at 'y'"),
    ],
    ids=["no array", "no examples", "a scalar"],
)
def test_arrays_without_examples_are_refused(arrays, match):
    with pytest.raises(ValueError, match=f"Batches needs {match}"):
        Batches(arrays, 2)


# Resuming in the middle of an epoch.


def test_iterator_saves_and_restores_its_position():
    batches = Batches(np.arange(20), 4)
    whole = served(batches, 2)
    iterator = batches(2)
    assert [next(iterator).tolist(), next(iterator).tolist()] == whole[:2]
    again = batches(2)
    again.set_state(iterator.get_state())
    assert [batch.tolist() for batch in again] == whole[2:]


def test_saved_position_does_not_change_as_the_iterator_advances():
    iterator = Batches(np.arange(20), 4)(0)
    before = iterator.get_state()
    rest = [batch.tolist() for batch in iterator]
    iterator.set_state(before)
    assert [batch.tolist() for batch in iterator] == rest


def test_resumed_run_gathers_no_used_examples(capsys):
    gathered = []

    @jax.tree_util.register_pytree_node_class
    class Example:
        def __init__(self, x):
            self.x = x

        def tree_flatten(self):
            return [self.x], None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            if isinstance(leaves[0], np.ndarray) and leaves[0].shape == (2,):
                gathered.append(leaves[0].tolist())
            return cls(*leaves)

    def step(state, batch):
        return state + batch.x.sum(), {}

    batches = Batches(Example(np.arange(8)), 2)
    engine = Engine(step)
    part = engine.run(jnp.int32(0), batches, steps=3)
    gathered.clear()
    assert int(engine.run(part, Batches(Example(np.arange(8)), 2), epochs=1).state) == 28
    assert len(gathered) == 1
    assert "skipping" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (lambda: Batches(np.arange(10), 2), "examples 8 became 10"),
        (lambda: Batches(np.arange(8), 4), "batch_size 2 became 4"),
        (lambda: Batches(np.arange(9), 2), "Batches has changed since the run was saved: examples 8 became 9"),
        (lambda: Batches(np.arange(8), 2, seed=1), "Batches has changed since the run was saved: seed 0 became 1"),
        (
            lambda: Batches(np.arange(8), 2, shuffle=False),
            "Batches has changed since the run was saved: shuffle True became False",
        ),
        (
            lambda: Batches(np.arange(8), 2, drop_last=False),
            "Batches has changed since the run was saved: drop_last True became False",
        ),
    ],
    ids=["examples", "batch_size", "one example", "seed", "shuffle", "drop_last"],
)
def test_run_cannot_resume_with_different_batches(other, change):
    engine = Engine(mean_step)
    part = engine.run(jnp.int32(0), Batches(np.arange(8), 2), steps=3)
    with pytest.raises(ValueError, match=change):
        engine.run(part, other(), steps=4)


@pytest.mark.parametrize("shuffle", [True, False])
def test_block_of_another_dtype_reads_no_uninitialized_memory(shuffle, monkeypatch):
    def dirty(*args):
        out = aligned_empty(*args)
        out.view(np.uint32)[...] = 0x7FA00000  # a signalling NaN, whose conversion would raise a warning
        return out

    monkeypatch.setattr("onstep.data.batches.aligned_empty", dirty)
    arrays, count = iter(Batches(np.arange(12.0), 2, shuffle=shuffle)).block(4, 5)
    assert (arrays.dtype, count) == (np.float32, 4)
    assert sorted(arrays[:4].ravel()) == sorted({*arrays[:4].ravel()} & {*range(12)})
