"""Several steps in one compiled call: the run is the same for every block length."""

import itertools
import logging
import threading
import warnings

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from clu import metrics
from models import Tripwire, compilations, epoch, fresh_state
from models import step as real_step
from onstep import Batches, Callback, Engine, at, every
from onstep.callbacks import EMA, Checkpoint, GradNorm
from onstep.compiled.blocks import choose_block_size
from onstep.data.stacking import BatchStacker
from onstep.snapshot import unpack
from onstep.spans import Observer
from onstep.testing import FakeClock, FakeLoader, StopAt, Transcript, same_bytes

KEY = jax.random.key(7)


def add(state, batch):
    return state + batch, {"loss": batch * 1.0}


def total(state, batch):
    """Add up all leaves of a batch."""
    leaves = [jnp.asarray(leaf).astype(jnp.float32).sum() for leaf in jax.tree.leaves(batch)]
    return state + sum(leaves), {"sum": sum(leaves) + 0.0}


class Looks(Callback):
    """Handlers that are due and do nothing."""

    def __init__(self, when):
        self.when = when

    def on_step_end(self, loop):
        pass

    on_step_begin = on_save = on_step_end


def observed(loop, event):
    """Show everything that a handler can see."""
    numbers = sorted((name, float(value)) for name, value in loop.metrics.items())
    batch = None if loop.batch is None else int(loop.batch)
    position = unpack(loop.snapshot().host)["data"] if event == "save" else None
    return repr((loop.epoch_step, int(loop.state), batch, numbers, sorted(loop.latest.items()), position))


def transcript(when=1, *, begins=False):
    """Write down events with everything that is seen there; only with `begins` those before steps, which end blocks."""
    quiet = ["load", "run_begin", "snapshot", *([] if begins else ["step_begin"])]
    return Transcript(show=observed, when=when, quiet=quiet)


class Replaces(Callback):
    """Replace the batch of every third step."""

    when = every(steps=3)

    def on_step_begin(self, loop):
        loop.batch = loop.batch + 1000


class Half(Callback):
    """A compiled half that counts how often it was due, and logs the count and the step."""

    def __init__(self, when, name=None):
        self.update_when, self.name = when, name

    def init(self, state):
        return jnp.int32(0)

    def update(self, carry, ctx):
        return carry + 1, ctx.log({f"{self.name}/due": carry + 1, f"{self.name}/step": ctx.step})


def points(history):
    return {name: list(zip(history.steps(name), values, strict=True)) for name, values in history.items()}


def host(result):
    return unpack(result.snapshot.host)


# The same bytes


def train(length, *others, state=None, log_every=4, data=epoch, **options):
    ema = EMA(0.9, warmup=3)
    engine = Engine(
        real_step, [ema, GradNorm(by_module=True, when=3), *others], log_every=log_every, steps_per_call=length
    )
    result = engine.run(state or fresh_state(), data, rng=KEY, **({"epochs": 3} | options))
    return result, (result.state, result.carry(ema))


@pytest.fixture(scope="module")
def whole():
    return train(5)


@pytest.mark.parametrize("length", [2, 7, 128])
def test_blocks_of_every_length_end_in_the_same_bytes_and_records(length, whole):
    result, trees = train(length)
    assert same_bytes(trees, whole[1])
    assert result.latest == whole[0].latest
    assert points(result.history) == points(whole[0].history)


@pytest.mark.parametrize(
    ("others", "options"),
    [
        pytest.param([], {"log_every": 1}, id="a record of every step"),
        pytest.param([], {"log_every": 1000}, id="few records"),
        pytest.param([Looks(every(5)), Looks(at(1, 2, 13))], {}, id="callbacks by steps"),
        pytest.param([Looks(every(epochs=1) | every(7))], {"epoch_steps": 12}, id="callbacks by epochs"),
        pytest.param([], {"epoch_steps": 9, "epochs": 4}, id="epochs of another length"),
        pytest.param([], {"data": lambda number: list(epoch(number))}, id="epochs of known length"),
    ],
)
def test_log_steps_and_host_callbacks_do_not_change_a_byte(others, options, whole):
    assert same_bytes(train(6, *others, **options)[1], whole[1])


@pytest.mark.parametrize(
    ("cut", "through"), [(7, "result"), (12, "result"), (1, "checkpoint"), (17, "checkpoint")], ids=str
)
def test_interrupted_run_resumes_with_blocks_of_another_length(cut, through, whole, tmp_path):
    def saved():
        return [Checkpoint(tmp_path, when=every(10))] if through == "checkpoint" else []

    first, _ = train(4, *saved(), StopAt(cut, final=False, reason="cut"))
    second, trees = train(7, *saved(), state=first if through == "result" else None)
    assert (first.step, first.stopped, second.step) == (cut, "cut", 36)
    assert same_bytes(trees, whole[1])
    assert second.latest == whole[0].latest
    for name, expected in points(whole[0].history).items():
        assert points(first.history).get(name, []) + points(second.history).get(name, []) == expected


