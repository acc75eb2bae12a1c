"""Data sources: which ones are accepted, when batches are drawn, how a run resumes, and which errors are raised."""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import refilled
from onstep import Batches, Callback, Engine, evaluate, every
from onstep.snapshot import unpack
from onstep.testing import EVENT_NAMES, FakeLoader, FakeLoaderIterator, SizedData, StopAt, Transcript
from onstep.testing import counting_step as add


def recorded(batches, drawn):
    """Yield the batches, and append each to `drawn` as it is drawn."""
    for batch in batches:
        drawn.append(batch)
        yield batch


class EndsOnce:
    """An iterator that fails if it is asked again after its end, so that a test cannot hang."""

    def __init__(self, batches):
        self.answers = iter([*batches, StopIteration(), AssertionError("asked again after the end")])

    def __iter__(self):
        return self

    def __next__(self):
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Live:
    """A live source of so many batches. It fails if it is asked for more, where a real one would block."""

    def __init__(self, batches):
        self.left = batches

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        assert self.left >= 0, "asked for a batch that no step needs"
        return 1


class SizedLoader(FakeLoader):
    def __len__(self):
        return len(self.batches)


def saves_and_epochs(when=1):
    """Write down the steps of saves and of ends of epochs."""
    return Transcript(quiet=set(EVENT_NAMES) - {"save", "epoch_end"}, when=when)


# Data sources.


@pytest.mark.parametrize(
    "data",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        SizedData([1, 2, 3], TypeError("no len")),
        SizedData([1, 2, 3], NotImplementedError()),
        lambda epoch: [1, 2, 3],
        lambda epoch: iter([1, 2, 3]),
        FakeLoader([1, 2, 3]),
        Batches(np.arange(1, 4), 1),
    ],
    ids=[
        "list",
        "tuple",
        "range",
        "len raises TypeError",
        "len raises NotImplementedError",
        "callable to a list",
        "callable to an iterator",
        "loader",
        "Batches",
    ],
)
def test_reiterable_source_is_read_again_every_epoch(data):
    def step(state, batch):
        return state + jnp.sum(batch), {}

    events = saves_and_epochs()
    result = Engine(step, [events]).run(jnp.int32(0), data, epochs=2)
    assert (int(result.state), result.step, result.epoch) == (12, 6, 2)
    assert events.steps("epoch_end") == [3, 6]


def test_batch_may_be_any_tree_of_arrays():
    def step(state, batch):
        (x, extra), y = batch["pair"], batch["y"]
        return state + x.sum() + extra + y, {}

    batches = [{"pair": (np.ones(2), 10), "y": jnp.float32(100)}] * 2
    assert Engine(step).run(jnp.float32(0), batches, epochs=1).state == 2 * 112


def test_callable_receives_the_epoch_number():
    result = Engine(add).run(jnp.int32(0), lambda epoch: [10**epoch] * 2, epochs=3)
    assert int(result.state) == 222


def test_generator_serves_a_run_with_a_target_in_steps():
    assert int(Engine(add).run(jnp.int32(0), itertools.count(1), steps=4).state) == 10


def test_endless_source_has_epochs_of_epoch_steps():
    events, drawn = saves_and_epochs(), []
    result = Engine(add, [events]).run(jnp.int32(0), recorded(itertools.count(), drawn), epochs=3, epoch_steps=5)
    assert (result.step, result.epoch, events.steps("epoch_end")) == (15, 3, [5, 10, 15])
    assert drawn == list(range(15))


def test_epoch_steps_continues_in_the_data_where_the_last_epoch_ended():
    batches = []
    engine = Engine(add)

    @engine.on("step_end")
    def note(loop):
        batches.append(int(loop.batch))

    engine.run(jnp.int32(0), lambda number: [10 * number + n for n in range(3)], epochs=2, epoch_steps=4)
    assert batches == [0, 1, 2, 10, 11, 12, 20, 21]


def test_iterator_of_unknown_length_is_one_epoch():
    events = saves_and_epochs()
    result = Engine(add, [events]).run(jnp.int32(0), (n for n in range(11)), epochs=1)
    assert (result.step, result.epoch, events.steps("epoch_end")) == (11, 1, [11])


