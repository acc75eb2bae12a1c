"""The mistakes of a first hour: each is answered with what was found and what to do, at the first possible moment.

A mistake is a function of a `Scene`. It builds what it needs and calls `scene.run`, with every argument right but one.
The moment is the last one that the scene reached: an error in a callback's arguments comes while the callback is MADE,
before an engine is made of it (ENGINE), before `run` is called (CALL), and so on. A warning counts like an error, since
pytest turns warnings into errors.
"""

import copy
import dataclasses
import pickle
import re
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onstep.sharding
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from onstep import Batches, Callback, Engine, at, evaluate, every
from onstep.callbacks import (
    CSV,
    EMA,
    SWA,
    Checkpoint,
    ClipWeights,
    EarlyStopping,
    Evaluate,
    GracefulExit,
    GradNorm,
    Histograms,
    Images,
    LearningRate,
    NaNGuard,
    Progress,
    Scalars,
    Target,
    TensorBoard,
    Writer,
)
from onstep.storage import load, save

MADE, ENGINE, CALL, STEP, EPOCH, RUN = (
    "while an argument of the engine or the run is made",
    "while the engine is made",
    "before the first step",
    "after the first step",
    "after the first epoch",
    "after the run",
)

X = np.arange(8, dtype=np.float32)
DATA = [X[:2], X[2:4], X[4:6], X[6:]]


def step(state, batch):
    return state + batch.sum(), {"loss": batch.mean()}


def tree_step(state, batch):
    return {**state, "params": state["params"] + batch.sum()}, {"loss": batch.mean()}


def score(state, batch):
    return {"accuracy": batch.mean()}


class Scene(Callback):
    """One run, and how far it came. It is the first callback of its engine.

    Attributes:
        moment: the last moment that was reached.
        path: a directory that does not exist.
        engine: the engine, once it is made.
    """

    name = "scene"

    def __init__(self, path):
        self.path, self.moment, self.engine = path, MADE, None

    def make(self, step=step, callbacks=(), **options):
        self.moment = ENGINE
        callbacks = [self, *callbacks] if isinstance(callbacks, (list, tuple)) else callbacks
        self.engine = Engine(step, callbacks, **{"log_every": 1, **options})
        return self.engine

    def run(self, callbacks=(), *, step=step, state=0.0, data=DATA, options=None, **arguments):
        engine = self.make(step, callbacks, **(options or {}))
        self.moment = CALL
        result = engine.run(state, data, **({} if {"epochs", "steps"} & set(arguments) else {"epochs": 1}), **arguments)
        self.moment = RUN
        return result

    def tree(self, callbacks=(), **arguments):
        """Run with a state of parameters and an optimizer's state."""
        arguments = {"state": {"params": jnp.float32(0), "opt_state": jnp.float32(0)}, **arguments}
        return self.run(callbacks, step=tree_step, **arguments)

    def on_step_end(self, loop):
        self.moment = STEP

    def on_epoch_end(self, loop):
        self.moment = EPOCH


class Mistake(NamedTuple):
    """A mistake, what it is answered with, and when."""

    name: str
    make: object
    error: type
    match: str
    moment: str


def at_event(event, handler):
    """Return a mistake that is made in a handler of an event."""

    def make(scene):
        engine = scene.make(tree_step, [ema := EMA(0.5)])
        engine.on(event)(lambda loop, *more: handler(loop, ema))
        scene.moment = CALL
        engine.run({"params": jnp.float32(0)}, DATA, epochs=1)

    return make


# The engine


class Plain:
    def on_step_end(self, loop):
        pass


ENGINES = [
    Mistake(
        "callbacks before the step",
        lambda s: Engine([Progress()], step),
        TypeError,
        r"Engine takes the step first, then the callbacks, got list and function. Swap them: Engine\(step, callbacks\)",
        MADE,
    ),
    Mistake(
        "a callback that is not in a list",
        lambda s: s.make(callbacks=Progress()),
        TypeError,
        r"An engine needs a list of callbacks, got Progress\(.*\). Write Engine\(step, \[Progress\(...\)\]\)",
        ENGINE,
    ),
    Mistake(
        "a class instead of a callback",
        lambda s: s.make(callbacks=[Progress]),
        TypeError,
        r"needs callbacks, got <class '.*Progress'>. Did you mean Progress\(...\)\?",
        ENGINE,
    ),
    Mistake(
        "a lambda in the list of callbacks",
        lambda s: s.make(callbacks=[lambda loop: None]),
        TypeError,
        r'needs callbacks, got <function .* To call a function at an event: engine.on\("step_end"\)\(function\)',
        ENGINE,
    ),
    Mistake(
        "None in the list of callbacks",
        lambda s: s.make(callbacks=[None]),
        TypeError,
        "needs callbacks, got None. Leave it out of the list",
        ENGINE,
    ),
    Mistake(
        "a list in the list of callbacks",
        lambda s: s.make(callbacks=[[Progress()]]),
        TypeError,
        r"needs callbacks, got \[Progress\(.*\)\]. Put its callbacks into the list one by one",
        ENGINE,
    ),
    Mistake(
        "an object that is not derived from Callback",
        lambda s: s.make(callbacks=[Plain()]),
        TypeError,
        r"needs callbacks, got .* Derive its class from onstep.Callback: class Plain\(Callback\)",
        ENGINE,
    ),
    Mistake(
        "a class that is not derived from Callback",
        lambda s: s.make(callbacks=[Plain]),
        TypeError,
        r"Derive it from onstep.Callback: class Plain\(Callback\)",
        ENGINE,
    ),
    Mistake(
        "two evaluations",
        lambda s: s.make(callbacks=[Evaluate(score, DATA), Evaluate(score, DATA)]),
        ValueError,
        r"Two callbacks are named 'val'. Give each its own name: Evaluate\(..., name='another'\)",
        ENGINE,
    ),
    Mistake(
        "one callback listed twice",
        lambda s: s.make(callbacks=[ema := EMA(), ema]),
        ValueError,
        "The callback EMA is listed twice. List it once, or make another one",
        ENGINE,
    ),
    Mistake(
        "an option of the engine by position",
        lambda s: Engine(step, [], 50),
        TypeError,
        r"Engine takes \(step, callbacks\) by position, and got 3. Pass the others by name: log_every=50",
        MADE,
    ),
    Mistake(
        "epochs of the engine",
        lambda s: s.make(epochs=5),
        TypeError,
        "Engine has no argument 'epochs'. It is an argument of engine.run",
        ENGINE,
    ),
    Mistake(
        "a misspelt option of the engine",
        lambda s: s.make(log_ever=5),
        TypeError,
        "Engine has no argument 'log_ever'. Did you mean log_every?",
        ENGINE,
    ),
    Mistake(
        "an option of the engine out of range",
        lambda s: s.make(log_every=0),
        ValueError,
        "Engine needs log_every to be a whole number >= 1, got 0",
        ENGINE,
    ),
    Mistake(
        "steps_per_call that is a word",
        lambda s: s.make(steps_per_call="all"),
        ValueError,
        "needs steps_per_call to be a whole number or \"auto\", got 'all'",
        ENGINE,
    ),
    Mistake(
        "engine.on without a name",
        lambda s: s.make().on(lambda loop: None),
        TypeError,
        r'engine.on needs the name of an event: write @engine.on\("step_end"\), got <lambda>',
        ENGINE,
    ),
    Mistake(
        "engine.on with a misspelt event",
        lambda s: s.make().on("step_ends")(lambda loop: None),
        ValueError,
        r"'step_ends' is not an event. Did you mean step_end\?",
        ENGINE,
    ),
    Mistake(
        "engine.on with an event of another engine",
        lambda s: s.make().on("train_batch_end")(lambda loop: None),
        ValueError,
        r"'train_batch_end' is not an event. Did you mean step_end\?",
        ENGINE,
    ),
    Mistake(
        "engine.on with a function without arguments",
        lambda s: s.make().on("step_end")(lambda: None),
        TypeError,
        r"<lambda> needs the arguments \(loop\), got \(\)",
        ENGINE,
    ),
    Mistake(
        "engine.on with a cadence that governs nothing",
        lambda s: s.make().on("epoch_end", when=5)(lambda loop: None),
        ValueError,
        r"<lambda>.when=every\(steps=5\) has no effect on on_epoch_end: .* every\(epochs=5\)",
        ENGINE,
    ),
    Mistake(
        "removing a callback from an engine",
        lambda s: s.make(callbacks=[EMA()]).callbacks.pop("EMA"),
        TypeError,
        "The callbacks of an engine cannot be changed. Make another Engine",
        ENGINE,
    ),
    Mistake(
        "adding a callback to an engine",
        lambda s: s.make().callbacks.update(EMA=EMA()),
        TypeError,
        "The callbacks of an engine cannot be changed. Make another Engine",
        ENGINE,
    ),
]

