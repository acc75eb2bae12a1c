"""Runs in processes that are killed, refused, or run out of disk: no checkpoint is lost."""

import os
import random
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import KILLS, SEEDS, Child, mounted, points, result, script
from models import fresh_state
from onstep import Engine
from onstep.callbacks import Checkpoint
from onstep.storage import Checkpoints, load
from onstep.testing import counting_step

pytestmark = pytest.mark.slow

NOT_PERMITTED = "a mount is not permitted here: "


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    directory = tmp_path_factory.mktemp("uninterrupted")
    code, error = Child(directory, cache=cache).end()
    assert (code, re.sub("onstep: compiled the step.*\n", "", error)) == (0, "")
    return directory


def kill_and_restart(directory, generator, when, most, cache):
    """Kill a run at random moments and restart it until it ends; return the number of kills."""
    kills = 0
    while kills < most:
        child = Child(directory, when=when, pace=0.02, cache=cache)
        early = generator.random() < 0.2  # while it imports, restores or compiles
        child.wait_for_steps(0 if early else generator.randint(1, 16))
        if not child.kill(generator.uniform(0, 0.5 if early else 0.1)):
            assert child.end()[0] == 0
            return kills
        kills += 1
    assert Child(directory, when=when, cache=cache).end()[0] == 0
    return kills


@pytest.mark.parametrize("seed", range(SEEDS))
def test_run_that_is_killed_repeatedly_ends_in_the_same_bytes(seed, uninterrupted, cache, tmp_path):
    generator, kills, lives = random.Random(seed), 0, 0
    while kills < KILLS:
        directory = tmp_path / str(lives)
        kills += kill_and_restart(directory, generator, 1 + seed % 3, KILLS - kills, cache)
        lives += 1
        assert result(directory) == result(uninterrupted)
        assert state_of(directory) == state_of(uninterrupted)
        assert_points_once(directory, uninterrupted)
        assert not [name for name in os.listdir(directory / "run") if not name.isdecimal()]


def state_of(directory):
    leaves = jax.tree.leaves(load(directory / "run", jax.jit(fresh_state)()))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def assert_points_once(directory, uninterrupted):
    """No point is shown twice or with another value. A kill may lose points that were not flushed."""
    shown, expected = points(directory), points(uninterrupted)
    assert len({(tag, step) for tag, step, _ in shown}) == len(shown)
    assert set(shown) <= set(expected)
    assert max(step for _, step, _ in shown) == max(step for _, step, _ in expected)


def test_second_live_process_is_refused_and_the_first_continues(uninterrupted, cache, tmp_path):
    first = Child(tmp_path, pace=0.1, cache=cache)
    first.wait_for_steps(1)
    code = """
import sys, jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint
Engine(lambda s, b: (s, {}), [Checkpoint(sys.argv[1])]).run(jnp.zeros(2), range(3), epochs=1)
"""
    second = script(code, tmp_path / "run")
    _, error = second.communicate()
    assert first.process.is_alive()
    assert second.returncode == 1
    assert "RuntimeError: Another live process is writing to" in error
    assert first.end()[0] == 0
    assert result(tmp_path) == result(uninterrupted)


THREADS = """
import sys, threading, jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint
def run(number):
    engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(f"{sys.argv[1]}/{number}", when=2, keep=2)])
    ended[number] = int(engine.run(jnp.int32(number), range(10), epochs=1).state)
ended = {}
threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(6)]
[thread.start() for thread in threads]
[thread.join(60) for thread in threads]
print(sorted(ended.items()), flush=True)
import os; os._exit(0)  # even if a thread hangs
"""


def test_runs_in_threads_of_one_process_all_save(tmp_path):
    said, error = script(THREADS, tmp_path).communicate()
    assert said == f"{[(number, number + 45) for number in range(6)]}\n", error
    assert [Checkpoints(tmp_path / str(number)).steps() for number in range(6)] == [[8, 10]] * 6


OVERWRITES = """
import sys, jax, jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint
step = lambda s, b: (jax.tree.map(lambda x: x + 1, s), {})
Engine(step, [Checkpoint(sys.argv[1], when=1, keep=1)]).run([jnp.zeros(99)] * 5, range(10**6), epochs=1)
"""


READS = """
import sys, jax.numpy as jnp, numpy as np
from onstep.storage import load
values = []
for _ in range(100):
    leaves = load(sys.argv[1], [jnp.zeros(99)] * 5)
    values.append(float(leaves[0][0]))
    assert all(np.all(leaf == values[-1]) for leaf in leaves)
assert values == sorted(values)
"""


def test_load_reads_from_a_run_that_deletes_all_but_the_newest_checkpoint(tmp_path):
    writer = script(OVERWRITES, tmp_path)
    try:
        while not Checkpoints(tmp_path).steps():
            time.sleep(0.01)
        reader = script(READS, tmp_path)
        _, error = reader.communicate()
        assert reader.returncode == 0, error
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.communicate()


CHANGED = """
import sys, jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
from onstep import Engine
from onstep.callbacks import EMA, Checkpoint, NaNGuard
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jax.nn.gelu(nn.relu(nn.Dense(8)(x))))
model, optimizer, rate = Net(), optax.adamw(optax.cosine_decay_schedule(1e-2, 100)), float(sys.argv[3])
def step(state, batch):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(jax.nn.softplus(model.apply(p, batch))))(state["params"])
    updates, moments = optimizer.update(grads, state["moments"], state["params"])
    params = optax.apply_updates(state["params"], jax.tree.map(lambda u: rate * u, updates))
    return {"params": params, "moments": moments}, {"loss": loss}, {"grads": grads}
params = model.init(jax.random.key(0), np.ones((2, 4), np.float32))
state = {"params": params, "moments": optimizer.init(params)}
engine = Engine(step, [EMA(0.9), NaNGuard(), Checkpoint(sys.argv[1])])
engine.run(state, [np.ones((2, 4), np.float32)] * 9, steps=int(sys.argv[2]))
"""