# When batches are drawn.


def test_no_batch_is_drawn_ahead_if_len_is_known():
    data, counts = SizedData([1, 2, 3], 3), []
    engine = Engine(add)

    @engine.on("step_end")
    def note(loop):
        counts.append((loop.step, len(data.drawn)))

    engine.run(jnp.int32(0), data, epochs=2)
    assert counts == [(n, n) for n in range(1, 7)]


@pytest.mark.parametrize("when", [1, 4])
def test_data_without_a_length_is_asked_for_a_batch_only_after_everything_due_at_the_step(when):
    drawn, counts = [], []
    engine = Engine(add, log_every=when)
    for event in ("step_end", "log", "save"):
        note = functools.partial(lambda event, loop, *record: counts.append((event, loop.step, len(drawn))), event)
        engine.on(event, when=1 if event == "log" else when)(note)
    engine.run(jnp.int32(0), recorded(itertools.count(), drawn), steps=8)
    assert counts == [
        line
        for step in range(when, 9, when)
        for line in [("step_end", step, step), ("log", step, step), ("save", step, step + (step < 8))]
    ]


@pytest.mark.parametrize("epoch_steps", [None, 3, 7])
@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"steps_per_call": 4}, {"prefetch": 3}], ids=str)
@pytest.mark.parametrize("kind", [lambda live: live, lambda live: lambda epoch: live], ids=["iterator", "callable"])
def test_run_to_a_number_of_steps_draws_no_further_batch(kind, options, when, epoch_steps):
    live, engine = Live(7), Engine(add, [saves_and_epochs(when)], **options)
    result = engine.run(jnp.int32(0), kind(live), steps=7, epoch_steps=epoch_steps)
    assert (int(result.state), live.left) == (7, 0)


def test_run_to_a_number_of_epochs_of_epoch_steps_draws_no_further_batch():
    for prefetch in (0, 3):
        assert Engine(add, prefetch=prefetch).run(jnp.int32(0), Live(6), epochs=2, epoch_steps=3).step == 6


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resumed_run_draws_what_its_new_target_needs(prefetch):
    live, engine = Live(9), Engine(add, prefetch=prefetch)
    result = engine.run(jnp.int32(0), live, steps=3)
    for target in (4, 9):
        result = engine.run(result, live, steps=target)
    assert (int(result.state), live.left) == (9, 0)


@pytest.mark.parametrize("ends", ["stop", "error", "break"])
def test_source_that_has_no_further_batch_yet_does_not_delay_the_end_of_a_run(ends):
    def train():
        engine = Engine(add)

        @engine.on("step_end")
        def end(loop):
            if loop.step == 3 and ends != "break":
                loop.stop("enough") if ends == "stop" else int("enough")

        with engine.steps(jnp.int32(0), Live(3), steps=7) as steps:
            for loop in steps:
                if loop.step == 3:
                    break
        return steps.result.stopped

    if ends == "error":
        with pytest.raises(ValueError, match="invalid literal") as caught:
            train()
        assert caught.value.__notes__ == ["onstep: raised by end.on_step_end at step 3"]
    else:
        assert train() == ("enough" if ends == "stop" else "the for loop was left early")


def test_iterator_that_has_ended_is_not_asked_again():
    events = saves_and_epochs(when=2)
    Engine(add, [events]).run(jnp.int32(0), EndsOnce([1, 2, 3, 4]), epochs=1)
    Engine(add, [events]).run(jnp.int32(0), EndsOnce([1, 2, 3]), epochs=1)
    assert events.steps("epoch_end") == [4, 3]