def test_batches_gathered_in_blocks_equal_batches_gathered_one_by_one():
    data = Batches({"x": np.arange(22.0), "y": np.arange(22)}, 3, seed=2)

    def mixed(state, batch):
        return state * 0.9 + (batch["x"] * jnp.arange(3)).sum() + batch["y"][0], {}

    one_by_one = [batch for number in range(3) for batch in data(number)]
    expected = Engine(mixed, steps_per_call=2).run(jnp.float32(0), one_by_one, epochs=1)
    assert same_bytes(Engine(mixed, steps_per_call=5).run(jnp.float32(0), data, epochs=3).state, expected.state)


# The same events


@pytest.mark.parametrize("length", [3, 128])
@pytest.mark.parametrize(
    ("callbacks", "data", "options"),
    [
        pytest.param(lambda: [transcript()], lambda: range(1, 8), {"epochs": 2}, id="every step"),
        pytest.param(lambda: [transcript(4)], lambda: range(1, 8), {"epochs": 3}, id="every fourth step"),
        pytest.param(lambda: [transcript(at(1, 6, 19))], lambda: range(1, 8), {"epochs": 3}, id="at"),
        pytest.param(lambda: [transcript(every(epochs=2))], lambda: range(1, 8), {"epochs": 5}, id="epochs"),
        pytest.param(
            lambda: [transcript(every(5) | every(epochs=1), begins=True)],
            lambda: range(1, 8),
            {"epochs": 3},
            id="begins",
        ),
        pytest.param(
            lambda: [transcript(3), transcript(4, begins=True)], lambda: range(1, 8), {"steps": 17}, id="two cadences"
        ),
        pytest.param(lambda: [transcript(5), Replaces()], lambda: range(1, 8), {"epochs": 3}, id="batches replaced"),
        pytest.param(lambda: [transcript(6)], lambda: iter(range(1, 40)), {"steps": 20}, id="an iterator"),
        pytest.param(lambda: [transcript(6)], lambda: iter(range(1, 10)), {"epochs": 1}, id="a short iterator"),
        pytest.param(
            lambda: [transcript(3)], lambda: lambda number: (i for i in range(5 + number)), {"epochs": 3}, id="growing"
        ),
        pytest.param(
            lambda: [transcript(4, begins=True)],
            lambda: range(1, 8),
            {"epochs": 4, "epoch_steps": 5},
            id="epochs across passes",
        ),
        pytest.param(lambda: [transcript(50)], lambda: FakeLoader(range(1, 8)), {"epochs": 3}, id="a loader"),
        pytest.param(
            lambda: [transcript(4), StopAt(9, final=False)], lambda: FakeLoader(range(1, 8)), {"epochs": 3}, id="a stop"
        ),
        pytest.param(lambda: [transcript(9), Half(2, "h")], lambda: range(1, 8), {"epochs": 4}, id="a compiled half"),
    ],
)
def test_events_and_observed_values_equal_those_of_single_steps(length, callbacks, data, options):
    def lines(steps_per_call):
        given = callbacks()
        Engine(add, given, log_every=6, steps_per_call=steps_per_call).run(jnp.int32(0), data(), **options)
        return [callback.lines for callback in given if isinstance(callback, Transcript)]

    assert lines(length) == lines(1)


@pytest.mark.parametrize("when", [1, 3, at(2, 9), every(epochs=1)], ids=str)
def test_iterating_yields_the_same_steps_with_blocks(when):
    def turns(length):
        engine = Engine(add, log_every=5, steps_per_call=length)
        with engine.steps(jnp.int32(0), range(7), epochs=2, when=when) as steps:
            return [(loop.step, loop.epoch, int(loop.state), int(loop.batch)) for loop in steps]

    assert turns(4) == turns(1)


def test_cadence_in_seconds_is_checked_after_each_block():
    clock, seen = FakeClock(), []

    def data():
        for _ in range(12):
            clock.advance(1)
            yield 1

    engine = Engine(add, log_every=1000, steps_per_call=4, clock=clock)
    engine.on("step_end", when=every(seconds=3))(lambda loop: seen.append(loop.step))
    engine.run(jnp.int32(0), data(), steps=12)
    assert seen == [4, 8, 12]


def test_no_batch_is_drawn_beyond_the_next_due_step():
    drawn, seen = [], []
    engine = Engine(add, log_every=1000, steps_per_call=128)
    engine.on("step_end", when=7)(lambda loop: seen.append((loop.step, len(drawn))))
    engine.run(jnp.int32(0), (drawn.append(i) or i for i in range(1000)), steps=21, epoch_steps=21)
    assert seen == [(7, 7), (14, 14), (21, 21)]


def test_state_assigned_between_two_blocks_is_used():
    engine = Engine(add, steps_per_call=8)

    @engine.on("step_end", when=5)
    def reset(loop):
        loop.state = jnp.int32(100)

    assert int(engine.run(jnp.int32(0), [1] * 12, epochs=1).state) == 102


