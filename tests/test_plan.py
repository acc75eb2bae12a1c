"""The plan of an engine: which callbacks handle which events, what is compiled, and how many steps a call runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Batches, Cadence, Callback, Engine, at, every
from onstep.callbacks import EMA, Checkpoint, Evaluate, GradNorm, Progress
from onstep.plan import words

KEY = jax.random.key(0)
DATA = Batches({"x": np.ones((24, 4), np.float32)}, 2)


def linear(state, batch):
    return {"w": state["w"] - 0.1}, {"loss": (batch["x"] @ state["w"]).mean()}


def noisy(state, batch, rng):
    return {"w": state["w"] + jax.random.normal(rng, (4,))}, {}


def conv(state, batch):
    image = batch["x"][None, None, :, :]
    return state, {"loss": jax.lax.conv(image, jnp.ones((1, 1, 2, 2)), (1, 1), "SAME").mean()}


def printing(state, batch):
    jax.debug.print("here")
    return state, {}


def fresh():
    return {"w": jnp.ones(4)}


class Host(Callback):
    """Handle the given events, and fail if a handler is called."""

    def __init__(self, *events, name=None, when=1):
        self.name, self.when = name, when
        for event in events:
            setattr(self, event, self._called)

    def _called(self, *args):
        raise AssertionError("a plan calls no handler")


class Counts(Callback):
    """A compiled half that counts."""

    update_when = every(steps=10)

    def init(self, state):
        return jnp.int32(0)

    def update(self, carry, ctx):
        return carry + 1, ctx


@pytest.mark.parametrize(
    ("cadence", "said"),
    [
        (every(1), "every step"),
        (every(100), "every 100 steps"),
        (every(epochs=1), "every epoch"),
        (every(epochs=5), "every 5 epochs"),
        (every(seconds=0.2), "every 0.2 s"),
        (at(7), "at step 7"),
        (at(10, 1) | every(epochs=1), "every epoch and at steps 1, 10"),
        (Cadence(), "never"),
    ],
    ids=str,
)
def test_cadence_is_described_in_words(cadence, said):
    assert words(cadence) == said


def test_summary_of_a_plan_as_text(tmp_path):
    ema = EMA(of=None)
    evaluate = Evaluate(linear, DATA, using=ema, when=every(epochs=2))
    engine = Engine(linear, [ema, Counts(), evaluate, Checkpoint(tmp_path, when=9), Progress(interval=5)])

    @engine.on("step_begin", when=at(4))
    def peek(loop): ...

    assert (
        str(engine.plan(fresh(), DATA, epochs=5))
        == """\
Events, in order, and the callbacks that handle them
  on_load         before anything else                               Checkpoint
  on_run_begin    when the run begins                                val (Evaluate), Checkpoint, Progress
  on_epoch_begin  when an epoch begins                               Checkpoint, Progress
  on_step_begin   at step 4                            step 4        peek
  on_step_end     every 2 epochs                       step 24       val (Evaluate)
                  every 5 s                            by the clock  Progress
  on_log          at each record                                     Checkpoint, Progress
  on_epoch_end    when an epoch is complete                          Checkpoint, Progress
  on_save         every 9 steps, and at the end        step 9        Checkpoint
  on_run_end      when the run ends, in reverse order                Progress, Checkpoint

Compiled into the step, in order
  1  linear(state, batch)  every step      state: 16 bytes in 1 array
  2  EMA                   every step      carry: 16 bytes in 1 array
  3  Counts                every 10 steps  carry: 4 bytes in 1 array

Steps per call: at most 9
  at most 128 for this step: more would gain nothing
  the first call runs at most 8 steps, later ones about 0.1 s worth
  Checkpoint.on_save ends a call every 9 steps
  an epoch ends a call every 12 steps
  log_every=50 ends a call every 50 steps