@pytest.mark.parametrize("through", ["result", "other data"])
def test_target_at_the_last_batch_of_an_epoch_leaves_its_end_to_the_resumed_run(through):
    def data(epoch):
        yield from [1, 2, 3]

    whole, parts = saves_and_epochs(every(epochs=1)), saves_and_epochs(every(epochs=1))
    uninterrupted = Engine(add, [whole], log_every=2).run(jnp.int32(0), data, epochs=3)
    engine = Engine(add, [parts], log_every=2)
    part = engine.run(jnp.int32(0), data, steps=6)
    assert (part.epoch, parts.steps("epoch_end"), parts.steps("save")) == (1, [3], [3, 6])
    yielded = []
    here = data if through == "result" else lambda epoch: data(epoch)
    with engine.steps(part, here, epochs=3, when=every(epochs=1)) as steps:
        yielded = [loop.step for loop in steps]
    assert yielded == [6, 9]
    assert parts.steps("epoch_end") == whole.steps("epoch_end") == [3, 6, 9]
    assert parts.steps("save") == [3, 6, 9]
    assert (steps.result.epoch, int(steps.result.state)) == (3, int(uninterrupted.state))
    assert steps.result.history["epoch/loss"] == [2, 2]
    assert steps.result.latest == uninterrupted.latest


def test_handler_by_steps_and_epochs_is_due_once_at_a_step_that_ends_an_epoch_of_unknown_length():
    noted = []
    engine = Engine(add)
    for event in ("step_end", "save"):
        engine.on(event, when=every(3) | every(epochs=1))(lambda loop, event=event: noted.append((event, loop.step)))
    with engine.steps(jnp.int32(0), lambda n: iter([1] * 3), epochs=2, when=every(3) | every(epochs=1)) as steps:
        assert [loop.step for loop in steps] == [3, 6]
    assert noted == [("step_end", 3), ("save", 3), ("step_end", 6), ("save", 6)]


@pytest.mark.parametrize("event", ["load", "run_begin", "epoch_begin"])
def test_no_batch_is_drawn_if_the_run_stops_before_its_first_step(event):
    drawn = []
    engine = Engine(add)

    @engine.on(event)
    def stop(loop):
        loop.stop("not today")

    result = engine.run(jnp.int32(0), recorded([1, 2], drawn), epochs=1)
    assert (result.step, result.stopped, drawn) == (0, "not today", [])


@pytest.mark.parametrize("kind", [FakeLoader, SizedLoader], ids=["drawn ahead", "not drawn ahead"])
def test_saved_position_does_not_depend_on_batches_drawn_ahead(kind):
    positions = []
    engine = Engine(add)

    @engine.on("save")
    def save(loop):
        positions.append(unpack(loop.snapshot().host)["data"])

    data = kind([1, 2, 3])
    engine.run(jnp.int32(0), data, steps=2)
    assert [(place["used"], place["loader"]) for place in positions] == [(1, {"next": 1}), (2, {"next": 2})]
    assert len(data.drawn) == 2


# Resuming in the middle of the data.


@pytest.mark.parametrize("kind", [FakeLoader, SizedLoader], ids=["without len", "with len"])
def test_loader_resumes_from_its_own_state_and_reads_nothing_twice(kind, capsys):
    engine = Engine(add, [StopAt(2, final=False)])
    part = engine.run(jnp.int32(0), kind([1, 2, 3, 4]), epochs=2)
    fresh = kind([1, 2, 3, 4])
    rest = engine.run(part, fresh, epochs=2)
    assert (rest.step, int(rest.state)) == (8, 20)
    assert (fresh.sought, fresh.drawn) == ([2], [3, 4, 1, 2, 3, 4])
    assert "skipping" not in capsys.readouterr().err


def test_source_without_state_skips_used_batches_and_says_so_once(capsys):
    data, ran = SizedData([1, 2, 3, 4], 4), []
    engine = Engine(add, [StopAt(2, final=False)])
    part = engine.run(jnp.int32(0), [1, 2, 3, 4], epochs=2)

    @engine.on("step_begin")
    def note(loop):
        ran.append(int(loop.batch))

    rest = engine.run(part, data, epochs=2)
    assert int(rest.state) == 20
    assert (data.drawn, ran) == ([1, 2, 3, 4] * 2, [3, 4, 1, 2, 3, 4])
    assert capsys.readouterr().err.count("skipping the first 2 batches") == 1


def test_callable_resumes_in_the_interrupted_epoch():
    called = []

    def data(epoch):
        called.append(epoch)
        return [10**epoch] * 3

    engine = Engine(add, [StopAt(5, final=False)])
    part = engine.run(jnp.int32(0), data, epochs=3)
    rest = engine.run(part, lambda epoch: data(epoch), epochs=3)
    assert (int(rest.state), called) == (333, [0, 1, 1, 2])


