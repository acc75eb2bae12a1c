"""Callbacks of an engine: names, order, functions, host state, carries, and what they may change."""

import contextlib
import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Batches, Callback, Engine, at, every
from onstep.testing import EVENT_NAMES, FakeClock, Transcript
from onstep.testing import counting_step as add


class Idle(Callback):
    """A compiled half that changes nothing."""

    def __init__(self, name=None):
        self.name = name

    def update(self, carry, ctx):
        return carry, ctx


class Counter(Callback):
    """Count steps on the host, from `start`."""

    def __init__(self, name=None, start=0):
        self.name, self.count = name, start

    def on_step_end(self, loop):
        self.count += 1

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


class Total(Callback):
    """Sum the batches in a carry."""

    def init(self, state):
        return jnp.zeros_like(state)

    def update(self, carry, ctx):
        return carry + ctx.batch, ctx


class Draw(Callback):
    """Log a random number."""

    def __init__(self, name):
        self.name = name

    def update(self, carry, ctx):
        return carry, ctx.log({f"draw/{self.name}": jax.random.uniform(ctx.rng)})


def written(lines, event):
    """Return the names of the callbacks that wrote an event into shared lines, in order."""
    return [line.split()[0] for line in lines if line.split()[1] == event]


# Names and order.


def test_callbacks_handle_events_in_list_order_and_end_in_reverse():
    lines = []
    Engine(add, [Transcript(name, lines=lines) for name in "bca"]).run(jnp.int32(0), [1], epochs=1)
    orders = {event: "".join(written(lines, event)) for event in dict.fromkeys(line.split()[1] for line in lines)}
    assert orders.pop("run_end") == "acb"
    assert orders.pop("log") == "bcabca"
    assert set(orders.values()) == {"bca"}
    assert len(orders) == 8


def test_on_save_comes_after_all_other_handlers_wherever_the_callback_is_listed():
    lines = []
    save = Transcript("first", lines=lines, quiet=set(EVENT_NAMES) - {"save"})
    Engine(add, [save, Transcript("last", lines=lines)], log_every=1).run(jnp.int32(0), [1], epochs=1)
    before = lines[: lines.index("first save 1/1")]
    assert [line.split()[1] for line in before][-4:] == ["step_end", "log", "log", "epoch_end"]


def test_compiled_halves_run_in_list_order():
    class Scale(Idle):
        def update(self, carry, ctx):
            return carry, ctx.replace(state=ctx.state * 10)

    class Shift(Idle):
        def update(self, carry, ctx):
            return carry, ctx.replace(state=ctx.state + 1)

    def run(callbacks):
        return int(Engine(add, callbacks).run(jnp.int32(0), [1], epochs=1).state)

    assert (run([Scale(), Shift()]), run([Shift(), Scale()])) == (11, 20)


def test_repeated_class_names_are_numbered():
    given = [Idle(), Counter(), Idle(), Idle("mine"), Idle()]
    engine = Engine(add, given)
    assert list(engine.callbacks) == ["Idle", "Counter", "Idle_2", "mine", "Idle_3"]
    assert list(engine.callbacks.values()) == given


def test_automatic_names_avoid_names_given_by_the_user():
    assert list(Engine(add, [Idle(), Idle("Idle"), Idle("Idle_2")]).callbacks) == ["Idle_3", "Idle", "Idle_2"]


def test_two_callbacks_with_the_same_name_are_refused():
    with pytest.raises(ValueError, match="Two callbacks are named 'mine'"):
        Engine(add, [Idle("mine"), Counter("mine")])


@pytest.mark.parametrize("name", [None, "mine"])
def test_callback_listed_twice_is_refused(name):
    callback = Idle(name)
    with pytest.raises(ValueError, match=f"The callback {name or 'Idle'} is listed twice. List it once"):
        Engine(add, [callback, Counter(), callback])


def test_class_in_the_list_is_refused_and_the_call_is_suggested():
    with pytest.raises(
        TypeError, match=r"An engine needs callbacks, got .*Counter.*\. Did you mean Counter\(\.\.\.\)\?"
    ):
        Engine(add, [Counter])


@pytest.mark.parametrize("wrong", [print, "Counter", None, [Counter()]], ids=["function", "name", "None", "list"])
def test_object_that_is_not_a_callback_is_refused(wrong):
    with pytest.raises(TypeError, match="An engine needs callbacks, got"):
        Engine(add, [wrong])


