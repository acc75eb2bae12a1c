"""The command line: what every command prints, its exit status, and that it changes no file."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from models import contents_below
from onstep import Engine
from onstep.callbacks import Checkpoint, Report
from onstep.cli import main

V0_1 = Path(__file__).parent / "data" / "v0_1" / "run"

SCRIPT = """
import sys
import jax.numpy as jnp
from onstep import Engine
from onstep.callbacks import Checkpoint, JSONLines

def step(state, batch):
    w = state["w"] + batch
    return {"w": w}, {"loss": jnp.log(20.5 - w)}

def train(directory, data):
    print("training", directory)
    callbacks = [Checkpoint(directory, when=4, keep=9, best="train/loss"), JSONLines(directory + "/log.jsonl")]
    Engine(step, callbacks, log_every=2).run({"w": jnp.float32(0)}, data, steps=8)

if __name__ == "__main__":
    last = float(sys.argv[sys.argv.index("--last") + 1])
    for directory in sys.argv[1].split(","):
        train(directory, [1.0] * 7 + [last])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a script and its runs: a and b are equal, and step 8 of c has a NaN."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py"]
    for arguments in (["a,b", "--last", "2"], ["c", "--last", "20"]):
        subprocess.run([*command, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def call(made, monkeypatch, capsys):
    """Run a command in the folder, check that it changes no file and its status, and return what it prints."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def call(*arguments, status=0):
        before = contents_below(made)
        assert main(list(arguments)) == status
        assert contents_below(made) == before
        printed = capsys.readouterr()
        if status == 2:
            assert printed.out == ""
            return printed.err
        return json.loads(printed.out) if "--json" in arguments else printed.out

    return call


def test_show_says_how_a_run_ended_and_lists_its_checkpoints(call, made):
    assert call("show", "a").splitlines() == [
        "a: finished at step 8 (epoch 1)",
        "",
        "      step   epoch         MB  train/loss",
        "         4       0       0.00  2.83278",
        "         8       1       0.00  2.52252     best",
        "",
        "latest values: train/loss 2.52252, epoch/loss 2.75172",
        "callbacks: JSONLines('a/log.jsonl')",
    ]
    found = call("show", "a", "--json")
    sizes = [row.pop("bytes") for row in found["checkpoints"]]
    assert min(sizes) > 1000
    config = found.pop("config")
    assert set(config["step"]) == {"program", "inputs"}
    assert found == {
        "directory": str(made / "a"),
        "step": 8,
        "epoch": 1,
        "ended": "finished",
        "reason": None,
        "resumable": False,
        "best": {"metric": "train/loss", "mode": "min", "step": 8},
        "checkpoints": [
            {"step": 4, "epoch": 0, "metrics": {"train/loss": pytest.approx(2.83278, 1e-5)}, "damage": None},
            {"step": 8, "epoch": 1, "metrics": {"train/loss": pytest.approx(2.52252, 1e-5)}, "damage": None},
        ],
        "values": {"train/loss": pytest.approx(2.52252, 1e-5), "epoch/loss": pytest.approx(2.75172, 1e-5)},
    }
    assert call("show", "c", "--json")["values"]["train/loss"] == "NaN"


@pytest.mark.parametrize("file", ["manifest.json", "host.npz"])
def test_damaged_checkpoints_are_listed(file, call, made):
    shutil.copytree(made / "a", made / "damaged", dirs_exist_ok=True)
    path = made / "damaged" / "8" / file
    path.write_bytes(path.read_bytes()[:-9])
    shown = call("show", "damaged", status=1)
    assert shown.startswith("damaged: saved at step 4 (epoch 0); the run goes on from here, or it was interrupted")
    assert "\n         8  damaged: " in shown
    assert call("show", "damaged", "--json", status=1)["checkpoints"][1]["damage"]
    assert call("verify", "damaged", status=1).startswith("4: intact\n8: ")
    assert list(call("verify", "damaged", "--json", status=1)["damage"]) == ["4", "8"]
    found = call("diff", "a", "damaged", "--json", status=1)
    assert list(found["damaged"]) == [str(made / "damaged" / "8")]
    assert found["checkpoints"] == {"equal_until": 4, "differs_at": None, "what": {}}
    shutil.rmtree(made / "damaged")


def test_verify_and_diff_of_intact_and_equal_runs(call, made):
    assert call("verify", "a") == "4: intact\n8: intact\n"
    assert call("verify", "a", "--json") == {"directory": str(made / "a"), "damage": {"4": None, "8": None}}
    assert call("diff", "a", "b") == "records: equal up to step 8\ncheckpoints: equal up to step 8\n"
    assert call("diff", "a", "b", "--json")["equal"]


def test_diff_says_what_differs_as_text_and_as_json(call, made):
    printed = call("diff", "a", "c", status=1)
    assert "records: equal up to step 6, different at step 8:\n  epoch/loss: 2.75" in printed
    assert "checkpoints: equal up to step 4, different at step 8:\n  state/w: 1 of 1 differs, by up to 18\n" in printed
    found = call("diff", "a", "c", "--json", status=1)
    assert (found["equal"], found["key"], found["configuration"], found["damaged"]) == (False, False, {}, {})
    assert found["checkpoints"]["differs_at"] == 8
    assert found["parting"] is None


@pytest.mark.slow
def test_diff_finds_the_exact_step_with_both_scripts(call):
    scripts = ["--scripts", "train.py a --last 2", "train.py c --last 20"]
    assert call("diff", "a", "c", *scripts, status=1).endswith(
        "replay: step 8 is the first that received other values: batch\n"
    )
    found = call("diff", "a", "c", *scripts, "--json", status=1)
    assert found["parting"] == {"step": 8, "received": ["batch"], "returned": []}


def test_directories_that_are_no_run_are_explained(call, made):
    for command in (["show"], ["verify"], ["report"], ["diff", "a"]):
        assert call(*command, "nope", status=2) == "onstep: nope cannot be read: No such file or directory.\n"
    (made / "empty").mkdir(exist_ok=True)
    assert call("show", "empty", status=2) == "onstep: empty is empty.\n"
    assert call("show", "train.py", status=2) == "onstep: train.py cannot be read: Not a directory.\n"
    assert "a/8 is one checkpoint. Give the directory of its run: " in call("show", "a/8", status=2)
    assert "holds no checkpoint. It holds " in call("show", "a/8/d", status=2)
    assert "holds no checkpoint. Runs in it are ./a, ./b, ./c." in call("show", ".", status=2)
    assert "needs a path in a local or mounted file system" in call("show", "gs://bucket/a", status=2)
    assert "have no checkpoint, record or fingerprint of the same step" in call("diff", "a", str(V0_1), status=2)


def test_run_of_version_0_1_is_read(call, made):
    assert "latest values: " in call("show", str(V0_1))
    assert "intact" in call("verify", str(V0_1))
    assert call("diff", str(V0_1), str(V0_1), "--json")["equal"]


def test_stops_and_interruptions_are_told_apart(tmp_path, capsys):
    def shown(**options):
        directory = tmp_path / str(len(os.listdir(tmp_path)))
        engine = Engine(lambda s, b: (s + b, {}), [Checkpoint(directory, when=2)])
        engine.on("step_end", when=3)(lambda loop: loop.stop("enough", **options))
        engine.run(jnp.int32(0), range(4), epochs=1)
        assert main(["show", str(directory)]) == 0
        assert main(["show", str(directory), "--json"]) == 0
        text, found = capsys.readouterr().out.split("\n{", 1)
        return text.splitlines()[0].removeprefix(f"{directory}: "), json.loads("{" + found)["resumable"]

    assert shown() == ("stopped at step 3 (epoch 0): enough", False)
    assert shown(final=False) == ("stopped at step 3 (epoch 0): enough (resumable)", True)


def test_replay_says_where_a_nan_comes_from(call):
    printed = call("replay", "--step", "8", "train.py", "c", "--last", "20", status=1)
    assert printed.startswith("training c\nstep 8, from checkpoint 4: not finite: loss\nfirst bad operation: log at ")
    found = call("replay", "--json", "--step", "7:8", "train.py", "c", "--last", "20", status=1)
    assert found["script"] == "train.py"
    first, second = found["steps"]
    assert first == {
        "step": 7,
        "checkpoint": 4,
        "metrics": {"loss": pytest.approx(2.60269, 1e-5)},
        "bad": [],
        "first_bad": None,
    }
    assert (second["metrics"], second["bad"], second["first_bad"]["operation"]) == ({"loss": "NaN"}, ["loss"], "log")


def test_replay_takes_the_wanted_run_of_a_script_or_of_a_module(call, made, capsys):
    finite = "step 3, from the initial state: all results are finite\nloss 2.8622\n"
    script = ["train.py", "a,b", "--last", "2"]
    assert call("replay", "--step", "3", *script) == f"training a\n{finite}"
    assert call("replay", "--step", "3", "-m", "train", *script[1:]) == f"training a\n{finite}"
    assert main(["replay", "--step", "3", "--run", "./a/../b", *script]) == 0  # the run of a resumes, and is over
    assert capsys.readouterr().out == f"training a\ntraining b\n{finite}"
    found = call("replay", "--json", "--checksums", "--step", "2:3", *script)["steps"]
    assert [(step["step"], sorted(step["checksums"])) for step in found] == [
        (2, ["batch", "state/w"]),
        (3, ["batch", "state/w"]),
    ]


REFUSED = {
    "no such step": (["--step", "99", "train.py", "a", "--last", "2"], "needs a step of the run, got 99; the run ends"),
    "no file": (["--step", "3", "tran.py"], "tran.py is no file. Give the script that made the run"),
    "no such run": (["--step", "3", "--run", "nope", "train.py"], "nope cannot be read"),
    "no run": (["--step", "3", "empty.py"], "empty.py made no run. There is no step to replay."),
    "fails": (["--step", "3", "fails.py"], "fails.py failed, so there is no step to replay; its error is above."),
    "exits": (["--step", "3", "exits.py"], "exits.py ended before its run, with exit status 3."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_replay_that_is_not_possible_is_explained(case, call, made):
    (made / "empty.py").write_text("")
    (made / "fails.py").write_text("1 / 0")
    (made / "exits.py").write_text("import sys; sys.exit(3)")
    arguments, message = REFUSED[case]
    error = call("replay", "--json", *arguments, status=2)
    assert message in error
    assert ("ZeroDivisionError" in error) == (case == "fails")
    assert ("Traceback" in error) == (case == "fails")


def test_runs_of_a_script_are_listed_if_none_is_the_wanted_one(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert main(["replay", "--step", "3", "--run", "c", "train.py", "a,b", "--last", "2"]) == 2
    error = capsys.readouterr().err
    assert f"train.py made no run with the directory c; it made {made / 'a'}, {made / 'b'}. There is no" in error


@pytest.mark.parametrize("steps", ["x", "0", "0:3", "9:8", "3:", "1.5", "-1"])
def test_steps_that_are_none_are_usage_errors(steps, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["replay", f"--step={steps}", "train.py"])
    assert f"--step: needs a step from 1 on, or two as FIRST:LAST, got '{steps}'" in capsys.readouterr().err


def test_report_is_written_from_what_was_saved(made, tmp_path, monkeypatch, capsys):
    directory = Path(shutil.copytree(made / "a", tmp_path / "a"))
    before = contents_below(directory)
    assert main(["report", str(directory), "-o", str(tmp_path / "page.html")]) == 0
    assert contents_below(directory) == before
    page = (tmp_path / "page.html").read_text()
    assert "Finished at step 8" in page
    assert "train/loss" in page
    assert "log.jsonl" in page
    assert main(["report", str(directory), "--json"]) == 0
    assert main(["report", str(directory)]) == 2
    printed = capsys.readouterr()
    assert json.loads("{" + printed.out.split("{")[1]) == {"file": str(directory / "report.html"), "step": 8}
    assert "report.html exists. Pass -o FILE" in printed.err
    (directory / "log.jsonl").unlink()  # the latest values are left
    assert main(["report", str(directory), "-o", str(tmp_path / "page.html")]) == 0
    assert "2.5225" in (tmp_path / "page.html").read_text()


def test_report_of_a_run_that_was_killed_has_the_curves_of_its_own_report(tmp_path):
    report = Report(tmp_path / "run" / "page.html")
    engine = Engine(lambda s, b: (s + b, {"loss": s}), [report, Checkpoint(tmp_path / "run", when=4)], log_every=1)
    with engine.steps(jnp.float32(0), range(8), epochs=1) as steps:
        next(loop for loop in steps if loop.step == 5)
        while not (tmp_path / "run" / "4").exists():  # it is committed in the background
            time.sleep(0.01)
        assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Saved at step 4" in page
    assert page.count('<path class="c0 d0"') == 2  # a curve of four points, and its key


def test_output_that_nobody_reads_to_its_end_is_no_error(made):
    command = [sys.executable, "-m", "onstep", "show", "a"]
    with subprocess.Popen(command, cwd=made, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)
