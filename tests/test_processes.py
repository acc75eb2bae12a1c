"""Several processes that train together, connected by the loopback address."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from onstep import processes
from onstep.cli import main

PAIR = Path(__file__).parent / "pair.py"
LIMIT = 200
"""Seconds for one pair of processes on a busy machine; on an idle one they take about ten."""


def start(scenario, directory, count=2, until="", **environment):
    """Return the exit statuses, the standard errors, and the seconds between the first and the last end.

    Args:
        until: a text in the standard error of process 0 after which the processes are killed.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    errors = [directory / f"{scenario}-{process}.err" for process in range(count)]
    started = []
    for process, path in enumerate(errors):
        command = [sys.executable, str(PAIR), scenario, str(process), str(count), str(port), str(directory)]
        with path.open("w") as file:
            started.append(subprocess.Popen(command, stderr=file, env={**os.environ, **environment}))
    ended, begun = {}, time.monotonic()
    try:
        while len(ended) < count and time.monotonic() - begun < LIMIT:
            for process, running in enumerate(started):
                if process not in ended and running.poll() is not None:
                    ended[process] = time.monotonic()
            time.sleep(0.05)
            if until and until in errors[0].read_text():
                ended = dict.fromkeys(range(count), 0.0)
    finally:
        for running in started:
            running.kill()
    texts = [path.read_text() for path in errors]
    assert len(ended) == count, f"a process waits for ever:\n{texts}"
    return [running.wait() for running in started], texts, max(ended.values()) - min(ended.values())


def reports(scenario, directory, count=2, **environment):
    """Return what each process reported, after all of them succeeded."""
    statuses, errors, _ = start(scenario, directory, count, **environment)
    assert statuses == [0] * count, "\n".join(errors)
    return [json.loads((directory / f"{scenario}-{process}.json").read_text()) for process in range(count)]


def last_error(text):
    """Return the last line of the last traceback, without the messages of JAX and of onstep after it."""
    lines = text[text.rindex("Traceback") :].splitlines()
    return next(line for line in lines[1:] if line and not line.startswith(" "))


