"""Configurations: what they build, compared with plain Optax and numpy; files; errors."""

import inspect
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onstep import Batches, Engine, every
from onstep.callbacks import EMA, Checkpoint, EarlyStopping, Evaluate
from onstep.config import Config, OptimizerConfig, SchedulerConfig, TrainingConfig, plot
from onstep.testing import same_bytes
from pydantic import Field

PARAMS = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}
GRADS = [{"w": jnp.array([0.3, -4.0, 0.1]) * n, "b": jnp.array(2.0)} for n in (1, -2, 3)]
SMALL = {
    "optimizer": {"name": "adam"},
    "scheduler": {"name": "constant", "learning_rate": 1e-3},
    "batch_size": 2,
    "epochs": 3,
}
FULL = """
optimizer:
  name: sgd
  momentum: 0.9
  nesterov: true
  clip_by_global_norm: 1
scheduler:
  name: cosine
  learning_rate: 1e-2
  warmup_steps: 4
  decay_steps: 20
batch_size: 4
epochs: 5
eval_every: 2
directory: {}
metric: val/loss
patience: 3
ema_decay: 0.9
"""


def after(tx, params=PARAMS):
    """Return the parameters after three steps with different gradients."""
    state = tx.init(params)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def small(**changes):
    return TrainingConfig.model_validate({**SMALL, **changes})


# Optimizers


OPTIMIZERS = {
    "adam": {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4, "nesterov": True},
    "adamw": {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "eps_root": 1e-4, "nesterov": True, "weight_decay": 0.3},
    "sgd": {"momentum": 0.8, "nesterov": True},
    "rmsprop": {
        "decay": 0.7,
        "eps": 1e-3,
        "initial_scale": 0.2,
        "eps_in_sqrt": False,
        "centered": True,
        "momentum": 0.8,
        "nesterov": True,
        "bias_correction": True,
    },
    "adagrad": {"initial_accumulator_value": 0.4, "eps": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_the_optax_optimizer_with_that_name(name):
    schedule, plain = optax.linear_schedule(0.1, 0.01, 3), getattr(optax, name)
    assert same_bytes(after(OptimizerConfig(name=name).build(schedule)), after(plain(schedule)))
    assert same_bytes(after(OptimizerConfig(name=name).build(0.1)), after(plain(0.1)))


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, arguments in OPTIMIZERS.items() for a in arguments])
def test_every_argument_reaches_its_optimizer(name, argument):
    needed = {"momentum": 0.5} if argument == "nesterov" and name in ("sgd", "rmsprop") else {}
    arguments = {**needed, argument: OPTIMIZERS[name][argument]}
    built = after(OptimizerConfig(name=name, **arguments).build(0.1))
    assert same_bytes(built, after(getattr(optax, name)(0.1, **arguments)))
    assert not same_bytes(built, after(getattr(optax, name)(0.1, **needed)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_number_that_optax_accepts_is_a_field(name):
    no_numbers = {"learning_rate", "mu_dtype", "accumulator_dtype", "mask"}
    assert set(inspect.signature(getattr(optax, name)).parameters) - no_numbers == set(OPTIMIZERS[name])


def test_gradients_are_clipped_by_value_and_then_by_norm():
    config = OptimizerConfig(name="sgd", clip_by_value=1.5, clip_by_global_norm=2.0)
    clipped = np.clip([0.3, -4.0, 0.1, 2.0], -1.5, 1.5)
    clipped *= 2.0 / np.linalg.norm(clipped)
    tx = config.build(1.0)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose([*updates["w"], updates["b"]], -clipped, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "clip"), [("clip_by_value", optax.clip), ("clip_by_global_norm", optax.clip_by_global_norm)]
)
def test_either_clip_can_be_left_out(field, clip):
    plain = optax.chain(clip(0.5), optax.adam(0.1))
    assert same_bytes(after(OptimizerConfig(name="adam", **{field: 0.5}).build(0.1)), after(plain))


# Schedules


def expected(config, t):
    """Return the closed form of a schedule at a step, in double precision."""
    r, w, e = config.learning_rate, config.warmup_steps, config.end_value or 0.0
    if t < w:
        return config.init_value + (r - config.init_value) * t / w
    if config.name == "constant":
        return r
    if config.name == "multistep":
        return r * config.decay_rate ** sum(t >= m for m in config.milestones)
    if config.name in ("exponential", "step"):
        q = (t - w) / config.transition_steps
        return max(e, r * config.decay_rate ** (math.floor(q) if config.name == "step" else q))
    p = min(1, (t - w) / (config.decay_steps - w))
    return r + (e - r) * p if config.name == "linear" else e + (r - e) * (1 + math.cos(math.pi * p)) / 2


SCHEDULES = [
    {"name": "constant"},
    {"name": "linear", "decay_steps": 50},
    {"name": "linear", "decay_steps": 50, "end_value": 0.05},
    {"name": "cosine", "decay_steps": 50},
    {"name": "cosine", "decay_steps": 50, "end_value": 0.05},
    {"name": "exponential", "transition_steps": 7, "decay_rate": 0.5},
    {"name": "exponential", "transition_steps": 7, "decay_rate": 0.5, "end_value": 0.05},
    {"name": "step", "transition_steps": 7, "decay_rate": 0.5},
    {"name": "step", "transition_steps": 7, "decay_rate": 0.5, "end_value": 0.05},
    {"name": "multistep", "milestones": [13, 20, 44], "decay_rate": 0.1},
]


@pytest.mark.parametrize(
    "warmup",
    [{}, {"warmup_steps": 1}, {"warmup_steps": 12}, {"warmup_steps": 12, "init_value": 0.02}],
    ids=["no warm-up", "one step", "from 0", "from 0.02"],
)
@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: "-".join([fields["name"], *list(fields)[1:]]))
def test_a_schedule_equals_its_closed_form_at_every_step(fields, warmup):
    config = SchedulerConfig(learning_rate=0.3, **fields, **warmup)
    rates = jax.vmap(config.build())(jnp.arange(60))
    np.testing.assert_allclose(rates, [expected(config, t) for t in range(60)], rtol=1e-5, atol=1e-8)


