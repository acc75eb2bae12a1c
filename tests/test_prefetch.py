"""Prefetching: batches are put on the device in order, a bounded number ahead, and no thread is left behind."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import refilled
from onstep import Batches, Engine
from onstep.data.prefetch import Prefetch
from onstep.snapshot import unpack
from onstep.testing import FakeLoader, FakeLoaderIterator, RaiseIn, SizedData, StopAt
from onstep.testing import counting_step as add


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "onstep-prefetch"]


def test_batches_come_in_order_and_on_the_device():
    given = list(Prefetch(iter([np.arange(3), np.arange(4)]), 2))
    assert all(isinstance(batch, jax.Array) for batch in given)
    assert [len(batch) for batch in given] == [3, 4]
    assert not threads()


def test_no_more_batches_than_the_depth_are_drawn_ahead():
    enough, too_many = threading.Event(), threading.Event()

    def source():
        yield from range(3)
        enough.set()
        yield 3
        too_many.set()
        yield 4

    batches = Prefetch(source(), 3)
    assert int(next(batches)) == 0
    assert enough.wait(10)  # three more than the one that was used
    assert not too_many.wait(0.1)
    batches.close()


def test_batches_drawn_before_a_close_are_not_lost():
    batches = Prefetch(iter(range(10)), 3)
    first = [int(next(batches)) for _ in range(2)]
    batches.close()
    assert not threads()
    assert first + [int(batch) for batch in batches] == list(range(10))


def test_batch_that_is_being_loaded_counts_as_the_one_that_is_asked_for():
    stuck, go, too_many = threading.Event(), threading.Event(), threading.Event()

    def source():
        yield 0
        stuck.set()
        go.wait(30)
        yield 1
        too_many.set()
        yield 2

    batches = Prefetch(source(), 3)
    batches.limit(2)
    assert int(next(batches)) == 0
    assert stuck.wait(30)
    batches.limit(1)
    threading.Timer(0.05, go.set).start()
    assert int(next(batches)) == 1
    assert not too_many.wait(0.1)
    batches.close()


def test_batch_is_on_the_device_before_the_next_is_loaded():
    class Transfer:
        def __init__(self, number):
            lines.append(f"put {number}")

        def block_until_ready(self):
            lines.append("ready")

    lines = []
    assert len(list(Prefetch(iter([1, 2]), 4, Transfer))) == 2
    assert lines == ["put 1", "ready", "put 2", "ready"]


class LiveState(FakeLoaderIterator):
    """Its state is one dict, which changes with every batch."""

    def __init__(self, loader):
        self.state = {}
        super().__init__(loader)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "next":
            self.state["next"] = value

    def get_state(self):
        return self.state


@pytest.mark.parametrize("prefetch", [0, 3])
def test_saved_position_does_not_change_with_a_loader_that_returns_its_live_state(prefetch):
    class Loader(FakeLoader):
        def __iter__(self):
            return LiveState(self)

    positions = []
    engine = Engine(add, prefetch=prefetch)
    engine.on("save")(lambda loop: positions.append(unpack(loop.snapshot().host)["data"]["loader"]["next"]))
    engine.run(jnp.int32(0), Loader([1, 2, 3, 4]), steps=4)
    assert positions == [1, 2, 3, 4]


def test_thread_that_is_stuck_in_the_source_is_left_behind_with_a_warning(monkeypatch):
    monkeypatch.setattr("onstep.data.prefetch.PATIENCE", 0.05)
    stuck, go = threading.Event(), threading.Event()

    def source():
        yield from [1, 2, 3]
        stuck.set()
        go.wait(30)
        yield from [4, 5]

    engine = Engine(add, prefetch=2)

    @engine.on("step_end", when=3)
    def fail(loop):
        assert stuck.wait(30)
        raise RuntimeError("enough")

    warning = pytest.warns(UserWarning, match=r"waited more than 0.05 s for the next batch of the data \(generator\)")
    with warning, pytest.raises(RuntimeError, match="enough"):
        engine.run(jnp.int32(0), source(), epochs=1)
    (thread,) = threads()
    assert thread.daemon
    go.set()
    thread.join(30)
    assert not thread.is_alive()


def test_thread_that_was_left_behind_is_used_again(monkeypatch):
    monkeypatch.setattr("onstep.data.prefetch.PATIENCE", 0.05)
    stuck, go = threading.Event(), threading.Event()

    def source():
        yield 1
        stuck.set()
        go.wait(30)
        yield from [2, 3]

    batches = Prefetch(source(), 2)
    assert int(next(batches)) == 1
    assert stuck.wait(30)
    with pytest.warns(UserWarning, match="The run ends without it"):
        batches.close()
    threading.Timer(0.05, go.set).start()
    assert [int(batch) for batch in batches] == [2, 3]
    assert not threads()


def test_no_more_batches_are_loaded_than_the_limit_unless_they_are_asked_for():
    drawn = []
    batches = Prefetch((drawn.append(n) or n for n in range(9)), 3)
    batches.limit(2)
    assert [int(next(batches)) for _ in range(2)] == [0, 1]
    batches.close()
    assert drawn == [0, 1]
    assert int(next(batches)) == 2
    batches.close()
    assert drawn == [0, 1, 2]


def test_error_of_the_source_is_raised_when_its_batch_is_needed():
    def source():
        yield 1
        yield 2
        raise OSError("disk")

    seen = []
    engine = Engine(add, prefetch=4, log_every=1)
    engine.on("step_end")(lambda loop: seen.append(loop.step))
    with pytest.raises(OSError, match="disk") as raised:
        engine.run(jnp.int32(0), lambda epoch: source(), epochs=1)
    assert seen == [1, 2]
    assert any("at batch 3 of pass 1" in note for note in raised.value.__notes__)
    assert not threads()


@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("data", ["list", "callable", "Batches", "epoch_steps"])
def test_run_is_the_same_with_and_without_prefetch(data, steps_per_call):
    rows = np.arange(14, dtype=np.int32)
    source = {"list": list(rows), "callable": lambda epoch: iter(rows + epoch), "Batches": Batches(rows, 2)}
    how = {"epoch_steps": 5} if data == "epoch_steps" else {}

    def step(state, batch):
        return state * 3 + batch.sum(), {"sum": batch.sum()}

    plain, ahead = (
        Engine(step, prefetch=n, steps_per_call=steps_per_call).run(
            jnp.int32(1), source.get(data, source["list"]), epochs=3, **how
        )
        for n in (0, 3)
    )
    assert int(plain.state) == int(ahead.state)
    assert plain.history["epoch/sum"] == ahead.history["epoch/sum"]
    assert not threads()


def test_stopped_run_resumes_at_the_next_batch():
    def step(state, batch):
        return state + batch.sum(), {}

    def run(prefetch):
        engine = Engine(step, [StopAt(4, final=False)], prefetch=prefetch)
        batches = Batches(np.arange(10, dtype=np.int32), 1)
        first = engine.run(jnp.int32(0), batches, epochs=1)
        second = engine.run(first, batches, epochs=1)
        return first.snapshot.host, int(first.state), int(second.state)

    assert run(0) == run(3)
    assert run(3)[2] == 45


def test_user_iterator_loses_no_batch_between_two_runs():
    engine = Engine(add, prefetch=3)
    numbers = iter(range(1, 11))
    first = engine.run(jnp.int32(0), numbers, steps=4)
    second = engine.run(first, numbers, steps=10)
    assert (int(first.state), int(second.state)) == (10, 55)
    assert not threads()


def test_iterator_with_a_length_loses_no_batch_between_two_epochs():
    class Sized:
        def __init__(self):
            self.numbers = iter(range(1, 10))

        def __len__(self):
            return 3

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.numbers)

    result = Engine(add, prefetch=2, log_every=1).run(jnp.int32(0), Sized(), steps=7)
    assert (int(result.state), result.epoch) == (28, 2)
    assert not threads()


def test_thread_ends_when_the_run_reaches_its_target_at_the_end_of_an_epoch():
    Engine(add, prefetch=2).run(jnp.int32(0), SizedData([1, 2, 3], 3), steps=6)
    assert not threads()


def test_thread_ends_when_the_run_raises():
    engine = Engine(add, [RaiseIn("step_end", RuntimeError("enough"), step=3)], prefetch=2)
    with pytest.raises(RuntimeError, match="enough"):
        engine.run(jnp.int32(0), range(100), epochs=1)
    assert not threads()


def test_source_longer_than_its_len_leaves_no_thread():
    with pytest.raises(ValueError, match="has len 3, but pass 1 yielded batch 4"):
        Engine(add, prefetch=2).run(jnp.int32(0), SizedData(range(10), 3), epochs=2)
    assert not threads()


@pytest.mark.parametrize("prefetch", [-1, 1.5, True])
def test_depth_that_is_not_a_whole_number_is_refused(prefetch):
    with pytest.raises((ValueError, TypeError), match="prefetch"):
        Engine(add, prefetch=prefetch)


def test_source_may_reuse_its_arrays():
    engine = Engine(lambda state, batch: (state, {"mean": batch.mean()}), prefetch=2, log_every=1)
    result = engine.run(jnp.int32(0), lambda epoch: refilled(), epochs=1)
    assert result.history["train/mean"] == list(range(40))