# Which methods are called.


def test_only_overridden_methods_are_ever_due():
    class Idles(Callback):
        when = every(seconds=1)

    class Acts(Idles):
        def on_step_end(self, loop):
            pass

    def reads_of_the_clock(callback):
        clock = FakeClock()
        Engine(add, [callback], clock=clock).run(jnp.int32(0), [1, 1], epochs=1)
        return clock.reads

    assert reads_of_the_clock(Idles()) == reads_of_the_clock(Callback())
    assert reads_of_the_clock(Acts()) > reads_of_the_clock(Callback())


def test_inherited_method_is_called():
    class More(Counter):
        pass

    more = More()
    Engine(add, [more]).run(jnp.int32(0), [1, 1], epochs=1)
    assert more.count == 2


# Functions as callbacks.


@pytest.mark.parametrize("event", ["step_end", "on_step_end"])
def test_engine_on_calls_a_function_and_returns_it_unchanged(event):
    engine = Engine(add)

    def note(loop):
        seen.append(loop.step)

    seen = []
    assert engine.on(event)(note) is note
    engine.run(jnp.int32(0), [1, 1], epochs=1)
    assert seen == [1, 2]


def test_function_runs_at_its_cadence():
    seen = []
    engine = Engine(add)
    engine.on("step_end", when=2)(lambda loop: seen.append(loop.step))
    engine.on("step_end", when=every(epochs=1) | at(4))(lambda loop: seen.append(("second", loop.step)))
    engine.run(jnp.int32(0), [1, 1, 1], epochs=2)
    assert seen == [2, ("second", 3), 4, ("second", 4), 6, ("second", 6)]


def test_functions_run_after_the_list_in_the_order_they_were_added():
    lines = []
    engine = Engine(add, [Transcript("listed", lines=lines)])
    engine.on("step_end")(lambda loop: lines.append("first step_end"))
    engine.on("step_end")(lambda loop: lines.append("second step_end"))
    engine.run(jnp.int32(0), [1], epochs=1)
    assert written(lines, "step_end") == ["listed", "first", "second"]


def test_functions_are_named_after_themselves():
    def sample(loop):
        pass

    engine = Engine(add)
    engine.on("epoch_end")(sample)
    engine.on("run_end")(sample)
    assert list(engine.callbacks) == ["sample", "sample_2"]


def test_function_receives_the_record_or_the_error():
    seen = []
    engine = Engine(add)
    engine.on("log")(lambda loop, record: seen.append(record.values))
    engine.on("exception")(lambda loop, error: seen.append(str(error)))

    @engine.on("epoch_end")
    def fail(loop):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.run(jnp.int32(0), [1], epochs=1)
    assert seen == [{"epoch/loss": 1}, "disk gone"]


@pytest.mark.parametrize(
    ("event", "meant"),
    [("epoch_ends", "epoch_end"), ("on_step_ends", "step_end"), ("exeption", "exception"), ("saved", "save")],
)
def test_unknown_event_is_refused_with_a_suggestion(event, meant):
    with pytest.raises(ValueError, match=rf"'{event}' is not an event\. Did you mean {meant}\?"):
        Engine(add).on(event)(lambda loop: None)


def test_unknown_event_without_a_similar_name_is_refused():
    with pytest.raises(ValueError, match=r"'xyz' is not an event\.$"):
        Engine(add).on("xyz")(lambda loop: None)


@pytest.mark.parametrize(
    ("event", "function", "needs"),
    [
        ("step_end", lambda: None, r"\(loop\), got \(\)"),
        ("step_end", lambda loop, metrics: None, r"\(loop\), got \(loop, metrics\)"),
        ("log", lambda loop: None, r"\(loop, record\), got \(loop\)"),
        ("exception", lambda loop: None, r"\(loop, error\), got \(loop\)"),
    ],
    ids=["none", "one too many", "no record", "no error"],
)
def test_function_with_the_wrong_arguments_is_refused_when_it_is_added(event, function, needs):
    with pytest.raises(TypeError, match=f"needs the arguments {needs}"):
        Engine(add).on(event)(function)


# The state of the host half.


def test_host_state_is_reset_before_every_new_run():
    counter = Counter(start=10)
    engine = Engine(add, [counter])
    counts = []
    for _ in range(2):
        engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
        counts.append(counter.count)
    assert counts == [13, 13]