# The step


class Trainer:
    def step(self, state, batch):
        return step(state, batch)


async def coroutine(state, batch):
    return step(state, batch)


def generator(state, batch):
    yield step(state, batch)


KEPT = []


def keeps(state, batch):
    KEPT.append(batch.mean())
    return step(state, batch)


def assigns(state, batch):
    state.params = state.params + 1
    return state, {}


STEPS = [
    Mistake(
        "a model instead of the step",
        lambda s: s.make(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        TypeError,
        r"The step needs the arguments \(state, batch\) or \(state, batch, rng\), got \(inputs\)",
        ENGINE,
    ),
    Mistake(
        "a class instead of the step",
        lambda s: s.make(Trainer),
        TypeError,
        r"The step needs to be a function \(state, batch\), got the class Trainer",
        ENGINE,
    ),
    Mistake(
        "a method without its object",
        lambda s: s.make(Trainer.step),
        TypeError,
        r"The step is a method of a class, got \(self, state, batch\). Pass the method of an object",
        ENGINE,
    ),
    Mistake("a coroutine", lambda s: s.make(coroutine), TypeError, "plain function, got a coroutine function", ENGINE),
    Mistake("a generator", lambda s: s.make(generator), TypeError, "plain function, got a generator function", ENGINE),
    Mistake(
        "a step without a batch",
        lambda s: s.make(lambda state: state),
        TypeError,
        r"\(state, batch\) or \(state, batch, rng\), got \(state\)",
        ENGINE,
    ),
    Mistake(
        "parameters and the optimizer's state as two arguments",
        lambda s: s.run(step=lambda params, opt_state, batch: (params, {})),
        ValueError,
        r"third argument, here 'batch'. If it needs one, pass rng=.* two arguments, \(params, opt_state, batch\) -> ",
        CALL,
    ),
    Mistake(
        "no random key",
        lambda s: s.run(step=lambda state, batch, rng: (state, {})),
        ValueError,
        r"The step takes a random key as its third argument. Pass one: rng=jax.random.key\(0\)",
        CALL,
    ),
    Mistake(
        "a seed instead of a random key",
        lambda s: s.run(step=lambda state, batch, rng: (state, {}), rng=0),
        TypeError,
        r"rng needs a random key such as jax.random.key\(0\), got 0",
        CALL,
    ),
    Mistake(
        "the loss instead of a dict",
        lambda s: s.run(step=lambda state, batch: (state, batch.mean())),
        TypeError,
        r'metrics as a dict of scalars by name, got an array float32\[\]. Give it a name: return state, {"loss": loss}',
        CALL,
    ),
    Mistake(
        "no return",
        lambda s: s.run(step=lambda state, batch: None),
        TypeError,
        r"The step needs to return \(state, metrics\) or \(state, metrics, aux\), got None",
        CALL,
    ),
    Mistake(
        "only the state",
        lambda s: s.run(step=lambda state, batch: state),
        TypeError,
        r"needs to return \(state, metrics\) .*, got an array float32\[\]",
        CALL,
    ),
    Mistake(
        "only the metrics",
        lambda s: s.run(step=lambda state, batch: {"loss": batch.mean()}),
        TypeError,
        r"needs to return \(state, metrics\) .*, got dict with the keys \['loss'\]",
        CALL,
    ),
    Mistake(
        "metrics before the state",
        lambda s: s.run(step=lambda state, batch: ({"loss": batch.mean()}, state)),
        TypeError,
        r"needs to return \(state, metrics\), got \(metrics, state\). Swap them",
        CALL,
    ),
    Mistake(
        "gradients instead of aux",
        lambda s: s.run(step=lambda state, batch: (state, {}, state)),
        TypeError,
        "needs a dict as its third result, aux, got",
        CALL,
    ),
    Mistake(
        "a metric for each example",
        lambda s: s.run(step=lambda state, batch: (state, {"loss": batch})),
        ValueError,
        r"scalar metrics, got shape \(2,\) for 'loss'. Reduce it, e.g. .mean\(\)",
        CALL,
    ),
    Mistake(
        "a word as a metric",
        lambda s: s.run(step=lambda state, batch: (state, {"loss": "low"})),
        TypeError,
        "scalar metrics, got str for 'loss'",
        CALL,
    ),
    Mistake(
        "an entry of the state that is gone",
        lambda s: s.run(step=lambda state, batch: ({"w": state["w"]}, {}), state={"w": 0.0, "n": 0}),
        ValueError,
        r"needs to return a state like the one it got: n: int32\[\] is gone",
        CALL,
    ),
    Mistake(
        "an integer that becomes a float",
        lambda s: s.run(step=lambda state, batch: (state + batch.sum(), {}), state=1),
        ValueError,
        r"int32\[\] became float32\[\]. Start it as a float, such as 1.0",
        CALL,
    ),
    Mistake(
        "a state that becomes an array",
        lambda s: s.run(step=lambda state, batch: (state + batch, {})),
        ValueError,
        r"float32\[\] became float32\[2\]",
        CALL,
    ),
    Mistake(
        "float of an array in the step",
        lambda s: s.run(step=lambda state, batch: (state, {"loss": float(batch.mean())})),
        jax.errors.ConcretizationTypeError,
        r"the step is compiled, so its arrays have no values yet. Return a number as a metric, print with",
        CALL,
    ),
    Mistake(
        "if on an array in the step",
        lambda s: s.run(step=lambda state, batch: (state, {} if batch.sum() > 0 else {"low": 1.0})),
        jax.errors.TracerBoolConversionError,
        r"argument batch.*branch with jnp.where or jax.lax.cond. Engine\(..., jit=False\) runs it uncompiled",
        CALL,
    ),
    Mistake(
        "numpy in the step",
        lambda s: s.run(step=lambda state, batch: (state, {"loss": np.asarray(batch).mean()})),
        jax.errors.TracerArrayConversionError,
        "the step is compiled, so its arrays have no values yet",
        CALL,
    ),
    Mistake(
        "an array of the step kept in a list",
        lambda s: s.run([PrintsKept()], step=keeps),
        jax.errors.ConcretizationTypeError,
        "an array of a compiled function has no value outside of it. Return it from the step: as a metric, or in",
        STEP,
    ),
    Mistake(
        "assigning to a frozen state",
        lambda s: s.run(step=assigns, state=train_state()),
        dataclasses.FrozenInstanceError,
        r"onstep: make a changed copy instead: state = state.replace\(params=params\)",
        CALL,
    ),
    Mistake(
        "a missing entry of the batch",
        lambda s: s.run(step=lambda state, batch: (state, {"loss": batch["y"]}), data=[{"x": 1.0}]),
        KeyError,
        r'y.*onstep: raised by the step <lambda>, .*test_first_hour.py line \d+: .*batch\["y"\]',
        CALL,
    ),
]


class PrintsKept(Callback):
    def on_step_end(self, loop):
        float(KEPT[-1])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


def train_state():
    return TrainState.create(apply_fn=None, params=jnp.float32(0), tx=optax.sgd(0.1))


def untouched(state, batch):
    return state, {}


class NnxStep:
    def __init__(self):
        self.model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)

    def __call__(self, model, batch):
        grads = nnx.grad(lambda model: model(batch[:, None]).sum())(model)
        self.optimizer.update(model, grads)
        return model, {}