def test_epoch_steps_resumes_in_the_middle_of_a_pass():
    engine = Engine(add, [StopAt(5, final=False)])
    data = [1, 20, 300]
    whole = Engine(add).run(jnp.int32(0), data, epochs=4, epoch_steps=2)
    part = engine.run(jnp.int32(0), data, epochs=4, epoch_steps=2)
    rest = engine.run(part, list(data), epochs=4, epoch_steps=2)
    assert (int(rest.state), rest.step) == (int(whole.state), 8)


@pytest.mark.parametrize("kind", [list, FakeLoader, SizedLoader], ids=["list", "loader", "loader with len"])
def test_batch_that_was_drawn_but_not_used_comes_first_when_resumed(kind):
    asked = []
    engine = Engine(add)

    @engine.on("step_begin")
    def interrupt(loop):
        asked.append(int(loop.batch))
        if asked == [1, 2, 3]:
            loop.stop("before step 3", final=False)

    part = engine.run(jnp.int32(0), kind([1, 2, 3, 4]), epochs=1)
    rest = engine.run(part, kind([1, 2, 3, 4]), epochs=1)
    assert (part.step, int(part.state)) == (2, 3)
    assert (asked, int(rest.state)) == ([1, 2, 3, 3, 4], 10)


def test_resuming_with_fewer_batches_than_were_used_is_an_error():
    engine = Engine(add, [StopAt(3, final=False)])
    part = engine.run(jnp.int32(0), lambda epoch: iter([1, 2, 3, 4]), epochs=1)
    with pytest.raises(ValueError, match="had used 3 batches of this pass, but the data now has only 2"):
        engine.run(part, lambda epoch: iter([1, 2]), epochs=2)


@pytest.mark.parametrize("steps", [3, 4])
def test_generator_resumes_where_the_previous_run_left_it(steps):
    drawn = []
    data = recorded(itertools.count(1), drawn)
    engine = Engine(add)
    part = engine.run(jnp.int32(0), data, steps=steps)
    rest = engine.run(part, data, steps=7)
    assert (int(rest.state), drawn) == (28, [1, 2, 3, 4, 5, 6, 7])


def test_generator_resumes_through_any_number_of_runs():
    data = itertools.count(1)
    engine = Engine(add)
    result = engine.run(jnp.int32(0), data, steps=1)
    for target in (2, 5, 9):
        result = engine.run(result, data, steps=target)
    assert int(result.state) == 45


def test_generator_resumes_after_breaking_out_of_the_iteration():
    data = itertools.count(1)
    engine = Engine(add)
    with engine.steps(jnp.int32(0), data, steps=4) as steps:
        next(iter(steps))
    assert int(engine.run(steps.result, data, steps=4).state) == 10


def test_generator_read_beyond_the_result_is_refused():
    data = itertools.count(1)
    engine = Engine(add)
    early = engine.run(jnp.int32(0), data, steps=2)
    engine.run(early, data, steps=5)
    with pytest.raises(ValueError, match=r"count was read beyond the step from which the run resumes\. Pass a new one"):
        engine.run(early, data, steps=5)


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        ([1, 2, 3, 4], {}, "epochs have 5 batches, this run's 4. Pass the same data"),
        (itertools.count(1), {}, "epochs have 5 batches, this run's an unknown number of"),
        (
            [1, 2, 3, 4, 5],
            {"epoch_steps": 3},
            "epochs have 5 batches, this run's 3. Pass the same data, batch size and epoch_steps",
        ),
    ],
    ids=["shorter", "unknown", "epoch_steps"],
)
def test_resuming_with_another_epoch_length_names_both_lengths(data, options, match):
    engine = Engine(add)
    part = engine.run(jnp.int32(0), [1, 2, 3, 4, 5], steps=3)
    with pytest.raises(ValueError, match=match):
        engine.run(part, data, steps=10, **options)