def test_batch_changed_in_place_before_a_step_is_used():
    engine = Engine(total, steps_per_call=4)

    @engine.on("step_begin", when=2)
    def scale(loop):
        loop.batch["x"] = loop.batch["x"] * 10

    assert float(engine.run(0.0, Batches({"x": np.ones(8)}, 2), epochs=1).state) == 2 + 20 + 2 + 20


def test_callback_may_turn_raw_data_into_a_batch_before_the_step():
    engine = Engine(total, steps_per_call=4)

    @engine.on("step_begin")
    def crop(loop):
        loop.batch = loop.batch["x"][:2]

    data = [{"x": np.ones(3), "file": "a.png"}] * 5
    assert float(engine.run(0.0, data, epochs=1).state) == 10


def test_callback_that_only_looks_at_batches_keeps_the_gather_of_whole_blocks(monkeypatch):
    stacks, looked = [], []
    monkeypatch.setattr("onstep.data.stream.BatchStacker", lambda *args: stacks.append(args) or BatchStacker(*args))
    engine = Engine(total, steps_per_call=4)

    @engine.on("step_begin", when=3)
    def look(loop):
        looked.append(loop.batch.tolist())
        if loop.step == 5:
            loop.batch = loop.batch * 10

    result = engine.run(0.0, Batches(np.arange(24.0), 2, shuffle=False), epochs=1)
    assert looked == [[4, 5], [10, 11], [16, 17], [22, 23]]
    assert float(result.state) == np.arange(24).sum() + 9 * (10 + 11)
    assert len(stacks) == 1  # of the batch that was replaced


def test_replaced_batch_ends_the_gather_of_whole_blocks_only_for_its_own_block(monkeypatch):
    stacks = []
    monkeypatch.setattr("onstep.data.stream.BatchStacker", lambda *args: stacks.append(args) or BatchStacker(*args))
    engine = Engine(total, steps_per_call=4)

    @engine.on("step_begin", when=at(2))
    def replace(loop):
        loop.batch = loop.batch * 10

    result = engine.run(0.0, Batches(np.arange(12.0), 2, shuffle=False), epochs=2)
    assert float(result.state) == 2 * np.arange(12).sum() + 9 * (2 + 3)
    assert len(stacks) == 1


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_batch_changed_in_place_is_the_one_that_the_step_gets(steps_per_call):
    engine = Engine(lambda state, batch: (state + batch["x"].sum(), {}), steps_per_call=steps_per_call)

    @engine.on("step_begin", when=2)
    def double(loop):
        loop.batch["x"] = loop.batch["x"] * 10

    batches = Batches({"x": np.arange(8.0)}, 2, shuffle=False)
    assert float(engine.run(0.0, batches, epochs=1).state) == (0 + 1) + 10 * (2 + 3) + (4 + 5) + 10 * (6 + 7)


def test_run_saved_in_blocks_resumes_in_blocks_of_two_where_auto_would_not_choose_blocks():
    def step(state, batch):
        return state + jnp.convolve(jnp.ones(3) * batch, jnp.ones(2)).sum(), {}

    class Calls(Observer):
        count = 0

        def begin(self, span):
            self.count += span.kind == "call"

    def mode(result):
        return unpack(result.snapshot.host)["program"]["mode"]

    part, calls = Engine(step, steps_per_call=4).run(0.0, [1.0] * 8, steps=3), Calls()
    engine = Engine(step)
    engine.on("run_begin")(lambda loop: loop.observe(calls))
    rest = engine.run(part, [1.0] * 8, epochs=1)
    assert (mode(part), mode(rest), calls.count, float(rest.state)) == ("block", "block", 3, 48.0)
    assert mode(Engine(step).run(0.0, [1.0] * 8, epochs=1)) == "plain"


# Batches


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(range(9), id="int"),
        pytest.param([0.5 * i for i in range(9)], id="float"),
        pytest.param([()] * 9, id="empty tuple"),
        pytest.param([None] * 9, id="None"),
        pytest.param([{"a": jnp.full(2, i), "b": (jnp.float32(i), None)} for i in range(9)], id="device arrays"),
        pytest.param([{"a": np.arange(i, i + 3), "b": jnp.float32(i)} for i in range(9)], id="host and device"),
        pytest.param([np.int64(i) for i in range(9)], id="numpy scalars"),
        pytest.param([np.arange(i, i + 3) for i in range(9)], id="int64"),
        pytest.param([np.full(3, i % 2 == 0) for i in range(9)], id="bool"),
        pytest.param([np.full(3, i, ml_dtypes.bfloat16) for i in range(9)], id="bfloat16"),
        pytest.param([np.arange(12)[i::3] for i in range(3)] * 3, id="strided"),
        pytest.param([np.zeros((0, 4))] * 9, id="no examples"),
    ],
)
def test_batches_of_every_kind_give_the_results_of_single_steps(batches):
    def run(length):
        seen = []
        engine = Engine(total, log_every=4, steps_per_call=length)
        engine.on("step_end", when=3)(
            lambda loop: seen.append(jax.tree.map(lambda x: np.asarray(x).tolist(), loop.batch))
        )
        result = engine.run(jnp.float32(0), list(batches), epochs=1)
        return float(result.state), points(result.history), seen

    assert run(4) == run(1)