def tied():
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    return {"encoder": model, "decoder": model}


@dataclasses.dataclass
class Plan:
    w: jax.Array
    name: str


jax.tree_util.register_dataclass(Plan, data_fields=["w", "name"], meta_fields=[])

STATES = [
    Mistake(
        "data before the state",
        lambda s: s.run(state=Batches(X, 2), data={"params": 0.0}),
        TypeError,
        r"takes the state first, then the data, got Batches and dict. Swap them: engine.run\(state, data\)",
        CALL,
    ),
    Mistake(
        "a list of batches before a model",
        lambda s: s.run(state=DATA, data=train_state()),
        TypeError,
        "takes the state first, then the data, got list and TrainState. Swap them",
        CALL,
    ),
    Mistake(
        "a function as the state",
        lambda s: s.run(state=Net().apply),
        TypeError,
        "got method at '.the tree itself.'. The state is what the step changes, such as the parameters",
        CALL,
    ),
    Mistake(
        "text in a dict",
        lambda s: s.run(state={"w": 0.0, "name": "first"}, step=untouched),
        TypeError,
        r"The state needs arrays .*, got str at 'name'. Keep it out of the tree: name = state.pop\('name'\)",
        CALL,
    ),
    Mistake(
        "text in a dataclass",
        lambda s: s.run(state=Plan(jnp.zeros(()), "first"), step=untouched),
        TypeError,
        r"got str at 'name'. .* declare name with dataclasses.field\(metadata={'static': True}\)",
        CALL,
    ),
    Mistake(
        "an Optax optimizer in the state",
        lambda s: s.run(state={"params": 0.0, "tx": optax.sgd(0.1)}, step=untouched),
        TypeError,
        r"got function at 'tx/init'. An Optax optimizer is functions. Put its state into the state: tx.init\(params\)",
        CALL,
    ),
    Mistake(
        "a Linen model as the state",
        lambda s: s.run(state=Net(), step=untouched),
        TypeError,
        r"got Net at '.the tree itself.'. A Linen model holds no arrays. .* model.init\(key, x\)\[\"params\"\]",
        CALL,
    ),
    Mistake(
        "an Equinox model with its functions",
        lambda s: s.run(state=eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(0)), step=untouched),
        TypeError,
        r"at '.*activation'. Keep it out of the tree: params, static = eqx.partition\(model, eqx.is_array\)",
        CALL,
    ),
    Mistake(
        "an NNX optimizer outside of the state",
        lambda s: s.run(step=(step := NnxStep()), state=step.model),
        Exception,
        r"what the step changes must be in the state.*engine.run\({\"model\": model, \"optimizer\": optimizer}",
        CALL,
    ),
    Mistake(
        "one NNX model twice in the state",
        lambda s: s.run(state=tied(), step=untouched),
        ValueError,
        r"holds one NNX Param at '.*' and '.*', which would be trained as two. .* nnx.split\(model\)",
        CALL,
    ),
    Mistake(
        "a state that was donated",
        lambda s: [
            Engine(step).run(state := jnp.ones(()), DATA, epochs=1, donate=True),
            s.run(state=state),
        ],
        ValueError,
        r"holds a deleted array .*It was donated .*keep a copy: jax.tree.map\(jnp.copy, loop.state\)",
        CALL,
    ),
]

# The data


def forgets(epoch):
    list(DATA)


class Frame:
    """Looks like a frame of pandas."""

    iloc, columns = None, ["x"]

    def __iter__(self):
        return iter(self.columns)


class Tensor:
    """Looks like a tensor of PyTorch."""

    shape, dtype = (2,), "torch.float32"

    def numpy(self):
        return np.zeros(self.shape)


class Liar(list):
    def __len__(self):
        return 9