@pytest.mark.parametrize("through", ["result", "snapshot"])
def test_callable_whose_pass_has_another_length_than_in_the_saved_run_names_both(through):
    engine = Engine(add)
    part = engine.run(jnp.int32(0), lambda epoch: [1] * (5 + epoch), steps=8)
    state = part
    if through == "snapshot":
        engine.on("load")(lambda loop: loop.restore(part.snapshot))
        state = jnp.int32(0)
    with pytest.raises(ValueError, match="Pass 2 of the data had 6 batches in the saved run, but has 4 in this one"):
        engine.run(state, lambda epoch: [1] * 4, steps=20)
    assert engine.run(state, lambda epoch: [1] * (5 + epoch), steps=20).step == 20


class Augmented:
    """Data that draw from a random generator of a callback."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 6

    def __iter__(self):
        for _ in range(6):
            yield self.generator.integers(1000)


class Generator(Callback):
    """Save and restore a random generator."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def get_state(self):
        return self.generator.bit_generator.state

    def set_state(self, state):
        self.generator.bit_generator.state = state


@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("cut", [4, 6, 10])
def test_generator_that_a_callback_restores_is_not_advanced_by_skipped_batches(cut, steps_per_call):
    def run(state, callback, steps):
        engine = Engine(add, [callback, Keep()], steps_per_call=steps_per_call)
        return engine.run(state, Augmented(callback.generator), steps=steps), engine.callbacks["Keep"].batches

    class Keep(Callback):
        def __init__(self):
            self.batches = []

        def on_step_end(self, loop):
            self.batches.append(int(loop.batch))

    whole, expected = run(jnp.int32(0), Generator(), 12)
    part, first = run(jnp.int32(0), Generator(), cut)
    rest, second = run(part, Generator(), 12)
    assert first + second == expected
    assert int(rest.state) == int(whole.state)


def test_negative_length_means_that_the_data_has_none():
    class Dataset:
        def __len__(self):
            return -1  # as of an endless tf.data.Dataset

        def __iter__(self):
            return iter([1, 2, 3])

    assert Engine(lambda s, b: (s + b, {})).run(0, Dataset(), epochs=2).step == 6


def test_new_generator_skips_used_batches(capsys):
    engine = Engine(add)
    part = engine.run(jnp.int32(0), itertools.count(1), steps=2)
    assert int(engine.run(part, itertools.count(1), steps=4).state) == 10
    assert "skipping the first 2 batches" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "iterator"])
def test_batch_replaced_before_a_stop_is_replaced_once(kind):
    asked, data = [], kind([1, 2, 3, 4])
    engine = Engine(add)

    @engine.on("step_begin")
    def double(loop):
        asked.append(int(loop.batch))
        loop.batch = loop.batch * 2
        if asked == [1, 2, 3]:
            loop.stop("before step 3", final=False)

    part = engine.run(jnp.int32(0), data, epochs=1)
    rest = engine.run(part, data, epochs=1)
    assert (asked, int(rest.state)) == ([1, 2, 3, 3, 4], 20)


# Errors.


@pytest.mark.parametrize(
    "data",
    [[], (), SizedData([], TypeError("no len")), lambda epoch: [], FakeLoader([])],
    ids=["list", "tuple", "without len", "callable", "loader"],
)
def test_empty_data_are_an_error_before_anything_is_saved(data):
    events = saves_and_epochs()
    with pytest.raises(ValueError, match="yielded no batches in epoch 1"):
        Engine(add, [events]).run(jnp.int32(0), data, epochs=1)
    assert (events.steps("save"), events.steps("epoch_end")) == ([], [])


def test_callable_without_batches_in_a_later_epoch_is_an_error_in_that_epoch():
    events = saves_and_epochs()
    with pytest.raises(ValueError, match="yielded no batches in epoch 2"):
        Engine(add, [events]).run(jnp.int32(0), lambda epoch: [1, 2] if epoch == 0 else [], epochs=2)
    assert (events.steps("save"), events.steps("epoch_end")) == ([1, 2], [2])


def test_generator_is_exhausted_at_its_second_epoch():
    events = saves_and_epochs()
    with pytest.raises(ValueError, match="exhausted at the start of epoch 2: a generator can be read only once"):
        Engine(add, [events]).run(jnp.int32(0), (n for n in range(12)), steps=24)
    assert (events.steps("save"), events.steps("epoch_end")) == (list(range(1, 13)), [12])