def test_a_schedule_accepts_a_python_integer():
    schedule = SchedulerConfig(name="linear", learning_rate=0.5, warmup_steps=4, decay_steps=8).build()
    assert [float(schedule(t)) for t in (0, 3, 4, 6, 8, 99)] == [0.0, 0.375, 0.5, 0.25, 0.0, 0.0]


def test_the_optimizer_follows_the_schedule():
    config = small(scheduler={"name": "linear", "learning_rate": 0.5, "warmup_steps": 2, "decay_steps": 4})
    tx, schedule = config.build()
    assert same_bytes(after(tx), after(optax.adam(schedule)))
    assert float(schedule(1)) == 0.25


@pytest.mark.parametrize("given", [SchedulerConfig(name="constant", learning_rate=0.1), optax.linear_schedule(1, 0, 9)])
def test_any_schedule_can_be_drawn(given, tmp_path):
    plot(given, 30, tmp_path / "rate.png")
    image = (tmp_path / "rate.png").read_bytes()
    width, height = (int.from_bytes(image[n : n + 4]) for n in (16, 20))
    assert (image[:8], width, height) == (b"\x89PNG\r\n\x1a\n", 960, 540)
    with pytest.raises(ValueError, match="plot needs steps to be a whole number >= 1"):
        plot(given, 0, tmp_path / "none.png")


# Writing and reading

quick = settings(deadline=None, database=None, derandomize=True)


def fraction():
    return st.floats(0, 1, exclude_max=True)


def positive(most=1e6):
    return st.floats(0, most, exclude_min=True)


def count(most=10**6):
    return st.integers(1, most)