@pytest.mark.parametrize("length", [4, "auto"])
def test_batch_may_contain_random_keys(length):
    def step(state, batch):
        return state + jax.random.normal(batch["key"]), {}

    batches = [{"key": key} for key in jax.random.split(KEY, 9)]
    result = Engine(step, steps_per_call=length).run(jnp.float32(0), batches, epochs=1)
    assert float(result.state) == pytest.approx(sum(float(jax.random.normal(b["key"])) for b in batches), rel=1e-5)


@pytest.mark.parametrize(
    ("state", "batch"),
    [(jnp.bfloat16(0), 0.5), (jnp.int8(0), 2), (jnp.bfloat16(0), jnp.full((), 0.5))],
    ids=["a float", "an int", "an array of weak type"],
)
def test_python_number_in_a_batch_does_not_widen_the_dtype(state, batch):
    result = Engine(lambda state, batch: (state + batch, {}), steps_per_call=4).run(state, [batch] * 6, epochs=1)
    assert (result.state.dtype, float(result.state)) == (state.dtype, 6 * float(batch))


def test_array_is_used_before_the_data_source_overwrites_it():
    def data(shape):
        buffer = np.zeros(shape)
        for i in range(10):
            buffer[...] = i
            yield buffer

    assert float(Engine(total, steps_per_call=4).run(0.0, data(()), steps=10).state) == 45
    assert float(Engine(total, steps_per_call=4).run(0.0, data(3), steps=10).state) == 135


def test_dict_is_used_before_the_data_source_overwrites_it():
    def data():
        batch = {}
        for i in range(10):
            batch["x"] = np.float32(i)
            yield batch

    assert float(Engine(total, steps_per_call=4).run(0.0, data(), steps=10).state) == 45


@pytest.mark.parametrize("length", [2, 3, 7, 128])
def test_batches_of_mixed_shapes_keep_their_order(length):
    order = [3, 3, 1, 2, 2, 2, 3, 1, 1, 3, 2, 3, 3]
    batches = [np.full(size, number, np.float32) for number, size in enumerate(order)]

    def remembers(state, batch):
        row = jnp.array([batch[0], batch.shape[0]])
        return {"n": state["n"] + 1, "seen": state["seen"].at[state["n"]].set(row)}, {"first": batch[0]}

    for log_every in (1, 100):
        with pytest.warns(UserWarning, match="is compiled again"):
            result = Engine(remembers, log_every=log_every, steps_per_call=length).run(
                {"n": 0, "seen": jnp.zeros((13, 2))}, batches, epochs=1
            )
        assert result.state["seen"].tolist() == [[number, size] for number, size in enumerate(order)]
        assert result.history["train/first"] == (list(range(13)) if log_every == 1 else [6.0])


@pytest.mark.parametrize(
    "batches",
    [[(1, 2), {"a": 3, "b": 4}, (5, 6)], [1, None, 2], [{"a": 1}, {"a": 2.5}, {"a": True}]],
    ids=["containers", "nothing", "dtypes"],
)
def test_batch_of_another_structure_ends_a_block(batches):
    def run(length):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(Engine(total, steps_per_call=length).run(0.0, batches * 2, epochs=1).state)

    assert run(8) == run(1)


def test_batches_and_state_of_the_caller_are_neither_changed_nor_donated():
    state, device, fixed = jnp.ones(3), [jnp.full(3, i) for i in range(6)], [np.full(3, i) for i in range(6)]
    for array in fixed:
        array.flags.writeable = False
    data = [{"device": a, "host": b, "state": state} for a, b in zip(device, fixed, strict=True)]
    result = Engine(lambda s, b: (s + b["device"] + b["state"], {}), steps_per_call=4).run(state, data, epochs=2)
    assert [a.tolist() for a in device] == [b.tolist() for b in fixed] == [[i] * 3 for i in range(6)]
    assert (state.tolist(), result.state.tolist()) == ([1] * 3, [43] * 3)


def test_writing_into_loop_batch_leaves_the_arrays_of_the_caller_unchanged():
    data = Batches(np.arange(8), 2, shuffle=False)
    engine = Engine(total, steps_per_call=2)

    @engine.on("step_end", when=2)
    def spoils(loop):
        loop.batch[...] = -1

    assert float(engine.run(0.0, data, epochs=2).state) == 56


# Compiled halves


