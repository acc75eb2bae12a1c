"""Integrity of checkpoints: damage is found and named, and files that are not ours are never changed."""

import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import FLIPS, KILLS, SEEDS
from onstep import Callback, Engine, at
from onstep.callbacks import CSV, EMA, Checkpoint, JSONLines
from onstep.snapshot import Snapshot
from onstep.storage import Checkpoints, CheckpointWriter, Lock, load, save
from onstep.storage import writer as writing
from onstep.storage.manifest import delete_listed
from onstep.storage.orbax_trees import ORBAX
from onstep.testing import LogValues, RaiseIn, StopAt


def step(state, batch):
    return state + batch, {"loss": state.mean() * 1.0}


def run(directory, steps=12, *, data=range(12), extra=(), state=0, **options):
    checkpoint = Checkpoint(directory, **{"when": 4, "keep": 9} | options)
    return Engine(step, [*extra, checkpoint], log_every=4).run(jnp.asarray(state), data, steps=steps)


def sum_at(steps):
    return sum(number % 12 for number in range(steps))


def steps_in(directory):
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("template")
    run(directory, best="train/loss", mode="max")
    return directory


@pytest.fixture
def saved(template, tmp_path):
    """A finished run of 12 steps with the checkpoints 4, 8 and 12."""
    return Path(shutil.copytree(template, tmp_path / "run"))


def scores(values):
    """Log "score" at some steps."""
    return LogValues({step: {"score": value} for step, value in values.items()}, name="score")


