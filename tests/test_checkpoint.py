"""Checkpoints: what is saved, what is resumed, and what is refused."""

import contextlib
import json
import os
import shutil
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import fresh_state
from onstep import Batches, Callback, Engine, every
from onstep.callbacks import EMA, Checkpoint, ClipWeights, EarlyStopping
from onstep.storage import Checkpoints, CheckpointWriter, load, orbax_trees, save
from onstep.storage.manifest import write_manifest
from onstep.testing import StopAt, counting_step, same_bytes


def run(directory, data=range(12), *, extra=(), state=0, **options):
    targets = {name: options.pop(name) for name in ("steps", "epochs") if name in options}
    engine = Engine(counting_step, [Checkpoint(directory, **options), *extra], log_every=4)
    return engine.run(jnp.int32(state), data, **(targets or {"epochs": 3}))


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def test_milestones_are_kept_for_ever(tmp_path):
    run(tmp_path, when=2, keep=1, keep_every=6, steps=20)
    assert steps_in(tmp_path) == [6, 12, 18, 20]
    run(tmp_path, when=5, keep=1, keep_every=6, steps=27)  # the first checkpoint of every six steps
    assert steps_in(tmp_path) == [6, 12, 18, 20, 25, 27]


def test_run_that_starts_from_another_one_leaves_it_untouched(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    run(old, when=5, keep=9, steps=20)
    before = files_in(old)
    with pytest.raises(FileNotFoundError, match=r"start='.*/old/7' is no checkpoint; .*/old holds \[5, 10, 15, 20\]"):
        run(new, when=4, start=old / "7", steps=22)
    whole = run(tmp_path / "whole", when=5, steps=22)
    forked = run(new, when=4, keep=9, start=old / "10", steps=22)
    assert (int(forked.state), forked.step) == (int(whole.state), 22)
    assert steps_in(new) == [12, 16, 20, 22]
    assert run(new, when=4, keep=9, start=old / "10", steps=30).step == 30  # from its own checkpoint
    assert files_in(old) == before
    newest = run(tmp_path / "newest", when=9, start=old, steps=21)
    assert newest.history.steps("train/loss") == [21]
    engine = Engine(counting_step, [Checkpoint(new, when=4, start=old / "10")])
    with pytest.raises(ValueError, match=r"needs a step after the first checkpoint .* which began at .*/old/10"):
        engine.replay(jnp.int32(0), range(12), step=11, epochs=3)
    assert int(engine.replay(jnp.int32(0), range(12), step=22, epochs=3).state) == sum(range(12)) + sum(range(9))


def files_in(directory):
    return {str(path): path.stat().st_mtime_ns for path in Path(directory).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"when": 12, "keep": 9}, [12, 24, 36]),
        ({"when": 10, "keep": 9}, [10, 20, 30, 36]),
        ({"when": 10, "keep": 2}, [30, 36]),
        ({"when": every(epochs=1), "keep": 1}, [36]),
        ({"when": every(epochs=2), "keep": 9}, [24, 36]),
        ({"when": 1000}, [36]),
        ({"when": 3, "keep": 9, "steps": 5}, [3, 5]),
        ({"when": every(epochs=1), "keep": 9, "steps": 2}, [2]),
    ],
)
def test_checkpoints_are_saved_at_their_cadence_and_once_at_the_end(options, expected, tmp_path):
    run(tmp_path, **options)
    assert steps_in(tmp_path) == expected


def test_checkpoint_holds_the_step_that_it_is_named_after(tmp_path):
    run(tmp_path, when=10, keep=9)
    sums = np.cumsum(np.tile(np.arange(12), 3))
    assert {n: int(load(tmp_path, jnp.int32(0), n)) for n in steps_in(tmp_path)} == {
        n: sums[n - 1] for n in (10, 20, 30, 36)
    }


def test_finished_run_runs_no_step_says_so_and_changes_no_file(tmp_path, capsys):
    run(tmp_path)
    before = files_in(tmp_path)
    result = run(tmp_path)
    assert (result.step, len(result.history)) == (36, 0)
    message = (
        f"onstep: already at step 36 (epoch 3 of 3): nothing to do in {tmp_path}; raise the target to train further, "
        "or start from scratch with Checkpoint(..., overwrite=True)\n"
    )
    assert capsys.readouterr().err == message
    assert files_in(tmp_path) == before


def test_higher_target_resumes_and_a_lower_one_is_refused(tmp_path):
    run(tmp_path, steps=36)
    assert run(tmp_path, steps=48).step == 48
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="at step 48, beyond the target of 24 steps"):
        run(tmp_path, steps=24)
    assert files_in(tmp_path) == before