def some(**fields):
    """Return dicts with any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


CLIPS = {"clip_by_value": positive(), "clip_by_global_norm": positive()}
MOMENTUM = st.one_of(
    some(momentum=fraction()), st.fixed_dictionaries({"momentum": st.floats(0.1, 0.9), "nesterov": st.booleans()})
)
ADAM = {"b1": fraction(), "b2": fraction(), "eps": positive(), "eps_root": st.floats(0, 1), "nesterov": st.booleans()}
RMSPROP = {"decay": fraction(), "eps": positive(), "centered": st.booleans(), "bias_correction": st.booleans()}


def named(name, *fields):
    return st.tuples(st.just({"name": name}), *fields).map(
        lambda parts: {k: v for part in parts for k, v in part.items()}
    )


optimizers = st.one_of(
    named("adam", some(**CLIPS, **ADAM)),
    named("adamw", some(**CLIPS, **ADAM, weight_decay=st.floats(0, 1))),
    named("sgd", some(**CLIPS), MOMENTUM),
    named("rmsprop", some(**CLIPS, **RMSPROP), MOMENTUM),
    named("adagrad", some(**CLIPS, initial_accumulator_value=st.floats(0, 1))),
)


@st.composite
def schedulers(draw):
    rate, warmup = draw(positive()), draw(st.integers(0, 1000))
    start = {"init_value": draw(st.floats(0, rate))} if warmup and draw(st.booleans()) else {}
    end = {"end_value": draw(st.floats(0, rate))} if draw(st.booleans()) else {}
    name = draw(st.sampled_from(["constant", "linear", "cosine", "exponential", "step", "multistep"]))
    if name in ("linear", "cosine"):
        own = {"decay_steps": draw(st.integers(warmup + 1, 10**6)), **end}
    elif name in ("exponential", "step"):
        own = {"transition_steps": draw(count()), "decay_rate": draw(positive(1)), **end}
    elif name == "multistep":
        steps = draw(st.sets(st.integers(warmup + 1, 10**6), min_size=1, max_size=4))
        own = {"milestones": sorted(steps), "decay_rate": draw(positive(1))}
    else:
        own = {}
    return {"name": name, "learning_rate": rate, "warmup_steps": warmup, **start, **own}


@st.composite
def runs(draw):
    scheduler = draw(schedulers())
    steps = st.integers(max(1, scheduler["warmup_steps"]), 2**31 - 1)
    targets = draw(st.sampled_from([("epochs",), ("steps",), ("epochs", "steps")]))
    run = {name: draw({"epochs": count(), "steps": steps}[name]) for name in targets}
    text = st.text(min_size=1) | st.sampled_from(["1e-3", "no", "3", "~", "2024-01-01", "a: b", "#", "\x85"])
    run |= draw(some(seed=st.integers(0, 2**32 - 1), log_every=count(), eval_every=count(), ema_decay=fraction()))
    if draw(st.booleans()):
        run |= {"directory": draw(text)} | draw(some(keep=count(), save_every=count()))
    if draw(st.booleans()):
        run |= {"metric": draw(text), "mode": draw(st.sampled_from(["min", "max"]))}
        run |= {"patience": draw(count()), "min_delta": draw(st.floats(0, 1))} if draw(st.booleans()) else {}
    return {"optimizer": draw(optimizers), "scheduler": scheduler, "batch_size": draw(count()), **run}


@quick
@given(runs())
def test_a_configuration_survives_yaml_json_and_dicts(fields):
    config = TrainingConfig.model_validate(fields)
    for part in (config, config.optimizer, config.scheduler):
        kind = type(part)
        assert kind.from_yaml(part.to_yaml()) == part
        assert kind.from_json(part.to_json()) == part
        assert kind.model_validate(part.model_dump()) == part


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_file_is_written_and_read_by_its_path(kind, tmp_path):
    config, path = small(directory="größe"), tmp_path / f"run.{kind}"
    text = getattr(config, f"to_{kind}")(path)
    assert path.read_text(encoding="utf-8") == text
    read = getattr(TrainingConfig, f"from_{kind}")
    assert read(path) == read(str(path)) == read(text) == config
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        read("none.yaml")


WRITTEN = """\
optimizer:
  name: adam
scheduler:
  name: constant
  learning_rate: 0.001
  warmup_steps: 0
  init_value: 0.0