DATASETS = [
    Mistake(
        "x and y as two arguments of Batches",
        lambda s: Batches(X, X, 2),
        TypeError,
        r'Batches takes one tree of arrays: Batches\({"x": x, "y": y}, batch_size\)',
        MADE,
    ),
    Mistake(
        "the seed of Batches by position",
        lambda s: Batches(X, 2, 0),
        TypeError,
        r"Batches takes \(arrays, batch_size\) by position, and got 3. Pass the others by name: seed=0",
        MADE,
    ),
    Mistake(
        "x and y of other lengths",
        lambda s: Batches({"x": X, "y": X[:7]}, 2),
        ValueError,
        "needs the same number of examples in all arrays: x has 8, y has 7",
        MADE,
    ),
    Mistake(
        "lists in Batches",
        lambda s: Batches({"x": [1.0, 2.0]}, 2),
        ValueError,
        r"got a single number at 'x/0'. Convert lists to arrays: np.array\(...\)",
        MADE,
    ),
    Mistake(
        "text in Batches",
        lambda s: Batches({"x": X, "label": np.array(["cat"] * 8)}, 2),
        TypeError,
        "Batches needs arrays and numbers as leaves, got ndarray of dtype <U3 at 'label'. Encode it as numbers",
        MADE,
    ),
    Mistake(
        "batches larger than the data",
        lambda s: Batches(X, 100),
        ValueError,
        "needs batch_size <= 8, the number of examples, got 100; or drop_last=False",
        MADE,
    ),
    Mistake("a batch size of 0", lambda s: Batches(X, 0), ValueError, "batch_size to be a whole number >= 1", MADE),
    Mistake(
        "an array as the data",
        lambda s: s.run(data=X),
        TypeError,
        r"got one array of shape \(8,\). For examples in memory: Batches\(x, batch_size\)",
        CALL,
    ),
    Mistake(
        "x and y as the data",
        lambda s: s.run(data=(X, X)),
        TypeError,
        r"got a tuple of arrays: .*Batches\({\"x\": x, \"y\": y}, batch_size\)",
        CALL,
    ),
    Mistake(
        "a dict as the data",
        lambda s: s.run(data={"x": X}),
        TypeError,
        r"got dict. For arrays in memory: Batches\(arrays, batch_size\)",
        CALL,
    ),
    Mistake("a file as the data", lambda s: s.run(data="train.csv"), TypeError, "iterable of batches .* got str", CALL),
    Mistake(
        "a frame of pandas as the data",
        lambda s: s.run(data=Frame()),
        TypeError,
        r"got Frame. For its rows as batches: Batches\({\"x\": frame\[columns\].to_numpy\(\)}, batch_size\)",
        CALL,
    ),
    Mistake(
        "tensors of PyTorch as batches",
        lambda s: s.run(data=[{"x": Tensor()}]),
        TypeError,
        r"got Tensor at 'x'. Convert it: batch\[\"x\"\].numpy\(\)",
        CALL,
    ),
    Mistake(
        "text in a batch",
        lambda s: s.run(data=[{"x": 1.0, "label": "cat"}]),
        TypeError,
        "A batch needs arrays and numbers as leaves, got str at 'label'. Encode it as numbers, or leave it out",
        CALL,
    ),
    Mistake(
        "a generator for several epochs",
        lambda s: s.run(data=(x for x in DATA), epochs=5),
        ValueError,
        "needs 5 passes over the data, but a generator can be read only once. Pass a list or a callable",
        CALL,
    ),
    Mistake(
        "a generator function without the epoch",
        lambda s: s.run(data=lambda: iter(DATA)),
        TypeError,
        r"A callable as data needs one argument, the epoch: data needs the arguments \(epoch\), got \(\)",
        CALL,
    ),
    Mistake(
        "a callable that returns nothing",
        lambda s: s.run(data=forgets),
        TypeError,
        "a callable, needs to return an iterable of batches for epoch 0, got None",
        CALL,
    ),
    Mistake("an empty list", lambda s: s.run(data=[]), ValueError, "yielded no batches in epoch 1: list", CALL),
    Mistake(
        "a generator that has been read",
        lambda s: s.run(data=iter([])),
        ValueError,
        "The data is exhausted at the start of epoch 1: a list_iterator can be read only once",
        CALL,
    ),
    Mistake(
        "a length that is too large",
        lambda s: s.run(data=Liar(DATA)),
        ValueError,
        "The data has len 9, but pass 1 ended after 4 batches. Fix its __len__, or pass epoch_steps=4",
        STEP,
    ),
    Mistake(
        "a short last batch",
        lambda s: s.run(data=Batches(X, 3, drop_last=False)),
        UserWarning,
        r"shape differs from the first one's, .*float32\[3\] became float32\[2\]. .* drop the short last one",
        STEP,
    ),
    Mistake(
        "buckets of lengths",
        lambda s: s.run(data=[np.ones((2, 3)), np.ones((2, 5))]),
        UserWarning,
        r"If you mean this, as with buckets of lengths, silence it: warnings.filterwarnings\(\"ignore\"",
        STEP,
    ),
]

# The run

RUNS = [
    Mistake(
        "epochs by position",
        lambda s: s.make().run(0.0, DATA, 5),
        TypeError,
        r"engine.run takes \(state, data\) by position, and got 3. Pass the others by name: epochs=5",
        ENGINE,
    ),
    Mistake(
        "epoch instead of epochs",
        lambda s: s.run(epoch=5),
        TypeError,
        r"engine.run has no argument 'epoch'. Did you mean epochs\?",
        CALL,
    ),
    Mistake(
        "callbacks of the run",
        lambda s: s.make().run(0.0, DATA, epochs=1, callbacks=[]),
        TypeError,
        "engine.run has no argument 'callbacks'. It is an argument of Engine",
        ENGINE,
    ),
    Mistake(
        "no target", lambda s: s.make().run(0.0, DATA), ValueError, "A run needs a target: epochs=, steps=", ENGINE
    ),
    Mistake(
        "epochs as text", lambda s: s.run(epochs="5"), ValueError, "epochs to be a whole number >= 0, got '5'", CALL
    ),
    Mistake(
        "steps as a float", lambda s: s.run(steps=1e3), ValueError, "steps to be a whole number >= 0, got 1000", CALL
    ),
    Mistake(
        "epochs without data",
        lambda s: s.run(data=None),
        ValueError,
        "A run without data needs the length of an epoch to reach epochs=. Pass epoch_steps=",
        CALL,
    ),
    Mistake(
        "a target that the run has passed",
        lambda s: (result := s.run(epochs=2)) and s.engine.run(result, DATA, epochs=1),
        ValueError,
        "at epoch 2, beyond the target of 1 epoch. Targets count from the beginning of the first run: pass epochs=3",
        RUN,
    ),
    Mistake(
        "a run inside a run",
        at_event("step_end", lambda loop, ema: Engine(tree_step, [ema]).run(loop.state, DATA, epochs=1)),
        RuntimeError,
        "EMA is in use by a run that has not ended.* make another Engine with callbacks of its own",
        STEP,
    ),
    Mistake(
        "engine.steps without with",
        lambda s: list(s.make().steps(0.0, DATA, epochs=1)),
        RuntimeError,
        "engine.steps needs a with: with engine.steps",
        ENGINE,
    ),
    Mistake(
        "a cadence of engine.steps that is a word",
        lambda s: s.make().steps(0.0, DATA, epochs=1, when="epoch"),
        ValueError,
        r"engine.steps\(when=...\) needs a cadence such as every\(steps=100\) or every\(epochs=1\), .* got 'epoch'",
        ENGINE,
    ),
]

# Your own callbacks


def define(**methods):
    """Return a mistake in the definition of a callback."""
    return lambda s: type("Bad", (Callback,), methods)


def update(function, **options):
    """Return a mistake in a compiled half."""

    def make(s):
        methods = {"init": lambda self, state: 0.0, "update": lambda self, carry, ctx: function(self, carry, ctx)}
        return s.run([type("Half", (Callback,), {**methods, **options})()])

    return make


def counts(half, carry, ctx):
    half.n += 1
    return carry, ctx


def keeps_loss(half, carry, ctx):
    half.loss = ctx.metrics["loss"]
    return carry, ctx


def drops_log(half, carry, ctx):
    ctx.log(x=1.0)
    return carry, ctx


def sets_state(half, carry, ctx):
    ctx.state = 0.0
    return carry, ctx