@pytest.mark.parametrize("make", [Engine.run, Engine.plan], ids=["run", "plan"])
def test_generator_for_several_epochs_is_refused_before_the_first_step(make):
    drawn = []
    match = "needs 5 passes over the data, but a generator can be read only once. Pass a list or a callable"
    with pytest.raises(ValueError, match=match):
        make(Engine(add), jnp.int32(0), recorded(range(12), drawn), epochs=5)
    assert drawn == []


@pytest.mark.parametrize("targets", [{"epochs": 5, "steps": 12}, {"epochs": 3, "epoch_steps": 4}], ids=str)
def test_generator_serves_several_epochs_if_it_is_known_to_suffice(targets):
    assert Engine(add).run(jnp.int32(0), iter(range(12)), **targets).step == 12


def test_generator_shorter_than_one_epoch_is_an_error():
    events = saves_and_epochs()
    with pytest.raises(ValueError, match=r"ended after 3 batches, but an epoch needs 5 \(epoch_steps\)"):
        Engine(add, [events]).run(jnp.int32(0), iter([1, 2, 3]), epochs=1, epoch_steps=5)
    assert events.steps("save") == [1, 2, 3]


def test_empty_data_with_epoch_steps_are_an_error():
    with pytest.raises(ValueError, match="ended after 0 batches, but an epoch needs 5"):
        Engine(add).run(jnp.int32(0), [], epochs=1, epoch_steps=5)


def test_len_that_is_too_long_is_an_error_when_the_data_end():
    events = saves_and_epochs(when=2)
    with pytest.raises(ValueError, match=r"has len 5, but pass 1 ended after 3 batches\. Fix its __len__"):
        Engine(add, [events]).run(jnp.int32(0), SizedData([1, 2, 3], 5), epochs=1)
    assert (events.steps("save"), events.steps("epoch_end")) == ([2], [])


def test_len_that_is_too_long_is_an_error_with_a_handler_at_every_step():
    class Source(SizedData):
        def __iter__(self):
            return EndsOnce(self.batches)

    with pytest.raises(ValueError, match=r"has len 5, but pass 1 ended after 3 batches\. Fix its __len__"):
        Engine(add, [saves_and_epochs()]).run(jnp.int32(0), Source([1, 2, 3], 5), epochs=1)


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        (
            SizedData([1] * 5, 3),
            {"epochs": 1},
            "The data has len 3, but pass 1 yielded batch 4. Fix its __len__, or pass",
        ),
        (SizedData([1] * 3, 0), {"epochs": 1}, "The data has len 0, but pass 1 yielded batch 1. Fix its __len__"),
        (SizedLoader([1] * 3), {"epochs": 1}, None),
        (SizedData([1] * 5, 3), {"steps": 3}, None),
        (SizedData([1] * 5, 3), {"epochs": 2, "epoch_steps": 5}, None),
    ],
    ids=["short", "zero", "right", "target in steps", "epoch_steps"],
)
@pytest.mark.parametrize("setup", [{"steps_per_call": 1}, {"steps_per_call": 8}, {"prefetch": 2}], ids=str)
def test_len_that_is_too_short_is_an_error_at_the_end_of_the_epoch(data, options, match, setup):
    events = saves_and_epochs()
    engine = Engine(add, [events], **setup)
    if match is None:
        engine.run(jnp.int32(0), data, **options)
    else:
        with pytest.raises(ValueError, match=match):
            engine.run(jnp.int32(0), data, **options)
        assert events.steps("epoch_end") == []


def test_error_after_the_last_batch_of_sized_data_is_raised():
    def data():
        yield from [1, 2]
        raise OSError("disk gone")

    class Source(SizedData):
        def __iter__(self):
            return data()

    with pytest.raises(OSError, match="disk gone"):
        Engine(add).run(jnp.int32(0), Source([], 2), epochs=1)


X, Y = np.zeros((640, 4), np.float32), np.zeros(640, np.int32)