def reseal(directory, change):
    """Change a manifest, and give it a valid checksum."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    change(manifest)
    path.write_text(json.dumps({**manifest, "checksum": zlib.crc32(json.dumps(manifest).encode())}))


# Damage is named, and the previous checkpoint is used


def flip(file, where):
    content = bytearray(file.read_bytes())
    content[where.randrange(len(content))] ^= 1 << where.randrange(8)
    file.write_bytes(content)


def resumes_from_8(directory):
    with pytest.warns(UserWarning, match=r"Checkpoint \S*/12 is damaged and is skipped: \S+ "):
        result = run(directory, 8)
    return (result.step, int(result.state)) == (8, sum_at(8))


@pytest.mark.parametrize("seed", range(FLIPS))
def test_flipped_bit_is_found_and_the_previous_checkpoint_is_used(seed, saved):
    files = sorted(path for path in (saved / "12").rglob("*") if path.is_file())
    flip(files[seed % len(files)], random.Random(seed))
    assert resumes_from_8(saved)


def test_no_flipped_bit_of_a_manifest_is_overlooked(saved):
    manifest, checkpoints, where = saved / "12" / "manifest.json", Checkpoints(saved), random.Random(0)
    whole = manifest.read_bytes()
    overlooked = []
    for place in range(len(whole)):
        bit = 1 << where.randrange(8)
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        if checkpoints.damage(12) is None:
            overlooked.append(whole[max(0, place - 12) : place + 1].decode())
    assert overlooked == []


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [truncate, Path.unlink, lambda file: file.write_bytes(b"")], ids=["half", "gone", "0"])
@pytest.mark.parametrize("kind", ["data", "metadata", "manifest"])
def test_truncated_or_missing_file_is_found_and_the_previous_checkpoint_is_used(kind, harm, saved):
    names = {
        "data": max((saved / "12").rglob("d/*"), key=lambda path: path.stat().st_size),
        "metadata": saved / "12" / "_METADATA",
        "manifest": saved / "12" / "manifest.json",
    }
    path, size = names[kind], names[kind].stat().st_size
    harm(path)
    said = Checkpoints(saved).damage(12)
    assert said.startswith(f"{path.relative_to(saved / '12')} ")
    if kind != "manifest":
        assert said.endswith(f"has {path.stat().st_size} bytes, not {size}" if path.exists() else "is missing")
    assert resumes_from_8(saved)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", '{"files": {}}', '{"files": 3}', "{", "\0\0\0", "\x80", '{"files": {"a": [1]}}', "[" * 10**5],
    ids=lambda text: repr(text[:20]),
)
def test_garbled_manifest_is_damage(text, saved):
    (saved / "12" / "manifest.json").write_bytes(text.encode("latin-1"))
    assert resumes_from_8(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", None),
        ("files", 3),
        ("files", {"a": 3}),
        ("files", {"a": [1, "b"]}),
        ("step", None),
        ("step", "12"),
        ("run", None),
        ("metrics", None),
        ("metrics", {"train/loss": "low"}),
        ("best", "train/loss"),
        ("config", 3),
        ("format", None),
        ("format", "one"),
    ],
)
def test_manifest_with_a_wrong_field_is_damage_that_names_the_field(name, value, saved):
    reseal(saved / "12", lambda manifest: manifest.pop(name, 0) if value is None else manifest.update({name: value}))
    assert Checkpoints(saved).damage(12) == f"manifest.json is damaged (it has no valid {name!r})"
    assert resumes_from_8(saved)


def test_checkpoint_of_a_newer_format_is_refused_by_number_and_not_skipped(saved):
    reseal(saved / "12", lambda manifest: manifest.update(format=3, files=[]))
    before = contents(saved)
    message = r"/12 has format 3, but this version of onstep reads format 2\. Upgrade onstep"
    for use in (lambda: run(saved, 16), lambda: run(saved, 16, resume=12), lambda: load(saved)):
        with pytest.raises(ValueError, match=message):
            use()
    assert contents(saved) == before
    assert int(load(saved, jnp.int32(0), 8)) == sum_at(8)


def test_run_archives_a_damaged_checkpoint_when_it_saves_that_step_again(saved):
    truncate(saved / "12" / "_METADATA")
    with pytest.warns(UserWarning, match="12 is damaged"):
        result = run(saved, 16)
    assert int(result.state) == sum_at(16)
    assert (steps_in(saved), steps_in(saved / "archive")) == ([4, 8, 12, 16], [12])


def test_checkpoint_under_the_name_of_another_step_is_damage(saved):
    (saved / "4").rename(saved / "16")
    with pytest.warns(UserWarning, match="16 is damaged"):
        assert run(saved, 12).step == 12


def test_run_resumes_past_a_step_whose_manifest_is_missing(saved):
    (saved / "12" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="12 is damaged"):
        result = run(saved, 16)
    assert int(result.state) == sum_at(16)


@pytest.mark.parametrize("harm", [truncate, lambda file: file.write_text("{}")], ids=["half", "empty"])
@pytest.mark.parametrize("options", [{"keep": 1}, {"best": "train/loss"}], ids=["keep", "best"])
def test_damaged_older_checkpoint_does_not_fail_the_run(harm, options, saved):
    harm(saved / "4" / "manifest.json")
    assert run(saved, 16, **options).step == 16
    assert 16 in steps_in(saved)


@pytest.mark.parametrize("harm", [truncate, lambda file: file.write_text("{}")], ids=["half", "empty"])
def test_best_is_chosen_among_readable_checkpoints(harm, saved):
    harm(saved / "12" / "manifest.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(saved, 8, best="train/loss", mode="max", resume="best").step == 8


def test_run_is_refused_if_every_checkpoint_is_damaged(saved):
    for path in saved.rglob("_METADATA"):
        truncate(path)
    before = contents(saved)
    with (
        pytest.warns(UserWarning, match="is damaged and is skipped"),
        pytest.raises(RuntimeError, match=r"none of the checkpoints \[4, 8, 12\] in .* is intact"),
    ):
        run(saved, 16)
    assert contents(saved) == before


def test_requested_checkpoint_that_is_damaged_is_an_error_that_names_the_file(saved):
    truncate(saved / "8" / "_METADATA")
    before = contents(saved)
    with pytest.raises(ValueError, match=r"/8 is damaged: _METADATA has \d+ bytes, not \d+"):
        run(saved, 16, resume=8)
    assert contents(saved) == before


def test_loading_a_damaged_checkpoint_is_an_error_that_names_the_file(saved):
    (saved / "12" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="/12 is damaged: _METADATA is missing"):
        load(saved, jnp.int32(0))
    assert int(load(saved, jnp.int32(0), 8)) == sum_at(8)


def test_damage_of_a_tree_that_save_wrote_is_found(tmp_path):
    save(tmp_path, jnp.arange(1000))
    flip(max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size), random.Random(0))
    with pytest.raises(ValueError, match="/0 is damaged: the contents of .* have changed"):
        load(tmp_path)


# Leftovers


def test_empty_directory_named_by_a_number_is_not_a_checkpoint(saved):
    (saved / "40").mkdir()
    assert run(saved, 16).step == 16
    assert steps_in(saved) == [4, 8, 12, 16, 40]


def test_leftovers_of_killed_saves_and_deletions_are_removed(saved):
    shutil.copytree(saved / "12", saved / ".saving" / "14")
    (saved / ".saving" / "14" / "manifest.json").unlink()
    (saved / ".saving" / "16.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(saved / "4", saved / "2.trash")
    shutil.copytree(saved / "4", saved / "3.0a1b2c3d.trash")
    result = run(saved, 16)
    assert int(result.state) == sum_at(16)
    assert sorted(os.listdir(saved)) == ["12", "16", "4", "8"]


@pytest.mark.parametrize("left", ["half of the files", "only the folders"])
def test_killed_deletion_is_finished(left, saved):
    trash = shutil.move(saved / "4", saved / "4.trash")
    for number, path in enumerate(sorted(path for path in Path(trash).rglob("*") if path.is_file())):
        if left == "only the folders" or (number % 2 and path.name != "manifest.json"):
            path.unlink()
    run(saved, 16)
    assert sorted(os.listdir(saved)) == ["12", "16", "8"]


def test_finished_run_changes_nothing_not_even_leftovers(saved):
    (saved / ".saving" / "14").mkdir(parents=True)
    before = sorted(map(str, saved.rglob("*")))
    run(saved, 12)
    assert sorted(map(str, saved.rglob("*"))) == before


# The best


@pytest.mark.parametrize(
    ("values", "mode", "kept"),
    [
        ({4: 0.1, 8: 0.5, 12: 0.4, 16: 0.3, 20: 0.2}, "min", [4, 16, 20]),
        ({4: 0.1, 8: 0.5, 12: 0.4, 16: 0.3, 20: 0.2}, "max", [8, 16, 20]),
        ({4: 0.3, 8: 0.3, 12: 0.3, 16: 0.3, 20: 0.3}, "min", [4, 16, 20]),
        ({4: 0.5, 8: 0.1, 12: 0.1, 16: 0.4, 20: 0.4}, "min", [8, 16, 20]),
        ({4: np.nan, 8: 7.0, 12: 8.0, 16: 9.0, 20: 9.0}, "min", [8, 16, 20]),
        ({4: 7.0, 8: np.nan, 12: np.nan, 16: np.nan, 20: np.nan}, "max", [4, 16, 20]),
        ({4: 7.0, 8: -np.inf, 12: 8.0, 16: 9.0, 20: 9.0}, "min", [4, 16, 20]),
        ({4: 7.0, 8: np.inf, 12: 5.0, 16: 5.0, 20: 5.0}, "max", [4, 16, 20]),
        ({8: 0.5}, "min", [8, 16, 20]),
        ({3: 0.01, 5: 0.01, 8: 0.5, 12: 0.6}, "min", [8, 16, 20]),
    ],
    ids=["min", "max", "equal", "first of equal", "nan first", "nan", "-inf", "inf", "one", "off"],
)
def test_best_is_kept_beside_the_newest(values, mode, kept, tmp_path):
    run(tmp_path, 20, keep=2, best="score", mode=mode, extra=[scores(values)])
    assert steps_in(tmp_path) == kept


NO_BEST = (
    r"no checkpoint in \[.*\] of .* counts as best, because 'score' was not recorded "
    "at a step that was saved, or was never finite"
)


@pytest.mark.parametrize("values", [{4: np.nan, 8: np.inf}, {3: 0.1, 19: 0.2}], ids=["not finite", "off"])
def test_run_warns_at_its_end_if_no_checkpoint_can_be_the_best(values, tmp_path):
    with pytest.warns(UserWarning, match=NO_BEST):
        run(tmp_path, 20, keep=2, best="score", extra=[scores(values)])
    assert steps_in(tmp_path) == [16, 20]


def test_best_from_before_a_resume_is_enough(tmp_path):
    values = scores({4: 0.1, 9: 0.2})
    run(tmp_path, 8, best="score", extra=[values])
    assert run(tmp_path, 12, best="score", extra=[values]).step == 12


def test_run_that_will_be_resumed_may_end_without_a_best(tmp_path):
    extra = [scores({3: 0.1}), StopAt(6, final=False)]
    assert run(tmp_path, 12, best="score", extra=extra).step == 6


def test_best_metric_that_never_appears_is_a_warning(tmp_path):
    message = r"Checkpoint watches 'val_loss', but the records hold \['epoch/loss', 'train/loss'\]. Add Evaluate"
    with pytest.warns(UserWarning, match=message):
        run(tmp_path, 16, best="val_loss")
    assert steps_in(tmp_path) == [4, 8, 12, 16]
    assert run(tmp_path, 16, best="val_loss").step == 16  # nothing to do
    save(tmp_path, jnp.int32(0), step=99)  # the lock was given back


def test_missing_best_metric_does_not_hide_the_error_that_ended_the_run(tmp_path):
    fails = RaiseIn("epoch_end", ZeroDivisionError("zero"))  # at the target
    with pytest.raises(ZeroDivisionError, match="zero") as error:
        run(tmp_path, best="val_loss", extra=[fails])
    assert not any("val_loss" in note for note in error.value.__notes__)


def test_best_is_kept_when_a_resumed_run_is_worse(tmp_path):
    run(tmp_path, 8, keep=1, best="score", extra=[scores({4: 0.3, 8: 0.4})])
    run(tmp_path, 20, keep=1, best="score", extra=[scores({12: 0.5, 16: 0.31, 20: 0.6})])
    assert steps_in(tmp_path) == [4, 8, 20]  # the run resumed from 8


def test_run_resumes_from_its_best_and_archives_later_ones(tmp_path):
    values = {4: 0.3, 8: 0.1, 12: 0.4}
    run(tmp_path, 16, best="score", extra=[scores(values)])
    result = run(tmp_path, 14, when=7, best="score", resume="best", extra=[scores(values)])
    assert int(result.state) == sum_at(14)
    assert (steps_in(tmp_path), steps_in(tmp_path / "archive")) == ([4, 8, 14], [12, 16])


def test_resume_from_the_best_is_an_error_if_there_is_none(tmp_path):
    with pytest.warns(UserWarning, match=NO_BEST):
        run(tmp_path, best="score", extra=[scores({3: 0.1})])
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint in .* has a value of .* best='score'; it holds \[4, 8, 12\]"
    ):
        run(tmp_path, best="score", resume="best")


@pytest.mark.parametrize(("mode", "step"), [("min", 8), ("max", 4)])
def test_best_is_loaded_by_the_metric_and_mode_of_the_run(mode, step, tmp_path):
    run(tmp_path, best="score", mode=mode, extra=[scores({4: 0.3, 8: 0.1, 12: 0.2})])
    assert int(load(tmp_path, jnp.int32(0), "best")) == sum_at(step)


def test_best_is_loaded_by_the_metric_of_the_newest_checkpoint(tmp_path):
    values = {4: 0.3, 8: 0.1, 12: 0.2}
    both = LogValues({step: {"score": values.get(step, 1.0), "late": -step} for step in range(1, 13)}, name="score")
    run(tmp_path, 8, best="score", extra=[both])
    run(tmp_path, 12, best="late", extra=[both])
    assert int(load(tmp_path, jnp.int32(0), "best")) == sum_at(12)


def test_loading_the_best_is_an_error_if_there_is_none(tmp_path):
    run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"load: no checkpoint in .* counts as best: it holds \[4, 8, 12\]"):
        load(tmp_path, jnp.int32(0), "best")


def test_manifest_of_an_early_version_is_read(saved):
    for step in (4, 8, 12):
        reseal(saved / str(step), lambda manifest: manifest.pop("best"))
    assert int(load(saved, jnp.int32(0), 8)) == sum_at(8)
    with pytest.raises(FileNotFoundError, match="counts as best"):
        load(saved, jnp.int32(0), "best")
    assert run(saved, 16, best="train/loss", mode="max", resume="best").step == 16


def test_checkpoint_from_which_a_run_resumed_is_not_deleted(saved):
    run(saved, 28, when=7, keep=1, resume=4)
    assert steps_in(saved) == [4, 28]


def test_steps_are_ordered_as_numbers_and_other_files_are_not_touched(tmp_path):
    notes = tmp_path / "7777_notes" / "mine.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    (tmp_path / "007").mkdir()
    values = scores({100: 0.1, 9900: 0.2, 10000: 0.3, 10100: 0.4})
    run(tmp_path, 10100, when=at(100, 9900, 10000), keep=2, best="score", extra=[values])
    assert sorted(os.listdir(tmp_path)) == ["007", "100", "10000", "10100", "7777_notes"]
    assert notes.read_text() == "mine"


# Files of others


def test_file_that_is_not_in_the_manifest_is_never_deleted(saved):
    (saved / "4" / "d" / "mine.txt").write_text("mine")
    run(saved, 16, keep=1)
    assert [path.read_text() for path in saved.rglob("mine.txt")] == ["mine"]
    assert [step for step in steps_in(saved) if step != 4] == [12, 16]


def test_step_can_be_deleted_twice_although_a_file_of_it_remained(saved):
    (saved / "4" / "mine.txt").write_text("mine")
    run(saved, 16, keep=1)
    save(saved, jnp.int32(0), step=2)
    run(saved, 20, keep=1, overwrite=True)
    assert steps_in(saved)[-1] == 20
    assert [path.read_text() for path in saved.rglob("mine.txt")] == ["mine"]


def test_checkpoint_of_another_run_is_not_deleted(saved):
    save(saved, jnp.int32(7), step=2)
    run(saved, 16, keep=1)
    assert (steps_in(saved), int(load(saved, jnp.int32(0), 2))) == ([2, 12, 16], 7)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_directory_with_the_name_of_a_step_is_an_error_and_is_kept(overwrite, tmp_path):
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="/4 exists and is not a checkpoint of this run"):
        run(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"4/thesis.txt": b"mine"}


def test_symbolic_link_with_the_name_of_a_step_is_ignored_and_never_followed(saved, tmp_path):
    target = Path(shutil.move(saved / "4", tmp_path / "elsewhere"))
    (saved / "4").symlink_to(target)
    before = contents(target)
    assert Checkpoints(saved).steps() == [8, 12]
    run(saved, 16, keep=1)
    assert contents(target) == before
    assert (saved / "4").is_symlink()


@pytest.mark.parametrize("name", ["ocdbt.process_0", "_METADATA"])
def test_symbolic_link_inside_a_checkpoint_is_never_followed_by_a_deletion(name, saved, tmp_path):
    target = Path(shutil.move(saved / "4" / name, tmp_path / "elsewhere"))
    (saved / "4" / name).symlink_to(target)
    run(saved, 16, keep=1)
    assert target.is_file() or len(contents(target)) > 2


def test_symbolic_link_with_the_name_of_a_deletion_is_never_followed(saved, tmp_path):
    target = Path(shutil.copytree(saved / "4", tmp_path / "elsewhere" / "4"))
    (saved / "4.trash").symlink_to(target)
    before = contents(target)
    assert run(saved, 16, keep=1).step == 16
    assert contents(target) == before


def test_symbolic_link_with_the_name_of_unfinished_saves_is_refused(saved, tmp_path):
    target = Path(shutil.copytree(saved / "4", tmp_path / "elsewhere" / "4"))
    (saved / ".saving").symlink_to(target.parent)
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="checkpoint of step 16 .* not be saved: .*saving is a symbolic link"):
        run(saved, 16)
    assert contents(tmp_path / "elsewhere") == before


def lead_outside(directory, name):
    """Add a file to a manifest, which stays valid."""
    reseal(directory, lambda manifest: manifest.update(files={name: [4, 0]} | manifest["files"]))


@pytest.mark.parametrize("outside", ["../../secret", "state/../../../secret", "ABSOLUTE", "..\\..\\secret", ""])
def test_manifest_that_leads_outside_is_damage_and_deletes_nothing(outside, saved, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    lead_outside(saved / "4", outside.replace("ABSOLUTE", str(secret)))
    with pytest.raises(ValueError, match="/4 is damaged: manifest.json .*is not the name of a file"):
        load(saved, jnp.int32(0), 4)
    assert run(saved, 16, keep=1).step == 16
    assert secret.read_text() == "mine"


def test_half_deleted_checkpoint_that_leads_outside_deletes_nothing(saved, tmp_path):
    (tmp_path / "secret").write_text("mine")
    lead_outside(Path(shutil.move(saved / "4", saved / "4.trash")), "../../secret")
    assert run(saved, 16).step == 16
    assert (tmp_path / "secret").read_text() == "mine"


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize("kind", ["object array", "bare"])
def test_pickled_bytes_in_the_host_state_are_refused_and_never_run(kind, tmp_path, monkeypatch):
    import pickle

    monkeypatch.chdir(tmp_path)
    payload = io.BytesIO(pickle.dumps(Payload()) if kind == "bare" else b"")
    if kind == "object array":
        text = np.frombuffer(b'{"mode": {"__array__": "0"}}', np.uint8)
        np.savez(payload, json=text, **{"0": np.array([Payload()], object)})
    writer = CheckpointWriter(tmp_path / "run")
    writer.save(4, {"state": np.int32(0)}, payload.getvalue())
    writer.close()
    with pytest.raises(ValueError, match="pickle"):
        run(tmp_path / "run")
    assert not (tmp_path / "unpickled").exists()


def test_class_named_in_a_manifest_is_not_imported(saved):
    path = saved / "12" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class": "os.system", "step": "antigravity"}))
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(saved, 16)
    assert "antigravity" not in __import__("sys").modules


def test_names_with_slashes_and_dots_do_not_become_paths(tmp_path):
    metric = "a/../../score"
    ema = EMA(0.5, of=None, name="../../up/../../x")
    extra = [ema, LogValues({step: {metric: step} for step in range(1, 13)}, name="score")]
    for target in (8, 12):
        result = run(tmp_path / "deep" / "run", target, state=0.0, best=metric, extra=extra)
    assert sorted(os.listdir(tmp_path / "deep" / "run")) == ["12", "4", "8"]
    assert os.listdir(tmp_path) == ["deep"]
    assert os.listdir(tmp_path / "deep") == ["run"]
    assert float(ema.params(result)) > 0


# One run, one directory


def test_overwrite_archives_the_old_run_at_the_first_save_and_not_before(saved):
    old, seen = contents(saved), {}

    class Look(Callback):
        when = at(4)  # on_step_end comes before the save

        def on_step_end(self, loop):
            seen[loop.step] = contents(saved).keys() - {".lock"}

    result = run(saved, 8, overwrite=True, extra=[Look()])
    assert result.history.steps("train/loss") == [4, 8]
    assert seen[4] == old.keys()
    assert (steps_in(saved), steps_in(saved / "archive")) == ([4, 8], [4, 8, 12])
    assert contents(saved / "archive") == old


def test_run_that_fails_before_its_first_save_leaves_the_old_one_in_place(saved):
    before = contents(saved)
    with pytest.raises(ValueError, match="bad batch"):
        run(saved, data=failing(3, ValueError("bad batch")), overwrite=True)
    assert contents(saved) == before


def failing(after, error):
    yield from range(after)
    raise error


def test_directory_that_a_live_run_writes_to_is_refused(saved):
    other = Lock(str(saved))
    other.acquire()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Another run of this process is writing to .*/run. Use"):
            run(saved, 16)
    other.release()
    assert run(saved, 16).step == 16
    assert not (saved / ".lock").exists()


def test_run_locks_its_directory_until_its_end(tmp_path):
    class Second(Callback):
        def on_run_begin(self, loop):
            with pytest.raises(RuntimeError, match="Another run of this process"):
                save(tmp_path, jnp.int32(1), step=100)

        on_step_end = on_run_begin

    run(tmp_path, 5, extra=[Second()])
    save(tmp_path, jnp.int32(1), step=100)


def test_directory_that_was_created_for_a_lock_is_removed_with_it(tmp_path):
    lock = Lock(str(tmp_path / "a" / "b"))
    lock.acquire()
    assert os.listdir(tmp_path / "a" / "b") == [".lock"]
    lock.release()
    assert os.listdir(tmp_path) == []


def test_lock_of_a_dead_process_does_not_block(saved):
    (saved / ".lock").touch()
    run(saved, 16)
    assert not (saved / ".lock").exists()


def test_symbolic_link_with_the_name_of_the_lock_is_not_followed(saved, tmp_path):
    (saved / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"):
        run(saved, 16)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_file_system_that_cannot_lock_is_named_with_the_way_around(number, saved, monkeypatch):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = rf"{saved} cannot be locked \({os.strerror(number)}\): .* pass lock=False"
    for use in (lambda: run(saved, 16), lambda: save(saved, jnp.int32(0), 20)):
        with pytest.raises(OSError, match=message) as caught:
            use()
        assert caught.value.errno == number
    with pytest.raises(OSError, match="cannot be locked"):
        save(saved / "new" / "folder", jnp.int32(0))
    assert not (saved / "new").exists()
    assert run(saved, 16, lock=False).step == 16
    save(saved, jnp.int32(0), 20, lock=False)
    assert steps_in(saved) == [4, 8, 12, 16, 20]


def test_interrupted_lock_is_tried_again(saved, monkeypatch):
    flock, errors = fcntl.flock, [OSError(errno.EINTR, "interrupted")] * 2
    monkeypatch.setattr(fcntl, "flock", lambda *args: flock(*args) if not errors else raise_(errors.pop()))
    lock = Lock(saved)
    lock.acquire()
    with pytest.raises(RuntimeError, match="Another run of this process"):
        Lock(saved).acquire()
    lock.release()


def raise_(error):
    raise error


def test_lock_is_not_taken_on_a_file_that_was_removed_since_it_was_opened(saved, monkeypatch):
    flock, ends = fcntl.flock, [True]

    def another_process_ends(*args):
        if ends:
            ends.pop()
            os.unlink(saved / ".lock")
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", another_process_ends)
    lock = Lock(saved)
    lock.acquire()
    with pytest.raises(RuntimeError, match="Another run of this process"):
        Lock(saved).acquire()
    lock.release()


def test_locks_leave_no_file_open(saved, monkeypatch):
    before, flock = set(os.listdir("/dev/fd")), fcntl.flock
    lock = Lock(saved)
    lock.acquire()
    with pytest.raises(RuntimeError):
        Lock(saved).acquire()
    lock.release()
    monkeypatch.setattr(fcntl, "flock", lambda *args: os.unlink(saved / ".lock") or monkeypatch.undo() or flock(*args))
    lock.acquire()
    lock.release()
    assert set(os.listdir("/dev/fd")) == before


def test_lock_whose_file_cannot_be_removed_is_released(saved, monkeypatch):
    monkeypatch.setattr(os, "unlink", lambda path: raise_(OSError("read-only")))
    for _ in range(2):
        lock = Lock(saved)
        lock.acquire()
        lock.release()


FORKS = """
import importlib.util, os, signal, sys, time, types
for name in ("onstep", "onstep.storage", "onstep.checks"):  # alone, because importing all of onstep takes seconds
    sys.modules[name] = types.ModuleType(name)