OWN = [
    Mistake(
        "a misspelt event",
        define(on_step_ends=lambda self, loop: None),
        TypeError,
        r"Bad.on_step_ends is not an event. Did you mean on_step_end\?",
        MADE,
    ),
    Mistake(
        "an event of another engine",
        define(on_train_begin=lambda self, loop: None),
        TypeError,
        r"Bad.on_train_begin is not an event. Did you mean on_run_begin\?",
        MADE,
    ),
    Mistake(
        "an event without self",
        define(on_step_end=lambda loop: None),
        TypeError,
        r"Bad.on_step_end needs the arguments \(self, loop\), got \(loop\)",
        MADE,
    ),
    Mistake(
        "an event of Keras",
        define(on_epoch_end=lambda self, epoch, logs=None: None),
        TypeError,
        r"\(self, loop\), got \(self, epoch, logs=None\). An event is given the loop: loop.epoch",
        MADE,
    ),
    Mistake(
        "an event of Lightning",
        define(on_epoch_end=lambda self, trainer, module: None),
        TypeError,
        r"Bad.on_epoch_end needs the arguments \(self, loop\), got \(self, trainer, module\)",
        MADE,
    ),
    Mistake(
        "on_log without the record",
        define(on_log=lambda self, loop: None),
        TypeError,
        r"\(self, loop, record\), got \(self, loop\)",
        MADE,
    ),
    Mistake(
        "update without the carry",
        define(update=lambda self, ctx: None),
        TypeError,
        r"Bad.update needs the arguments \(self, carry, ctx\), got \(self, ctx\)",
        MADE,
    ),
    Mistake(
        "init without update",
        define(init=lambda self, state: 0.0),
        TypeError,
        "Bad has init without update; define both",
        MADE,
    ),
    Mistake(
        "a cadence that is a word",
        define(when="epoch"),
        ValueError,
        r"Bad.when needs a cadence such as every\(steps=100\) or every\(epochs=1\), .*got 'epoch'",
        MADE,
    ),
    Mistake(
        "a cadence of 0",
        define(when=0),
        ValueError,
        "Bad.when needs a cadence .* or a whole number of steps > 0, got 0",
        MADE,
    ),
    Mistake(
        "a cadence that governs nothing",
        lambda s: s.make(callbacks=[type("Bad", (Callback,), {"when": 5, "on_epoch_end": lambda self, loop: None})()]),
        ValueError,
        r"Bad.when=every\(steps=5\) has no effect on on_epoch_end: it governs on_step_begin, on_step_end, on_save",
        ENGINE,
    ),
    Mistake(
        "arguments for a callback that takes none",
        lambda s: type("Bad", (Callback,), {})(5),
        TypeError,
        "Bad takes no arguments",
        MADE,
    ),
    Mistake(
        "update without return",
        update(lambda half, carry, ctx: None),
        TypeError,
        r"Half.update needs to return \(carry, ctx\), got None",
        CALL,
    ),
    Mistake(
        "update that returns only the context",
        update(lambda half, carry, ctx: ctx),
        TypeError,
        r"Half.update needs to return \(carry, ctx\), got Context",
        CALL,
    ),
    Mistake(
        "update that changes the shape of the state",
        update(lambda half, carry, ctx: (carry, ctx.replace(state=jnp.zeros(2)))),
        ValueError,
        r"Half.update needs to return a state like the one it got: .*float32\[\] became float32\[2\]",
        CALL,
    ),
    Mistake(
        "a carry that becomes something else",
        update(lambda half, carry, ctx: (ctx.batch, ctx)),
        ValueError,
        r"Half.update needs to return a carry like the one it got: .*float32\[\] became float32\[2\]",
        CALL,
    ),
    Mistake(
        "ctx.log without using its result",
        update(drops_log),
        ValueError,
        r"Half.update logs 'x', but does not return .* Write ctx = ctx.log\(...\)",
        CALL,
    ),
    Mistake(
        "ctx.log of a name that is taken",
        update(lambda half, carry, ctx: (carry, ctx.log(loss=1.0))),
        ValueError,
        r"Half logs 'loss', which is taken. The metrics are \['loss'\]",
        CALL,
    ),
    Mistake(
        "ctx.log of an array",
        update(lambda half, carry, ctx: (carry, ctx.log(x=ctx.batch))),
        ValueError,
        r"Half needs to log scalars, got shape \(2,\) for 'x'",
        CALL,
    ),
    Mistake(
        "ctx.replace of another field",
        update(lambda half, carry, ctx: (carry, ctx.replace(params=1.0))),
        TypeError,
        r"ctx.replace of Half accepts only state, metrics and aux, got \['params'\]",
        CALL,
    ),
    Mistake(
        "assigning to the context",
        update(sets_state),
        dataclasses.FrozenInstanceError,
        r"make a changed copy instead: .* ctx = ctx.replace\(state=state\)",
        CALL,
    ),
    Mistake(
        "a random key that the run lacks",
        update(lambda half, carry, ctx: (carry, ctx.log(x=jax.random.uniform(ctx.rng)))),
        ValueError,
        r"Half needs a random key. Pass one to the run: rng=jax.random.key\(0\)",
        CALL,
    ),
    Mistake(
        "counting in update",
        update(counts, n=0),
        UserWarning,
        "Half.update changes self.n from 0 to 1. It runs only while the step is compiled, .* Count in the carry",
        CALL,
    ),
    Mistake(
        "keeping an array of update",
        update(keeps_loss),
        TypeError,
        r"Half.update sets self.loss to a traced array.* Keep it in the carry, .* ctx.log\(loss=...\)",
        CALL,
    ),
    Mistake(
        "float of a metric in update",
        update(lambda half, carry, ctx: (carry + float(ctx.metrics["loss"]), ctx)),
        jax.errors.ConcretizationTypeError,
        "the step is compiled, so its arrays have no values yet",
        CALL,
    ),
]

# The built-in callbacks