@pytest.mark.parametrize("run", [Engine(add).run, lambda state, data, **targets: evaluate(add, state, data)])
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (X, r"one array of shape \(640, 4\)\. .* Batches\(x, batch_size\)\. If every row is a batch: list\(x\)"),
        (jnp.zeros(3), r"one array of shape \(3,\)"),
        (
            (X, Y),
            r"a tuple of arrays: float32\[640, 4\] and int32\[640\]\. .* Batches\({\"x\": x, \"y\": y}, batch_size\)",
        ),
        ((X, X), "a tuple of arrays: .* If every array is a batch, pass a list"),
        ([X, Y], "a list of arrays: .* and "),
        ([jnp.asarray(X), Y], "a list of arrays: .* and "),
        (lambda epoch: (X, Y), "a tuple of arrays: .* and "),
    ],
    ids=["array", "jax array", "tuple", "same kind", "list", "jax and numpy", "callable"],
)
def test_arrays_that_are_not_batches_are_refused_with_the_remedy(data, match, run):
    with pytest.raises(TypeError, match=f"data needs to be an iterable of batches, got {match}"):
        run(jnp.int32(0), data, epochs=1)


@pytest.mark.parametrize(
    "data", [list(X[:3]), [X[:8], X[:8], X[:3]], [X[:2, :3], X[:2, :4]], ({"x": X}, {"x": X}), (1, 2), [X], list(Y[:4])]
)
def test_sequences_of_batches_are_accepted(data):
    def step(state, batch):
        return state + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(batch)), {}

    with warnings.catch_warnings(action="ignore"):  # about the shapes
        assert Engine(step).run(jnp.float32(0), data, epochs=1).step == len(data)


@pytest.mark.parametrize("run", [Engine(add).run, Engine(add).plan, lambda s, data, **targets: evaluate(add, s, data)])
def test_callable_without_an_argument_is_refused(run):
    def gen():
        yield 1

    match = r"A callable as data needs one argument, the epoch: data needs the arguments \(epoch\), got \(\)"
    with pytest.raises(TypeError, match=match):
        run(jnp.int32(0), gen, epochs=1)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("place", ["callable", "iter", "get_state"])
def test_stop_iteration_that_is_not_the_end_of_the_data_is_an_error(place, prefetch):
    def stop(*args):
        return next(iter(()))

    class Iterator(FakeLoaderIterator):
        def get_state(self):
            return stop() if self.next == 1 else super().get_state()

    class Loader(FakeLoader):
        def __iter__(self):
            return stop() if place == "iter" else Iterator(self)

    data = stop if place == "callable" else Loader([1, 2, 3])
    with pytest.raises(RuntimeError, match="The data raised StopIteration outside of __next__") as caught:
        Engine(add, [saves_and_epochs()], prefetch=prefetch).run(jnp.int32(0), data, epochs=1)
    assert isinstance(caught.value.__cause__, StopIteration)
    assert caught.value.__notes__[0].startswith("onstep: raised by the data, at batch")


@pytest.mark.parametrize(
    ("data", "kind"),
    [({"x": [1, 2]}, "dict"), ("abc", "str"), (5, "int"), (lambda epoch: 5, "int")],
    ids=["dict", "string", "number", "callable to a number"],
)
def test_object_that_is_not_a_data_source_is_refused(data, kind):
    with pytest.raises(TypeError, match=f"data needs to be an iterable of batches or a callable .*, got {kind}"):
        Engine(add).run(jnp.int32(0), data, epochs=1)


def failing():
    """Yield six batches, then raise an error."""
    yield from range(1, 7)
    raise OSError("disk gone")


class Failing:
    def __iter__(self):
        return failing()


class SizedFailing(Failing):
    def __len__(self):
        return 12


@pytest.mark.parametrize("when", [1, 4, every(epochs=1)], ids=repr)
@pytest.mark.parametrize("data", [Failing, SizedFailing, failing], ids=["without len", "with len", "generator"])
def test_error_of_the_data_is_raised_unchanged_with_a_note_of_its_origin(data, when):
    with pytest.raises(OSError, match="disk gone") as caught:
        Engine(add, [saves_and_epochs(when)]).run(jnp.int32(0), data(), epochs=1)
    assert str(caught.value) == "disk gone"
    assert caught.value.__notes__ == ["onstep: raised by the data, at batch 7 of pass 1"]