def test_host_state_is_reset_after_a_failed_run():
    counter = Counter()
    engine = Engine(add, [counter])
    with pytest.raises(ValueError, match="can be read only once"):
        engine.run(jnp.int32(0), iter([1, 1]), epochs=2)
    engine.run(jnp.int32(0), [1], epochs=1)
    assert counter.count == 1


def test_host_state_is_restored_from_a_result():
    counter = Counter()
    engine = Engine(add, [counter])
    first = engine.run(jnp.int32(0), [1, 1, 1], epochs=1)
    engine.run(jnp.int32(0), [1], epochs=1)
    engine.run(first, [1, 1, 1], epochs=2)
    assert counter.count == 6


def test_host_state_is_restored_in_another_engine():
    first = Engine(add, [Counter("a"), Counter("b", start=100)]).run(jnp.int32(0), [1, 1], epochs=1)
    a, b = Counter("a"), Counter("b")
    Engine(add, [b, a]).run(first, [1, 1], epochs=2)
    assert (a.count, b.count) == (4, 104)


def test_another_engine_starts_a_callback_from_its_initial_state():
    counter = Counter()
    Engine(add, [counter]).run(jnp.int32(0), [1, 1], epochs=1)
    Engine(add, [counter]).run(jnp.int32(0), [1], epochs=1)
    assert counter.count == 1


def test_host_state_may_hold_json_values_arrays_and_bytes():
    kept = {"n": 3, "x": 0.1, "none": None, "list": [1, ["a"]], "array": np.arange(3, dtype=np.int16), "bytes": b"\0\1"}

    class Keeps(Callback):
        def get_state(self):
            return kept

        def set_state(self, state):
            self.got = state

    keeps = Keeps()
    Engine(add, [keeps])
    array = keeps.got.pop("array")
    assert (array.tolist(), array.dtype) == ([0, 1, 2], np.int16)
    assert keeps.got == {name: value for name, value in kept.items() if name != "array"}


# What events may change.


def test_state_assigned_in_an_event_is_used_by_the_next_step():
    engine = Engine(add)

    @engine.on("step_end")
    def assign(loop):
        loop.state = loop.state + 100

    assert int(engine.run(jnp.int32(0), [1, 1, 1, 1], epochs=3).state) == 12 * 101


@pytest.mark.parametrize(("event", "total"), [("run_begin", 1002), ("epoch_end", 1002), ("save", 2002)])
def test_state_may_be_assigned_in_any_event(event, total):
    engine = Engine(add)
    engine.on(event)(lambda loop: setattr(loop, "state", loop.state + 1000))
    assert int(engine.run(jnp.int32(0), [1, 1], epochs=1).state) == total


def test_assigned_state_is_not_donated():
    mine = jnp.int32(100)
    engine = Engine(add)
    engine.on("run_begin")(lambda loop: setattr(loop, "state", mine))
    assert int(engine.run(jnp.int32(0), [1, 1], epochs=1).state) == 102
    assert int(mine) == 100


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"w": jnp.zeros(3), "n": 0}, r"w: float32\[2\] became float32\[3\]"),
        ({"w": jnp.zeros(2, jnp.int32), "n": 0}, r"w: float32\[2\] became int32\[2\]"),
        ({"w": jnp.zeros(2)}, r"n: int32\[\] is gone"),
        ({"w": jnp.zeros(2), "n": 0, "m": 0}, r"m: int32\[\] is new"),
    ],
    ids=["shape", "dtype", "leaf gone", "leaf new"],
)
def test_assigned_state_of_another_structure_is_refused_naming_the_leaf(new, said):
    engine = Engine(lambda state, batch: (state, {}))
    engine.on("step_end")(lambda loop: setattr(loop, "state", new))
    with pytest.raises(ValueError, match=f"loop.state needs a state like the one it has: {said}"):
        engine.run({"w": jnp.zeros(2), "n": 0}, [1], epochs=1)


def test_batch_assigned_in_step_begin_is_used_by_the_step():
    seen = []
    engine = Engine(add)
    engine.on("step_begin")(lambda loop: setattr(loop, "batch", loop.batch * 10))
    engine.on("step_begin")(lambda loop: setattr(loop, "batch", loop.batch + 1))
    engine.on("step_end")(lambda loop: seen.append(int(loop.batch)))
    assert int(engine.run(jnp.int32(0), [1, 2, 3], epochs=1).state) == 63
    assert seen == [11, 21, 31]