BUILT_IN = [
    Mistake(
        "patience by position",
        lambda s: EarlyStopping("val/loss", 3),
        TypeError,
        r"EarlyStopping takes \(metric\) by position, and got 2. Pass the others by name: patience=3",
        MADE,
    ),
    Mistake(
        "an argument of Keras",
        lambda s: EarlyStopping(monitor="val/loss", patience=3),
        TypeError,
        "EarlyStopping has no argument 'monitor'. Its arguments are metric, patience, mode",
        MADE,
    ),
    Mistake(
        "a cadence by position",
        lambda s: Checkpoint(s.path, 10),
        TypeError,
        r"Checkpoint takes \(directory\) by position, and got 2. Pass the others by name: when=10",
        MADE,
    ),
    Mistake(
        "a misspelt argument",
        lambda s: Checkpoint(s.path, overwritten=True),
        TypeError,
        r"Checkpoint has no argument 'overwritten'. Did you mean overwrite\?",
        MADE,
    ),
    Mistake(
        "a cadence of a callback that is a word",
        lambda s: Checkpoint(s.path, when="epoch"),
        ValueError,
        r"Checkpoint.when needs a cadence such as every\(steps=100\) or every\(epochs=1\), .* got 'epoch'",
        MADE,
    ),
    Mistake(
        "every 0 steps", lambda s: every(0), ValueError, "every needs steps to be a whole number >= 1, got 0", MADE
    ),
    Mistake(
        "two units of a cadence",
        lambda s: every(100, epochs=1),
        ValueError,
        r"every needs one of steps, epochs and seconds, got .*. Combine with \|",
        MADE,
    ),
    Mistake("at step 0", lambda s: at(0), ValueError, ">= 1, got 0. Steps are counted from 1", MADE),
    Mistake("at the last step", lambda s: at(-1), ValueError, "got -1. .* and after the last one on_run_end", MADE),
    Mistake(
        "a compiled cadence in seconds",
        lambda s: EMA(0.5, when=every(seconds=1)),
        ValueError,
        r"EMA.update_when needs a cadence in steps or epochs, got every\(seconds=1\). It is compiled",
        MADE,
    ),
    Mistake("a decay above 1", lambda s: EMA(99.9), ValueError, "EMA needs 0 <= decay < 1, got 99.9", MADE),
    Mistake("a field as the decay", lambda s: EMA("params"), ValueError, "0 <= decay < 1, got 'params'", MADE),
    Mistake(
        "a misspelt field",
        lambda s: s.tree([EMA(of="param")]),
        ValueError,
        r"EMA needs 'param' in the state, but dict has \['opt_state', 'params'\]. Did you mean params\?",
        CALL,
    ),
    Mistake(
        "a field of a state that is one array",
        lambda s: s.run([EMA()]),
        ValueError,
        r"EMA needs 'params' in the state, but the state is one array, float32\[\]. Pass of=None",
        CALL,
    ),
    Mistake(
        "patience of 0",
        lambda s: EarlyStopping("x", patience=0),
        ValueError,
        "patience to be a whole number >= 1",
        MADE,
    ),
    Mistake(
        "a mode that is a word of another engine",
        lambda s: EarlyStopping("val/loss", patience=1, mode="auto"),
        ValueError,
        "EarlyStopping needs mode 'min' or 'max', got 'auto'",
        MADE,
    ),
    Mistake(
        "mode='max' forgotten by EarlyStopping",
        lambda s: EarlyStopping("val/accuracy", patience=1),
        UserWarning,
        r"treats lower values of 'val/accuracy' as better \(mode='min'\). Pass mode='max'",
        MADE,
    ),
    Mistake(
        "mode='max' forgotten by Checkpoint",
        lambda s: Checkpoint(s.path, best="val/top5"),
        UserWarning,
        "treats lower values of 'val/top5' as better",
        MADE,
    ),
    Mistake(
        "a misspelt metric of an evaluation",
        lambda s: s.run([Evaluate(score, DATA), EarlyStopping("val/accurac", patience=1)], epochs=2),
        UserWarning,
        r"EarlyStopping watches 'val/accurac', but the records hold \['val/accuracy'\]. Did you mean val/accuracy\?",
        CALL,
    ),
    Mistake(
        "a metric without its prefix",
        lambda s: s.run([EarlyStopping("loss", patience=1)], epochs=2),
        UserWarning,
        r"watches 'loss', but the records hold \['epoch/loss', 'train/loss'\]",
        EPOCH,
    ),
    Mistake(
        "a misspelt metric to show",
        lambda s: s.run([Progress(metrics=["train/los"])], epochs=2),
        UserWarning,
        r"Progress watches 'train/los', but the records hold \[.*\]. Did you mean train/loss\?",
        STEP,
    ),
    Mistake(
        "one metric that is not in a list",
        lambda s: Progress(metrics="train/loss"),
        ValueError,
        r"Progress needs metrics to be a list of names, got 'train/loss'. Pass metrics=\['train/loss'\]",
        MADE,
    ),
    Mistake(
        "data before the evaluation step",
        lambda s: Evaluate(Batches(X, 2), score),
        TypeError,
        r"Evaluate takes the step first, then the data, got Batches and function. Swap them: Evaluate\(step, data\)",
        MADE,
    ),
    Mistake(
        "an array as evaluation data",
        lambda s: Evaluate(score, X),
        TypeError,
        r"got one array of shape \(8,\). For examples in memory: Batches",
        MADE,
    ),
    Mistake(
        "the training step as the evaluation step",
        lambda s: s.run([Evaluate(step, DATA)]),
        TypeError,
        "The evaluation step needs to return only metrics, got 2 results, as of a training step",
        CALL,
    ),
    Mistake(
        "an evaluation metric for each example",
        lambda s: s.run([Evaluate(lambda state, batch: {"error": batch}, DATA)]),
        ValueError,
        r"The evaluation step needs scalar metrics, got shape \(2,\) for 'error'. Reduce it",
        CALL,
    ),
    Mistake(
        "an error in the evaluation step",
        lambda s: s.run([Evaluate(lambda state, batch: {"error": batch["y"]}, [{"x": 1.0}])]),
        KeyError,
        r"y.*raised by the evaluation step <lambda>, .*test_first_hour.py line \d+",
        CALL,
    ),
    Mistake(
        "evaluation data that can be read once",
        lambda s: s.run([Evaluate(score, iter(DATA))], epochs=2),
        ValueError,
        "Evaluate 'val' reads its data several times, but a list_iterator can be read only once. Pass a list",
        CALL,
    ),
    Mistake(
        "no evaluation data", lambda s: s.run([Evaluate(score, [])]), ValueError, "evaluation data yielded no", CALL
    ),
    Mistake(
        "an evaluation that drops examples",
        lambda s: evaluate(score, 0.0, Batches(X, 3)),
        UserWarning,
        "The evaluation data drops 2 examples. Pass drop_last=False",
        MADE,
    ),
    Mistake(
        "an average that is not in the list",
        lambda s: s.tree([Evaluate(score, DATA, using=EMA(0.5))]),
        ValueError,
        r"This EMA is not among the run's callbacks \['scene', 'val'\]",
        CALL,
    ),
    Mistake(
        "a number for using=",
        lambda s: Evaluate(score, DATA, using=0.9),
        TypeError,
        r"needs using= to have apply\(loop\), such as an EMA, got 0.9",
        MADE,
    ),
    Mistake(
        "a rate instead of a schedule",
        lambda s: LearningRate(0.1),
        TypeError,
        "LearningRate needs schedule to be a function of the count, got 0.1. Leave it out",
        MADE,
    ),
    Mistake(
        "an optimizer without inject_hyperparams",
        lambda s: s.tree([LearningRate()]),
        ValueError,
        "needs a scalar 'learning_rate' in opt_state, .* make the optimizer with optax.inject_hyperparams",
        CALL,
    ),
    Mistake(
        "no gradients", lambda s: s.tree([GradNorm()]), ValueError, r"GradNorm needs aux\['grads'\], .* Return it", CALL
    ),
    Mistake(
        "no gradients for histograms",
        lambda s: s.tree([Histograms(s.path, grads=True)]),
        ValueError,
        r"Histograms\(grads=True\) needs aux\['grads'\] to have the structure of 'params'",
        CALL,
    ),
    Mistake(
        "max_skips without skip",
        lambda s: NaNGuard(max_skips=3),
        ValueError,
        "NaNGuard needs skip=True for max_skips=3; without it, no step is skipped",
        MADE,
    ),
    Mistake(
        "a misspelt name to ignore",
        lambda s: s.run([NaNGuard(ignore="los")]),
        ValueError,
        r"NaNGuard found nothing named 'los' to ignore. Did you mean loss\?",
        CALL,
    ),
    Mistake(
        "a NaN",
        lambda s: s.run([NaNGuard(when=1)], data=[np.array([np.nan])]),
        FloatingPointError,
        r"NaNGuard: non-finite loss at step 1 \(NaN\).* To find the operation that caused it:\n.*replay.* 1",
        STEP,
    ),
    Mistake(
        "NaNGuard after an average",
        lambda s: s.tree([EMA(0.5), NaNGuard(skip=True)]),
        ValueError,
        r"NaNGuard\(skip=True\) needs to come before EMA in the list of callbacks",
        CALL,
    ),
    Mistake("bounds that are swapped", lambda s: ClipWeights(1, -1), ValueError, "ClipWeights needs low < high", MADE),
    Mistake(
        "one field twice", lambda s: Target("params", "params"), ValueError, "Target needs two different fields", MADE
    ),
    Mistake("no start of SWA", lambda s: SWA(start=-1), ValueError, "SWA needs start to be a whole number >= 0", MADE),
    Mistake(
        "a leaf that does not exist",
        lambda s: s.tree([Scalars("scale")]),
        ValueError,
        "Scalars found no leaf named 'scale' in the state",
        CALL,
    ),
    Mistake(
        "images without a directory",
        lambda s: Images(lambda state: {}),
        ValueError,
        "Images needs a directory: png= for files, events= for TensorBoard",
        MADE,
    ),
    Mistake(
        "a writer without write_scalars",
        lambda s: Writer(object()),
        TypeError,
        "Writer needs an object with write_scalars, got object",
        MADE,
    ),
    Mistake(
        "a deadline by position",
        lambda s: GracefulExit(3600),
        TypeError,
        r"GracefulExit takes no arguments by position, and got 1. Pass the others by name: deadline=3600",
        MADE,
    ),
    Mistake(
        "a number as a directory",
        lambda s: Checkpoint(5),
        TypeError,
        "Checkpoint needs a path, such as 'runs/first', got 5",
        MADE,
    ),
    Mistake("no directory", lambda s: TensorBoard(""), ValueError, "TensorBoard needs a path, got ''", MADE),
    Mistake(
        "a bucket as a directory",
        lambda s: Checkpoint("gs://bucket/run"),
        ValueError,
        "local or mounted file system, got 'gs://bucket/run'. Mount the storage",
        MADE,
    ),
    Mistake(
        "a directory as a file", lambda s: CSV("."), ValueError, "CSV needs the path of a file, but .* is a dir", MADE
    ),
]