batch_size: 2
epochs: 3
seed: 0
log_every: 50
keep: 3
mode: min
min_delta: 0.0
"""


def test_a_configuration_is_written_in_order_with_defaults_and_without_empty_fields():
    assert small().to_yaml() == WRITTEN
    assert json.loads(small().to_json()) == yaml.safe_load(WRITTEN)


class VAE(Config):
    """A user's configuration, with a tuple, and a field that can be None but has another default."""

    widths: tuple[int, ...] = Field((64, 32), strict=False)
    latent: int | None = 8
    training: TrainingConfig


def test_a_configuration_of_a_user_survives_yaml_and_json():
    config = VAE(widths=(8, 4), latent=None, training=small())
    assert VAE.from_yaml(config.to_yaml()) == VAE.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"(?s)widths.1\n.*training.batch_size\n"):
        VAE.from_yaml(config.to_yaml().replace("- 4", "- '4'").replace("batch_size: 2", "batch_size: 0"))


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "1.0e-3", "10e-4"])
def test_every_notation_of_a_small_number_is_read(number):
    config = SchedulerConfig.from_yaml(f"{{name: constant, learning_rate: {number}}}")
    assert config.learning_rate == 1e-3


def test_a_configuration_is_frozen_and_hashable():
    config = small()
    with pytest.raises(ValueError, match="seed\n.*frozen"):
        config.seed = 1
    assert {config: 1}[small()] == 1


# Errors


def scheduler(**fields):
    return {"scheduler": {"learning_rate": 0.1, **fields}}


INVALID = [
    ({"batch_size": "3"}, "batch_size\n  Input should be a valid integer"),
    ({"batch_size": True}, "batch_size\n  Input should be a valid integer"),
    ({"batch_size": 2.0}, "batch_size\n  Input should be a valid integer"),
    ({"batch_size": 0}, "batch_size\n  Input should be greater than or equal to 1"),
    ({"seed": 2**32}, "seed\n  Input should be less than 4294967296"),
    ({"steps": 2**31}, "steps\n  Input should be less than 2147483648"),
    ({"ema_decay": 1.0}, "ema_decay\n  Input should be less than 1"),
    ({"ema_decay": True}, "ema_decay\n  Input should be a valid number"),
    ({"metric": ""}, "metric\n  String should have at least 1 character"),
    ({"metric": "val/loss", "mode": "best"}, "mode\n  Input should be 'min' or 'max'"),
    ({"epoch": 3}, "there is no field 'epoch'. Did you mean epochs?"),
    ({3: 3}, "there is no field 3. The fields are optimizer, scheduler, batch_size, epochs"),
    ({"epochs": None}, "a run needs a target: epochs, steps or both"),
    ({"patience": 3}, "patience needs metric"),
    ({"mode": "max"}, "mode needs metric"),
    ({"metric": "val/loss", "min_delta": 0.1}, "min_delta needs patience"),
    ({"keep": 5}, "keep needs directory"),
    ({"save_every": 5}, "save_every needs directory"),
    (
        {"optimizer": {"name": "lion"}},
        "optimizer.name\n  Input should be 'adam', 'adamw', 'sgd', 'rmsprop' or 'adagrad'",
    ),
    ({"optimizer": {"b1": 0.9}}, "optimizer.name\n  Field required"),
    ({"optimizer": None}, "optimizer\n  Input should be a valid dictionary"),
    ({"optimizer": {"name": "adam", "b1": 1.0}}, "optimizer.b1\n  Input should be less than 1"),
    ({"optimizer": {"name": "adam", "eps": 0.0}}, "optimizer.eps\n  Input should be greater than 0"),
    ({"optimizer": {"name": "adam", "nesterov": 1}}, "optimizer.nesterov\n  Input should be a valid boolean"),
    ({"optimizer": {"name": "sgd", "nesterov": True}}, "optimizer\n  Value error, nesterov needs momentum"),
    ({"optimizer": {"name": "rmsprop", "nesterov": True}}, "optimizer\n  Value error, nesterov needs momentum"),
    ({"optimizer": {"name": "sgd", "moment": 0.1}}, "optimizer\n  Value error, there is no .* Did you mean momentum?"),
    (scheduler(name="constant", learning_rate=0.0), "scheduler.learning_rate\n  Input should be greater than 0"),
    (scheduler(name="constant", learning_rate=math.inf), "scheduler.learning_rate\n  Input should be a finite number"),
    (scheduler(name="constant", learning_rate=math.nan), "scheduler.learning_rate\n  Input should be"),
    (
        scheduler(name="constant", end_value=0.0),
        "scheduler\n  Value error, constant has no end_value. It has no arguments",
    ),
    (scheduler(name="step", decay_steps=9), "step has no decay_steps. It has end_value, transition_steps, decay_rate"),
    (scheduler(name="linear"), "scheduler\n  Value error, linear needs decay_steps"),
    (scheduler(name="exponential"), "scheduler\n  Value error, exponential needs transition_steps, decay_rate"),
    (scheduler(name="constant", init_value=0.01), "init_value needs warmup_steps"),
    (
        scheduler(name="constant", warmup_steps=2, init_value=0.2),
        "init_value needs to be <= learning_rate, 0.1, got 0.2",
    ),
    (scheduler(name="linear", decay_steps=9, end_value=0.2), "end_value needs to be <= learning_rate, 0.1, got 0.2"),
    (scheduler(name="cosine", decay_steps=9, warmup_steps=9), "decay_steps needs to be > warmup_steps, 9, got 9"),
    (scheduler(name="multistep", decay_rate=0.1, milestones=[]), "milestones\n  .* at least 1 item"),
    (
        scheduler(name="multistep", decay_rate=0.1, milestones=[3, True]),
        "milestones.1\n  Input should be a valid integer",
    ),
    (scheduler(name="multistep", decay_rate=0.1, milestones=[5, 5]), r"milestones need to increase .* got \(5, 5\)"),
    (scheduler(name="multistep", decay_rate=0.1, milestones=[4], warmup_steps=4), "be > warmup_steps, 4, got"),
    (
        scheduler(name="multistep", decay_rate=1.5, milestones=[4]),
        "decay_rate\n  Input should be less than or equal to 1",
    ),
    (
        {"steps": 9, **scheduler(name="constant", warmup_steps=10)},
        "scheduler.warmup_steps needs to be <= steps, 9, got 10",
    ),
]