@pytest.mark.parametrize(
    "when", [2, 3, every(4) | every(7), at(1, 5, 6, 20), every(epochs=1), every(epochs=2) | at(3)], ids=str
)
@pytest.mark.parametrize("length", [3, 128])
def test_compiled_half_in_a_block_is_due_at_its_steps_only(when, length):
    def run(length):
        half = Half(when, "h")
        engine = Engine(add, [half], log_every=1, steps_per_call=length)
        result = engine.run(jnp.int32(0), range(7), epochs=3)
        return int(result.carry(half)), points(result.history)

    assert run(length) == run(1)


def test_compiled_halves_of_several_cadences_log_only_when_due():
    halves = [Half(2, "two"), Half(1, "one"), Half(5, "five"), Half(at(3), "at"), Half(every(epochs=1), "epoch")]
    engine = Engine(add, halves, log_every=1000, steps_per_call=6)
    seen = {}
    engine.on("step_end", when=at(2, 3, 7, 10))(
        lambda loop: seen.update({loop.step: {name.split("/")[0] for name in loop.metrics} - {"loss"}})
    )
    result = engine.run(jnp.int32(0), range(7), epochs=2)
    assert seen == {2: {"one", "two"}, 3: {"one", "at"}, 7: {"one", "epoch"}, 10: {"one", "two", "five"}}
    assert [int(result.carry(half)) for half in halves] == [7, 14, 2, 1, 2]
    expected = {"two/step": 7, "one/step": 6.5, "five/step": 6.5, "at/step": 2, "epoch/step": 9.5}
    assert {name: result.latest[f"train/{name}"] for name in expected} == expected


def test_compiled_half_that_was_never_due_is_in_no_record():
    result = Engine(add, [Half(at(100), "late")], log_every=3, steps_per_call=4).run(jnp.int32(0), range(7), epochs=1)
    assert set(result.history) == {"train/loss", "epoch/loss"}


def test_compiled_half_may_change_the_state_within_a_block():
    class Clips(Callback):
        update_when = every(3)

        def update(self, carry, ctx):
            return carry, ctx.replace(state=jnp.minimum(ctx.state, 10))

    result = Engine(add, [Clips()], log_every=1, steps_per_call=5).run(jnp.int32(0), [4] * 8, epochs=1)
    assert int(result.state) == 18


def test_random_numbers_in_a_block_equal_those_of_single_steps():
    class Draws(Callback):
        def update(self, carry, ctx):
            return carry, ctx.log(draw=jax.random.randint(ctx.rng, (), 0, 10**6))

    def draws(length):
        engine = Engine(add, [Draws()], log_every=1, steps_per_call=length)
        return engine.run(jnp.int32(0), range(9), epochs=1, rng=KEY).history["train/draw"]

    assert draws(4) == draws(1)


def test_clu_metrics_merge_exactly_in_blocks():
    @flax.struct.dataclass
    class Metrics(metrics.Collection):
        accuracy: metrics.Accuracy
        loss: metrics.Average.from_output("loss")

    def step(state, batch):
        out = {"logits": batch["x"], "labels": batch["y"], "loss": batch["x"].sum(axis=1)}
        return state, Metrics.single_from_model_output(**out)

    x = np.random.default_rng(0).normal(size=(33, 3)).astype(np.float32)
    data = Batches({"x": x, "y": np.arange(33) % 3}, 3, seed=1)

    def history(length):
        return points(Engine(step, log_every=4, steps_per_call=length).run(0, data, epochs=2).history)

    assert history(5) == history(128) == history(1)
    assert len(history(5)["train/accuracy"]) == 6


@pytest.mark.parametrize("value", [True, 3, 0.25, np.float64(2), float("nan")], ids=str)
def test_metric_may_be_a_constant(value):
    history = Engine(lambda s, b: (s, {"c": value}), steps_per_call=4).run(0, range(6), epochs=1).history
    assert history["epoch/c"] == pytest.approx([float(value)], nan_ok=True)


# Errors and positions


@pytest.mark.parametrize("number", [1, 2, 6, 9])
@pytest.mark.parametrize("callbacks", [[], [Looks(3)]], ids=["alone", "with a callback"])
def test_all_batches_before_a_failing_one_are_used(number, callbacks):
    def data():
        for i in itertools.count(1):
            if i == number:
                raise OSError("disk gone")
            yield i

    events = transcript(1000)
    engine = Engine(add, [events, *callbacks], steps_per_call=4)
    with pytest.raises(OSError, match="disk gone") as caught:
        engine.run(jnp.int32(0), data(), steps=20)
    assert caught.value.__notes__ == [f"onstep: raised by the data, at batch {number} of pass 1"]
    assert events.lines[-2].startswith(f"exception {number - 1}/0 ({number - 1}, {sum(range(number))}, ")


def test_error_note_counts_the_batches_of_the_current_pass():
    def data(number):
        yield from [1, 1, 1]
        if number == 1:
            raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        Engine(add, steps_per_call=8).run(jnp.int32(0), data, steps=20, epoch_steps=5)
    assert caught.value.__notes__ == ["onstep: raised by the data, at batch 4 of pass 2"]