def test_final_stop_stays_stopped(tmp_path, capsys):
    assert run(tmp_path, extra=[StopAt(5, reason="enough")]).stopped == "enough"
    before = files_in(tmp_path)
    result = run(tmp_path, epochs=9)
    assert (result.step, result.stopped) == (5, "enough")
    assert (
        f"the run ended with a final stop at step 5 (enough): nothing to do in {tmp_path}; resume from an earlier "
        "checkpoint with Checkpoint(..., resume=step), or start from scratch with Checkpoint(..., overwrite=True)"
    ) in capsys.readouterr().err
    assert files_in(tmp_path) == before


def test_empty_directory_starts_from_scratch(tmp_path):
    assert run(tmp_path / "new" / "run").step == 36
    assert steps_in(tmp_path / "new" / "run") == [12, 24, 36]


def test_used_directory_is_refused_without_resume(tmp_path):
    run(tmp_path, steps=3)
    before = files_in(tmp_path)
    with pytest.raises(FileExistsError, match="holds a run at step 3. Resume it .resume=True."):
        run(tmp_path, resume=False)
    assert files_in(tmp_path) == before


def test_earlier_step_is_resumed_and_later_ones_are_archived(tmp_path):
    whole = run(tmp_path, when=4, keep=20)
    result = run(tmp_path, when=5, keep=20, resume=16)
    assert int(result.state) == int(whole.state)
    assert steps_in(tmp_path) == [4, 8, 12, 16, 20, 25, 30, 35, 36]
    assert steps_in(tmp_path / "archive") == [20, 24, 28, 32, 36]


def test_no_name_in_the_archive_is_used_twice(tmp_path):
    for _ in range(3):
        run(tmp_path, when=4, keep=20, resume=True if not any(tmp_path.iterdir()) else 32)
    assert sorted(os.listdir(tmp_path / "archive")) == ["36", "36.2"]


def test_names_in_the_archive_of_version_0_1_are_not_used_again(tmp_path):
    run(tmp_path, when=4, keep=20)
    shutil.copytree(tmp_path / "36", tmp_path / "aside" / "36")  # as version 0.1 named the archive
    before = files_in(tmp_path / "aside")
    run(tmp_path, when=4, keep=20, resume=28)
    assert sorted(os.listdir(tmp_path / "archive")) == ["32", "36.2"]
    assert steps_in(tmp_path) == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert files_in(tmp_path / "aside") == before


def test_missing_step_is_an_error_that_lists_the_existing_ones(tmp_path):
    run(tmp_path, when=12)
    with pytest.raises(FileNotFoundError, match=r"no step 17 in .*; it holds \[12, 24, 36\]"):
        run(tmp_path, resume=17)


def test_failing_run_keeps_its_last_checkpoint_and_leaves_no_thread(tmp_path):
    def broken():
        yield from range(6)
        raise OSError("disk gone")

    threads = set(threading.enumerate())
    with pytest.raises(OSError, match="disk gone"):
        run(tmp_path, broken(), when=1, steps=12)
    assert steps_in(tmp_path) == [4, 5, 6]
    assert set(threading.enumerate()) <= threads


def test_no_thread_outlives_a_run(tmp_path):
    threads = set(threading.enumerate())
    run(tmp_path, when=5)
    run(tmp_path, when=5, epochs=4)
    assert set(threading.enumerate()) <= threads


def test_resume_continues_the_open_window_and_the_epoch_mean(tmp_path):
    whole = Engine(counting_step, log_every=4).run(jnp.int32(0), range(12), epochs=2).history
    first, second = run(tmp_path, steps=6).history, run(tmp_path, epochs=2).history
    assert (first.steps("train/loss"), second.steps("train/loss")) == ([4, 6], [8, 12, 16, 20, 24])
    assert second["train/loss"] == whole["train/loss"][1:]
    assert second["epoch/loss"] == whole["epoch/loss"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda s: s["a"], r"state/a: float32\[2\] is gone.*state: float32\[2\] is new"),
        (lambda s: s | {"b": s["a"]}, r"state/b: float32\[2\] is new"),
        (lambda s: {"a": jnp.zeros(3)}, r"state/a: float32\[2\] became float32\[3\]"),
        (lambda s: {"a": jnp.zeros(2, jnp.int32)}, r"state/a: float32\[2\] became int32\[2\]"),
    ],
)
def test_different_state_is_refused_before_anything_is_written(make, match, tmp_path):
    state = {"a": jnp.zeros(2)}

    def go(state, steps):
        return Engine(lambda s, b: (s, {}), [Checkpoint(tmp_path)]).run(state, range(4), steps=steps)

    go(state, 2)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=f"The saved run does not fit this one .saved, then here.: {match}") as caught:
        go(make(state), 4)
    remedy = "To start from scratch, pass overwrite=True or another directory."
    assert str(caught.value).endswith(f"\nCheckpoint found the saved run in {tmp_path}/2. {remedy}")
    assert files_in(tmp_path) == before