# Resuming


def other(s, *, callbacks=(), first=(), data=DATA, then=DATA, state=0.0, step=step, rng=None, **options):
    """Run and save once, then again with something changed."""
    Engine(step, [*first, Checkpoint(s.path)]).run(0.0, data, epochs=1, rng=rng)
    return s.run([*callbacks, Checkpoint(s.path, **options)], state=state, data=then, step=step, epochs=2)


def takes_key(state, batch, rng):
    return step(state, batch)


RESUMES = [
    Mistake(
        "another shape of the state",
        lambda s: other(s, state=jnp.zeros(2)),
        ValueError,
        r"does not fit this one .*float32\[\] became float32\[2\].*found the saved run in .*overwrite=True",
        CALL,
    ),
    Mistake(
        "another callback with a carry",
        lambda s: other(s, callbacks=[EMA(0.5, of=None)]),
        ValueError,
        r"carries/EMA/average: float32\[\] is new.*pass strict=False.*overwrite=True or another directory",
        CALL,
    ),
    Mistake(
        "another batch size",
        lambda s: other(s, data=Batches(X, 2), then=Batches(X, 4)),
        ValueError,
        "epochs have 4 batches, this run's 2. Pass the same data, batch size and epoch_steps.*overwrite=True",
        CALL,
    ),
    Mistake(
        "another batch size in the middle of an epoch",
        lambda s: [
            Engine(step, [Checkpoint(s.path, when=1)]).run(0.0, Batches(X, 2), steps=2),
            s.run([Checkpoint(s.path)], data=Batches(X, 4), epochs=2),
        ],
        ValueError,
        "Batches has changed since the run was saved: batch_size 2 became 4.*overwrite=True",
        CALL,
    ),
    Mistake(
        "another random key",
        lambda s: [
            Engine(takes_key, [Checkpoint(s.path)]).run(0.0, DATA, epochs=1, rng=jax.random.key(0)),
            s.run([Checkpoint(s.path)], step=takes_key, rng=jax.random.key(1), epochs=2),
        ],
        ValueError,
        r"The saved run has the random key .*\[0, 0\].*, this run .*\[0, 1\].* Pass the same key",
        CALL,
    ),
    Mistake(
        "a lower target",
        lambda s: [
            Engine(step, [Checkpoint(s.path)]).run(0.0, DATA, epochs=2),
            s.run([Checkpoint(s.path)], epochs=1),
        ],
        ValueError,
        "at epoch 2, beyond the target of 1 epoch",
        CALL,
    ),
    Mistake(
        "resume=False in a directory with a run",
        lambda s: other(s, resume=False),
        FileExistsError,
        r"holds a run at step 4. Resume it \(resume=True\), archive it \(overwrite=True\) or give another directory",
        CALL,
    ),
    Mistake(
        "a step that was not saved",
        lambda s: other(s, resume=3),
        FileNotFoundError,
        r"no step 3 in .*; it holds \[4\]",
        CALL,
    ),
    Mistake(
        "a step of a directory without checkpoints",
        lambda s: s.run([Checkpoint(s.path, resume=3)]),
        FileNotFoundError,
        "no step 3 in .*; it holds no checkpoint. To start from scratch, leave out resume=",
        CALL,
    ),
    Mistake(
        "resume='best' without a metric",
        lambda s: Checkpoint(s.path, resume="best"),
        ValueError,
        "Checkpoint needs resume=True, False, a step, or 'best' with best=, got 'best'",
        MADE,
    ),
    Mistake(
        "one directory in two checkpoints",
        lambda s: s.run([Checkpoint(s.path), Checkpoint(s.path, when=2)]),
        ValueError,
        "two callbacks of this run have the directory .* Give each its own",
        CALL,
    ),
    Mistake(
        "a leaf that a checkpoint cannot hold",
        lambda s: s.run([Checkpoint(s.path)], state={"codes": jnp.zeros(2, "uint4")}, step=untouched),
        TypeError,
        "A checkpoint cannot hold the leaf 'state/codes' of dtype uint4. Convert it, or keep it out of the tree",
        CALL,
    ),
    Mistake("an empty directory", lambda s: load(s.path), FileNotFoundError, "load: .* holds no checkpoint", MADE),
    Mistake(
        "a step that was not saved by save",
        lambda s: [save(s.path, {"w": jnp.zeros(2)}, step=1), load(s.path, step=2)],
        FileNotFoundError,
        r"load: no step 2 in .*; it holds \[1\]",
        MADE,
    ),
    Mistake(
        "a tree of another shape",
        lambda s: [save(s.path, {"w": jnp.zeros(2)}), load(s.path, {"w": jnp.zeros(3)})],
        ValueError,
        r"does not fit like \(stored, then like\): state/w: float32\[2\] became float32\[3\]",
        MADE,
    ),
    Mistake(
        "saving one step twice",
        lambda s: [save(s.path, {"w": jnp.zeros(2)}), save(s.path, {"w": jnp.zeros(2)})],
        FileExistsError,
        "already holds step 0. Use another step or directory",
        MADE,
    ),
]

# The loop and the result


def keep_state(loop, ema, kept=[]):  # noqa: B006
    kept.append(loop.state)
    return float(kept[0]["params"]) if len(kept) > 1 else None


def in_steps(s):
    kept = []
    with s.make().steps(jnp.float32(0), DATA, epochs=1) as steps:
        for loop in steps:
            kept.append(loop.state)
            float(kept[0])