@pytest.mark.parametrize("data", [Failing, SizedFailing], ids=["without len", "with len"])
def test_step_before_an_error_of_the_data_is_saved(data):
    events = saves_and_epochs()
    with pytest.raises(OSError, match="disk gone"):
        Engine(add, [events]).run(jnp.int32(0), data(), epochs=1)
    assert events.steps("save") == [1, 2, 3, 4, 5, 6]


def test_error_of_a_batch_that_no_step_needs_is_not_raised():
    assert int(Engine(add).run(jnp.int32(0), failing(), steps=6).state) == 21


def test_deferred_error_is_raised_when_its_batch_is_needed():
    data = failing()
    engine = Engine(add)
    part = engine.run(jnp.int32(0), data, steps=6)
    with pytest.raises(OSError, match="disk gone"):
        engine.run(part, data, steps=7)


def test_error_of_the_first_batch_of_an_epoch_names_the_pass():
    def data(epoch):
        if epoch == 1:
            raise OSError("disk gone")
        return [1, 2]

    with pytest.raises(OSError, match="disk gone") as caught:
        Engine(add).run(jnp.int32(0), data, epochs=2)
    assert caught.value.__notes__ == ["onstep: raised by the data, at batch 1 of pass 2"]


# Batches of another shape.


def summing(shapes):
    """Return a step that appends the shape of its batch to `shapes` whenever it is traced."""

    def step(state, batch):
        shapes.append(batch["x"].shape)
        return state + batch["x"].sum(), {}

    return step


def test_short_last_batch_is_compiled_once_with_one_warning():
    shapes, last = [], []
    data = Batches({"x": np.ones(23, np.float32)}, 2, drop_last=False)
    engine = Engine(summing(shapes))
    engine.on("epoch_end")(lambda loop: last.append(loop.batch["x"].tolist()))
    with pytest.warns(UserWarning, match=r"x: float32\[2\] became float32\[1\]") as warned:
        result = engine.run(jnp.float32(0), data, epochs=2)
    assert (result.step, float(result.state), last) == (24, 46, [[1], [1]])
    assert (shapes, len(warned)) == ([(2,), (1,)], 1)


def test_second_run_of_an_engine_compiles_nothing():
    shapes = []
    data = Batches({"x": np.ones(7, np.float32)}, 2, drop_last=True)
    engine = Engine(summing(shapes))
    first = engine.run(jnp.float32(0), data, epochs=1)
    engine.run(jnp.float32(0), data, epochs=1)
    engine.run(first, data, epochs=2)
    assert shapes == [(2,)]


def test_another_run_may_have_batches_of_another_shape():
    shapes = []
    engine = Engine(summing(shapes))
    for size in (2, 3):
        engine.run(jnp.float32(0), Batches({"x": np.ones(6, np.float32)}, size), epochs=1)
    assert shapes == [(2,), (3,)]


def test_new_leaf_in_a_batch_is_named():
    def step(state, batch):
        return state + sum(jax.tree.leaves(batch)), {}

    with pytest.warns(UserWarning, match=r"y: int32\[\] is new"):
        Engine(step).run(jnp.int32(0), [{"x": 1}, {"x": 1, "y": 2}], epochs=1)


def test_source_may_reuse_its_arrays():
    engine = Engine(lambda state, batch: (state, {"mean": batch.mean()}), log_every=1, steps_per_call=1)
    result = engine.run(jnp.int32(0), lambda epoch: refilled(200), epochs=1)
    assert result.history["train/mean"] == list(range(200))


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_source_may_reuse_its_arrays_while_the_loop_does_not_stop_for_the_host(steps_per_call):
    engine = Engine(lambda state, batch: (state, {"mean": batch.mean()}), log_every=500, steps_per_call=steps_per_call)
    assert engine.run(jnp.int32(0), lambda epoch: refilled(200), epochs=1).latest["epoch/mean"] == 99.5


def test_source_of_an_evaluation_may_reuse_its_arrays():
    def slow(state, batch):
        for _ in range(8):
            state = jnp.tanh(state @ state)
        return {"mean": (batch + state[0, 0]).mean()}  # the batch is read when the source has overwritten it

    assert evaluate(slow, jnp.zeros((400, 400)), refilled(20))["mean"] == 9.5