@pytest.mark.parametrize(("changes", "message"), INVALID, ids=lambda given: str(given)[:60])
def test_an_invalid_value_is_an_error_that_names_its_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate({**SMALL, **changes})


FIELDS = {field for arguments in OPTIMIZERS.values() for field in arguments}


@pytest.mark.parametrize(("name", "field"), [(n, f) for n in OPTIMIZERS for f in sorted(FIELDS - set(OPTIMIZERS[n]))])
def test_an_argument_of_another_optimizer_is_an_error(name, field):
    value = next(arguments[field] for arguments in OPTIMIZERS.values() if field in arguments)
    with pytest.raises(ValueError, match=f"{name} has no {field}. It has .*(momentum|eps)"):
        OptimizerConfig(name=name, **{field: value})


NO_NUMBER = st.text() | st.booleans() | st.lists(st.integers()) | st.dictionaries(st.text(), st.integers())


@quick
@given(runs(), st.data())
def test_a_value_of_another_type_is_an_error_that_names_its_path(fields, data):
    path = data.draw(st.sampled_from([("batch_size",), ("seed",), ("ema_decay",), ("scheduler", "learning_rate")]))
    *outer, name = path
    (fields[outer[0]] if outer else fields)[name] = data.draw(NO_NUMBER)
    with pytest.raises(ValueError, match=rf"\n{'.'.join(path)}\n"):
        TrainingConfig.model_validate(fields)


