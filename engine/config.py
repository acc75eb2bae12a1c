"""Validated configurations of runs that read and write YAML and JSON; needs pydantic and PyYAML."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import optax

from .checks import check_int, did_you_mean

try:
    import yaml
    from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator
except ImportError as _error:
    raise ImportError(f"onstep.config needs pydantic and PyYAML: pip install pydantic PyYAML ({_error})") from _error

Whole = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1, with two differences from PyYAML.

    `1e-3` is a number, as intended, and not a string. A key that is given twice is an error, as the YAML
    specification says. PyYAML would keep the last value.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"{name} is given twice, in lines {lines[name]} and {line}. Keep one of them.")
            lines[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Writes YAML, with quotes around strings that `_Loader` would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


class Config(BaseModel):
    """A frozen, validated configuration that reads and writes YAML and JSON.

    Subclass it for your own configurations. Types are strict, so neither `"3"` nor True is a number, and an unknown
    field is an error.

    Raises:
        ValueError: fields are unknown, missing, of a wrong type or out of range (pydantic's ValidationError).

    >>> class VAEConfig(Config):
    ...     latent: int = 8
    >>> VAEConfig.from_yaml("latent: 16")
    VAEConfig(latent=16)
    >>> print(VAEConfig().to_yaml())
    latent: 8
    <BLANKLINE>
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        has = cls.model_fields
        if unknown := [name for name in given if name not in has] if isinstance(given, dict) else []:
            near = did_you_mean(str(unknown[0]), has)
            raise ValueError(f"there is no field {unknown[0]!r}.{near} The fields are {', '.join(has)}.")
        return given

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: Callable[[Self], dict[str, Any]]) -> dict[str, Any]:
        fields = type(self).model_fields
        return {name: value for name, value in serialize(self).items() if (value, fields[name].default) != (None, None)}

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the configuration as YAML, including default values, and write it to `path` if given."""
        return _written(yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the configuration as JSON, including default values, and write it to `path` if given."""
        return _written(self.model_dump_json(indent=2), path)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Self:
        """Read a configuration from YAML.

        Args:
            source: the text, or the path of a file. A string that contains no mapping is a path.

        Raises:
            ValueError: fields are unknown, missing, of a wrong type or out of range (pydantic's ValidationError),
                each with its path, or a key is given twice.
        """
        values = _Loader(_text(source)).get_single_data()
        return cls.model_validate_json(json.dumps(values, default=str))  # str: for values that YAML reads as dates

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Self:
        """Read a configuration from JSON: a text, or the path of a file. Errors are those of `from_yaml`."""
        text = _text(source)
        json.loads(text, object_pairs_hook=_once)  # pydantic would keep the last value
        return cls.model_validate_json(text)

    def _needs(self, name: str, needed: str) -> None:
        """Raise a ValueError if a field has a non-default value, but a field that it needs has no value."""
        if getattr(self, name) != type(self).model_fields[name].default and not getattr(self, needed):
            raise ValueError(f"{name} needs {needed}.")


class _Choice(Config):
    """One of several functions, chosen by `name`, with fields for its arguments."""

    name: Any
    _functions: ClassVar[dict[str, Callable[..., Any]]]
    _common: ClassVar[set[str]]  # fields that are not arguments

    def _call(self, *positional: Any) -> Any:
        return self._functions[self.name](*positional, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self if name not in self._common and value is not None}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        parameters = inspect.signature(self._functions[self.name]).parameters
        has = [name for name in type(self).model_fields if name in parameters]
        needs = [name for name in has if parameters[name].default is inspect.Parameter.empty]
        given = self._arguments()
        if wrong := [name for name in given if name not in has]:
            raise ValueError(f"{self.name} has no {', '.join(wrong)}. It has {', '.join(has) or 'no arguments'}.")
        if missing := [name for name in needs if name not in given]:
            raise ValueError(f"{self.name} needs {', '.join(missing)}.")
        return self