sys.modules["onstep.checks"].local_path = lambda who, path: path
spec = importlib.util.spec_from_file_location("onstep.storage.lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.Lock(sys.argv[2])
lock.acquire()
"""


def forks(code, directory):
    """Run a script that holds a lock; return what it prints."""
    script = [sys.executable, "-c", FORKS + code, importlib.util.find_spec("onstep.storage.lock").origin, directory]
    return subprocess.run(script, stdout=subprocess.PIPE, text=True, check=False, timeout=60).stdout


def test_worker_of_a_killed_process_does_not_hold_its_lock(saved):
    worker = forks(
        """
worker = os.fork()
if not worker:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
        saved,
    )
    try:
        lock = Lock(saved)
        lock.acquire()
        lock.release()
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_worker_cannot_release_the_lock_of_its_parent(saved):
    said = forks(
        """
worker = os.fork()
lock_file = os.path.join(sys.argv[2], ".lock")
if not worker:
    lock.release()
    try:
        module.Lock(sys.argv[2]).acquire()
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(worker, 0)
print(os.path.exists(lock_file))
""",
        saved,
    )
    assert said == f"Another live process is writing to {saved}. Use another directory.\nTrue\n"


def test_directory_of_two_callbacks_is_refused_before_the_first_step(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    before = contents(saved)
    for other in (saved, tmp_path / "link"):
        with pytest.raises(ValueError, match="two callbacks of this run have the directory .* Give each its own"):
            run(saved, 16, extra=[Checkpoint(other, when=4)])
    assert contents(saved) == before


@pytest.mark.parametrize("options", [{"resume": False}, {"resume": 5}, {"extra": [EMA(0.5, of=None)]}])
def test_refused_run_releases_the_lock(options, saved):
    before = contents(saved)
    with pytest.raises((ValueError, OSError), match="holds|fit"):
        run(saved, 16, **options)
    assert contents(saved) == before
    assert run(saved, 16).step == 16


# Changes between two runs


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (np.zeros((12, 3)), r"The batches differ from .*: .*: float32\[2\] became float32\[3\]"),
        (
            np.zeros((12, 2), int),
            r"The batches differ from .*: .*: float32\[2\] became int32\[2\]",
        ),
        (
            np.zeros((12, 2, 1)),
            r"The batches differ from .*: .*: float32\[2\] became float32\[2,1\]",
        ),
        (np.zeros((13, 2)), "The saved run's epochs have 12 batches, this run's 13"),
        (iter(np.zeros((12, 2))), "The saved run's epochs have 12 batches, this run's an unknown number of"),
    ],
    ids=["shape", "dtype", "rank", "length", "kind"],
)
def test_different_data_is_refused_before_anything_is_written(data, match, tmp_path):
    def go(data, steps):
        engine = Engine(lambda s, b: (s + b.sum(), {}), [Checkpoint(tmp_path, when=4)])
        return engine.run(jnp.float32(0), data, steps=steps)

    go(list(np.zeros((12, 2), np.float32)), 6)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=match):
        go(data if hasattr(data, "__next__") else list(data), 8)
    assert contents(tmp_path) == before