def checkpoints(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_single_process_agrees_with_itself_at_once():
    assert processes.writes()
    assert processes.agree({"a": 1}) == [{"a": 1}]
    assert processes.first(lambda a, b: a + b, 1, 2) == 3
    assert processes.failed() is None


@pytest.mark.slow
def test_two_processes_of_four_devices_train_like_one_device(tmp_path):
    (alone,) = reports("losses", tmp_path, 1)
    pair = reports("losses", tmp_path)
    for process in pair:
        for name, (loss, order) in process["ends"].items():
            np.testing.assert_allclose(loss, alone["ends"]["batches"][0], rtol=1e-5, err_msg=name)
            assert order == alone["ends"]["batches"][1], name  # the same examples at the same positions of each step
        assert process["error"] == pytest.approx(alone["error"], rel=1e-5)
        assert process["seen"] == alone["seen"]


@pytest.mark.slow
def test_decisions_by_clock_stop_and_file_are_the_same_in_every_process(tmp_path):
    first, second = reports("agree", tmp_path)
    bytes_of = [process.pop("bytes") for process in (first, second)]
    assert first == second
    assert all(whole == again for whole, again in bytes_of)
    assert first["timed"] == 200
    assert first["examples"] == 64  # of the whole batch
    assert 0 < len(first["times"]) < 200
    assert first["stopped"] == [3, "enough (requested by process 1)"]
    assert first["early"] == 0
    assert first["checkpoints"] == [24, 28, 30]
    assert first["loaded"]
    assert "the number of batches in an epoch is 8 in process 0, 7 in process 1" in first["lengths"]
    assert "the checksum of the state at params/w" in first["seeds"]
    assert "the list of callbacks is {} in process 0, {'GradNorm'" in first["lists"]
    assert "Several processes need a mesh" in first["meshes"]
    assert "holds step 0" in first["used"]
    assert (
        "divide into 8 parts along the mesh's axes ('data',) (8 devices), got a batch with 60" in first["indivisible"]
    )
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert len(list((tmp_path / "png").iterdir())) == 1


@pytest.mark.slow
def test_checkpoint_resumes_on_another_number_of_processes_and_back(tmp_path):
    (alone,) = reports("losses", tmp_path, 1)
    begun, _ = reports("begin", tmp_path)
    for name in ("one", "single"):
        shutil.copytree(tmp_path / "moves", tmp_path / name / "moves")
    (single,) = reports("resume_alone", tmp_path / "single", 1)
    assert single["devices"] == 1
    np.testing.assert_allclose(begun["losses"] + single["losses"], alone["ends"]["batches"][0][:40], rtol=1e-5)
    (one,) = reports("resume", tmp_path / "one", 1)
    shutil.rmtree(tmp_path / "one" / "moves" / "40")
    back, _ = reports("resume", tmp_path / "one")
    pair, _ = reports("resume", tmp_path)
    whole = alone["ends"]["batches"][0]
    np.testing.assert_allclose(begun["losses"] + one["losses"], whole[:40], rtol=1e-5)
    np.testing.assert_allclose(begun["losses"] + pair["losses"], whole[:40], rtol=1e-5)
    assert back["steps"][0] == 31
    np.testing.assert_allclose(back["losses"], whole[30:40], rtol=1e-5)


@pytest.mark.slow
def test_each_process_restores_the_position_of_its_own_loader(tmp_path):
    reports("loader_moves", tmp_path, STEPS="5")
    cut = [*reports("loader_moves", tmp_path, STEPS="7")[0]["order"]]
    (alone,) = reports("loader_moves", tmp_path, 1, STEPS="9")
    assert "position in the data was saved by 2 processes, but this run has 1" in alone["message"]
    (tmp_path / "whole").mkdir()
    assert cut == reports("loader_moves", tmp_path / "whole", STEPS="7")[0]["order"][5:]


@pytest.mark.slow
def test_configurations_that_differ_are_refused_before_the_first_step(tmp_path):
    first, second = reports("differ", tmp_path)
    assert first == second
    assert first.pop("same") == ["nothing", [3]]
    for name, (message, ran) in first.items():
        assert (message != "nothing", ran) == (True, []), name
    told = {name: message for name, (message, _) in first.items()}
    same = "All processes must have the same configuration: "
    assert told["rate"].startswith(f"{same}the compiled step is '%cst = stablehlo.constant dense<1.5")
    assert told["line"].startswith(f"{same}the compiled step is")
    assert told["key"].startswith(f"{same}the random key (rng) is")
    assert told["seed"].startswith(f"{same}the data is")
    assert "seed=1" in told["seed"]
    assert told["decay"].startswith(f"{same}the arguments of EMA is")
    assert told["patience"].startswith(f"{same}the arguments of EarlyStopping is")
    assert told["steps_per_call"] == f"{same}steps_per_call is 2 in process 0, 3 in process 1."
    assert "y: float32[32,4] in process 0" in told["dtype"]
    assert "y: float16[32,4] in process 1" in told["dtype"]
    assert "x: float32[28,16], y: float32[28,4] in process 1" in told["rows"]


@pytest.mark.slow
def test_processes_that_wait_for_a_device_end_a_second_after_one_of_them_failed(tmp_path):
    statuses, errors, seconds = start("loader_raises", tmp_path, 4)
    assert statuses == [1] * 4, errors
    assert seconds < 8  # on an idle machine 2
    for process, text in enumerate(errors):
        cause = "OSError: disk gone"
        last = text.strip().splitlines()[-1] if process != 1 else last_error(text)
        assert cause in last, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "where"),
    [
        ("stalls", "process 1: at step 5, reading the data (pair.py"),
        (
            "evaluates_less",
            "process 0: at step 2, evaluating in val.on_step_end; process 1: at step 2, waiting for",
        ),
    ],
)
def test_a_process_that_others_wait_for_is_named_with_its_step_and_activity(scenario, where, tmp_path):
    _, errors, _ = start(scenario, tmp_path, until="no progress")
    line = next(line for line in errors[0].splitlines() if "no progress" in line)
    assert line.startswith("onstep: no progress for 5 s; ")
    assert where in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "failing", "error", "saved"),
    [
        ("raises", 0, "RuntimeError: boom", [2]),
        ("loader_raises", 1, "OSError: disk gone", [2, 4]),
        ("runs_out", 1, "ProcessError: Process 1 ran out of data at step 7", [2, 4]),
        ("short_batch", 1, "ProcessError: A batch of the training data has ", []),
    ],
)
def test_failing_process_ends_all_and_the_others_name_it(scenario, failing, error, saved, tmp_path):
    statuses, errors, seconds = start(scenario, tmp_path)
    assert 0 not in statuses
    assert error in last_error(errors[failing])
    assert f"process {failing} " in errors[1 - failing].lower() or f"process {failing}, " in errors[1 - failing]
    assert error.split(": ", 1)[1] in errors[1 - failing]
    assert seconds < 15
    assert not saved or checkpoints(tmp_path / "run") == saved