class OptimizerConfig(_Choice):
    """An Optax optimizer. Arguments have the names and default values that they have in Optax.

    Attributes:
        name: the optimizer. An argument that it does not have is an error.
        clip_by_value: c; gradients are first clipped to [-c, c].
        clip_by_global_norm: the largest global norm; gradients are then scaled down to it.

    >>> import optax
    >>> tx = OptimizerConfig(name="sgd", momentum=0.9, clip_by_global_norm=1.0).build(0.1)
    >>> isinstance(tx, optax.GradientTransformation)
    True
    """

    _functions = {n: getattr(optax, n) for n in ("adam", "adamw", "sgd", "rmsprop", "adagrad")}
    _common = {"name", "clip_by_value", "clip_by_global_norm"}

    name: Literal["adam", "adamw", "sgd", "rmsprop", "adagrad"]
    clip_by_value: Positive | None = None
    clip_by_global_norm: Positive | None = None
    b1: Fraction | None = None
    b2: Fraction | None = None
    eps: Positive | None = None
    eps_root: NotNegative | None = None
    weight_decay: NotNegative | None = None
    momentum: Fraction | None = None
    nesterov: bool | None = None
    decay: Fraction | None = None
    initial_scale: NotNegative | None = None
    eps_in_sqrt: bool | None = None
    centered: bool | None = None
    bias_correction: bool | None = None
    initial_accumulator_value: NotNegative | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.nesterov and self.name in ("sgd", "rmsprop") and not self.momentum:
            raise ValueError("nesterov needs momentum.")
        return self

    def build(self, learning_rate: float | optax.Schedule) -> optax.GradientTransformation:
        """Return the Optax transformation: clipping, followed by the optimizer."""
        clips = []
        if self.clip_by_value is not None:
            clips.append(optax.clip(self.clip_by_value))
        if self.clip_by_global_norm is not None:
            clips.append(optax.clip_by_global_norm(self.clip_by_global_norm))
        return optax.chain(*clips, self._call(learning_rate))


# Each schedule starts at its highest rate, `after` warm-up steps. Its fields are keyword arguments.


def _constant(rate: float, after: int) -> optax.Schedule:
    return optax.constant_schedule(rate)


def _linear(rate: float, after: int, *, decay_steps: int, end_value: float = 0.0) -> optax.Schedule:
    return optax.linear_schedule(rate, end_value, decay_steps - after)


def _cosine(rate: float, after: int, *, decay_steps: int, end_value: float = 0.0) -> optax.Schedule:
    return optax.cosine_decay_schedule(rate, decay_steps - after, alpha=end_value / rate)


def _exponential(
    rate: float,
    after: int,
    *,
    transition_steps: int,
    decay_rate: float,
    end_value: float | None = None,
    staircase: bool = False,
) -> optax.Schedule:
    return optax.exponential_decay(rate, transition_steps, decay_rate, staircase=staircase, end_value=end_value)


def _multistep(rate: float, after: int, *, milestones: tuple[int, ...], decay_rate: float) -> optax.Schedule:
    return optax.piecewise_constant_schedule(rate, {step - after: decay_rate for step in milestones})


class SchedulerConfig(_Choice):
    """A learning rate schedule of Optax, after a linear warm-up.

    With r the learning rate, e the end value, w the number of warm-up steps and t >= w the step:

        constant      r
        linear        r + (e - r) p,                       p = min(1, (t - w) / (decay_steps - w))
        cosine        e + (r - e) (1 + cos(pi p)) / 2
        exponential   max(e, r decay_rate ** q),           q = (t - w) / transition_steps
        step          max(e, r decay_rate ** floor(q))
        multistep     r decay_rate ** n,                   n = number of milestones <= t

    Attributes:
        name: the schedule. A field that it does not have is an error.
        learning_rate: r, the highest rate.
        warmup_steps: w; the rate rises from `init_value` at step 0 to r at step w.
        decay_steps: the step at which e is reached, counted from the first step of the run, as in Optax.
        milestones: the steps at which the rate falls, counted from the first step of the run.

    >>> schedule = SchedulerConfig(name="cosine", learning_rate=0.1, warmup_steps=10, decay_steps=110).build()
    >>> [round(float(schedule(step)), 6) for step in (0, 5, 10, 60, 110)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """

    _functions = {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "exponential": _exponential,
        "step": functools.partial(_exponential, staircase=True),
        "multistep": _multistep,
    }
    _common = {"name", "learning_rate", "warmup_steps", "init_value"}

    name: Literal["constant", "linear", "cosine", "exponential", "step", "multistep"]
    learning_rate: Positive
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = 0
    init_value: NotNegative = 0.0
    decay_steps: Whole | None = None
    end_value: NotNegative | None = None
    transition_steps: Whole | None = None
    decay_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    milestones: Annotated[tuple[Whole, ...], Field(min_length=1, strict=False)] | None = None  # a list is accepted

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        self._needs("init_value", "warmup_steps")
        for name in ("init_value", "end_value"):
            if (getattr(self, name) or 0) > self.learning_rate:
                raise ValueError(
                    f"{name} needs to be <= learning_rate, {self.learning_rate}, got {getattr(self, name)}."
                )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps needs to be > warmup_steps, {self.warmup_steps}, got {self.decay_steps}.")
        if self.milestones is not None:
            steps = (self.warmup_steps, *self.milestones)
            if any(later <= step for step, later in itertools.pairwise(steps)):
                raise ValueError(f"milestones need to increase and be > warmup_steps, {steps[0]}, got {steps[1:]}.")
        return self

    def build(self) -> optax.Schedule:
        """Return the schedule, a function of the step."""
        main = self._call(self.learning_rate, self.warmup_steps)
        if not self.warmup_steps:
            return main
        warmup = optax.linear_schedule(self.init_value, self.learning_rate, self.warmup_steps)
        return optax.join_schedules([warmup, main], [self.warmup_steps])