def test_only_a_changed_script_says_that_its_step_has_changed(tmp_path):
    said = [script(CHANGED, tmp_path, *arguments).communicate()[1] for arguments in ((4, 1.0), (8, 1.0), (12, 2.0))]
    assert ["changed since" in text for text in said] == [False, False, True], said


BIG = """
import sys, jax.numpy as jnp, numpy as np
from onstep import Callback, Engine
from onstep.callbacks import Checkpoint
state = jnp.asarray(np.random.default_rng(0).normal(size=1_200_000), jnp.float32)
def step(state, batch):
    return state + 1, {}
class Last(Callback):
    when = 5
    def on_step_end(self, loop):
        ACTION
engine = Engine(step, [Last(), Checkpoint(sys.argv[1], when=1, keep=9)])
"""

FOR = """
with engine.steps(state, range(6), epochs=1) as steps:
    for loop in steps:
        if loop.step == 3:
            sys.exit(4)
"""


def big():
    return np.random.default_rng(0).normal(size=1_200_000).astype(np.float32)


def intact(directory):
    """Check that every checkpoint loads and has the state of its step; return the steps."""
    steps = sorted(int(name) for name in os.listdir(directory) if name.isdecimal())
    assert all(np.array_equal(load(directory, big(), step)[:99], counted(step)[:99]) for step in steps)
    return steps


def counted(steps):
    state = big()
    for _ in range(steps):
        state = state + np.float32(1)
    return state


@pytest.mark.parametrize(
    ("action", "ending", "code", "last"),
    [
        ("pass", "engine.run(state, range(6), epochs=1)", 0, 6),
        ("loop.stop('enough')", "engine.run(state, range(6), epochs=1)\nsys.exit(7)", 7, 5),
        ("raise OSError('broken')", "engine.run(state, range(6), epochs=1)", 1, 4),
        ("sys.exit(3)", "engine.run(state, range(6), epochs=1)", 3, 4),
        ("pass", FOR, 4, 2),
    ],
    ids=["return", "stop", "exception", "sys.exit", "for"],
)
def test_script_that_ends_right_after_a_save_has_committed_it(action, ending, code, last, tmp_path):
    process = script(BIG.replace("ACTION", action) + ending, tmp_path)
    _, error = process.communicate()
    assert process.returncode == code, error
    assert intact(tmp_path)[-1] == last


def test_full_disk_ends_the_run_and_earlier_checkpoints_load(tmp_path):
    with mounted(tmp_path, "-t", "tmpfs", "-o", "size=12m", "tmpfs") as refused:
        if refused:
            pytest.skip(NOT_PERMITTED + refused)
        process = script(BIG.replace("ACTION", "pass") + "engine.run(state, range(6), epochs=1)", tmp_path)
        _, error = process.communicate()
        assert process.returncode == 1
        steps = intact(tmp_path)
        last = error.strip().split("RuntimeError: ")[-1]
        assert re.match(rf"The checkpoint of step {steps[-1] + 1} in {tmp_path} could not be saved", last)
        assert "No space left on device" in last
        assert steps in ([1], [1, 2])
        assert sorted(os.listdir(tmp_path)) == [str(step) for step in steps]


def go(directory, steps, *extra):
    engine = Engine(counting_step, [*extra, Checkpoint(directory, when=4)])
    return engine.run(jnp.int32(0), range(12), steps=steps)


def test_read_only_directory_is_an_error_with_its_path_and_reason(tmp_path):
    go(tmp_path, 4)
    with mounted(tmp_path, "--bind", str(tmp_path)) as refused:
        if refused:
            pytest.skip(NOT_PERMITTED + refused)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True)
        with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path}"):
            go(tmp_path, 8)
        assert int(load(tmp_path, jnp.int32(0))) == 6


BECOMES_READ_ONLY = """
import subprocess, sys, jax.numpy as jnp
from onstep import Callback, Engine, at
from onstep.callbacks import Checkpoint
directory = sys.argv[1]
class Remount(Callback):
    when = at(6)
    def on_step_end(self, loop):
        subprocess.run(["mount", "--bind", directory, directory], check=True)  # the lock file stays open below
        subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
def go(steps, *extra):
    engine = Engine(lambda s, b: (s + b, {}), [*extra, Checkpoint(directory, when=4)])
    engine.run(jnp.int32(0), range(12), steps=steps)
go(4)
go(12, Remount())
"""


def test_disk_that_becomes_read_only_ends_the_run_at_once(tmp_path):
    with mounted(tmp_path, "-t", "tmpfs", "tmpfs") as refused:
        if refused:
            pytest.skip(NOT_PERMITTED + refused)
        process = script(BECOMES_READ_ONLY, tmp_path)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=False)
        assert process.returncode == 1
        reason = f"The checkpoint of step 8 in {tmp_path} could not be saved: .*Read-only file system"
        assert re.search(reason, error.strip().split("RuntimeError: ")[-1])
        assert int(load(tmp_path, jnp.int32(0), 4)) == 6