def test_new_carry_is_refused_by_name(tmp_path):
    run(tmp_path, steps=2)
    message = rf"carries/EMA/average: int32\[\] is new.\n.* in {tmp_path}/2. To add or remove .*, pass strict=False. To"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, extra=[EMA(of=None)])


# A changed configuration


def double(state, batch):
    return state + 2 * batch, {"loss": state * 1.0}


def said(capsys):
    """Return what the run said about changes."""
    return [line.split(": ", 2)[2] for line in capsys.readouterr().err.splitlines() if "changed since" in line]


CHANGED_STEP = "the step function, the optimizer or a compiled half"


def test_changed_arguments_of_a_callback_are_said_with_both_sides(tmp_path, capsys):
    def stops(patience, every):
        return [EarlyStopping("train/loss", patience=patience), ClipWeights(0, 9**9, when=every, of="state")]

    def step(state, batch):
        return {"state": state["state"] + batch}, {"loss": batch}

    def go(steps, *arguments):
        engine = Engine(step, [*stops(*arguments), Checkpoint(tmp_path)])
        engine.run({"state": jnp.int32(0)}, range(12), steps=steps)

    go(4, 7, 2)
    go(6, 7, 2)
    assert said(capsys) == []
    go(8, 9, 3)
    clips = [f"ClipWeights(0, 387420489, of='state', when={every})" for every in (2, 3)]
    stopping = [f"EarlyStopping('train/loss', patience={patience})" for patience in (7, 9, 8)]
    assert said(capsys) == [f"{stopping[0]} is now {stopping[1]}; {clips[0]} is now {clips[1]}"]
    go(8, 8, 3)  # has nothing to do
    assert said(capsys) == [f"{stopping[1]} is now {stopping[2]}"]


def test_arguments_that_differ_in_each_process_or_session_are_not_said(tmp_path, capsys):
    class Watches(Callback):
        def __init__(self, what, folder):
            self.what, self.folder = what, folder

    def watches(folder):
        alive.append(object())  # so that the next one has another address
        return [Watches(alive[-1], str(tmp_path / folder / "events")), Counts()]

    alive = []

    run(tmp_path, steps=4, extra=watches("old"))
    run(tmp_path, steps=6, extra=watches("new"), keep=5, when=2)
    shutil.copytree(tmp_path, tmp_path / "moved")
    run(tmp_path / "moved", steps=8, extra=watches("new"))
    assert said(capsys) == []


def test_callback_whose_repr_fails_is_saved_by_its_class(tmp_path):
    class Broken(Callback):
        def __repr__(self):
            raise ZeroDivisionError

    run(tmp_path, steps=2, extra=[Broken()])
    assert Checkpoints(tmp_path).manifest(2)["config"]["callbacks"] == {"Broken": "Broken"}


def test_manifest_has_no_secret_of_a_callback(tmp_path):
    class Sends(Callback):
        def __init__(self, *, password):
            self.password = password

    run(tmp_path, steps=2, extra=[Sends(password="1234")])
    assert Checkpoints(tmp_path).manifest(2)["config"]["callbacks"] == {"Sends": "Sends(password=***)"}


@pytest.mark.parametrize("steps_per_call", [1, 8])
@pytest.mark.parametrize("change", ["step", "rate", "compiled half"])
def test_changed_step_is_said_at_the_first_record(change, steps_per_call, tmp_path, capsys):
    def go(steps, rate=0.5, power=2, clip=9.0):
        optimizer = optax.adam(rate)

        def step(state, batch):
            grad = jax.grad(lambda w: jnp.abs(w - batch) ** power)(state["w"])
            updates, moments = optimizer.update(grad, state["moments"])
            return {"w": state["w"] + updates, "moments": moments}, {"grad": grad}

        state = {"w": jnp.float32(0), "moments": optimizer.init(jnp.float32(0))}
        callbacks = [ClipWeights(-clip, clip, of="w"), Checkpoint(tmp_path)]
        engine = Engine(step, callbacks, log_every=1, steps_per_call=steps_per_call)
        engine.on("log")(lambda loop, record: seen.append((loop.step, *said(capsys))))
        return engine.run(state, list(np.arange(9, dtype=np.float32)), steps=steps)

    seen = []
    go(2)
    go(4)
    changed = {"step": {"power": 3}, "rate": {"rate": 0.25}, "compiled half": {"clip": 8.0}}[change]
    go(6, **changed)
    go(8, **changed)
    assert [step for step, *messages in seen if CHANGED_STEP in messages] == [5]


