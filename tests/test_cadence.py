"""Cadences by steps, epochs and seconds, alone and combined, in both halves of a callback."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine, at, every
from onstep.callbacks import ClipWeights
from onstep.testing import FakeClock, Restore, StopAt, TickingBatches


def step(state, batch):
    return state + batch, {}


class NotedBegins(Callback):
    """Collect the steps before which it was called."""

    def __init__(self, when):
        self.when = when
        self.begins = []

    def on_step_begin(self, loop):
        self.begins.append(loop.step + 1)


class NotedEnds(Callback):
    """Collect the steps after which it was called."""

    def __init__(self, when):
        self.when = when
        self.ends = []

    def on_step_end(self, loop):
        self.ends.append(loop.step)


class NotedInside(Callback):
    """Mark in the carry the steps at which its compiled half was due."""

    def __init__(self, update_when, most=32):
        self.update_when, self.most = update_when, most

    def init(self, state):
        return jnp.zeros(self.most, bool)

    def update(self, carry, ctx):
        return carry.at[ctx.step].set(True), ctx

    def steps(self, result):
        return (np.flatnonzero(result.carry(self)) + 1).tolist()


def ends(when, *, steps, data=None, **options):
    noted = NotedEnds(when)
    Engine(step, [noted]).run(jnp.int32(0), data or [1] * steps, steps=steps, **options)
    return noted.ends


@pytest.mark.parametrize(
    ("when", "steps", "due"),
    [
        pytest.param(every(3), 10, [3, 6, 9], id="every 3 steps, neither at 0 nor at the end"),
        pytest.param(4, 10, [4, 8], id="a plain int means steps"),
        pytest.param(at(2), 10, [2], id="once, at step 2"),
        pytest.param(at(1, 5), 10, [1, 5], id="at two steps"),
        pytest.param(at(1, 2, 5, 7, 17, 20), 30, [1, 2, 5, 7, 17, 20], id="at a list of steps"),
        pytest.param(at(5, 1, 5), 10, [1, 5], id="at in any order, each once"),
        pytest.param(at(40), 10, [], id="at a step beyond the end"),
        pytest.param(at(1) | every(3), 15, [1, 3, 6, 9, 12, 15], id="first and every 3"),
        pytest.param(at(8) | at(1, 2), 15, [1, 2, 8], id="at combined with at"),
        pytest.param(at(1) | at(13, 14, 15), 15, [1, 13, 14, 15], id="first and the last three"),
        pytest.param(at(1) | at(10), 15, [1, 10], id="first and tenth"),
        pytest.param(at(1) | at(1), 15, [1], id="the same step twice is due once"),
        pytest.param(every(2) | every(3), 12, [2, 3, 4, 6, 8, 9, 10, 12], id="two cadences, due once where they meet"),
        pytest.param(every(6) | 4, 12, [4, 6, 8, 12], id="a cadence combined with a plain int"),
        pytest.param(4 | every(6), 12, [4, 6, 8, 12], id="a plain int combined with a cadence"),
    ],
)
def test_cadence_in_steps_is_due_at_these_steps(when, steps, due):
    assert ends(when, steps=steps) == due


def test_cadence_counts_steps_across_epochs():
    due = ends(every(10), data=[1] * 100, steps=500)
    assert due == list(range(10, 501, 10))


def test_all_methods_of_a_callback_share_its_cadence():
    class Both(NotedBegins, NotedEnds):
        def __init__(self):
            self.when, self.begins, self.ends = every(3) | at(1), [], []

    both = Both()
    Engine(step, [both]).run(jnp.int32(0), [1] * 10, epochs=1)
    assert both.begins == both.ends == [1, 3, 6, 9]


def test_cadence_in_epochs_is_due_at_the_step_that_completes_an_epoch():
    assert ends(every(epochs=1), data=[1] * 4, steps=12) == [4, 8, 12]
    assert ends(every(epochs=2), data=[1] * 4, steps=12) == [8]


def test_cadence_in_epochs_is_not_due_in_an_unfinished_epoch():
    assert ends(every(epochs=1), data=[1] * 4, steps=6) == [4]


def test_cadence_in_epochs_needs_no_known_length_for_on_step_end():
    assert ends(every(epochs=1), data=lambda epoch: iter([1] * (epoch + 1)), steps=7) == [1, 3, 6]


def test_cadence_in_epochs_counts_epochs_of_epoch_steps():
    assert ends(every(epochs=2), data=[1] * 10, epoch_steps=3, steps=15) == [6, 12]


def test_cadences_in_epochs_and_steps_combine():
    assert ends(every(epochs=1) | every(3), data=[1] * 4, steps=12) == [3, 4, 6, 8, 9, 12]


def test_on_step_begin_is_due_before_the_step_that_completes_an_epoch():
    noted = NotedBegins(every(epochs=1))
    Engine(step, [noted]).run(jnp.int32(0), [1] * 4, epochs=3)
    assert noted.begins == [4, 8, 12]


def test_on_step_begin_by_epochs_needs_a_known_length():
    engine = Engine(step, [NotedBegins(every(epochs=1))])
    with pytest.raises(
        ValueError, match=r"NotedBegins.on_step_begin is due every\(epochs=1\), .* generator has no len\(\)"
    ):
        engine.run(jnp.int32(0), (1 for _ in range(4)), epochs=1)


def test_on_step_begin_by_epochs_accepts_epoch_steps_as_the_length():
    noted = NotedBegins(every(epochs=1))
    Engine(step, [noted]).run(jnp.int32(0), (1 for _ in range(6)), epoch_steps=2, epochs=3)
    assert noted.begins == [2, 4, 6]


@pytest.mark.parametrize(
    ("when", "due"),
    [
        pytest.param(every(3), [3, 6, 9, 12], id="every 3 steps"),
        pytest.param(5, [5, 10], id="a plain int"),
        pytest.param(at(1, 7), [1, 7], id="at"),
        pytest.param(at(1) | every(4), [1, 4, 8, 12], id="first and every 4"),
        pytest.param(every(epochs=2), [8], id="every 2 epochs"),
        pytest.param(every(epochs=1) | every(5), [4, 5, 8, 10, 12], id="epochs and steps"),
        pytest.param(1, list(range(1, 13)), id="every step"),
    ],
)
def test_compiled_half_is_due_at_these_steps(when, due):
    inside = NotedInside(when)
    result = Engine(step, [inside]).run(jnp.int32(0), [1] * 4, epochs=3)
    assert inside.steps(result) == due


def test_compiled_halves_keep_their_own_cadences():
    inside = [NotedInside(every(2)), NotedInside(at(3)), NotedInside(1)]
    result = Engine(step, inside).run(jnp.int32(0), [1] * 5, epochs=1)
    assert [half.steps(result) for half in inside] == [[2, 4], [3], [1, 2, 3, 4, 5]]


def test_compiled_half_by_epochs_needs_a_known_length():
    engine = Engine(step, [NotedInside(every(epochs=1))])
    with pytest.raises(ValueError, match=r"NotedInside.update is due every\(epochs=1\).*Pass epoch_steps= to run"):
        engine.run(jnp.int32(0), lambda epoch: iter([1, 1]), epochs=2)


def test_compiled_half_by_epochs_accepts_epoch_steps_as_the_length():
    inside = NotedInside(every(epochs=1))
    result = Engine(step, [inside]).run(jnp.int32(0), (1 for _ in range(6)), epoch_steps=2, epochs=3)
    assert inside.steps(result) == [2, 4, 6]


def test_compiled_half_cannot_be_due_by_the_clock():
    with pytest.raises(
        ValueError, match=r"NotedInside.update_when needs a cadence in steps or epochs, got .*every\(seconds=60\)"
    ):
        NotedInside(every(10) | every(seconds=60))


@pytest.mark.parametrize(
    ("when", "due"),
    [
        pytest.param(every(seconds=3), [3, 6, 9], id="whole seconds"),
        pytest.param(every(seconds=2.5), [3, 6, 9], id="between two steps, counted from the last time it was due"),
        pytest.param(every(seconds=0.1), list(range(1, 11)), id="shorter than a step"),
        pytest.param(every(seconds=60), [], id="longer than the run"),
        pytest.param(every(seconds=4) | at(2), [2, 6, 10], id="counted from the last time that either term was due"),
        pytest.param(every(seconds=3) | every(epochs=1), [3, 5, 8, 10], id="seconds and epochs"),
    ],
)
def test_cadence_in_seconds_follows_the_clock_of_the_engine(when, due):
    clock, noted = FakeClock(), NotedEnds(when)
    engine = Engine(step, [noted], steps_per_call=1, clock=clock)
    engine.run(jnp.int32(0), TickingBatches(clock, [1] * 5), epochs=2)
    assert noted.ends == due


def test_on_step_begin_by_seconds_comes_before_the_next_step():
    clock, noted = FakeClock(), NotedBegins(every(seconds=3))
    engine = Engine(step, [noted], steps_per_call=1, clock=clock)
    engine.run(jnp.int32(0), TickingBatches(clock, [1] * 10), epochs=1)
    assert noted.begins == [4, 7, 10]


def test_seconds_are_counted_from_the_start_of_each_run():
    clock, noted = FakeClock(), NotedEnds(every(seconds=3))
    engine = Engine(step, [noted], steps_per_call=1, clock=clock)
    data = TickingBatches(clock, [1] * 4)
    result = engine.run(jnp.int32(0), data, epochs=1)
    clock.advance(100)
    engine.run(result, data, epochs=2)
    assert noted.ends == [3, 7]


@pytest.mark.parametrize(
    ("when", "due"),
    [
        pytest.param(every(4), [4, 8, 12], id="every 4 steps"),
        pytest.param(at(2, 7, 11), [2, 7, 11], id="at"),
        pytest.param(every(epochs=2), [8], id="every 2 epochs"),
    ],
)
def test_cadence_of_a_resumed_run_counts_absolute_steps(when, due):
    noted, inside = NotedEnds(when), NotedInside(when)
    engine = Engine(step, [noted, inside])
    data = [1] * 4
    result = engine.run(jnp.int32(0), data, steps=6)
    result = engine.run(result, data, steps=13)
    assert noted.ends == inside.steps(result) == due


def test_stop_between_two_due_steps_does_not_shift_the_cadence():
    noted = NotedEnds(every(4))
    engine = Engine(step, [noted, StopAt(6, final=False)])
    result = engine.run(jnp.int32(0), [1] * 12, steps=12)
    assert (result.step, noted.ends) == (6, [4])
    engine.run(result, [1] * 12, steps=12)
    assert noted.ends == [4, 8, 12]


def test_cadence_is_kept_when_another_engine_resumes():
    result = Engine(step, [NotedInside(4)]).run(jnp.int32(0), [1] * 12, steps=6)
    noted, inside = NotedEnds(4), NotedInside(4)
    again = Engine(step, [Restore(result), noted, inside]).run(jnp.int32(0), [1] * 12, steps=12)
    assert noted.ends == [8, 12]
    assert inside.steps(again) == [4, 8, 12]


def test_cadence_starts_over_in_a_second_run():
    noted, inside = NotedEnds(at(2)), NotedInside(at(2))
    engine = Engine(step, [noted, inside])
    results = [engine.run(jnp.int32(0), [1] * 4, epochs=1) for _ in range(2)]
    assert noted.ends == [2, 2]
    assert [inside.steps(result) for result in results] == [[2], [2]]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_cadence_can_be_queried_without_a_loop(n):
    due = [step for step in range(101) if every(n).due(step)]
    assert due == [step for step in range(1, 101) if step % n == 0]


@pytest.mark.parametrize(
    ("cadence", "step", "following"),
    [
        pytest.param(every(3), 0, 3, id="from the start"),
        pytest.param(every(3), 3, 6, id="after a due step"),
        pytest.param(every(100), 10**12, 10**12 + 100, id="far into a run"),
        pytest.param(at(2, 9), 2, 9, id="at"),
        pytest.param(at(2, 9), 9, math.inf, id="after the last"),
        pytest.param(every(10) | at(2), 2, 10, id="combined"),
        pytest.param(every(epochs=1) | every(seconds=1), 0, math.inf, id="units other than steps"),
    ],
)
def test_cadence_knows_its_next_step(cadence, step, following):
    assert cadence.next(step) == following


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: every(0), "every needs steps to be a whole number >= 1.* got 0", id="zero steps"),
        pytest.param(lambda: every(-3), "every needs steps to be a whole number >= 1.* got -3", id="negative steps"),
        pytest.param(lambda: every(True), "every needs steps to be a whole number >= 1.* got True", id="a bool"),
        pytest.param(lambda: every(2.0), "every needs steps to be a whole number >= 1.* got 2.0", id="float steps"),
        pytest.param(lambda: every("3"), "every needs steps to be a whole number >= 1.* got '3'", id="a string"),
        pytest.param(lambda: every(epochs=0), "every needs epochs to be a whole number >= 1.* got 0", id="zero epochs"),
        pytest.param(
            lambda: every(epochs=0.5), "every needs epochs to be a whole number >= 1.* got 0.5", id="half an epoch"
        ),
        pytest.param(
            lambda: every(epochs=True), "every needs epochs to be a whole number >= 1.* got True", id="a bool epoch"
        ),
        pytest.param(lambda: every(seconds=0), "every needs seconds > 0.* got 0", id="zero seconds"),
        pytest.param(lambda: every(seconds=-1.0), "every needs seconds > 0.* got -1.0", id="negative seconds"),
        pytest.param(lambda: every(seconds=math.nan), "every needs seconds > 0.* got nan", id="NaN seconds"),
        pytest.param(lambda: every(seconds=True), "every needs seconds > 0.* got True", id="a bool second"),
        pytest.param(lambda: every(seconds="1"), "every needs seconds > 0.* got '1'", id="seconds as a string"),
        pytest.param(lambda: every(), "one of steps, epochs and seconds, got none", id="no unit"),
        pytest.param(lambda: every(None), "one of steps, epochs and seconds, got none", id="None"),
        pytest.param(lambda: every(2, epochs=1), r"one of .*'steps': 2, 'epochs': 1.*Combine with \|", id="two units"),
        pytest.param(lambda: at(), r"at needs the steps at which .* got none", id="at nothing"),
        pytest.param(lambda: at(0), r"at needs steps to be a whole number >= 1, got 0", id="at zero"),
        pytest.param(lambda: at(3, -1), r"at needs steps to be a whole number >= 1, got -1", id="at a negative step"),
        pytest.param(lambda: at(True), r"at needs steps to be a whole number >= 1, got True", id="at a bool"),
        pytest.param(lambda: at(1.0), r"at needs steps to be a whole number >= 1, got 1.0", id="at a float"),
        pytest.param(lambda: at([1, 2]), r"at needs steps to be a whole number >= 1, got \[1, 2\]", id="at a list"),
    ],
)
def test_invalid_cadence_is_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("other", [0, -1, True, 2.0, "3", None], ids=repr)
def test_cadence_combines_only_with_cadences_and_ints(other):
    with pytest.raises(ValueError, match=r"A cadence combined by \| needs .* got " + repr(other)):
        every(1) | other


@pytest.mark.parametrize("when", [0, -1, True, 2.0, "epoch", None, {"10"}], ids=repr)
def test_callback_refuses_a_when_that_is_not_a_cadence_when_it_is_made(when):
    with pytest.raises(ValueError, match=f"NotedEnds.when needs a cadence .* got {when!r}"):
        NotedEnds(when)
    with pytest.raises(ValueError, match=f"NotedInside.update_when needs a cadence .* got {when!r}"):
        NotedInside(when)
    with pytest.raises(ValueError, match=f"ClipWeights.when needs a cadence .* got {when!r}"):
        ClipWeights(-1, 1, when=when)


def test_class_is_refused_when_its_when_is_not_a_cadence():
    with pytest.raises(ValueError, match=r"Never.when needs a cadence .* got 0"):
        type("Never", (NotedEnds,), {"when": 0})


def test_engine_on_and_engine_steps_refuse_a_when_that_is_not_a_cadence():
    with pytest.raises(ValueError, match=r"sample\.when needs a cadence"):

        @Engine(step).on("step_end", when=0)
        def sample(loop): ...

    with pytest.raises(ValueError, match=r"engine.steps\(when=...\) needs a cadence"):
        Engine(step).steps(jnp.int32(0), [1], epochs=1, when=1.5)


@pytest.mark.parametrize(
    ("cadence", "text"),
    [
        pytest.param(every(100), "every(steps=100)", id="steps"),
        pytest.param(every(epochs=1), "every(epochs=1)", id="epochs"),
        pytest.param(every(seconds=0.5), "every(seconds=0.5)", id="seconds"),
        pytest.param(at(10, 1), "at(1, 10)", id="at, in order"),
        pytest.param(at(1) | every(epochs=2) | 5, "every(steps=5) | every(epochs=2) | at(1)", id="combined"),
    ],
)
def test_repr_of_a_cadence_is_the_expression_that_makes_it(cadence, text):
    assert repr(cadence) == text
    assert eval(text) == cadence