The loop
  next returns to the host at step 3 (peek.on_step_begin)
  also returns to the host every 5 s (Progress.on_step_end)
  records train/ means every 50 steps (log_every) and epoch/ means every epoch
  ends at step 60
  keeps at most 2 compiled calls in flight"""
    )


def test_plan_without_arguments_says_what_it_does_not_know():
    plan = Engine(linear, [GradNorm(when=10), Evaluate(linear, DATA)], log_every=20).plan()
    assert plan.events[-1] == ("on_step_end", "every epoch", "", "val (Evaluate)")
    assert plan.compiled == [("linear(state, batch)", "every step", ""), ("GradNorm", "every 10 steps", "")]
    assert plan.steps_per_call is None
    assert plan.why == ['"auto" decides from the step and a batch: pass the state and the data to plan']
    assert plan.loop[0] == "next returns to the host at step 20 (log_every=20)"


def test_engine_without_callbacks_has_a_summary():
    assert str(Engine(linear).plan()).startswith(
        "Events, in order, and the callbacks that handle them\n  none\n\nCompiled"
    )


def test_plan_runs_calls_donates_and_writes_nothing(tmp_path, capsys):
    events = ("on_load", "on_run_begin", "on_step_begin", "on_step_end", "on_log", "on_save", "on_run_end")
    state, drawn = fresh(), []
    engine = Engine(linear, [Host(*events), Counts(), Checkpoint(tmp_path / "run")])

    def data(epoch):
        drawn.append(epoch)
        yield from DATA(epoch)

    engine.plan(state, data, epochs=2)
    assert state["w"].tolist() == [1] * 4
    assert (drawn, list(tmp_path.iterdir()), capsys.readouterr()) == ([0], [], ("", ""))


def test_plan_leaves_the_state_of_callbacks_unchanged():
    class Remembers(Callback):
        steps = 0

        def on_step_end(self, loop):
            self.steps = loop.step

        def get_state(self):
            return {"steps": self.steps}

        def set_state(self, state):
            self.steps = state["steps"]

    remembers = Remembers()
    engine = Engine(linear, [remembers])
    engine.run(fresh(), DATA, steps=7)
    engine.plan(fresh(), DATA, steps=9)
    assert remembers.steps == 7


def test_run_after_a_plan_equals_a_run_without_one():
    engine = Engine(noisy, [Counts()])
    engine.plan(fresh(), DATA, steps=5, rng=KEY)
    runs = [one.run(fresh(), DATA, steps=5, rng=KEY) for one in (engine, Engine(noisy, [Counts()]))]
    assert runs[0].state["w"].tolist() == runs[1].state["w"].tolist()


def test_plan_does_not_read_data_that_can_be_read_only_once():
    data = iter(DATA)
    plan = Engine(linear).plan(fresh(), data, steps=5)
    assert plan.why == ["the data (EpochIterator) can be read only once, so plan took no batch from it to decide"]
    assert len(list(data)) == 12


@pytest.mark.parametrize(
    ("step", "options", "steps", "why"),
    [
        (conv, {}, 1, "one step a call: a convolution is slower in a loop on CPUs"),
        (printing, {}, 1, "one step a call: the step has side effects, such as a print"),
        (linear, {}, 12, "at most 128 for this step: more would gain nothing"),
        (
            linear,
            {"mesh": jax.sharding.Mesh(jax.devices()[:1], ("data",))},
            1,
            "one step a call: several steps per call have not been measured on many devices",
        ),
        (linear, {"steps_per_call": 1}, 1, "steps_per_call=1"),
        (linear, {"steps_per_call": 8}, 8, "steps_per_call=8"),
        (linear, {"jit": False}, 1, "jit=False: nothing is compiled"),
    ],
    ids=["convolution", "print", "auto", "mesh", "one", "eight", "uncompiled"],
)
def test_plan_gives_the_reason_for_the_steps_per_call(step, options, steps, why):
    plan = Engine(step, **options).plan(fresh(), DATA, epochs=2)
    assert (plan.steps_per_call, plan.why[0]) == (steps, why)


def test_large_batches_and_long_steps_make_short_calls():
    def products(state, batch):
        return state, {"sum": (batch["x"] @ batch["x"].T).sum()}

    batch = {"x": np.ones((1000, 1000), np.float32)}
    plan = Engine(products).plan(fresh(), [batch] * 50, epochs=1)
    assert (plan.steps_per_call, plan.why[0]) == (
        2,
        "at most 2 for this step: a longer call would delay stops and signals",
    )
    plan = Engine(linear).plan(fresh(), [{"x": np.ones((10**6, 4), np.float32)}] * 50, epochs=1)
    assert plan.why[0] == "at most 2 for this step: more batches would take too much memory at once"


def test_plan_names_what_ends_a_call_shortest_first():
    callbacks = [Host("on_step_end", name="rare", when=100), Host("on_step_end", "on_save", name="often", when=5)]
    plan = Engine(linear, [*callbacks, Host("on_log", name="never")]).plan(fresh(), DATA)
    assert plan.steps_per_call == 5
    assert plan.why[2:] == [
        "often.on_step_end ends a call every 5 steps",
        "often.on_save ends a call every 5 steps",
        "an epoch ends a call every 12 steps",
        "log_every=50 ends a call every 50 steps",
        "rare.on_step_end ends a call every 100 steps",
    ]


@pytest.mark.parametrize(
    ("callback", "stop"),
    [
        (Host("on_step_end", name="a", when=7), "step 7 (a.on_step_end)"),
        (Host("on_step_begin", name="a", when=7), "step 6 (a.on_step_begin)"),
        (Host("on_step_begin", name="a"), "step 1 (a.on_step_begin)"),
        (Host("on_step_begin", name="a", when=at(1)), "step 12 (the end of epoch 1)"),
        (Host("on_save", name="a", when=at(3)), "step 3 (a.on_save)"),
        (Host("on_step_end", name="a", when=every(epochs=1)), "step 12 (the end of epoch 1, a.on_step_end)"),
        (Host("on_log", name="a"), "step 12 (the end of epoch 1)"),
    ],
    ids=["after", "before", "before each", "before the first", "save", "epoch", "none"],
)
def test_plan_predicts_where_the_run_stops_next(callback, stop):
    assert Engine(linear, [callback]).plan(fresh(), DATA, epochs=2).loop[0] == f"next returns to the host at {stop}"
    for event in ("on_step_end", "on_step_begin", "on_save", "on_log"):
        if event in vars(callback):
            setattr(callback, event, lambda loop, record=None: None)
    engine, ends = Engine(linear, [callback], steps_per_call=100), []
    before = engine._compiled.advance
    engine._compiled.advance = lambda *args: ends.append(args[3] + args[4]) or before(*args)
    engine.run(fresh(), DATA, epochs=2)
    assert f"step {ends[0]} " in stop


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({"epochs": 5}, "ends at step 60"),
        ({"epochs": 5, "steps": 20}, "ends at step 20"),
        ({"epochs": 5, "epoch_steps": 4}, "ends at step 20"),
    ],
    ids=["epochs", "both", "epoch_steps"],
)
def test_plan_predicts_where_the_run_ends(arguments, end):
    assert end in Engine(linear).plan(fresh(), DATA, **arguments).loop


def test_end_of_the_run_is_unknown_without_the_epoch_length():
    assert "ends with epoch 3, whose last step is not known in advance" in Engine(linear).plan(epochs=3).loop


def test_plan_says_what_is_due_only_after_the_end():
    callbacks = [Host("on_step_end", "on_save", when=100), Host("on_step_end", when=every(epochs=2))]
    plan = Engine(linear, callbacks).plan(fresh(), DATA, steps=20)
    assert [(event, later) for event, _, later, _ in plan.events] == [
        ("on_step_end", "not in this run"),
        ("on_step_end", "not in this run"),
        ("on_save", "step 20"),
    ]


def test_plan_of_a_resumed_run_starts_at_the_saved_step():
    def engine():
        return Engine(linear, [Evaluate(lambda *given: linear(*given)[1], DATA, when=every(epochs=2)), Counts()])

    first = engine().run(fresh(), DATA, steps=15)
    plan = engine().plan(first, DATA, epochs=4)
    assert ("on_step_end", "every 2 epochs", "step 24", "val (Evaluate)") in plan.events
    assert plan.loop[0] == "next returns to the host at step 24 (the end of epoch 2, val.on_step_end)"
    assert "ends at step 48" in plan.loop


def test_plan_of_a_resumed_run_keeps_the_execution_mode():
    first = Engine(linear, steps_per_call=1).run(fresh(), DATA, steps=5)
    plan = Engine(linear).plan(first, DATA, epochs=4)
    assert (plan.steps_per_call, plan.why) == (1, ["one step a call: the saved run ran one step a call"])
    first = Engine(conv, steps_per_call=4).run(fresh(), DATA, steps=5)
    assert Engine(conv).plan(first, DATA, epochs=4).steps_per_call == 2


def test_plan_names_queued_calls_and_prefetched_batches():
    plan = Engine(linear, in_flight=3, prefetch=2).plan()
    assert plan.loop[-1] == "keeps at most 3 compiled calls in flight, and moves 2 batches to the device in advance"


def test_plan_raises_the_errors_of_a_run():
    with pytest.raises(ValueError, match="takes a random key"):
        Engine(noisy).plan(fresh(), DATA, epochs=1)
    with pytest.raises(ValueError, match="yielded no batches"):
        Engine(linear).plan(fresh(), [], epochs=1)
    with pytest.raises(TypeError, match="data needs to be an iterable"):
        Engine(linear).plan(fresh(), 3, epochs=1)
    with pytest.raises(ValueError, match="needs epochs to be a whole number >= 0"):
        Engine(linear).plan(epochs=-1)


def test_notebook_shows_tables():
    shown = Engine(linear, [Host("on_step_end", "on_save", name="a|b", when=5)]).plan()._repr_markdown_()
    assert "| event | when | next | callback |\n| --- | --- | --- | --- |\n" in shown
    assert "| on_step_end | every 5 steps | step 5 | a\\|b (Host) |" in shown
    assert "**Steps per call: not decided yet**\n\n- " in shown


def test_graph_shows_the_handled_events_and_their_order():
    callbacks = [Counts(), Host("on_step_end", "on_run_end", "on_exception", name='"<x>"', when=5)]
    lines = Engine(linear, callbacks).plan().mermaid().splitlines()
    assert lines == [
        "flowchart TD",
        '    compiled_call["compiled call<br/>linear(state, batch): every step<br/>Counts: every 10 steps"]',
        '    on_step_end["on_step_end<br/>#quot;#lt;x#gt;#quot; (Host): every 5 steps"]',
        '    on_exception["on_exception<br/>#quot;#lt;x#gt;#quot; (Host)"]',
        '    on_run_end["on_run_end<br/>#quot;#lt;x#gt;#quot; (Host)"]',
        "    compiled_call --> on_step_end",
        "    on_step_end --> on_run_end",
        "    on_step_end -->|again, until the target or a stop| compiled_call",
        "    compiled_call -.->|an error, wherever it is raised| on_exception",
    ]
