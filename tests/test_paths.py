"""Paths that users give to callbacks: made absolute at once, `~` expanded, URLs and directories refused early."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest
from onstep import Engine, plots, storage
from onstep.callbacks import (
    CSV,
    Checkpoint,
    Histograms,
    Images,
    JSONLines,
    Profiler,
    Report,
    TensorBoard,
    WandB,
)
from onstep.callbacks.json_lines import read_json_lines
from onstep.tools import close_event_writer, event_writer, local_path


def draw(state):
    return {"grey": jnp.full((2, 2, 1), state["params"])}


FILES = {
    "JSONLines": JSONLines,
    "CSV": CSV,
    "Report": Report,
    "read_json_lines": read_json_lines,
    "plot": lambda path: plots.plot({}, ["loss"], path),
}
DIRECTORIES = {
    "Checkpoint": Checkpoint,
    "TensorBoard": TensorBoard,
    "Histograms": Histograms,
    "Images": lambda path: Images(draw, png=path),
    "Images with events": lambda path: Images(draw, events=path),
    "Profiler": lambda path: Profiler(path, start=1, steps=1),
    "WandB": lambda path: WandB(dir=path),
    "Checkpoints": storage.Checkpoints,
    "CheckpointWriter": storage.CheckpointWriter,
    "Lock": storage.Lock,
    "save": lambda path: storage.save(path, {"w": jnp.ones(1)}),
    "load": storage.load,
    "event_writer": lambda path: event_writer(None, path),
    "close_event_writer": lambda path: close_event_writer(None, path),
}


@pytest.mark.parametrize("make", [*FILES.values(), *DIRECTORIES.values()], ids=[*FILES, *DIRECTORIES])
@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "s3://bucket/log", Path("gs://bucket/run"), "file:///run", ""], ids=str
)
def test_url_or_empty_path_is_refused_when_it_is_given(tmp_path, monkeypatch, make, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"needs a path in a local or mounted file system, got '\w+:/|needs a path, got ''"
    ):
        make(path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_directory_in_place_of_a_file_is_refused_and_left_alone(tmp_path, make):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match=r"needs the path of a file, but .*runs is a directory"):
        make(tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_directory_that_appears_in_place_of_a_record_file_is_not_renamed(tmp_path):
    engine = Engine(lambda state, batch: (state, {"loss": batch}), [JSONLines(tmp_path / "log")])
    (tmp_path / "log").mkdir()
    with pytest.raises(ValueError, match="A record file needs the path of a file, but .*log is a directory"):
        engine.run(0, [1.0], epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_name_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("CSV", "12:30/log") == str(tmp_path / "12:30" / "log")
    assert local_path("CSV", "C:/log") == str(tmp_path / "C:" / "log")  # a drive of Windows


def everything(directory):
    """Return an engine with every callback that writes files, below a directory."""

    def step(state, batch):
        return {"params": state["params"] + batch}, {"loss": batch}

    callbacks = [
        Report(f"{directory}/report.html"),
        JSONLines(f"{directory}/log.jsonl"),
        CSV(f"{directory}/log.csv"),
        TensorBoard(f"{directory}/events"),
        Histograms(f"{directory}/histograms", when=2),
        Images(draw, png=f"{directory}/png", events=f"{directory}/images", when=2),
        Profiler(f"{directory}/trace", start=2, steps=1),
        Checkpoint(f"{directory}/run", when=2),
    ]
    return Engine(step, callbacks, log_every=1)


WRITTEN = ["events", "histograms", "images", "log.csv", "log.jsonl", "png", "report.html", "run", "trace"]


def test_change_of_the_working_directory_in_mid_run_moves_nothing(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    engine = everything("runs")
    engine.on("step_end")(lambda loop: os.chdir(tmp_path / "elsewhere"))
    engine.run({"params": jnp.float32(0)}, [1.0] * 6, epochs=1)
    assert not any((tmp_path / "elsewhere").iterdir())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == WRITTEN
    assert len(list((tmp_path / "runs" / "events").iterdir())) == 1


def test_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    everything("~/runs").run({"params": jnp.float32(0)}, [1.0] * 4, epochs=1)
    assert sorted(path.name for path in (tmp_path / "home" / "runs").iterdir()) == WRITTEN
    assert not any((tmp_path / "here").iterdir())
    assert storage.load("~/runs/run")["params"] == 4
    assert read_json_lines("~/runs/log.jsonl").steps("train/loss") == [1, 2, 3, 4]