def test_terminal_in_colour_does_not_make_a_step_another_step(tmp_path, capsys, monkeypatch):
    def go(steps):
        return Engine(lambda s, b: (s + b, {"loss": s}), [Checkpoint(tmp_path)]).run(0, [1, 2, 3, 4], steps=steps)

    go(2)
    monkeypatch.setattr("jax._src.pretty_printer.CAN_USE_COLOR", True)  # as if the process had begun on a terminal
    assert "\x1b" in str(jax.make_jaxpr(jnp.sin)(1.0))
    assert go(4).step == 4
    assert "changed since" not in capsys.readouterr().err


def test_changed_step_is_said_at_the_latest_when_it_is_saved(tmp_path, capsys):
    for step in (counting_step, double):
        Engine(step, [Checkpoint(tmp_path)]).run(jnp.int32(0), range(12), epochs=1 if step is counting_step else 2)
    assert said(capsys) == [CHANGED_STEP]


def test_resume_at_a_short_batch_does_not_say_that_the_step_changed(tmp_path, capsys):
    data = Batches(np.arange(7), 3, drop_last=False)
    for steps in (2, 3, 5):
        engine = Engine(lambda s, b: (s + b.sum(), {}), [Checkpoint(tmp_path)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.run(jnp.int32(0), data, steps=steps)
    assert said(capsys) == []


@pytest.mark.parametrize("config", [None, {}, {"step": 3, "callbacks": ["Counts()"]}, {"step": {"inputs": 1}}])
def test_run_without_a_known_configuration_in_its_manifest_resumes(config, tmp_path, capsys):
    run(tmp_path, steps=4)
    manifest = Checkpoints(tmp_path).manifest(4)
    if config is None:
        del manifest["config"]
    else:
        manifest["config"] = config
    write_manifest(tmp_path / "4", manifest)
    assert run(tmp_path, steps=6, extra=[Counts()]).step == 6
    assert said(capsys) == []


def test_uncompiled_run_is_saved_without_a_fingerprint_of_its_step(tmp_path):
    Engine(counting_step, [Checkpoint(tmp_path)], jit=False).run(jnp.int32(0), range(4), epochs=1)
    assert Checkpoints(tmp_path).manifest(4)["config"]["step"] is None


class Counts(Callback):
    """Counts steps in its host state."""

    def __init__(self, name=None):
        self.name, self.count = name, 0

    def on_step_end(self, loop):
        self.count += 1

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def test_two_callbacks_of_one_class_each_get_their_own_state_back(tmp_path):
    one, two = Counts(), Counts()
    two.when = every(2)
    run(tmp_path, extra=[one, two], steps=6)
    again = Counts(), Counts()
    again[1].when = every(2)
    run(tmp_path, extra=again, steps=8)
    assert [callback.count for callback in again] == [8, 4]


def test_removed_callback_is_named_and_a_new_one_starts_from_scratch(tmp_path):
    run(tmp_path, extra=[Counts("old")], steps=6)
    new = Counts("new")
    with pytest.warns(UserWarning, match="The saved run holds the state of old") as warned:
        run(tmp_path, extra=[new], steps=8)
    assert warned[0].filename == __file__
    assert new.count == 2


def test_different_batch_size_is_refused(tmp_path):
    def go(batch_size, steps):
        data = Batches(np.arange(12), batch_size)
        return Engine(lambda s, b: (s + b.sum(), {}), [Checkpoint(tmp_path)]).run(jnp.int32(0), data, steps=steps)

    go(2, 3)
    with pytest.raises(ValueError, match="Batches has changed since the run was saved: batch_size 2 became 3"):
        go(3, 4)


@flax.struct.dataclass
class Odd:
    """A state with what is difficult for Orbax: a key, an empty array, 16-bit floats, a scalar, an empty dict."""

    key: jax.Array
    empty: jax.Array
    half: jax.Array
    number: jax.Array
    nothing: dict
    name: str = flax.struct.field(pytree_node=False)


def odd(seed):
    key = jax.random.key(seed)
    return Odd(key, jnp.zeros((0, 3)), jax.random.normal(key, (3,), jnp.bfloat16), jnp.int8(seed), {}, "odd")


def test_any_pytree_of_arrays_is_saved_and_loaded(tmp_path):
    save(tmp_path, odd(3), step=5)
    assert same_bytes(load(tmp_path, odd(0)), odd(3))
    with pytest.raises(FileExistsError, match="holds step 5"):
        save(tmp_path, odd(3), step=5)
    with pytest.raises(FileNotFoundError, match=r"no step 6 in .*; it holds \[5\]"):
        load(tmp_path, odd(0), step=6)


@pytest.mark.parametrize(
    "tree", [jnp.arange(3), jax.random.key(1), np.float64(2), np.arange(3)], ids=["array", "key", "scalar", "int64"]
)
def test_bare_array_is_saved_and_loaded(tree, tmp_path):
    save(tmp_path, tree)
    assert same_bytes(load(tmp_path, tree), tree)


@pytest.mark.parametrize("tree", [{}, None, {"a": jnp.zeros((0,))}], ids=["dict", "none", "size 0"])
def test_tree_without_arrays_is_refused(tree, tmp_path):
    with pytest.raises(ValueError, match="save needs a tree with arrays in it"):
        save(tmp_path / "new", tree)
    assert not (tmp_path / "new").exists()


def test_step_that_is_already_saved_is_refused_and_kept(tmp_path):
    save(tmp_path, jnp.arange(3), step=4)
    with pytest.raises(FileExistsError, match="already holds step 4. Use another step or directory"):
        save(tmp_path, jnp.zeros(3), step=4)
    assert load(tmp_path, jnp.zeros(3, int)).tolist() == [0, 1, 2]
    save(tmp_path, jnp.zeros(3), step=5)
    assert Checkpoints(tmp_path).steps() == [4, 5]


@pytest.mark.parametrize("small", [orbax_trees.SMALL, 0], ids=["small", "large"])
def test_trees_are_loaded_by_name_alone_and_together(small, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_trees, "SMALL", small)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    trees = {
        "state": {"w": jnp.ones((2, 3), jnp.bfloat16), "n": np.int64(2**40), "key": jax.random.key(3), "none": None},
        "carries": {"EMA": {"average": (jax.device_put(jnp.arange(16), divided), jnp.float32(0.5))}, "empty": {}},
    }
    with contextlib.closing(CheckpointWriter(tmp_path)) as writer:
        writer.save(4, trees)
    checkpoints = Checkpoints(tmp_path)
    everything = checkpoints.load(4)
    assert list(everything) == ["carries", "state"]
    for name, tree in trees.items():
        assert same_bytes(checkpoints.load(4, {name: tree})[name], tree)
        for found in (everything[name], checkpoints.load(4, {name: None})[name]):
            assert same_bytes(jax.tree.leaves(found), jax.tree.leaves(tree))
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found) if leaf.dtype != np.int64)
    assert everything["carries"]["EMA"]["average"][0].sharding == divided
    with pytest.raises(ValueError, match=r"structures do not match:\nstate\.v"):
        checkpoints.load(4, {"state": trees["state"] | {"v": jnp.ones(2)}})