@pytest.mark.slow
def test_wrong_bit_in_one_process_ends_all_and_the_command_line_reads_their_checkpoints(tmp_path, capsys):
    statuses, errors, _ = start("repeats", tmp_path)
    assert statuses == [1, 1], errors
    for text in errors:
        wrong = r"two calls of step 4 with the same arguments differ in state/seen \(1 of 64\) on cpu:\d+\. The device"
        assert re.search(f"RuntimeError: RepeatStep: {wrong}", last_error(text)), text
    directory = str(tmp_path / "run")
    assert [main(["diff", directory, directory]), main(["verify", directory]), main(["show", directory])] == [0, 0, 0]
    equal = "fingerprints: equal up to step 4\ncheckpoints: equal up to step 4\n"
    assert capsys.readouterr().out.startswith(f"{equal}2: intact\n4: intact\n{directory}: finished at step 4 (epoch 0)")


@pytest.mark.slow
def test_checkpoint_is_not_committed_without_the_part_of_another_process(tmp_path):
    statuses, errors, _ = start("part_fails", tmp_path)
    assert statuses == [1, 1], errors
    for text in errors:
        assert re.search(r"checkpoint of step 2 in .* could not be saved: OSError: disk full", last_error(text))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_process_that_waits_for_data_is_ended_when_another_one_fails(tmp_path):
    statuses, errors, seconds = start("fails_while_another_waits_for_data", tmp_path)
    assert statuses == [1, 1], errors
    assert last_error(errors[0]) == "OSError: disk gone"
    assert re.search(r"ending process 1: Process 0 failed at step \d: OSError: disk gone", errors[1])
    assert seconds < 15


@pytest.mark.slow
def test_killed_process_ends_all_and_the_next_start_resumes(tmp_path):
    statuses, errors, seconds = start("is_killed", tmp_path)
    assert statuses == [1, -9]
    assert "Process 1 is not responding: it has exited or was killed. It was last seen at step " in errors[0]
    assert seconds < 20
    assert checkpoints(tmp_path / "run") == [2]
    reports("resume_after_kill", tmp_path)
    assert checkpoints(tmp_path / "run")[-1] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "status", "stopped", "saves"),
    [
        ("is_terminated", [143, 143], "SIGTERM", True),
        ("is_interrupted", [143, -2], "SIGTERM", True),
        ("is_terminated_without_a_handler", [143, 143], None, False),
    ],
)
def test_signal_to_one_process_stops_all_after_the_same_step(scenario, status, stopped, saves, tmp_path):
    statuses, errors, _ = start(scenario, tmp_path)
    assert statuses == status, errors
    ends = [json.loads((tmp_path / f"{scenario}-{process}.json").read_text()) for process in (0, 1)]
    assert ends[0]["step"] == ends[1]["step"]
    assert 20 <= ends[0]["step"] < 200  # the next host stop is at step 400
    assert ends[0]["stopped"] == stopped
    assert not saves or checkpoints(tmp_path / "run") == [ends[0]["step"]]
    assert "Traceback" not in errors[1]
    assert ("run the same command to resume" in errors[0]) == saves