def test_error_while_tracing_is_raised_before_any_step_ran():
    def step(state, batch):
        raise KeyError("no such name")

    events = transcript()
    with pytest.raises(KeyError, match="no such name"):
        Engine(step, [events], steps_per_call=4).run(jnp.int32(0), range(9), epochs=1)
    assert [line.split(" (")[0] for line in events.lines] == ["epoch_begin 0/0", "exception 0/0", "run_end 0/0"]


def test_error_in_a_callback_is_raised_at_its_due_step():
    engine = Engine(add, steps_per_call=8)

    @engine.on("step_end", when=5)
    def fails(loop):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        engine.run(jnp.int32(0), range(20), epochs=1)
    assert caught.value.__notes__ == ["onstep: raised by fails.on_step_end at step 5"]


def test_ctrl_c_while_drawing_a_block_keeps_the_steps_before_it():
    def interrupts(index):
        if index == 6:
            raise KeyboardInterrupt

    events = transcript(1000)
    with pytest.raises(KeyboardInterrupt):
        Engine(add, [events], steps_per_call=4).run(jnp.int32(0), FakeLoader(range(20), interrupts), epochs=1)
    assert events.lines[-2].startswith("exception 4/0 (4, 6, ")


def cut_while_drawing(number, batches, length, stop):
    """Run until `stop` is called while batch `number` (from 1) is drawn, then resume from the state of the loader."""
    loops = []

    def before(index):
        if index == number - 1:
            stop(loops[0])

    def run(start, data):
        engine = Engine(total, steps_per_call=length, log_every=1000)
        engine.on("run_begin")(lambda loop: loops.append(loop))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A batch.s shape differs")
            return engine.run(start, data, epochs=1)

    first = run(0.0, FakeLoader(batches, before))
    return first, run(first, FakeLoader(batches))


MIXED = [np.full(1 if number in (3, 4, 9) else 2, number, np.float32) for number in range(1, 13)]


@pytest.mark.parametrize("number", [1, 2, 5, 6, 10])
@pytest.mark.parametrize("batches", [list(range(1, 13)), MIXED], ids=["one shape", "shapes that change"])
def test_stop_while_drawing_a_block_loses_and_repeats_no_batch(number, batches):
    first, second = cut_while_drawing(number, batches, 5, lambda loop: loop.stop("signal", final=False))
    assert first.step <= number + 4
    assert host(first)["data"]["loader"] == {"next": first.step}
    assert (second.step, float(second.state)) == (12, sum(float(np.sum(batch)) for batch in batches))


def test_stop_from_another_thread_loses_and_repeats_no_batch():
    def stop(loop):
        thread = threading.Thread(target=lambda: loop.stop("signal", final=False))
        thread.start()
        thread.join()

    first, second = cut_while_drawing(7, MIXED, 5, stop)
    assert (first.stopped, host(first)["data"]["loader"]) == ("signal", {"next": first.step})
    assert float(second.state) == sum(float(batch.sum()) for batch in MIXED)


def test_stop_in_a_block_with_a_failing_batch_saves_the_right_position():
    def stop_and_fail(loop):
        loop.stop("signal", final=False)
        raise OSError("disk gone")

    first, second = cut_while_drawing(4, [1] * 12, 8, stop_and_fail)
    assert (first.step, host(first)["data"]["loader"]) == (3, {"next": 3})
    assert int(second.state) == 12


def test_save_in_a_block_with_a_failing_batch_saves_the_right_position():
    clock, saved = FakeClock(), []

    def before(index):
        clock.now = index + 1.0
        if index == 5:
            raise OSError("disk gone")

    engine = Engine(total, log_every=1000, steps_per_call=8, clock=clock)
    engine.on("save", when=every(seconds=3))(lambda loop: saved.append((loop.step, loop.snapshot())))
    with pytest.raises(OSError, match="disk gone"):
        engine.run(0.0, FakeLoader(range(20), before), epochs=1)
    assert [(step, unpack(snapshot.host)["data"]["loader"]["next"]) for step, snapshot in saved] == [(5, 5)]


@pytest.mark.parametrize("cut", [1, 4, 5, 13])
def test_batches_resume_after_the_last_batch_that_was_used(cut):
    def data():
        return Batches(np.arange(1, 17), 3, seed=3)

    expected = Engine(total, steps_per_call=4).run(0.0, data(), epochs=3)
    first = Engine(total, [StopAt(cut, final=False)], steps_per_call=4).run(0.0, data(), epochs=3)
    assert host(first)["data"]["loader"] == (None if cut % 5 == 0 else {"index": cut % 5, "of": [16, 3, 3, True, True]})
    second = Engine(total, steps_per_call=7).run(first, data(), epochs=3)
    assert (second.step, float(second.state)) == (15, float(expected.state))


# The mode