@quick
@given(runs(), st.text(), st.sampled_from(["training", "optimizer", "scheduler"]))
def test_an_unknown_field_is_an_error_at_every_level(fields, name, where):
    assume(name not in {**TrainingConfig.model_fields, **OptimizerConfig.model_fields, **SchedulerConfig.model_fields})
    fields.get(where, fields)[name] = 1
    with pytest.raises(ValueError, match=re.escape(f"there is no field {name!r}.")):
        TrainingConfig.model_validate(fields)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []\n", "batch_size: !!python/name:os.getcwd\n"])
def test_yaml_that_would_run_code_is_an_error(text):
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        TrainingConfig.from_yaml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size: 2\nepochs: 3\nbatch_size: 4\n", "batch_size is given twice, in lines 1 and 3"),
        ("epochs: 3\noptimizer:\n  b1: 0.8\n  name: adam\n  b1: 0.9\n", "b1 is given twice, in lines 3 and 5"),
        ("{epochs: 3, 'epochs': 3}", "epochs is given twice, in lines 1 and 1"),
    ],
    ids=["outermost", "in a part", "in one line"],
)
def test_a_key_that_is_given_twice_is_an_error_that_names_the_lines(text, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_yaml(text)


def test_a_name_that_is_given_twice_in_json_is_an_error():
    with pytest.raises(ValueError, match="b1 is given twice"):
        TrainingConfig.from_json('{"optimizer": {"b1": 0.8, "name": "adam", "b1": 0.9}}')


class Optimizers(Config):
    a: OptimizerConfig
    b: OptimizerConfig
    c: OptimizerConfig


def test_parts_of_yaml_can_have_the_same_keys_and_be_merged():
    text = "a: &a {name: sgd, momentum: 0.1}\nb: &b {<<: *a, momentum: 0.2}\nc: {<<: *b, momentum: 0.3}\n"
    kept = Optimizers.from_yaml(text)
    assert [part.momentum for part in (kept.a, kept.b, kept.c)] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("missing", ["pydantic", "yaml"])
def test_the_import_says_what_to_install_if_a_package_is_missing(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import onstep.config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ImportError: onstep.config needs pydantic and PyYAML: pip install pydantic PyYAML" in done.stderr


# A run


TAKERS = {
    "batch_size": Batches,
    "seed": Batches,
    "log_every": Engine,
    "epochs": Engine.run,
    "steps": Engine.run,
    "directory": Checkpoint,
    "keep": Checkpoint,
    "metric": EarlyStopping,
    "mode": EarlyStopping,
    "patience": EarlyStopping,
    "min_delta": EarlyStopping,
}


@pytest.mark.parametrize(("name", "taker"), TAKERS.items(), ids=list(TAKERS))
def test_a_field_has_the_name_and_the_default_of_the_argument_it_is_for(name, taker):
    parameter, field = inspect.signature(taker).parameters[name], TrainingConfig.model_fields[name]
    assert field.is_required() or field.default in (None, parameter.default)


def test_a_run_is_built_from_a_configuration(tmp_path):
    config = TrainingConfig.from_yaml(FULL.format(tmp_path))
    tx, schedule = config.build()
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    data = Batches({"x": x, "y": 3 * x}, config.batch_size, seed=config.seed)

    def loss_fn(params, batch):
        return jnp.mean((params * batch["x"] - batch["y"]) ** 2)

    def step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        return {"params": state["params"] + updates, "opt_state": opt_state}, {"loss": loss}

    ema = EMA(config.ema_decay)
    score = Evaluate(lambda s, b: {"loss": loss_fn(s["params"], b)}, data, when=config.eval_every or every(epochs=1))
    stop = EarlyStopping(config.metric, patience=config.patience, mode=config.mode, min_delta=config.min_delta)
    save = Checkpoint(config.directory, keep=config.keep, best=config.metric, mode=config.mode)
    engine = Engine(step, [ema, score, stop, save], log_every=config.log_every)
    params = jnp.float32(0)
    result = engine.run(
        {"params": params, "opt_state": tx.init(params)}, data, epochs=config.epochs, steps=config.steps
    )
    assert (result.step, result.history.steps("val/loss")) == (20, list(range(2, 21, 2)))
    assert result.latest["val/loss"] < result.history["val/loss"][0]
    assert float(schedule(result.step)) == 0.0