def test_assigned_batch_lasts_for_one_step():
    engine = Engine(add)
    engine.on("step_begin", when=2)(lambda loop: setattr(loop, "batch", 1000))
    assert int(engine.run(jnp.int32(0), [1, 1, 1], epochs=1).state) == 1002


def test_batch_that_a_handler_only_changes_in_place_is_used_by_the_step():
    engine = Engine(lambda state, batch: (state + batch["x"].sum(), {}), steps_per_call=2)
    engine.on("step_begin", when=2)(lambda loop: loop.batch.update(x=np.full(2, 100.0)))
    result = engine.run(jnp.float32(0), Batches({"x": np.ones(6)}, 2), epochs=1)
    assert float(result.state) == 2 + 200 + 2


def test_batch_is_not_drawn_for_a_handler_that_does_not_read_it():
    drawn = []

    def numbers():
        for number in (1, 2, 3):
            drawn.append(number)
            yield number

    before = []
    engine = Engine(add)
    engine.on("step_begin")(lambda loop: before.append(len(drawn)))
    engine.run(jnp.int32(0), lambda epoch: numbers(), epochs=1, epoch_steps=3)
    assert before[1:] == [1, 2]


def test_batch_can_only_be_replaced_before_its_step():
    engine = Engine(add)
    engine.on("step_end")(lambda loop: setattr(loop, "batch", 5))
    with pytest.raises(RuntimeError, match="loop.batch can only be replaced in on_step_begin"):
        engine.run(jnp.int32(0), [1], epochs=1)


def test_batch_after_a_stop_before_its_step_is_that_of_the_last_step():
    seen = []
    engine = Engine(add)

    @engine.on("step_begin", when=2)
    def stop(loop):
        loop.batch = loop.batch * 10
        loop.stop("no further")

    engine.on("run_end")(lambda loop: seen.append(int(loop.batch)))
    result = engine.run(jnp.int32(0), [1, 2, 3], epochs=1)
    assert (result.step, seen) == (1, [1])


@pytest.mark.parametrize("name", ["step_end", "epoch_begin", "onstep_end", "On_step_end", "onEpochEnd"])
def test_method_that_looks_like_an_event_is_refused_when_the_class_is_defined(name):
    with pytest.raises(TypeError, match=rf"Mine.{name} is never called. The event is on_(step|epoch)_(begin|end)\."):
        type("Mine", (Callback,), {name: lambda self, loop: None})


def test_mixin_with_a_misspelt_event_is_refused():
    mixin = type("Mixin", (), {"on_stepend": lambda self, loop: None})
    with pytest.raises(TypeError, match=r"Mine.on_stepend is not an event. Did you mean on_step_end\?"):
        type("Mine", (mixin, Callback), {})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("on_batch_end", "on_step_end"),
        ("on_train_batch_start", "on_step_begin"),
        ("on_train_begin", "on_run_begin"),
        ("on_fit_end", "on_run_end"),
        ("on_epoch_finish", "on_epoch_end"),
    ],
)
def test_event_of_another_engine_is_refused_with_ours(theirs, ours):
    with pytest.raises(TypeError, match=rf"Mine.{theirs} is not an event. Did you mean {ours}\?"):
        type("Mine", (Callback,), {theirs: lambda self, loop: None})


def test_cadence_that_governs_nothing_is_refused():
    def engine(**attributes):
        Engine(add, [type("Mine", (Callback,), attributes)()])

    with pytest.raises(ValueError, match=r"Mine.when=every\(steps=5\) has no effect on on_log"):
        engine(when=5, on_log=lambda self, loop, record: None)
    with pytest.raises(ValueError, match=r"has no effect on update. Its cadence is update_when"):
        engine(when=5, update=lambda self, carry, ctx: (carry, ctx))
    with pytest.raises(ValueError, match=r"Mine.update_when=every\(steps=5\) has no effect, because Mine"):
        engine(update_when=5, on_step_end=lambda self, loop: None)


def test_misspelt_compiled_half_is_a_warning_when_the_class_is_defined():
    with pytest.warns(UserWarning, match=r"Mine.updat is never called by the engine. Did you mean update\?") as warned:
        type("Mine", (Callback,), {"updat": lambda self, carry, ctx: (carry, ctx)})
    assert warned[0].filename == __file__
    type("Fine", (Callback,), {"updates": property(lambda self: 0), "log": lambda self: None})