@pytest.mark.parametrize(("lengths", "modes"), [((4, 1), ("block", "plain")), ((1, 4), ("plain", "block"))], ids=str)
def test_run_cannot_resume_in_another_execution_mode(lengths, modes):
    first = Engine(add, [StopAt(3, final=False)], steps_per_call=lengths[0]).run(jnp.int32(0), range(9), epochs=1)
    with pytest.raises(ValueError, match=f"the execution mode '{modes[0]}', this run '{modes[1]}'.*steps_per_call"):
        Engine(add, steps_per_call=lengths[1]).run(first, range(9), epochs=1)


@pytest.mark.parametrize("length", [1, 4, "auto"])
@pytest.mark.parametrize("then", [1, 4, "auto"])
def test_uncompiled_run_resumes_either_execution_mode_and_keeps_it(length, then):
    first = Engine(add, [StopAt(3, final=False)], steps_per_call=length).run(jnp.int32(0), range(9), epochs=1)
    second = Engine(add, [StopAt(5, final=False)], steps_per_call=then, jit=False).run(first, range(9), epochs=1)
    assert (second.step, int(second.state)) == (5, 10)
    assert host(second)["program"]["mode"] == host(first)["program"]["mode"]
    assert int(Engine(add, steps_per_call=length).run(second, range(9), epochs=1).state) == 36


IMAGE = np.ones((1, 1, 4, 4), np.float32)


def convolve(x):
    return jax.lax.conv(x, np.ones((1, 1, 3, 3), np.float32), (1, 1), "SAME").sum()


def test_auto_chooses_blocks_for_a_small_step_and_single_steps_for_a_convolution():
    def convolves(state, batch):
        return state + convolve(batch), {}

    for step, mode, length in ((total, "block", 3), (convolves, "plain", 1)):
        first = Engine(step, [StopAt(2, final=False)], steps_per_call="auto").run(0.0, [IMAGE] * 5, epochs=1)
        assert host(first)["program"]["mode"] == mode
        assert Engine(step, steps_per_call=length).run(first, [IMAGE] * 5, epochs=1).step == 5


def test_auto_resumes_in_the_saved_mode_although_the_next_batch_is_short():
    data = [np.ones((5, 2**20), np.float32), np.ones((1, 2**20), np.float32)]  # a batch of 20 MiB is a block of its own
    first = Engine(total, [StopAt(1, final=False)], steps_per_call="auto").run(0.0, data, epochs=1)
    with pytest.warns(UserWarning, match="is compiled again"):
        assert Engine(total, steps_per_call="auto").run(first, data, epochs=1).step == 2


def test_auto_decides_from_the_batches_of_each_run():
    engine = Engine(total, steps_per_call="auto")
    engine.run(0.0, [np.ones(2, np.float32)], epochs=1)
    large = engine.run(0.0, [np.ones((5, 2**20), np.float32)], epochs=1)
    assert host(large)["program"]["mode"] == "plain"


@pytest.mark.parametrize("length", [1, 4, "auto"])
def test_snapshot_may_be_taken_before_the_first_batch(length):
    snapshots = []
    engine = Engine(add, steps_per_call=length)
    engine.on("load")(lambda loop: snapshots.append(loop.snapshot()))
    engine.run(jnp.int32(0), range(3), epochs=1)
    assert unpack(snapshots[0].host)["program"]["batch"] is None


@jax.custom_vjp
def own_backward(x):
    return x.sum()


own_backward.defvjp(lambda x: (x.sum(), x), lambda x, g: (g * x * convolve(x),))


@jax.custom_jvp
def own_forward(x):
    return convolve(x)


own_forward.defjvp(lambda primals, tangents: (convolve(primals[0]), tangents[0].sum()))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(convolve, id="bare"),
        pytest.param(jax.grad(convolve), id="gradient"),
        pytest.param(jax.jit(convolve), id="jit"),
        pytest.param(jax.vmap(lambda row: convolve(row[None])), id="vmap"),
        pytest.param(lambda x: jax.lax.scan(lambda c, _: (c + convolve(x), None), 0.0, None, 3), id="scan"),
        pytest.param(lambda x: jax.lax.map(lambda row: convolve(row[None]), x), id="map"),
        pytest.param(lambda x: jax.lax.cond(x.sum() > 0, convolve, jnp.sum, x), id="cond"),
        pytest.param(lambda x: jax.lax.while_loop(lambda c: c < 9, lambda c: c + convolve(x), 0.0), id="while"),
        pytest.param(jax.checkpoint(convolve), id="checkpoint"),
        pytest.param(jax.grad(jax.checkpoint(lambda x: convolve(x) ** 2)), id="gradient of checkpoint"),
        pytest.param(jax.grad(own_backward), id="custom_vjp"),
        pytest.param(own_forward, id="custom_jvp"),
    ],
)
def test_convolution_is_found_inside_every_transformation(function):
    assert choose_block_size(jax.make_jaxpr(function)(IMAGE), IMAGE)[0] == 0