def test_smaller_batches_are_a_warning_if_the_length_is_unknown(tmp_path):
    def go(rows, steps):
        engine = Engine(lambda s, b: (s + b.sum(), {}), [Checkpoint(tmp_path, when=4)])
        return engine.run(jnp.float32(0), lambda epoch: iter(np.zeros((12, rows))), steps=steps)

    go(4, 6)
    with pytest.warns(
        UserWarning, match=r"shape differs from the first one's.*float32\[4\] became float32\[2\]"
    ) as warned:
        go(2, 9)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_run_over_sequences_of_several_lengths_resumes_at_any_of_them(steps_per_call):
    data = [np.ones((2, length)) for length in (3, 3, 5, 4)]
    engine = Engine(lambda s, b: (s + b.sum(), {}), [StopAt(2, final=False)], steps_per_call=steps_per_call)
    first = engine.run(jnp.float32(0), data, epochs=1)
    with pytest.warns(UserWarning, match="shape differs from the first one's"):
        assert float(engine.run(first, data, epochs=1).state) == 30


def test_different_random_key_is_refused_before_anything_is_written(tmp_path):
    def go(key, steps):
        engine = Engine(lambda s, b, rng: (s + b, {}), [Checkpoint(tmp_path)])
        return engine.run(jnp.int32(0), range(12), steps=steps, rng=key)

    go(jax.random.key(1), 6)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"random key \(rng\) .* this run"):
        go(jax.random.key(2), 8)
    assert contents(tmp_path) == before