def test_load_without_like_returns_plain_dicts(tmp_path):
    save(tmp_path, {"params": {"w": jnp.ones(2)}})
    assert load(tmp_path)["params"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"w": jnp.zeros(2), "v": jnp.zeros(2)}, r"state/v: float32\[2\] is new"),
        ({"w": jnp.zeros(3)}, r"state/w: float32\[2\] became float32\[3\]"),
        ({"w": jnp.zeros(2, jnp.int32)}, r"state/w: float32\[2\] became int32\[2\]"),
        ({"w": jnp.zeros(2, jnp.bfloat16)}, r"state/w: float32\[2\] became bfloat16\[2\]"),
        ({"w": jax.random.key(0)}, r"state/w: float32\[2\] became key<fry>\[\]"),
        ({"w": [jnp.zeros(2)]}, r"state/w: float32\[2\] is gone; state/w/0: float32\[2\] is new"),
        ({"w": jnp.zeros(2), "v": None}, r"structures do not match:\nstate\.v"),
        (jnp.zeros(2), r"state/w: float32\[2\] is gone; state: float32\[2\] is new"),
    ],
    ids=["leaf", "shape", "dtype", "half", "key", "list", "none", "bare"],
)
@pytest.mark.parametrize("saved_by", ["save", "run"])
def test_tree_that_does_not_fit_is_not_loaded(saved_by, like, match, tmp_path):
    if saved_by == "save":
        save(tmp_path, {"w": jnp.ones(2)})
    else:
        Engine(lambda s, b: (s, {}), [Checkpoint(tmp_path)]).run({"w": jnp.ones(2)}, range(2), epochs=1)
    with pytest.raises(ValueError, match=rf"load: {tmp_path}/\d does not fit like.*: .*{match}"):
        load(tmp_path, like)