def test_engine_is_copied_and_pickled_as_its_configuration():
    engine = Engine(add, [Transcript(name="T")], log_every=7)
    engine.run(jnp.int32(0), [1], epochs=1)
    for another in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert repr(another) == repr(engine)
        assert another.callbacks["T"] is not engine.callbacks["T"]
        assert int(another.run(jnp.int32(0), [1, 2], epochs=1).state) == 3


def test_result_that_is_copied_or_pickled_says_what_to_keep_instead():
    result = Engine(add).run(jnp.int32(0), [1], epochs=1)
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"A Result cannot be copied or pickled.* result.state"):
            make_copy(result)


# The compiled half.


def test_compiled_half_sees_the_state_before_and_after_the_step():
    class See(Callback):
        def update(self, carry, ctx):
            return carry, ctx.log(
                step=ctx.step,
                before=ctx.before,
                after=ctx.state,
                batch=ctx.batch,
                loss=ctx.metrics["l"],
                aux=ctx.aux["a"],
            )

    def step(state, batch):
        return state + batch, {"l": batch * 2}, {"a": batch * 3}

    history = Engine(step, [See()], log_every=1).run(jnp.int32(10), [1, 2], epochs=1).history
    seen = [history[f"train/{name}"] for name in ("step", "before", "after", "batch", "loss", "aux")]
    assert seen == [[0, 1], [10, 11], [11, 13], [1, 2], [2, 4], [3, 6]]


def test_state_replaced_by_a_compiled_half_is_used_by_the_next_step():
    class Clip(Callback):
        def update(self, carry, ctx):
            return carry, ctx.replace(state=jnp.minimum(ctx.state, 5))

    states = []
    engine = Engine(add, [Clip()])
    engine.on("step_end")(lambda loop: states.append(int(loop.state)))
    assert int(engine.run(jnp.int32(0), [3, 3, -1], epochs=1).state) == 4
    assert states == [3, 5, 4]


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("when", [1, 2])
def test_aux_that_a_compiled_half_replaces_reaches_the_later_ones(when, steps_per_call):
    class Doubles(Callback):
        update_when = when

        def update(self, carry, ctx):
            return carry, ctx.replace(aux={"grads": 2 * ctx.aux["grads"]})

    class Sees(Callback):
        def __init__(self, name):
            self.name = name

        def update(self, carry, ctx):
            return carry, ctx.log({self.name: ctx.aux["grads"]})

    def step(state, batch):
        return state, {}, {"grads": batch}

    engine = Engine(step, [Sees("before"), Doubles(), Sees("after")], log_every=1, steps_per_call=steps_per_call)
    history = engine.run(jnp.float32(0), [1.0, 2.0, 3.0, 4.0], epochs=1).history
    assert history["train/before"] == [1, 2, 3, 4]
    assert history["train/after"] == [n * (2 if n % when == 0 else 1) for n in (1, 2, 3, 4)]


def test_compiled_half_with_a_cadence_cannot_change_the_tree_of_aux():
    class Adds(Callback):
        update_when = 2

        def update(self, carry, ctx):
            return carry, ctx.replace(aux={"more": ctx.state})

    with pytest.raises(
        ValueError, match="Adds.update, which is not due at every step, needs to return a dict as aux like"
    ):
        Engine(lambda s, b: (s, {}), [Adds()]).run(jnp.float32(0), [1.0, 2.0], epochs=1)


def test_compiled_half_runs_at_its_cadence():
    class Reset(Callback):
        update_when = every(steps=3)

        def update(self, carry, ctx):
            return carry, ctx.replace(state=jnp.zeros_like(ctx.state)).log(was=ctx.state)

    states = []
    engine = Engine(add, [Reset()], log_every=1)
    engine.on("step_end")(lambda loop: states.append(int(loop.state)))
    history = engine.run(jnp.int32(0), [1] * 8, epochs=1).history
    assert states == [1, 2, 0, 1, 2, 0, 1, 2]
    assert (history.steps("train/was"), history["train/was"]) == ([3, 6], [3, 3])