def test_one_average_may_replace_another_without_strict(tmp_path):
    old, new = EMA(0.5, of=None, name="old"), EMA(0.5, of=None, name="new")
    run(tmp_path, 8, state=0.0, extra=[old])
    result = run(tmp_path, 9, state=0.0, extra=[new], strict=False)
    assert float(result.state) == sum_at(9)
    assert float(new.params(result)) == (sum_at(8) + sum_at(9)) / 2
    again = run(tmp_path, 9, state=0.0, extra=[new])
    assert float(new.params(again)) == float(new.params(result))


@pytest.mark.parametrize("first", [[EMA(0.5, of=None)], []], ids=["removed", "added"])
def test_average_may_be_added_or_removed_without_strict(first, tmp_path):
    run(tmp_path, 8, state=0.0, extra=first)
    result = run(tmp_path, 12, state=0.0, extra=[] if first else [EMA(0.5, of=None)], strict=False)
    assert float(result.state) == sum_at(12)


def test_different_state_is_refused_even_without_strict(tmp_path):
    run(tmp_path, 8)
    with pytest.raises(ValueError, match=r"state: int32\[\] became float32\[\]"):
        run(tmp_path, 12, state=0.0, strict=False)


def test_source_without_a_position_is_read_from_the_beginning_without_skip(tmp_path, capsys):
    seen = []

    def simulator():
        for number in range(99):
            seen.append(number)
            yield number

    run(tmp_path, 4, data=simulator())
    assert run(tmp_path, 8, data=simulator(), skip=False).step == 8
    assert seen == [0, 1, 2, 3] * 2  # no batch is drawn that is not used
    assert "skipping" not in capsys.readouterr().err