def test_leaf_of_size_0_with_another_dtype_does_not_fit(tmp_path):
    save(tmp_path, {"w": jnp.ones(2), "none": jnp.zeros((0, 3))})
    with pytest.raises(ValueError, match=r"state/none: float32\[0,3\] became int32\[0,3\]"):
        load(tmp_path, {"w": jnp.ones(2), "none": jnp.zeros((0, 3), jnp.int32)})


def on_missing_devices(directory):
    """Change a checkpoint so that it was saved on more devices than there are."""
    file = directory / "_sharding"
    file.write_text(file.read_text().replace('\\"id\\": ', '\\"id\\": 9'))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"files": manifest["files"] | {"_sharding": [file.stat().st_size, zlib.crc32(file.read_bytes())]}}
    del manifest["checksum"]
    write_manifest(directory, manifest)


@pytest.mark.parametrize("kind", ["no like", "arrays", "shapes", "numpy", "8 devices"])
def test_checkpoint_of_many_devices_is_loaded_on_one(kind, tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tree = {"w": jnp.arange(16.0), "n": jnp.int32(3), "key": jax.random.key(1)}
    save(tmp_path, tree | {"w": jax.device_put(tree["w"], divided)})
    on_missing_devices(tmp_path / "0")
    likes = {
        "no like": None,
        "arrays": tree,
        "shapes": jax.eval_shape(lambda: tree),
        "numpy": tree | {"w": np.zeros(16, np.float32), "n": np.int32(0)},
        "8 devices": jax.eval_shape(lambda: tree) | {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=divided)},
    }
    loaded = load(tmp_path, likes[kind])
    assert same_bytes(loaded, tree)
    assert isinstance(loaded["w"], np.ndarray if kind == "numpy" else jax.Array)
    assert getattr(loaded["w"], "sharding", divided).num_devices == (8 if kind in ("8 devices", "numpy") else 1)