def test_carry_is_kept_between_steps_and_can_be_read():
    total, seen = Total(), []
    engine = Engine(add, [Idle(), total])
    engine.on("step_end")(lambda loop: seen.append(int(loop.carry(total))))
    result = engine.run(jnp.int32(7), [1, 2, 3], epochs=1)
    assert (seen, int(result.carry(total)), int(result.state)) == ([1, 3, 6], 6, 13)


def test_carry_is_reset_by_a_new_run_and_restored_from_a_result():
    total = Total()
    engine = Engine(add, [total])
    first = engine.run(jnp.int32(0), [1, 2], epochs=1)
    fresh = engine.run(jnp.int32(0), [1, 2], epochs=1)
    rest = engine.run(first, [1, 2], epochs=3)
    assert [int(result.carry(total)) for result in (first, fresh, rest)] == [3, 3, 9]


def test_carry_of_a_callback_outside_the_run_is_refused():
    total = Total()
    result = Engine(add, [total, Counter()]).run(jnp.int32(0), [1], epochs=1)
    with pytest.raises(ValueError, match=r"This Total is not among the run's callbacks \['Total', 'Counter'\]"):
        result.carry(Total())


def test_carry_of_a_callback_without_a_compiled_half_is_refused():
    counter = Counter()
    result = Engine(add, [counter]).run(jnp.int32(0), [1], epochs=1)
    with pytest.raises(ValueError, match="Counter has no carry"):
        result.carry(counter)


# Random numbers of a compiled half.


def draws(names, **targets):
    """Return the random numbers that each named callback drew, step by step."""
    result = Engine(add, [Draw(name) for name in names], log_every=1).run(
        jnp.int32(0), [1, 1, 1, 1], rng=jax.random.key(0), **targets
    )
    return {name: result.history[f"train/draw/{name}"] for name in names}


def test_random_numbers_differ_by_callback_and_step():
    numbers = draws("abc", epochs=2)
    assert len({number for column in numbers.values() for number in column}) == 3 * 8


def test_random_numbers_do_not_depend_on_other_callbacks():
    assert draws("abc", epochs=1)["b"] == draws("b", epochs=1)["b"] == draws("cb", epochs=1)["b"]


def test_random_numbers_are_the_same_after_resuming():
    engine = Engine(add, [Draw("a")], log_every=1)
    part = engine.run(jnp.int32(0), [1, 1, 1, 1], steps=3, rng=jax.random.key(0))
    rest = engine.run(part, [1, 1, 1, 1], epochs=2, rng=jax.random.key(0))
    assert part.history["train/draw/a"] + rest.history["train/draw/a"] == draws("a", epochs=2)["a"]


def test_random_numbers_of_the_step_do_not_depend_on_callbacks():
    def step(state, batch, rng):
        return state + jax.random.uniform(rng), {}

    states = [
        np.asarray(Engine(step, callbacks).run(jnp.float32(0), [1, 1], epochs=1, rng=jax.random.key(0)).state)
        for callbacks in ([], [Draw("a")])
    ]
    assert states[0].tobytes() == states[1].tobytes()


# What is freed.


class Data(list):
    """A list that can have weak references."""


def watched(callback):
    """Return weak references to an engine, its data and its callback, then the engine and the data."""
    data, engine = Data([1, 1, 1]), Engine(add, [callback, Idle()])
    return [weakref.ref(engine), weakref.ref(data), weakref.ref(callback)], engine, data


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_finished_engine_is_freed_at_once_with_its_data_and_callbacks():
    alive, engine, data = watched(Counter())
    result = engine.run(jnp.int32(0), data, epochs=1)
    del engine, data, result
    assert [reference() for reference in alive] == [None, None, None]


@pytest.mark.usefixtures("no_collector")
def test_engine_whose_iteration_was_left_early_is_freed_at_once():
    alive, engine, data = watched(Counter())
    with engine.steps(jnp.int32(0), data, epochs=1) as steps:
        for loop in steps:
            if loop.step == 2:
                break
    del engine, data, steps, loop
    assert [reference() for reference in alive] == [None, None, None]


@pytest.mark.usefixtures("no_collector")
def test_failed_engine_is_freed_at_once():
    class Fails(Counter):
        def on_step_end(self, loop):
            raise OSError("disk gone")  # RaiseIn would keep the error, and with it every frame of its traceback

    alive, engine, data = watched(Fails())
    with contextlib.suppress(OSError):
        engine.run(jnp.int32(0), data, epochs=1)
    del engine, data
    assert [reference() for reference in alive] == [None, None, None]