def test_other_data_is_read_from_the_beginning_without_skip(tmp_path):
    def go(rows, batches, skip, **target):
        engine = Engine(lambda s, b: (s + b.sum(), {"loss": b.sum()}), [Checkpoint(tmp_path, when=4, skip=skip)])
        return engine.run(jnp.float32(0), list(np.ones((batches, rows), np.float32)), **target)

    go(2, 12, True, steps=6)
    with pytest.raises(ValueError, match=r"float32\[2\] became float32\[4\]\. Pass the same data and batch size\."):
        go(4, 12, True, epochs=1)
    result = go(4, 3, False, epochs=1)  # the first epoch begins again
    assert (result.step, result.epoch, float(result.state)) == (9, 1, 6 * 2 + 3 * 4)
    assert result.history["epoch/loss"] == [4.0]
    result = go(8, 3, False, steps=11, epoch_steps=2)
    assert (result.step, result.epoch, float(result.state)) == (11, 2, 24 + 2 * 8)


def test_epoch_continues_without_skip_where_its_length_is_given(tmp_path):
    def go(steps):
        engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(tmp_path, when=4, skip=False)])
        return engine.run(jnp.int32(0), iter([1] * 20), steps=steps, epoch_steps=4)

    assert (go(6).epoch, go(8).epoch) == (1, 2)