@pytest.mark.parametrize("tree", ["state", "carry"])
@pytest.mark.parametrize("dtype", ["uint4", "uint2"])
def test_dtype_that_cannot_be_stored_is_refused_before_the_first_step(dtype, tree, tmp_path):
    seen = []

    class Codes(Callback):
        def init(self, state):
            return {"codes": jnp.zeros(3, dtype)}

        def update(self, carry, ctx):
            return carry, ctx

    state = {"w": jnp.zeros(2), "codes": jnp.zeros(3, dtype)}
    extra, state = ([], state) if tree == "state" else ([Codes()], {"w": jnp.zeros(2)})
    engine = Engine(lambda s, b: (s, {}), [*extra, Checkpoint(tmp_path / "run")])
    engine.on("step_end")(lambda loop: seen.append(loop.step))
    name = "state/codes" if tree == "state" else "carries/Codes/codes"
    with pytest.raises(TypeError, match=f"A checkpoint cannot hold the leaf '{name}' of dtype {dtype}. Convert it"):
        engine.run(state, range(3), epochs=1)
    assert seen == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.zeros(2, "uint4"),
        np.array(["a"]),
        np.array([None]),
        "text",
        np.datetime64("2020-01-01"),
        np.zeros(1, "i4,i4"),
    ],
    ids=lambda leaf: str(getattr(leaf, "dtype", leaf)),
)
def test_leaf_that_cannot_be_stored_is_refused_by_name(leaf, tmp_path):
    for use in (
        lambda tree: save(tmp_path / "run", tree),
        lambda tree: CheckpointWriter(tmp_path).save(0, {"a": tree}),
    ):
        with pytest.raises(TypeError, match=r"A checkpoint cannot hold the leaf '(a/)?w/0' of dtype .+\. Convert it"):
            use({"v": jnp.zeros(2), "w": [leaf]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", "bfloat16", "complex64", "bool"])
def test_every_dtype_that_can_be_stored_is(dtype, tmp_path):
    tree = {"w": jnp.arange(4).astype(dtype)}
    save(tmp_path, tree)
    assert same_bytes(load(tmp_path, tree), tree)


def delete(directory, step):
    """Delete a checkpoint as a run does."""
    (directory / str(step)).rename(directory / f"{step}.0123abcd.trash")
    shutil.rmtree(directory / f"{step}.0123abcd.trash")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["steps", "damage", "host", "load"])
def test_checkpoint_that_a_run_deletes_while_it_is_loaded_gives_way_to_a_newer_one(name, when, tmp_path, monkeypatch):
    save(tmp_path / "run", {"w": jnp.ones(2)}, step=1)
    method, newer = getattr(Checkpoints, name), [2, 3]

    def meanwhile(*args, **options):
        found = None if when == "before" else method(*args, **options)
        if newer:
            step = newer.pop(0)  # first, because the writer calls the method as well
            writer = CheckpointWriter(tmp_path / "run")
            writer.save(step, {"state": {"w": jnp.full(2, 1.0 * step)}})
            writer.close()
            delete(tmp_path / "run", step - 1)
        return method(*args, **options) if when == "before" else found

    monkeypatch.setattr(Checkpoints, name, meanwhile)
    assert load(tmp_path / "run", {"w": jnp.zeros(2)})["w"].tolist() == [3, 3]
    assert os.listdir(tmp_path / "run") == ["3"]


def test_load_looks_again_if_checkpoints_come_and_go_while_it_lists_them(tmp_path, monkeypatch):
    save(tmp_path, {"w": jnp.ones(2)}, step=1)
    steps, seen = Checkpoints.steps, [[]]
    monkeypatch.setattr(Checkpoints, "steps", lambda self: seen.pop() if seen else steps(self))
    assert load(tmp_path, {"w": jnp.zeros(2)})["w"].tolist() == [1, 1]


def test_requested_step_that_a_run_deletes_while_it_is_loaded_is_missing(tmp_path, monkeypatch):
    save(tmp_path, {"w": jnp.ones(2)}, step=1)
    save(tmp_path, {"w": jnp.ones(2)}, step=2)
    host = Checkpoints.host
    monkeypatch.setattr(Checkpoints, "host", lambda self, step: delete(tmp_path, step) or host(self, step))
    with pytest.raises(FileNotFoundError, match=r"no step 1 in .*; it holds \[2\]"):
        load(tmp_path, step=1)


def test_load_gives_up_if_every_checkpoint_is_deleted_while_it_is_loaded(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(Checkpoints, "steps", lambda self: tried.append(len(tried)) or list(tried))
    with pytest.raises(RuntimeError, match=f"load: a run deletes the checkpoints in {tmp_path} before they are read"):
        load(tmp_path)


def test_numpy_arrays_are_loaded_where_like_has_them(tmp_path):
    save(tmp_path, jnp.ones(2))
    assert isinstance(load(tmp_path, np.zeros(2, np.float32)), np.ndarray)
    assert isinstance(load(tmp_path, jnp.zeros(2)), jax.Array)


def test_64_bit_numbers_are_not_truncated(tmp_path):
    save(tmp_path, {"n": np.arange(2), "m": 3})
    assert same_bytes(load(tmp_path, {"n": np.zeros(2, int), "m": 0}), {"n": np.arange(2), "m": np.int64(3)})
    with pytest.raises(ValueError, match=r"state/n: int64\[2\] became int32\[2\]"):
        load(tmp_path, {"n": jnp.zeros(2, jnp.int32), "m": 0})


def test_initial_state_of_a_run_fits_its_saved_state(tmp_path):
    state = {"step": 0, "rate": 0.5, "w": np.zeros(2)}
    result = Engine(lambda s, b: (s, {}), [Checkpoint(tmp_path)]).run(state, range(2), epochs=1)
    assert same_bytes(load(tmp_path, like=state), result.state)


def test_tree_that_an_early_version_saved_is_loaded(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.save(0, {"state": {"w": jnp.ones(2)}})
    writer.close()
    assert load(tmp_path, {"w": jnp.zeros(2)})["w"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"load: .*/0 does not fit like: .*\nstate\.v"):
        load(tmp_path, {"v": jnp.zeros(2)})


def test_state_of_a_run_is_loaded_without_its_carries(tmp_path):
    def count(state, batch):
        return state.replace(step=state.step + 1), {}

    result = Engine(count, [EMA(0.9), Checkpoint(tmp_path)]).run(fresh_state(), range(4), epochs=1)
    assert same_bytes(load(tmp_path, like=result.state), result.state)


@pytest.mark.parametrize("small", [orbax_trees.SMALL, 0], ids=["copied by us", "copied by Orbax"])
def test_state_saved_while_steps_run_is_the_state_of_its_step(small, tmp_path, monkeypatch):
    def fast(state, batch):
        return jax.tree.map(lambda x: x + 1, state), {}

    monkeypatch.setattr(orbax_trees, "SMALL", small)
    state = {str(i): jnp.zeros(20_000) for i in range(5)}
    Engine(fast, [Checkpoint(tmp_path, when=1, keep=50)]).run(state, range(30), epochs=1)
    for number in steps_in(tmp_path):
        assert all(np.all(leaf == number) for leaf in load(tmp_path, state, number).values())


def test_numpy_array_may_be_modified_when_save_returns(tmp_path):
    array = np.arange(3)
    with contextlib.closing(CheckpointWriter(tmp_path)) as writer, orbax_trees.ORBAX:  # nothing is written yet
        writer.save(1, {"state": array})
        array += 10
    assert load(tmp_path).tolist() == [0, 1, 2]


def test_result_resumes_in_the_directory_of_its_run(tmp_path):
    engine = Engine(counting_step, [Checkpoint(tmp_path, when=4, keep=9)])
    first = engine.run(jnp.int32(0), range(12), steps=6)
    assert engine.run(first, range(12), steps=12).step == 12
    assert steps_in(tmp_path) == [4, 6, 8, 12]
    with pytest.raises(FileExistsError, match="holds a run at step 12, beyond step 6 of this run"):
        engine.run(first, range(12), steps=12)


class Average(NamedTuple):
    """A carry whose fields are not in alphabetical order."""

    zeta: Any
    alpha: Any


def test_named_tuple_is_loaded_from_a_dict_with_the_same_names(tmp_path):
    like = {"a": Average({"w": jnp.zeros(2)}, jnp.int32(0)), "b": [Average(jnp.zeros(3), jnp.float32(0))]}
    expected = jax.tree.map(lambda leaf: leaf + 1, like)
    save(tmp_path, {"a": expected["a"]._asdict(), "b": [expected["b"][0]._asdict()]})
    assert same_bytes(load(tmp_path, like), expected)
    assert same_bytes(Checkpoints(tmp_path).load(0, {"state": like}, partial=True), {"state": expected})


def test_named_tuple_with_another_part_is_refused(tmp_path):
    save(tmp_path, {"a": {"zeta": jnp.ones(2), "beta": jnp.int32(3)}})
    with pytest.raises(ValueError, match=r"state/a/beta: int32\[\] is gone"):
        load(tmp_path, {"a": Average(jnp.ones(2), jnp.int32(1))})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Checkpoint("/runs"), "Checkpoint('/runs')"),
        (lambda: Checkpoint("/runs", when=5, best="val/loss"), "Checkpoint('/runs', when=5, best='val/loss')"),
        (lambda: Checkpoints("/runs"), "Checkpoints('/runs')"),
        (lambda: Checkpoints("/runs", best="acc", mode="max"), "Checkpoints('/runs', best='acc', mode='max')"),
    ],
)
def test_repr_is_the_call_that_makes_the_object(make, expected):
    assert repr(make()) == expected


