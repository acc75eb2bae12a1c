"""One of several processes that train together; tests/test_processes.py starts it.

python pair.py SCENARIO PROCESS PROCESSES PORT DIRECTORY
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import jax

SCENARIO, PROCESS, PROCESSES, PORT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
DIRECTORY = Path(sys.argv[5])
jax.config.update("jax_num_cpu_devices", 8 // PROCESSES)
if PROCESSES > 1:
    jax.distributed.initialize(f"127.0.0.1:{PORT}", PROCESSES, PROCESS)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from onstep import Batches, Callback, Engine, Loop, at, evaluate, every, processes  # noqa: E402
from onstep.callbacks import (  # noqa: E402
    EMA,
    Checkpoint,
    EarlyStopping,
    Evaluate,
    Fingerprint,
    GracefulExit,
    GradNorm,
    Images,
    RepeatStep,
    TensorBoard,
    Timing,
)
from onstep.callbacks.checkpoint import load, save  # noqa: E402
from onstep.processes import ProcessError  # noqa: E402
from onstep.sharding import create, fsdp, make_mesh  # noqa: E402
from onstep.storage import writer  # noqa: E402
from onstep.testing import FakeLoader, FakeLoaderIterator  # noqa: E402

TX = optax.adam(1e-2)
MESH = make_mesh()


def make(key):
    params = {"w": jax.random.normal(key, (16, 32)) / 4, "v": jnp.zeros((32, 4))}
    return {"params": params, "opt": TX.init(params), "seen": jnp.zeros(512)}


def cut(seed=0):
    return create(make, fsdp(MESH, small=0), jax.random.key(seed))


def step(state, batch, rng):
    kept = jax.random.bernoulli(rng, 0.9, batch["x"].shape)

    def loss_fn(params):
        return ((jnp.tanh(batch["x"] * kept @ params["w"]) @ params["v"] - batch["y"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt = TX.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    seen = state["seen"].at[batch["number"]].add(1)
    order = (batch["number"] * jnp.arange(1, 1 + batch["number"].shape[0])).sum()
    return {"params": params, "opt": opt, "seen": seen}, {"loss": loss, "order": order}, {"grads": grads}


def score(state, batch):
    return {"error": ((jnp.tanh(batch["x"] @ state["params"]["w"]) @ state["params"]["v"] - batch["y"]) ** 2).mean()}


def arrays(examples=512):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 16)).astype(np.float32)
    return {"x": x, "y": (x @ rng.normal(size=(16, 4))).astype(np.float32), "number": np.arange(examples)}


def data(size=64, **options):
    return Batches(arrays(), size, **options)


def run(state, *callbacks, source=None, steps=50, epochs=None, mesh=MESH, **options):
    engine = Engine(step, callbacks, mesh=mesh, **{"log_every": 1, **options})
    return engine.run(state, source or data(), steps=steps, epochs=epochs, rng=jax.random.key(1))


def checksum(result):
    """Return a checksum of the arrays that this process holds at the end of a run."""
    arrays = jax.tree.leaves(result.snapshot.tree)
    return zlib.crc32(b"".join(np.asarray(shard.data).tobytes() for a in arrays for shard in a.addressable_shards))


def message_of(function):
    """Return the message of the error that `function` raises."""
    try:
        function()
    except (ValueError, FileExistsError, ProcessError) as error:
        return str(error).removesuffix(" (raised in process 0)")
    return "nothing"


def report(**values):
    """Write values to the file that the test reads."""
    (DIRECTORY / f"{SCENARIO}-{PROCESS}.json").write_text(json.dumps(values))


def own_part(source):
    """Yield the rows of each batch that belong to this process, as its own loader would."""
    rows = 64 // PROCESSES
    for batch in source:
        yield {name: array[PROCESS * rows : (PROCESS + 1) * rows] for name, array in batch.items()}


class At3(Callback):
    """Call `act(loop)` after step 3."""

    def __init__(self, act):
        self.act = act
        self.when = at(3)

    def on_step_end(self, loop):
        self.act(loop)


class Times(Callback):
    """Collect the steps at which a cadence in seconds was due."""

    def __init__(self):
        self.when, self.steps = every(seconds=0.05), []

    def on_step_end(self, loop):
        self.steps.append(loop.step)


def losses():
    """Train with every kind of data source: losses and examples equal those of one device."""
    runs = {
        "batches": run(cut(), GradNorm()),
        "blocks": run(cut(), GradNorm(), steps_per_call=8),
        "whole state": run(make(jax.random.key(0)), GradNorm(), source=data()),
        "a loader": run(cut(), GradNorm(), source=lambda epoch: own_part(data()(epoch))),
        "prefetch": run(cut(), GradNorm(), prefetch=2),
    }
    ends = {name: [result.history[k] for k in ("train/loss", "train/order")] for name, result in runs.items()}
    uneven = data(100, drop_last=False)  # the last batch of 12 does not divide among the devices
    seen = np.asarray(jax.jit(lambda x: x, out_shardings=None)(runs["whole state"].state["seen"]))
    report(ends=ends, error=evaluate(score, cut(), uneven, mesh=MESH)["error"], seen=seen.tolist())


def agree():
    """Stops, clocks and files are the same in all processes, and so is the error of a mistake."""
    times, ema, timing = Times(), EMA(0.9), Timing()
    # The hosts were started at different times, so their clocks differ.
    timed = run(cut(), times, ema, timing, steps=200, clock=lambda: time.monotonic() + 1000 * PROCESS)
    examples, rate = (timed.history[f"time/{name}_per_second"][-1] for name in ("examples", "steps"))
    stopped = run(cut(), At3(lambda loop: loop.stop("enough") if PROCESS == 1 else None))
    early = run(cut(), At3(lambda loop: loop.stop("never begun")), steps=0)
    saves = Checkpoint(DIRECTORY / "run", when=4)
    events = TensorBoard(DIRECTORY / "events")
    drawn = Images(lambda state: {"w": state["params"]["w"][..., None]}, png=DIRECTORY / "png", when=25)
    whole = run(cut(), EMA(0.9), saves, events, drawn, steps=30)
    for steps in (9, 10, 30):
        again = run(cut(), EMA(0.9), Checkpoint(DIRECTORY / "again", when=4), steps=steps)
    tree = {"w": cut()["params"]["w"]}
    save(DIRECTORY / "tree", tree)
    loaded = load(DIRECTORY / "tree", like=tree)["w"]
    same = all(
        np.array_equal(np.asarray(a.data), np.asarray(b.data))
        for a, b in zip(tree["w"].addressable_shards, loaded.addressable_shards, strict=True)
    )
    few = list(data())[: 8 - PROCESS]
    report(
        times=times.steps,
        timed=timed.step,
        examples=round(examples / rate, 3),
        stopped=[stopped.step, stopped.stopped],
        early=early.step,
        checkpoints=sorted(int(path.name) for path in (DIRECTORY / "run").iterdir() if path.name.isdigit()),
        bytes=[checksum(whole), checksum(again)],
        loaded=same,
        lengths=message_of(lambda: run(cut(), source=few)),
        seeds=message_of(lambda: run(make(jax.random.key(PROCESS)))),
        lists=message_of(lambda: run(cut(), *[GradNorm()] * PROCESS)),
        meshes=message_of(lambda: run(make(jax.random.key(0)), mesh=None)),
        used=message_of(lambda: save(DIRECTORY / "tree", tree)),
        indivisible=message_of(lambda: run(cut(), source=data(60))),
    )


def differ():
    """Whatever differs in one process is refused before the first step, in the same words everywhere."""

    def tried(make_step=lambda rate: step, *callbacks, source=None, key=1, **options):
        ran = []
        callbacks = (*callbacks, At3(lambda loop: ran.append(loop.step)))
        engine = Engine(make_step(PROCESS), callbacks, mesh=MESH, log_every=50, **options)
        message = message_of(lambda: engine.run(cut(), source or data(), steps=3, rng=jax.random.key(key)))
        return message, ran

    def scaled(process):
        return lambda state, batch: ({**state, "seen": state["seen"] * (1.5 + process)}, {})

    def another_line(process):
        return lambda state, batch: (
            {**state, "seen": jnp.abs(state["seen"]) if process else state["seen"]},
            {},
        )

    def typed(epoch):
        return (b | {"y": b["y"].astype(np.float16) if PROCESS else b["y"]} for b in own_part(data()(epoch)))

    def short(epoch):
        return ({name: array[: 32 - 4 * PROCESS] for name, array in b.items()} for b in own_part(data()(epoch)))

    report(
        rate=tried(scaled),
        line=tried(another_line),
        key=tried(key=PROCESS),
        seed=tried(source=data(seed=PROCESS)),
        decay=tried(lambda process: step, EMA(0.9 + 0.01 * PROCESS)),
        patience=tried(lambda process: step, EarlyStopping("train/loss", patience=1 + PROCESS)),
        dtype=tried(source=typed),
        steps_per_call=tried(steps_per_call=2 + PROCESS),
        rows=tried(source=short),
        same=tried(),
    )


def short_batch():
    """The loader of process 1 gives a short last batch."""

    def source(epoch):
        for number, batch in enumerate(own_part(data()(epoch))):
            yield {name: array[: 32 - 4 * (number == 7 and PROCESS == 1)] for name, array in batch.items()}

    run(cut(), source=source, log_every=50)


def begin():
    """Run half of the steps, for another number of processes to resume."""
    report(losses=run(cut(), EMA(0.9), Checkpoint(DIRECTORY / "moves", when=10), steps=20).history["train/loss"])


def resume():
    """Resume the run of `begin` in several processes, or in one with a mesh."""
    result = run(cut(), EMA(0.9), Checkpoint(DIRECTORY / "moves", when=10), steps=40)
    report(losses=result.history["train/loss"], steps=result.history.steps("train/loss"))


def resume_alone():
    """Resume the run of `begin` on one device, without a mesh."""
    saves = Checkpoint(DIRECTORY / "moves", when=10)
    result = run(make(jax.random.key(0)), EMA(0.9), saves, steps=40, mesh=None)
    report(losses=result.history["train/loss"], devices=len(jax.tree.leaves(result.state)[0].sharding.device_set))


def loader_moves():
    class Loader(FakeLoader):
        def __iter__(self):
            return Reader(self)

    class Reader(FakeLoaderIterator):
        """Check that each process gets its own position back."""

        def get_state(self):
            return {**super().get_state(), "process": PROCESS}

        def set_state(self, state):
            assert state["process"] == PROCESS
            super().set_state(state)

    steps = int(os.environ.get("STEPS", "5"))
    saves = Checkpoint(DIRECTORY / "loader", when=5)
    source = Loader(own_part(data()))
    message = message_of(lambda: report(order=run(cut(), saves, source=source, steps=steps).history["train/order"]))
    if message != "nothing":
        report(message=message)


def raises():
    def act(loop):
        if PROCESS == 0:
            raise RuntimeError("boom")

    run(cut(), Checkpoint(DIRECTORY / "run", when=2), At3(act))


def repeats():
    """Repeat every second step; in a second run, one bit that process 1 holds is wrong."""
    tried, seen = Loop.try_step, [0]

    def faulty(loop):
        state, carries, metrics = tried(loop)
        seen[0] += 1
        if seen[0] == 4 and PROCESS == 1:
            parts = [np.array(shard.data) for shard in state["seen"].addressable_shards]
            parts[2].view(np.uint32)[0] ^= 1
            moved = [jax.device_put(part, device) for part, device in zip(parts, jax.local_devices(), strict=True)]
            wrong = jax.make_array_from_single_device_arrays((512,), state["seen"].sharding, moved)
            state = {**state, "seen": wrong}
        return state, carries, metrics

    run(cut(), RepeatStep(2), Fingerprint(2), Checkpoint(DIRECTORY / "run", when=2), steps=4)
    Loop.try_step = faulty
    run(cut(), RepeatStep(2), steps=8, steps_per_call=4)


def loader_raises():
    def source(epoch):
        for number, batch in enumerate(own_part(data()(epoch))):
            if number == 5 and PROCESS == 1:
                raise OSError("disk gone")
            yield batch

    run(cut(), Checkpoint(DIRECTORY / "run", when=2), source=source, log_every=50)


def part_fails():
    """Process 1 cannot write its part of a checkpoint."""

    def fail(*args):
        raise OSError("disk full")

    if PROCESS == 1:
        writer.write = fail
    run(cut(), Checkpoint(DIRECTORY / "run", when=2), log_every=50)


def runs_out():
    def source(epoch):
        yield from list(own_part(data()(epoch)))[: 7 - PROCESS]

    run(cut(), Checkpoint(DIRECTORY / "run", when=2), source=source, steps=None, epochs=2, log_every=50)


def evaluates_less():
    """The evaluation data of process 1 is one batch short."""
    processes.PATIENCE = 5
    held_out = Evaluate(score, lambda epoch: list(own_part(data()(0)))[: 4 - PROCESS], when=2)
    run(cut(), held_out, steps=6)


def stalls():
    """The data of process 1 gives no further batch."""
    processes.PATIENCE = 5

    def source(epoch):
        for number, batch in enumerate(own_part(data()(epoch))):
            if number == 5 and PROCESS == 1:
                time.sleep(1000)
            yield batch

    run(cut(), source=source, log_every=50)


def fails_while_another_waits_for_data():
    def source(epoch):
        for number, batch in enumerate(own_part(data()(epoch))):
            if number == 5 and PROCESS == 1:
                time.sleep(1000)
            if number == 6 and PROCESS == 0:
                raise OSError("disk gone")
            yield batch

    run(cut(), source=source, log_every=50)


def is_killed():
    def act(loop):
        if PROCESS == 1:
            while not (DIRECTORY / "run" / "2").exists():  # a save is committed in the background
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    run(cut(), Checkpoint(DIRECTORY / "run", when=2), At3(act))


def resume_after_kill():
    report(step=run(cut(), Checkpoint(DIRECTORY / "run", when=2), At3(lambda loop: None), steps=8).step)


def ends_by(number, *callbacks):
    """Send a signal to process 1 in the middle of 400 steps without a host stop."""

    def source(epoch):
        for n in range(400):
            if n == 20 and PROCESS == 1:
                os.kill(os.getpid(), number)
            time.sleep(0.05)
            yield from own_part([next(iter(data(seed=1)))])

    saves = Checkpoint(DIRECTORY / "run", when=400)
    engine = Engine(step, [*callbacks, saves], mesh=MESH, log_every=400)
    engine.on("run_end")(lambda loop: report(step=loop.step, seconds=time.monotonic() - began, stopped=loop.stopped))
    began = time.monotonic()
    engine.run(cut(), source, steps=400, rng=jax.random.key(1))


def is_terminated():
    ends_by(signal.SIGTERM, GracefulExit())


def is_interrupted():
    ends_by(signal.SIGINT, GracefulExit())


def is_terminated_without_a_handler():
    ends_by(signal.SIGTERM)


globals()[SCENARIO]()
