"""Errors in the user's functions name the function, its line and the argument; so do mistakes in compiled halves."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine

STATE = {"w": jnp.ones(3)}
DATA = [{"x": np.ones(2, np.float32)}] * 4


def branch_on_state(model, batch):
    if model["w"].sum() > 0:
        return model, {}
    return model, {"loss": 1.0}


def branch_on_batch(model, examples):
    return model, {"loss": 1.0 if examples["x"].sum() > 0 else 0.0}


def multiply(model, batch):
    return model, {"loss": model["w"] @ jnp.ones(7)}


def error_of(step, *callbacks, **options):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        Engine(step, callbacks, **options).run(STATE, DATA, epochs=1)
    notes = [note for note in caught.value.__notes__ if note.startswith("onstep: raised by")]
    return str(caught.value), notes[0]


MODES = pytest.mark.parametrize(
    "options", [{"steps_per_call": 1}, {"steps_per_call": 2}, {}], ids=["plain", "block", "auto"]
)


@MODES
@pytest.mark.parametrize(
    ("step", "argument", "source"),
    [
        (branch_on_state, "model['w']", 'if model["w"].sum() > 0:'),
        (branch_on_batch, "examples['x']", 'return model, {"loss": 1.0 if examples["x"].sum() > 0 else 0.0}'),
    ],
    ids=["state", "batch"],
)
def test_an_error_while_tracing_names_the_function_its_argument_and_the_line(step, argument, source, options):
    message, note = error_of(step, **options)
    assert f"tracing the function {step.__name__} at {__file__}:{step.__code__.co_firstlineno} for jit" in message
    assert f"the value of the argument {argument}." in message
    assert note.startswith(f"onstep: raised by the step {step.__name__}, {__file__} line ")
    assert note.endswith(source)


@pytest.mark.parametrize("options", [{}, {"jit": False}], ids=["compiled", "uncompiled"])
def test_an_error_in_the_step_names_the_line_not_the_library(options):
    message, note = error_of(multiply, **options)
    assert "contracting dimensions" in message
    assert note.endswith(': return model, {"loss": model["w"] @ jnp.ones(7)}')


def test_a_wrong_result_of_the_step_names_where_it_is_defined():
    assert error_of(lambda state, batch: None)[1].startswith(f"onstep: raised by the step <lambda>, {__file__} line ")


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("method", ["init", "update"])
def test_an_error_in_a_compiled_half_names_it_and_the_line(method, when):
    class Multiplies(Callback):
        update_when = when

        def init(self, state):
            return state["w"] @ jnp.ones(7 if method == "init" else 3)

        def update(self, carry, ctx):
            return ctx.state["w"] @ jnp.ones(7), ctx

    message, note = error_of(lambda state, batch: (state, {}), Multiplies())
    assert "contracting dimensions" in message
    assert note.startswith(f"onstep: raised by Multiplies.{method}, {__file__} line ")
    assert "@ jnp.ones(7" in note


def test_the_compiled_function_has_the_name_of_the_step():
    names, engine = [], Engine(step)
    engine.on("run_end")(lambda loop: names.append(loop.traced.fun_name))
    engine.run(STATE, DATA, epochs=1)
    assert names == ["step"]


# Mistakes in compiled halves


class Half(Callback):
    n = 0
    x = None

    def __init__(self, change, when=1):
        self.change, self.update_when = change, when
        self.n, self.names, self.x = 0, [], None

    def update(self, carry, ctx):
        return carry, self.change(self, ctx)


def dropped_log(half, ctx):
    ctx.log(x=1.0)
    return ctx


def dropped_second_log(half, ctx):
    ctx = ctx.log(x=1.0)
    ctx.log(y=1.0)
    return ctx


def kept_logs(half, ctx):
    return ctx.log(x=1.0).log(y=ctx.metrics["loss"])


def keeps_array(half, ctx):
    half.x = {"w": ctx.state["w"]}
    return ctx


def counts(half, ctx):
    half.n += 1
    return ctx


def notes_names(half, ctx):
    half.names = [*ctx.metrics]
    half.leaves = len(ctx.state)
    return ctx


def step(state, batch):
    return state, {"loss": batch["x"].sum()}


def run(change, when=1):
    return Engine(step, [Half(change, when)], log_every=1).run(STATE, DATA, epochs=1)


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize(("change", "name"), [(dropped_log, "x"), (dropped_second_log, "y")])
def test_a_dropped_result_of_log_is_an_error(change, name, when):
    with pytest.raises(ValueError, match=rf"Half.update logs '{name}', but does not return .* ctx = ctx.log\(...\)"):
        run(change, when)


def test_results_of_log_that_are_returned_are_fine():
    assert run(kept_logs).history["train/y"] == [2.0] * 4


@pytest.mark.parametrize("when", [1, 2])
def test_an_array_of_the_step_kept_in_the_callback_is_an_error(when):
    with pytest.raises(TypeError, match=r"Half.update sets self.x to a traced array.* ctx.log\(x=...\)"):
        run(keeps_array, when)


def test_counting_in_the_callback_causes_a_warning():
    with pytest.warns(
        UserWarning, match=r"Half.update changes self.n from 0 to 1. It runs only while the step is"
    ) as warned:
        run(counts)
    assert warned[0].filename == __file__


def test_what_a_callback_notes_about_the_trace_is_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(notes_names)
