"""Error messages: each mistake is named with what was found and what to do, before anything is written.

The mistakes of a first hour, with the moment at which each is answered, are in `test_first_hour.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Callback, Engine
from onstep.callbacks import (
    EMA,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    Images,
    LearningRate,
    Progress,
    TensorBoard,
    Writer,
)


def step(state, batch):
    return state + batch, {"loss": state * 1.0}


def fails(step, match, error=ValueError, state=None, tmp_path=None, **options):
    """Check that a run of one step raises and leaves no file behind."""
    callbacks = [] if tmp_path is None else [Checkpoint(tmp_path / "run", when=1), TensorBoard(tmp_path / "run")]
    with pytest.raises(error, match=match):
        Engine(step, callbacks).run(jnp.float32(0) if state is None else state, [1.0], epochs=1, **options)
    assert tmp_path is None or not any(tmp_path.iterdir())


# The step


STATE = {"params": {"w": jnp.zeros(3), "b": jnp.zeros(())}, "rng": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {"params": s["params"]}, r"rng: float32\[2\] is gone"),
        (lambda s: s | {"new": s["rng"]}, r"new: float32\[2\] is new"),
        (lambda s: s | {"rng": jnp.zeros(4)}, r"rng: float32\[2\] became float32\[4\]"),
        (lambda s: s | {"rng": jnp.zeros(2, jnp.bfloat16)}, r"rng: float32\[2\] became bfloat16\[2\]"),
        (lambda s: s | {"params": tuple(s["params"].values())}, r"params/w: float32\[3\] is gone"),
        (lambda s: (s["params"], s["rng"]), "is gone; .* is new"),
    ],
)
def test_step_that_changes_the_state_structure_names_the_leaf_and_both_sides(change, match, tmp_path):
    match = f"The step needs to return a state like the one it got: .*{match}"
    fails(lambda s, b: (change(s), {}), match, state=STATE, tmp_path=tmp_path)


def test_structure_that_differs_without_a_leaf_is_named():
    class One(NamedTuple):
        w: jax.Array

    class Two(NamedTuple):
        w: jax.Array

    fails(lambda s, b: (Two(s.w), {}), "the structure .*One.* became .*Two", state=One(jnp.zeros(1)))


@pytest.mark.parametrize(
    ("results", "error", "match"),
    [
        (lambda s: (s,), TypeError, "got 1 results"),
        (lambda s: (s, {}, {}, {}), TypeError, "got 4 results"),
        (lambda s: [s, {}], TypeError, "got list"),
        (lambda s: (s, {1: s}), TypeError, "metrics as a dict of scalars by name"),
        (lambda s: (s, {"loss": jnp.zeros(1)}), ValueError, r"scalar metrics, got shape \(1,\) for 'loss'"),
        (lambda s: (s, {"loss": {"a": s}}), TypeError, "scalar metrics, got dict for 'loss'"),
        (lambda s: (s, {"loss": jax.random.key(0)}), TypeError, r"needs numbers as metrics, got key<fry> for 'loss'"),
    ],
)
def test_wrong_return_value_of_the_step_is_named(results, error, match, tmp_path):
    fails(lambda s, b: results(s), match, error, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: None, r"\(state, batch\) or \(state, batch, rng\), got \(\)"),
        (lambda a, b, c, d: None, r"got \(a, b, c, d\)"),
        (lambda state, batch, *, rng: None, r"got \(state, batch, rng\)"),
        ("step", "needs to be a function .*got str"),
    ],
)
def test_step_with_the_wrong_arguments_is_refused_when_the_engine_is_made(wrong, match):
    with pytest.raises(TypeError, match=match):
        Engine(wrong)


def takes_key(state, batch, rng):
    return state + jax.random.uniform(rng), {}


class Bound:
    def step(self, state, batch, rng):
        return takes_key(state, batch, rng)


@pytest.mark.parametrize(
    "wrapped",
    [
        takes_key,
        jax.jit(takes_key),
        Bound().step,
        functools.partial(lambda scale, state, batch, rng: takes_key(state, batch, rng), 1.0),
        functools.wraps(takes_key)(lambda *args: takes_key(*args)),
    ],
    ids=["plain", "jitted", "bound", "partial", "wrapped"],
)
def test_step_that_takes_a_key_is_recognized_however_it_is_wrapped(wrapped):
    result = Engine(wrapped).run(jnp.float32(0), [0, 0], epochs=1, rng=jax.random.key(3))
    keys = [jax.random.fold_in(jax.random.key(3), n) for n in range(2)]
    assert float(result.state) == pytest.approx(sum(float(jax.random.uniform(key)) for key in keys))
    fails(wrapped, "takes a random key as its third argument. Pass one: rng=")


@pytest.mark.parametrize("wrong", ["key", np.zeros(2)], ids=["str", "floats"])
def test_rng_that_is_not_a_random_key_is_refused(wrong):
    fails(takes_key, "rng needs a random key such as jax.random.key", TypeError, rng=wrong)


class Tensor:
    """Looks like a tensor of PyTorch or TensorFlow."""

    shape, dtype = (2,), "torch.float32"

    def numpy(self):
        return np.zeros(self.shape)

    __array__ = numpy


class Series:
    """Looks like a column of pandas."""

    dtype = np.dtype("float64")

    def __array__(self, dtype=None, copy=None):
        return np.zeros(2)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("name", "str"),
        (len, "builtin_function_or_method"),
        (object(), "object"),
        ({1}, "set"),
        (np.array(["a"]), "ndarray of dtype <U1"),
        (np.array([None]), "ndarray of dtype object"),
        (np.array([0], "datetime64[s]"), r"ndarray of dtype datetime64\[s\]"),
        (Tensor(), "Tensor"),
    ],
    ids=["str", "function", "object", "set", "strings", "objects", "dates", "tensor"],
)
def test_state_leaf_that_is_not_an_array_is_named(leaf, kind):
    fails(step, f"arrays and numbers as leaves, got {kind} at 'a/1'", TypeError, state={"a": [1, leaf]})


# The batches


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        ("cat", "got str at 'x/0'. Encode it as numbers, or leave it out"),
        (object(), "got object at 'x/0'. Encode it as numbers"),
        (np.array(["cat"]), "got ndarray of dtype <U3 at 'x/0'. Encode it as numbers"),
        (np.array([None]), "got ndarray of dtype object at 'x/0'. Encode it as numbers"),
        (np.timedelta64(1, "s"), r"got timedelta64 of dtype timedelta64\[s\] at 'x/0'. Encode it"),
        (Tensor(), r"got Tensor at 'x/0'. Convert it: batch\[\"x\"\]\[0\]\.numpy\(\)\."),
        (Series(), r"got Series at 'x/0'. Convert it: np\.asarray\(batch\[\"x\"\]\[0\]\)\."),
    ],
    ids=["str", "object", "strings", "objects", "duration", "tensor", "series"],
)
@pytest.mark.parametrize("options", [{}, {"steps_per_call": 1}, {"jit": False}, {"prefetch": 1}], ids=str)
def test_batch_leaf_that_is_not_an_array_is_named_before_the_first_step(options, leaf, match):
    with pytest.raises(TypeError, match=f"A batch needs arrays and numbers as leaves, {match}"):
        Engine(lambda s, b: (s, {}), **options).run(jnp.float32(0), [{"x": [leaf], "y": 1.0}] * 3, epochs=1)


def test_batch_leaf_that_is_not_an_array_is_named_in_a_later_block():
    data = [{"x": np.zeros(2)}] * 3 + [{"x": "cat"}] * 3
    with (
        pytest.raises(TypeError, match="A batch needs arrays and numbers as leaves, got str at 'x'"),
    ):
        Engine(lambda s, b: (s, {}), steps_per_call=2).run(jnp.float32(0), data, epochs=1)


@pytest.mark.parametrize("leaf", [True, 1.0, 1j, np.bool_(True), np.float16(1), np.ones(2, jnp.bfloat16)])
def test_numbers_and_arrays_are_leaves_of_a_batch(leaf):
    assert Engine(lambda s, b: (s, {}), steps_per_call=2).run(jnp.float32(0), [leaf] * 3, epochs=1).step == 3


# The run


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ({"epochs": -1}, "A run needs epochs to be a whole number >= 0, got -1"),
        ({"steps": 1.5}, "A run needs steps to be a whole number >= 0, got 1.5"),
        ({"steps": True}, "A run needs steps to be a whole number >= 0, got True"),
        ({"steps": 3, "epoch_steps": 0}, "A run needs epoch_steps to be a whole number >= 1, got 0"),
    ],
)
def test_targets_out_of_range_are_refused(targets, match):
    with pytest.raises(ValueError, match=match):
        Engine(step).run(jnp.float32(0), [1.0], **targets)


@pytest.mark.parametrize("option", ["log_every", "in_flight"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None])
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"Engine needs {option} to be a whole number >= 1, got {value}"):
        Engine(step, **{option: value})


def test_target_below_the_current_step_is_refused():
    engine = Engine(step)
    result = engine.run(jnp.float32(0), [1.0] * 4, epochs=2)
    with pytest.raises(ValueError, match="at step 8, beyond the target of 5 steps"):
        engine.run(result, [1.0] * 4, steps=5)


def test_resuming_with_another_random_key_names_both_keys():
    engine = Engine(takes_key)
    result = engine.run(jnp.float32(0), [0, 0], epochs=1, rng=jax.random.key(3))
    with pytest.raises(ValueError, match=r"random key \(rng\) .*\[0, 3\].*, this run .*\[0, 4\]"):
        engine.run(result, [0, 0], epochs=2, rng=jax.random.key(4))


# Callbacks


async def coroutine(self, loop):
    pass


def generator(self, loop):
    yield


def test_handler_assigned_to_an_object_is_checked_when_the_engine_is_made():
    callback = Callback()
    callback.on_step_end = lambda: None
    with pytest.raises(TypeError, match=r"Callback.on_step_end needs the arguments \(loop\), got \(\)"):
        Engine(step, [callback])


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({"on_train_start": lambda self, loop: None}, "Bad.on_train_start is not an event"),
        ({"on_step_end": lambda self: None}, r"Bad.on_step_end needs the arguments \(self, loop\), got \(self\)"),
        ({"on_step_end": lambda self, loop, metrics: None}, r"\(self, loop\), got \(self, loop, metrics\)"),
        ({"on_exception": lambda self, loop: None}, r"\(self, loop, error\), got \(self, loop\)"),
        ({"on_log": None}, "Bad.on_log needs to be a plain method, got NoneType"),
        ({"on_step_end": coroutine}, "Bad.on_step_end needs to be a plain function, got a coroutine function"),
        ({"on_step_end": generator}, "Bad.on_step_end needs to be a plain function, got a generator function"),
        ({"on_log": staticmethod(lambda loop, record: None)}, "plain method, got staticmethod"),
        ({"get_state": lambda self: {}}, "Bad has get_state without set_state; define both"),
        ({"set_state": lambda self, state: None}, "Bad has set_state without get_state; define both"),
    ],
)
def test_callback_class_with_a_mistake_is_refused_when_it_is_defined(methods, match):
    with pytest.raises(TypeError, match=match):
        type("Bad", (Callback,), methods)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (lambda carry, ctx: ctx, TypeError, r"Half.update needs to return \(carry, ctx\), got Context"),
        (lambda carry, ctx: (carry, ctx.state), TypeError, r"Half.update needs to return \(carry, ctx\)"),
        (lambda carry, ctx: None, TypeError, r"Half.update needs to return \(carry, ctx\), got None"),
        (lambda carry, ctx: (jnp.zeros(2), ctx), ValueError, r"Half.update needs to return a carry like .*\[\] became"),
        (lambda carry, ctx: (carry, ctx.replace(state=jnp.zeros(2))), ValueError, "Half.update needs .* a state like"),
        (
            lambda carry, ctx: (carry, ctx.replace(batch=1)),
            TypeError,
            r"ctx.replace of Half accepts only .*, got \['batch'\]",
        ),
        (lambda carry, ctx: (carry, ctx.log(loss=1)), ValueError, "Half logs 'loss', which is taken"),
        (lambda carry, ctx: (carry, ctx.log(x=jnp.zeros(2))), ValueError, "Half needs to log scalars"),
        (lambda carry, ctx: (carry, ctx.log(x=ctx.rng[0])), ValueError, "Half needs a random key"),
    ],
)
def test_compiled_half_with_a_mistake_is_named(wrong, error, match):
    class Half(Callback):
        update_when = 2  # behind a branch; tests/test_first_hour.py has those that are always due

        def init(self, state):
            return 0.0

        def update(self, carry, ctx):
            return wrong(carry, ctx)

    with pytest.raises(error, match=match):
        Engine(step, [Half()]).run(jnp.float32(0), [1.0] * 2, epochs=1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EMA(start=-1), "EMA needs start to be a whole number >= 0"),
        (lambda: EarlyStopping("x", patience=1, min_delta=-1), "min_delta >= 0, got -1"),
        (lambda: Checkpoint("x", keep=0), "Checkpoint needs keep to be a whole number >= 1"),
        (lambda: Progress(interval=-1), "Progress needs interval > 0 in seconds, got -1"),
        (lambda: Progress(interval="1"), "Progress needs interval > 0 in seconds, got '1'"),
    ],
)
def test_arguments_out_of_range_are_refused_when_the_callback_is_made(make, match):
    with pytest.raises(ValueError, match=match):
        make()


class Scalars:
    """A writer whose method lacks the step."""

    def write_scalars(self, scalars):
        pass


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Checkpoint("x", best=5), "Checkpoint needs best= to be the name of a metric, .* got 5"),
        (lambda: EarlyStopping(5, patience=1), "EarlyStopping needs the name of a metric, .* got 5"),
        (lambda: Evaluate(score, [], name=None), "Evaluate needs a name for its records, .* got None"),
        (lambda: LearningRate(name=None), "LearningRate needs a name for its records, .* got None"),
        (lambda: Images(lambda: {}, png="x"), r"The function of Images needs the arguments \(state\), got \(\)"),
        (lambda: Images(lambda s: {}, png="x", using=0.9), r"Images needs using= to have apply\(loop\), .* got 0.9"),
        (lambda: Writer(Scalars()), r"Scalars.write_scalars needs the arguments \(step, scalars\), got \(scalars\)"),
        (lambda: Engine(step, [Callback5()]), "The name of Callback5 needs to be text, got 5"),
    ],
)
def test_arguments_of_another_type_are_refused_when_the_callback_is_made(make, match):
    with pytest.raises(TypeError, match=match):
        make()


class Callback5(Callback):
    name = 5


def score(state, batch):
    return {"loss": state}


def test_missing_field_of_the_state_is_named_with_the_existing_fields(tmp_path):
    with pytest.raises(ValueError, match=r"EMA needs 'parameters' in the state, but dict has \['params', 'rng'\]"):
        Engine(step, [EMA(of="parameters"), Checkpoint(tmp_path / "run")]).run(STATE, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "set"),
        (np.array([object()]), "ndarray"),
        (np.array(["2026-11-28"], "datetime64"), "ndarray"),
        ({"__array__": "0"}, "dict"),
        ({"__bytes__": ""}, "dict"),
        ({1: 2}, "dict"),
    ],
    ids=["set", "objects", "dates", "name of an array", "name of bytes", "key that is no string"],
)
def test_host_state_that_cannot_be_saved_is_refused_when_the_engine_is_made(value, kind):
    class Keeps(Callback):
        def get_state(self):
            return {"seen": value}

        def set_state(self, state):
            pass

    with pytest.raises(TypeError, match=rf"Keeps.get_state needs JSON values, .*got {kind} at \['seen'\]"):
        Engine(step, [Keeps()])


def test_restore_outside_on_load_is_refused():
    engine = Engine(step)
    result = engine.run(jnp.float32(0), [1.0], epochs=1)
    engine.on("epoch_begin")(lambda loop: loop.restore(result.snapshot))
    with pytest.raises(RuntimeError, match="loop.restore can only be called in on_load"):
        engine.run(jnp.float32(0), [1.0], epochs=1)


def test_steps_of_a_missing_name_in_the_history_are_answered_like_its_values():
    history = Engine(step).run(jnp.float32(0), [1.0], epochs=1).history
    with pytest.raises(KeyError, match="'loss' was not recorded"):
        history.steps("loss")