def test_host_state_is_that_of_the_checkpoints_step(tmp_path):
    class Counts(Callback):
        def __init__(self):
            self.seen = np.zeros(30, int)

        def on_step_end(self, loop):
            self.seen[loop.step] += 1  # in place, while the previous save is still being written

        def get_state(self):
            return {"seen": self.seen}

        def set_state(self, state):
            self.seen = state["seen"].copy()

    run(tmp_path, 20, when=1, keep=30, extra=[Counts()])
    for number in range(20, 0, -1):
        counts = Counts()
        run(tmp_path, number, when=1, keep=30, resume=number, extra=[counts])
        assert counts.seen.sum() == number


# Saves that fail


@contextlib.contextmanager
def files_up_to(size):
    """Limit the size of files that this process can write, so that saves fail in the background."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BIG = np.random.default_rng(0).normal(size=1 << 17).astype(np.float32)
"""A state of 512 KiB that cannot be compressed."""


def raises_at_8(directory):
    """Save step 4, and expect that the save of step 8 fails."""
    run(directory, 4, state=BIG)
    return pytest.raises(
        RuntimeError, match=rf"checkpoint of step 8 in {re.escape(str(directory))} could not be saved: .*File too large"
    )


@pytest.mark.parametrize("target", [8, 12, 40], ids=["the run's end", "the next save", "the next of many"])
def test_save_that_fails_in_the_background_ends_the_run_with_step_path_and_reason(target, tmp_path):
    threads = set(threading.enumerate())
    with raises_at_8(tmp_path), files_up_to(1 << 16):
        run(tmp_path, target, state=BIG)
    assert np.array_equal(load(tmp_path, BIG), BIG + 0 + 1 + 2 + 3)
    assert os.listdir(tmp_path) == ["4"]
    left = set(threading.enumerate()) - threads
    for thread in left:  # Orbax's pool of writers ends a moment after the save failed
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


def test_run_resumes_from_the_previous_checkpoint_after_a_failed_save(tmp_path):
    with raises_at_8(tmp_path), files_up_to(1 << 16):
        run(tmp_path, 12, state=BIG)
    result = run(tmp_path, 12, state=BIG)
    whole = run(tmp_path / "whole", 12, state=BIG)
    assert np.array_equal(result.state, whole.state)
    assert steps_in(tmp_path) == [4, 8, 12]


def test_failed_save_does_not_hide_the_error_of_a_callback(tmp_path):
    raises_at_8(tmp_path)
    breaks = RaiseIn("step_end", KeyError("its own"), step=9)
    with pytest.raises(KeyError, match="its own") as caught, files_up_to(1 << 16):
        run(tmp_path, 12, state=BIG, extra=[breaks])
    note = caught.value.__notes__[-1]
    assert re.search("RuntimeError was also raised: The checkpoint of step 8 .* could not be saved", note)
    assert os.listdir(tmp_path) == ["4"]


def test_file_with_the_name_of_the_directory_is_an_error_that_names_it(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(OSError, match="/run"):
        run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's event loop
def test_directory_that_vanishes_during_a_run_is_an_error_with_step_and_path(tmp_path):
    class Removes(Callback):
        when = at(6)

        def on_step_end(self, loop):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("now a file")

    threads = set(threading.enumerate())
    run(tmp_path / "run", 4)
    with pytest.raises(RuntimeError, match="checkpoint of step 8 in .*/run could not be saved: .*Not a directory"):
        run(tmp_path / "run", 12, extra=[Removes()])
    # Orbax's threads may wait for the directory until they give up; none of ours is left.
    assert not [t for t in set(threading.enumerate()) - threads if t.name.startswith("onstep")]


def test_path_with_the_word_deleted_gives_no_advice_about_donation(tmp_path):
    with raises_at_8(tmp_path / "deleted") as caught, files_up_to(1 << 16):
        run(tmp_path / "deleted", 12, state=BIG)
    assert "donated" not in "".join(caught.value.__notes__)


def test_error_of_a_failed_save_is_raised_once(tmp_path):
    with raises_at_8(tmp_path) as caught, files_up_to(1 << 16):
        run(tmp_path, 12, state=BIG)
    assert "could not be saved" not in "".join(caught.value.__notes__)
    assert "step 8" in str(caught.value)


def test_writer_reports_a_failed_save_once_and_can_save_again(tmp_path):
    writer = CheckpointWriter(tmp_path)
    with files_up_to(1 << 16):
        writer.save(1, {"state": BIG})
        with pytest.raises(RuntimeError, match="checkpoint of step 1 .* could not be saved"):
            writer.wait()
    writer.wait()
    writer.save(2, {"state": BIG})
    writer.close()
    assert writer.checkpoints.steps() == [2]


def test_save_for_which_no_thread_is_left_does_not_block_the_next_one(tmp_path, monkeypatch):
    start = threading.Thread.start

    def fail(thread):
        if thread.name == "onstep-commit":
            raise RuntimeError("can't start new thread")
        start(thread)

    writer = CheckpointWriter(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            writer.save(1, {"state": jnp.ones(2)})
    assert not ORBAX.locked()  # otherwise the next save waits for ever
    writer.close()
    save(tmp_path / "b", jnp.ones(2))
    assert steps_in(tmp_path / "b") == [0]


def test_orbax_is_not_asked_to_save_where_a_folder_cannot_be_created(saved, monkeypatch):
    asked, makedirs = [], os.makedirs

    def refuse(path, *args, **options):
        if ".saving" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        makedirs(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", refuse)
    monkeypatch.setattr("onstep.storage.writer.write", lambda *args: asked.append(args))
    with pytest.raises(RuntimeError, match=r"checkpoint of step 16 in .* could not be saved: .*Read-only file system"):
        run(saved, 16)
    assert asked == []


def test_what_seals_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    fsync, rename, synced, sealed = os.fsync, os.rename, set(), []

    def record_rename(old, new):
        if new == str(tmp_path / "4"):
            sealed.extend(name for name in ("host.npz", "manifest.json") if os.stat(f"{old}/{name}").st_ino in synced)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "rename", record_rename)
    run(tmp_path, 4)
    assert sealed == ["host.npz", "manifest.json"]


def test_checkpoint_loses_its_name_before_its_first_file_is_deleted(tmp_path, monkeypatch):
    def record(folder):
        deleted.append((os.path.basename(folder).split(".")[0], steps_in(tmp_path)))
        delete_listed(folder)

    deleted = []
    monkeypatch.setattr("onstep.storage.writer.delete_listed", record)
    run(tmp_path, 12, keep=1)
    assert deleted == [("4", [8]), ("8", [12])]


def test_rewritten_records_are_on_disk_before_they_replace_the_old_ones(tmp_path, monkeypatch):
    fsync, replace, synced, replaced = os.fsync, os.replace, set(), []

    def record_replace(old, new):
        replaced.append((os.path.basename(new), os.stat(old).st_ino in synced))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", record_replace)
    run(tmp_path / "run", 4, extra=[JSONLines(tmp_path / "records.jsonl"), CSV(tmp_path / "records.csv")])
    assert replaced[:2] == [("records.jsonl", True), ("records.csv", True)]


def test_arrays_that_were_loaded_for_a_resume_are_not_copied_again(saved):
    class Restores(Callback):
        def on_load(self, loop):
            checkpoints = Checkpoints(saved)

            def tree(like):
                loaded.update(checkpoints.load(12, like))
                return loaded

            loop.restore(Snapshot(12, tree, checkpoints.host(12)))
            assert loop.state is loaded["state"]

    loaded = {}
    assert int(Engine(step, [Restores()], log_every=4).run(jnp.int32(0), range(12), steps=16).state) == sum_at(16)


def test_run_can_be_resumed_twice_from_one_result():
    engine = Engine(step, log_every=4)
    first = engine.run(jnp.zeros(1000, jnp.int32), range(12), steps=4)
    for _ in range(2):
        assert int(engine.run(first, range(12), steps=8).state[0]) == sum_at(8)
    assert int(first.state[0]) == sum_at(4)


def test_two_threads_do_not_use_orbax_at_once(tmp_path, monkeypatch):
    write, finalize, using, both, tries = writing.write, writing.finalize, [], threading.Event(), threading.Event()

    def writes(*args):
        using.append(1)
        if len(using) > 1:
            both.set()
        tries.wait(5)
        both.wait(0.1)  # time for the other thread to get in, if it can
        write(*args)

    def finalizes(*args):
        finalize(*args)
        using.pop()

    def other():
        second.save(1, {"state": jnp.ones(2)})
        tries.set()
        second.close()

    monkeypatch.setattr(writing, "write", writes)
    monkeypatch.setattr(writing, "finalize", finalizes)
    first, second = CheckpointWriter(tmp_path / "a"), CheckpointWriter(tmp_path / "b")
    first.save(1, {"state": jnp.ones(2)})
    thread = threading.Thread(target=other)
    thread.start()
    first.close()
    thread.join()
    assert not both.is_set()
    assert (steps_in(tmp_path / "a"), steps_in(tmp_path / "b")) == ([1], [1])


def test_loading_waits_for_a_save_in_another_thread(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    finalize, restore, happened, loads = writing.finalize, ocp.Checkpointer.restore, [], []

    def finalizes(*args):
        loads[0].start()
        loads[0].join(0.1)
        finalize(*args)
        happened.append("saved")

    def restores(*args, **options):
        happened.append("loads")
        return restore(*args, **options)

    save(tmp_path / "a", jnp.ones(2))
    loads.append(threading.Thread(target=load, args=(tmp_path / "a",)))
    monkeypatch.setattr(writing, "finalize", finalizes)
    monkeypatch.setattr(ocp.Checkpointer, "restore", restores)
    save(tmp_path / "b", jnp.ones(2))
    loads[0].join()
    assert happened == ["saved", "loads"]


def test_numbers_in_the_docs_are_those_of_the_tests():
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    assert f"{FLIPS} flipped bits" in page
    assert f"{SEEDS * KILLS} kills, {KILLS} of each of {SEEDS} seeds" in page