def rows_for_product(n, times=1):
    def step(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, times)[0]

    x = np.ones((n, n), np.float32)
    return choose_block_size(jax.make_jaxpr(step)(x), x)[0]


def rows_for_batch(size):
    batch = {"x": np.ones(size, np.float32)}
    return choose_block_size(jax.make_jaxpr(lambda b: b["x"].sum())(batch), batch)[0]


def test_more_flops_make_shorter_blocks_down_to_single_steps():
    assert [rows_for_product(n) for n in (8, 256, 512, 1024)] == [128, 119, 14, 0]
    assert [rows_for_product(256, times) for times in (1, 10, 50, 100)] == [119, 11, 2, 0]


def test_larger_batches_make_shorter_blocks_down_to_single_steps():
    assert [rows_for_batch(2**n) for n in (10, 16, 18, 20, 22, 23)] == [128, 128, 32, 8, 2, 0]


# Compilations and reads


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(range(7), id="numbers"),
        pytest.param([np.full(2, i) for i in range(7)], id="numpy"),
        pytest.param([{"x": jnp.full(2, i)} for i in range(7)], id="device"),
        pytest.param([{"key": key} for key in jax.random.split(KEY, 7)], id="keys"),
        pytest.param(Batches(np.arange(15), 2), id="Batches"),
        pytest.param(lambda epoch: (np.float32(i) for i in range(7)), id="generators"),
    ],
)
@pytest.mark.parametrize("length", [5, "auto"])
def test_blocks_of_every_length_share_one_trace_and_one_executable(data, length):
    traces = []

    def step(state, batch, rng):
        traces.append(1)
        return state + jax.random.uniform(rng), {"loss": state}

    with compilations() as compiled:
        engine = Engine(step, [EMA(0.9, of=None), Half(3, "h")], log_every=4, steps_per_call=length)
        engine.on("step_end", when=at(1))(lambda loop: compiled.clear())
        engine.run(0.0, data, epochs=4, rng=KEY)
    assert compiled == []
    assert len(traces) == 1


def test_compilation_is_logged_once_with_the_block_length(caplog):
    with caplog.at_level(logging.INFO, "onstep"):
        engine = Engine(add, steps_per_call=6)
        for _ in range(2):
            engine.run(jnp.int32(0), range(9), epochs=2)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("compiled the step, up to 6 steps a call, in ")


@pytest.mark.parametrize("given", [0, -1, 2.5, True, "fast", None], ids=str)
def test_invalid_steps_per_call_is_refused_when_the_engine_is_made(given):
    with pytest.raises(ValueError, match=f"Engine needs steps_per_call .*whole number.*, got {given!r}"):
        Engine(add, steps_per_call=given)


def test_metrics_of_blocks_are_read_only_at_log_steps():
    calls, reads, seen = [], [], []
    engine = Engine(add, log_every=20, steps_per_call=4)

    def call(bundle, batches, rng, due):
        calls.append(int(due[1]))
        column = Tripwire(len(calls), reads, shape=(4,))
        return bundle, ({"loss": column}, {"loss": column})

    engine._compiled.call = call
    for event, when in (("step_end", 7), ("log", 1)):
        engine.on(event, when=when)(lambda loop, *_: seen.append((loop.step, len(calls), len(reads))))
    engine.run(jnp.int32(0), range(60), steps=40)
    assert seen == [(7, 2, 0), (14, 4, 0), (20, 6, 6), (21, 7, 6), (28, 9, 6), (35, 11, 6), (40, 13, 13)]
    assert calls == [4, 3, 4, 3, 4, 2, 1, 4, 3, 4, 3, 4, 1]
    assert reads == list(range(1, 14))


def test_slow_steps_make_shorter_blocks_with_auto():
    def lengths(steps_per_call):
        clock, seen = FakeClock(), []

        def data(epoch):
            for n in range(200):
                clock.advance(0.019)  # the seconds of a step
                yield n

        step, options = (lambda state, batch: (state + batch, {})), {"log_every": 50, "clock": clock}
        engine = Engine(step, steps_per_call=steps_per_call, **options)
        deciding = engine._compiled._select_call

        def decide(layout):
            deciding(layout)
            call = engine._compiled.call
            engine._compiled.call = lambda *args: seen.append(int(args[3][1])) or call(*args)

        engine._compiled._select_call = decide
        if steps_per_call != "auto":
            decide(None)
        assert int(engine.run(jnp.int32(0), data, epochs=1).state) == sum(range(200))
        return seen

    chosen, given = lengths("auto"), lengths(32)
    assert max(chosen[:7]) == 8  # before the duration of a step is known
    assert max(chosen[8:]) == 5  # 0.1 s
    assert max(given) == 32


def test_debug_nans_names_the_operation_that_made_the_nan():
    def step(state, batch):
        return state + jnp.log(batch), {}

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in log"):
        Engine(step).run(jnp.float32(0), [np.float32(1), np.float32(-1)], epochs=1)