@pytest.mark.parametrize("make", [Checkpoint, Checkpoints, CheckpointWriter])
def test_unknown_mode_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"Checkpoints? needs mode 'min' or 'max', got 'least'"):
        make(tmp_path, mode="least")


def test_run_tells_where_its_checkpoints_are(tmp_path):
    seen = []

    class Look(Callback):
        def on_run_begin(self, loop):
            seen.extend((each.directory, each.best, each.mode) for each in loop.checkpoints)

    Engine(
        counting_step,
        [Look(), Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b", best="train/loss", mode="max")],
        log_every=2,
    ).run(jnp.int32(0), range(2), epochs=1)
    assert seen == [(str(tmp_path / "a"), None, "min"), (str(tmp_path / "b"), "train/loss", "max")]


def test_reading_checkpoints_needs_no_lock_and_changes_nothing(tmp_path):
    class Read(Callback):
        when = every(4)

        def on_step_end(self, loop):
            checkpoints = Checkpoints(tmp_path)
            for number in checkpoints.steps():
                assert checkpoints.damage(number) is None
                assert int(checkpoints.load(number, {"state": jnp.int32(0)})["state"]) == sum(range(number))
                assert checkpoints.host(number)

    run(tmp_path, extra=[Read()], when=3, keep=9, epochs=1)
    before = files_in(tmp_path)
    assert Checkpoints(tmp_path).steps() == [3, 6, 9, 12]
    assert files_in(tmp_path) == before
    assert Checkpoints(tmp_path / "missing").steps() == []
    assert not (tmp_path / "missing").exists()