class TrainingConfig(Config):
    """The configuration of a run: arguments of `Engine`, `run` and the usual callbacks, with the same names.

    It holds values only. `build` returns the optimizer and the schedule, and your code passes on the other values.

    Attributes:
        batch_size: examples in a batch.
        epochs, steps: the targets; at least one is needed.
        seed: the seed of the weights, the order of the data, and the run's random key.
        log_every: steps between two records of the training metrics.
        eval_every, save_every: steps between two evaluations or saves; None means once per epoch.
        directory: where checkpoints are saved; None saves none.
        keep: the number of newest checkpoints to keep.
        metric, mode: the metric that early stopping and the best checkpoint compare, such as `"val/loss"`.
        patience, min_delta: arguments of early stopping; None never stops early.
        ema_decay: the decay of the averaged parameters; None keeps no average.

    >>> config = TrainingConfig(
    ...     optimizer=OptimizerConfig(name="adam"),
    ...     scheduler=SchedulerConfig(name="constant", learning_rate=0.001),
    ...     batch_size=32,
    ...     epochs=3,
    ... )
    >>> tx, schedule = config.build()
    >>> round(float(schedule(0)), 6)
    0.001
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    batch_size: Whole
    epochs: Whole | None = None
    steps: Whole | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Whole = 50
    eval_every: Whole | None = None
    save_every: Whole | None = None
    directory: Name | None = None
    keep: Whole = 3
    metric: Name | None = None
    mode: Literal["min", "max"] = "min"
    patience: Whole | None = None
    min_delta: NotNegative = 0.0
    ema_decay: Fraction | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.epochs is None and self.steps is None:
            raise ValueError("a run needs a target: epochs, steps or both.")
        needs = {"save_every": "directory", "keep": "directory", "mode": "metric", "patience": "metric"}
        for name, needed in {**needs, "min_delta": "patience"}.items():
            self._needs(name, needed)
        if self.steps is not None and self.scheduler.warmup_steps > self.steps:
            raise ValueError(
                f"scheduler.warmup_steps needs to be <= steps, {self.steps}, got {self.scheduler.warmup_steps}."
            )
        return self

    def build(self) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Return the Optax transformation, which follows the schedule, and the schedule."""
        schedule = self.scheduler.build()
        return self.optimizer.build(schedule), schedule


def plot(schedule: SchedulerConfig | optax.Schedule, steps: int, path: str | os.PathLike[str]) -> None:
    """Draw a learning rate schedule into an image file, with matplotlib.

    Args:
        schedule: the schedule, or its configuration.
        steps: the number of steps to draw, from step 0.
        path: the image file, such as `.png`, `.svg` or `.pdf`.

    Raises:
        ValueError: `steps` is less than 1.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "schedule.png"
    >>> plot(SchedulerConfig(name="cosine", learning_rate=0.1, decay_steps=100), 100, path)
    >>> path.exists()
    True
    """
    from matplotlib.figure import Figure

    check_int("plot", "steps", steps, 1)
    rate = schedule.build() if isinstance(schedule, SchedulerConfig) else schedule
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(jax.vmap(rate)(jnp.arange(steps)))
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, steps), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Raise a ValueError if a JSON object has two values for a name."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice. Keep one of them.")


def _text(source: str | os.PathLike[str]) -> str:
    """Return the content of a file, or the source itself if it is a string that contains a mapping."""
    if isinstance(source, str) and re.search(r"[{\n]|:\s", source):
        return source
    return Path(source).read_text(encoding="utf-8")


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
