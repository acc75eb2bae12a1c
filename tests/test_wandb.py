"""WandB: what the real package writes offline, read from its own files."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from onstep import Engine
from onstep.callbacks import Checkpoint, WandB
from onstep.callbacks.wandb_run import _logged_steps
from onstep.testing import RaiseIn, StopAt, counting_step
from wandb.proto.wandb_internal_pb2 import Record as Entry

SETTINGS = {"silent": True, "console": "off", "x_disable_stats": True, "x_disable_meta": True, "disable_git": True}


def engine(path, *callbacks, **options):
    tracker = WandB("project", mode="offline", dir=str(path), settings=SETTINGS, **options)
    return Engine(counting_step, [*callbacks, tracker], log_every=1)


def entries(folder):
    """Yield the entries in W&B's file, which is short enough to be one block of LevelDB's log."""
    (path,) = folder.glob("run-*.wandb")
    data, at = path.read_bytes(), 7
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        yield Entry.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


def sessions(path):
    """Return run, rows and exit code of each session."""
    wandb.teardown()  # waits for the process in which W&B writes, as happens when a program ends
    found = []
    files = path.glob("wandb/offline-run-*/run-*.wandb")  # W&B leaves an empty folder when it returns an active run
    for folder in sorted((file.parent for file in files), key=lambda folder: folder.stat().st_ctime_ns):
        rows, run, code = [], None, None
        for entry in entries(folder):
            if entry.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item}
                logged = {name: json.loads(text) for name, text in values.items() if not name.startswith("_")}
                rows.append((entry.history.step.num, logged))
            elif entry.HasField("run"):
                run = entry.run
            elif entry.HasField("exit"):
                code = entry.exit.exit_code
        found.append((run, rows, code))
    return found


def test_every_step_is_one_row_of_a_finished_run(tmp_path):
    engine(tmp_path, run_name="first", tags=["a"]).run(jnp.float32(0), [1.0, math.nan, 3.0], steps=3)
    ((run, rows, code),) = sessions(tmp_path)
    assert (run.project, run.display_name, list(run.tags), code) == ("project", "first", ["a"], 0)
    assert [step for step, _ in rows] == [1, 2, 3]
    np.testing.assert_equal([values["train/loss"] for _, values in rows], [1.0, math.nan, 3.0])


def test_configuration_is_flat_and_its_secrets_are_in_no_file(tmp_path):
    config = {"optimizer": {"rate": 0.1}, "api_key": "sk-123", "url": "https://u:p@host"}
    engine(tmp_path, config=config).run(jnp.float32(0), [1.0], epochs=1)
    ((run, _, _),) = sessions(tmp_path)
    logged = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert logged == {"optimizer.rate": 0.1, "api_key": "***", "url": "https://***@host"}
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"sk-123" not in written
    assert b"u:p@" not in written


@pytest.mark.parametrize("cut", [3, 4, 5, 6])
def test_resumed_run_continues_the_same_wandb_run_without_duplicate_points(tmp_path, cut):
    batches = [float(n) for n in range(8)]
    first = engine(tmp_path, Checkpoint(tmp_path / "run", when=2), RaiseIn("step_end", OSError("gone"), step=cut + 1))
    with pytest.raises(OSError, match="gone"):
        first.run(jnp.float32(0), batches, epochs=1)
    wandb.teardown()
    engine(tmp_path, Checkpoint(tmp_path / "run", when=2)).run(jnp.float32(0), batches, epochs=1)
    (one, before, failed), (other, after, finished) = sessions(tmp_path)
    assert (one.run_id, failed, finished) == (other.run_id, 1, 0)
    assert [(step, values["train/loss"]) for step, values in before + after] == list(enumerate(batches, 1))


def test_run_from_scratch_is_a_new_wandb_run(tmp_path):
    same = engine(tmp_path)
    for _ in range(2):
        same.run(jnp.float32(0), [1.0], epochs=1)
    (one, _, _), (other, _, _) = sessions(tmp_path)
    assert one.run_id != other.run_id


def test_given_id_is_used(tmp_path):
    engine(tmp_path, id="mine").run(jnp.float32(0), [1.0], epochs=1)
    ((run, _, _),) = sessions(tmp_path)
    assert run.run_id == "mine"


def test_run_that_is_interrupted_or_stopped_to_be_resumed_ends_as_killed(tmp_path):
    engine(tmp_path, StopAt(1, final=False)).run(jnp.float32(0), [1.0, 2.0], epochs=1)
    with pytest.raises(KeyboardInterrupt):
        engine(tmp_path, RaiseIn("epoch_end", KeyboardInterrupt())).run(jnp.float32(0), [1.0, 2.0], epochs=2)
    assert [code for _, _, code in sessions(tmp_path)] == [255, 255]


def test_logged_steps_are_found_in_a_file_of_many_blocks(tmp_path):
    first = engine(tmp_path).run(jnp.float32(0), [0.0] * 400, epochs=1)
    wandb.teardown()
    (long,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert long.stat().st_size > 2 * 32768
    again = engine(tmp_path)
    again.on("run_begin")(lambda loop: loop.log({"again": 1.0}))
    again.run(first, [0.0] * 400, steps=401)
    long.parent.rename(tmp_path / "long")
    ((_, rows, _),) = sessions(tmp_path)
    assert rows == [(401, {"train/loss": 0.0})]


@pytest.mark.parametrize("room", range(7))
def test_logged_steps_are_found_next_to_block_padding_and_an_incomplete_end(tmp_path, room):
    def entry(step, size=0):
        found = Entry()
        found.history.step.num = step
        found.history.item.add(value_json="x" * size)
        return found.SerializeToString()

    def framed(data):
        return bytes(4) + len(data).to_bytes(2, "little") + b"\1" + data

    filler = 32768 - room - 7 - 7 - len(entry(1, 32000))
    first = framed(entry(1, 32000 + filler))
    (tmp_path / "file").write_bytes(bytes(7) + first + bytes(room) + framed(entry(2)) + framed(entry(3))[:-1])
    assert list(_logged_steps(tmp_path / "file")) == [1, 2]


@pytest.fixture
def user_run(tmp_path):
    """A W&B run that the user has begun."""
    run = wandb.init(id="user", mode="offline", dir=str(tmp_path), settings=SETTINGS)
    yield run
    run.finish()


def test_run_that_the_user_has_begun_gets_the_records_and_stays_open(tmp_path, user_run):
    engine(tmp_path, config={"rate": 0.1}).run(jnp.float32(0), [1.0, 2.0], epochs=1)
    assert wandb.run is user_run
    assert user_run.config["rate"] == 0.1
    user_run.log({"mine": 5.0})
    user_run.finish()
    ((run, rows, code),) = sessions(tmp_path)
    assert (run.run_id, code) == ("user", 0)
    assert [(step, values["train/loss"]) for step, values in rows if "train/loss" in values] == [(1, 1.0), (2, 2.0)]
    assert [values["mine"] for _, values in rows if "mine" in values] == [5.0]


def test_no_point_is_lost_if_the_user_has_logged_more_often(tmp_path, user_run):
    run = engine(tmp_path)
    run.on("step_end")(lambda loop: [wandb.log({"mine": loop.step}) for _ in range(3)])
    run.run(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1)
    user_run.finish()
    ((_, rows, _),) = sessions(tmp_path)
    assert [values["train/loss"] for _, values in rows if "train/loss" in values] == [1.0, 2.0, 3.0]
    assert [values["mine"] for _, values in rows if "mine" in values] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_run_inside_a_callback_has_its_own_wandb_run_and_leaves_the_outer_one_open(tmp_path):
    inner, outer = engine(tmp_path, id="inner"), engine(tmp_path, id="outer")
    outer.on("step_end", when=2)(lambda loop: inner.run(jnp.float32(0), [5.0], epochs=1))
    outer.run(jnp.float32(0), [1.0, 2.0, 3.0], epochs=1)
    found = {run.run_id: ([values["train/loss"] for _, values in rows], code) for run, rows, code in sessions(tmp_path)}
    assert found == {"outer": ([1.0, 2.0, 3.0], 0), "inner": ([5.0], 0)}
    assert wandb.run is None


def test_run_that_the_user_has_begun_beside_the_current_one_stays_open(tmp_path):
    with wandb.init(id="beside", mode="offline", dir=str(tmp_path), settings=SETTINGS, reinit="create_new") as user_run:
        engine(tmp_path).run(jnp.float32(0), [1.0], epochs=1)
        user_run.log({"mine": 5.0})
    ((run, rows, _),) = sessions(tmp_path)
    assert (run.run_id, rows[-1][1]["mine"]) == ("beside", 5.0)


def test_one_string_as_tags_is_refused():
    with pytest.raises(ValueError, match=r"WandB needs tags to be a list of names, got 'baseline'"):
        WandB("project", tags="baseline")


def test_nothing_is_created_before_the_first_record(tmp_path):
    with pytest.raises(ValueError, match="yielded no batches"):
        engine(tmp_path).run(jnp.float32(0), [], epochs=1)
    assert not any(tmp_path.iterdir())


def test_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"WandB needs the package wandb, which is not installed: pip install wandb"):
        WandB("project")