RESULTS = [
    Mistake(
        "the state of an earlier step",
        at_event("step_end", keep_state),
        RuntimeError,
        r"onstep: an array kept from an earlier step .* Keep a copy instead: jax.tree.map\(jnp.copy, loop.state\)",
        STEP,
    ),
    Mistake(
        "the state of an earlier step in the for loop",
        in_steps,
        RuntimeError,
        "onstep: an array kept from an earlier step has since been donated",
        STEP,
    ),
    Mistake(
        "a metric without its prefix in loop.latest",
        at_event("log", lambda loop, ema: loop.latest["loss"]),
        KeyError,
        r"'loss' is not recorded yet; loop.latest holds \['train/loss'\]. Did you mean train/loss\?",
        STEP,
    ),
    Mistake(
        "a metric that is not recorded yet",
        at_event("step_end", lambda loop, ema: loop.latest["val/loss"]),
        KeyError,
        r"'val/loss' is not recorded yet; loop.latest holds \[\]",
        STEP,
    ),
    Mistake(
        "a metric without its prefix in the history",
        lambda s: s.run().history["loss"],
        KeyError,
        r"'loss' was not recorded; the history holds \['epoch/loss', 'train/loss'\]. Did you mean train/loss\?",
        RUN,
    ),
    Mistake(
        "an average of the state",
        at_event("step_end", lambda loop, ema: ema.params(loop.state)),
        TypeError,
        "EMA needs the loop or the result of a run, got dict",
        STEP,
    ),
    Mistake(
        "a carry by name",
        at_event("step_end", lambda loop, ema: loop.carry("EMA")),
        ValueError,
        r"This str is not among the run's callbacks \['scene', 'EMA', '<lambda>'\]. Pass the callback itself",
        STEP,
    ),
    Mistake(
        "the carry of a callback without one",
        at_event("step_end", lambda loop, ema: loop.carry(loop.callbacks["scene"])),
        ValueError,
        "scene has no carry: it does not override update",
        STEP,
    ),
    Mistake(
        "a number to log",
        at_event("step_end", lambda loop, ema: loop.log(0.5)),
        TypeError,
        r'loop.log needs a dict of numbers by name, got float: loop.log\({"val/loss": loss}\)',
        STEP,
    ),
    Mistake(
        "text to log",
        at_event("step_end", lambda loop, ema: loop.log({"val/loss": "low"})),
        TypeError,
        "A record needs numbers, got str for 'val/loss'",
        STEP,
    ),
    Mistake(
        "an array to log",
        at_event("step_end", lambda loop, ema: loop.log({"val/loss": X})),
        ValueError,
        r"A record needs scalars, got shape \(8,\) for 'val/loss'",
        STEP,
    ),
    Mistake(
        "a batch that is replaced too late",
        at_event("step_end", lambda loop, ema: setattr(loop, "batch", X)),
        RuntimeError,
        "loop.batch can only be replaced in on_step_begin, before its step",
        STEP,
    ),
    Mistake(
        "a state of another shape",
        at_event("step_end", lambda loop, ema: setattr(loop, "state", {"params": jnp.zeros(2)})),
        ValueError,
        r"loop.state needs a state like the one it has: params: float32\[\] became float32\[2\]",
        STEP,
    ),
    Mistake(
        "a final stop while saving",
        at_event("save", lambda loop, ema: loop.stop("enough")),
        RuntimeError,
        "A final loop.stop is too late in on_save. Call it in on_step_end or on_log",
        STEP,
    ),
    Mistake(
        "removing a callback from a loop",
        at_event("step_end", lambda loop, ema: loop.callbacks.pop("EMA")),
        TypeError,
        "The callbacks of an engine cannot be changed",
        STEP,
    ),
    Mistake(
        "a metric of the result by index",
        lambda s: s.run()["train/loss"],
        TypeError,
        r"A Result has attributes, not items, got \['train/loss'\]. Read result.state, .*latest\[\"train/loss\"\]",
        RUN,
    ),
    Mistake(
        "unpacking a result",
        lambda s: (lambda state, metrics: None)(*s.run()),
        TypeError,
        "A Result has attributes, not items|must be an iterable, not Result",
        RUN,
    ),
    Mistake(
        "pickling a result", lambda s: pickle.dumps(s.run()), TypeError, "A Result cannot be copied or pickled", RUN
    ),
    Mistake("copying a result", lambda s: copy.deepcopy(s.run()), TypeError, "Keep what you need of it", RUN),
]

# Meshes


def mesh(name="data", count=2):
    return Mesh(np.array(jax.devices()[:count]), (name,))


def rules(s):
    layout = onstep.sharding.by_path(mesh("model"), {"kernels": PartitionSpec("model")})
    return layout({"kernel": jax.ShapeDtypeStruct((4,), "float32")})


MESHES = [
    Mistake(
        "a number of devices", lambda s: s.make(mesh=2), TypeError, "mesh needs a jax.sharding.Mesh, .* got int", ENGINE
    ),
    Mistake(
        "a list of devices",
        lambda s: s.make(mesh=jax.devices()),
        TypeError,
        "mesh needs a jax.sharding.Mesh, .* got",
        ENGINE,
    ),
    Mistake(
        "axes that do not make up the devices",
        lambda s: onstep.sharding.make_mesh(data=3),
        ValueError,
        "make_mesh needs axes that make up 8 devices, got {'data': 3}. One of them may be -1",
        MADE,
    ),
    Mistake(
        "a mesh without an axis for batches",
        lambda s: s.make(mesh=Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("model", "expert"))),
        ValueError,
        r"mesh needs an axis 'data' over which batches are divided, got \('model', 'expert'\)",
        ENGINE,
    ),
    Mistake(
        "a batch that does not divide",
        lambda s: s.run(data=[np.ones(3, np.float32)], options={"mesh": mesh()}),
        ValueError,
        r"divide into 2 parts along the mesh's axes \('data',\) .* with 3 examples. Change the batch size, drop",
        CALL,
    ),
    Mistake(
        "an axis that the mesh lacks",
        lambda s: onstep.sharding.fsdp(mesh(), "fsdp"),
        ValueError,
        r"fsdp needs an axis of the mesh, got 'fsdp'; it has \('data',\)",
        MADE,
    ),
    Mistake(
        "a rule that matches no leaf",
        rules,
        ValueError,
        r"no leaf matches \['kernels'\]. The paths are \['kernel'\]",
        MADE,
    ),
    Mistake(
        "a divided state without a mesh",
        lambda s: s.run(step=untouched, state=jax.device_put(jnp.zeros(4), NamedSharding(mesh(), PartitionSpec()))),
        UserWarning,
        r"The state is on 2 devices, but the engine has no mesh.* Engine\(..., mesh=mesh\)",
        CALL,
    ),
]

MISTAKES = [*ENGINES, *STEPS, *STATES, *DATASETS, *RUNS, *OWN, *BUILT_IN, *RESUMES, *RESULTS, *MESHES]


def text_of(error):
    """Return what the user reads: the message and the notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_mistake_is_answered_at_its_moment(mistake, tmp_path):
    scene = Scene(tmp_path / "run")
    with pytest.raises(mistake.error) as caught:
        mistake.make(scene)
    assert re.search(mistake.match, text := text_of(caught.value), re.DOTALL), text
    assert scene.moment == mistake.moment


def test_table_has_every_kind_of_mistake():
    assert len(MISTAKES) == len({mistake.name for mistake in MISTAKES}) > 150
