"""The examples about steps, loops and reuse: run as a user runs them, and tested in parts."""

import importlib.util
import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onstep
import optax
import pytest
import setuptools
from flax import nnx
from models import EXAMPLES_FOLDER, files
from models import load_example as load
from onstep import Batches, Engine
from onstep.testing import same_bytes

pytestmark = pytest.mark.slow

SHARED = EXAMPLES_FOLDER / "two_projects" / "shared_callbacks"
NEEDS_HAIKU = pytest.mark.skipif(importlib.util.find_spec("haiku") is None, reason="dm-haiku is not installed")
RESUMABLE = [
    pytest.param("template.py", ["--model", "linen"], id="template-linen"),
    pytest.param("template.py", ["--model", "nnx"], id="template-nnx"),
    pytest.param("template.py", ["--model", "equinox"], id="template-equinox"),
    pytest.param("libraries.py", ["--library", "linen"], id="libraries-linen"),
    pytest.param("libraries.py", ["--library", "nnx"], id="libraries-nnx"),
    pytest.param("libraries.py", ["--library", "nnx-split"], id="libraries-nnx-split"),
    pytest.param("libraries.py", ["--library", "equinox"], id="libraries-equinox"),
    pytest.param("libraries.py", ["--library", "haiku"], id="libraries-haiku", marks=NEEDS_HAIKU),
    pytest.param("advanced_step.py", [], id="advanced-step"),
    pytest.param("reinforce.py", [], id="reinforce"),
    pytest.param("language_model.py", [], id="language-model"),
    pytest.param("functional_loop.py", [], id="functional-loop"),
    pytest.param("two_projects/project_a.py", [], id="project-a"),
    pytest.param("two_projects/project_b.py", [], id="project-b"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return the folder to import the shared package from: installed if that works offline, else its source."""
    if int(setuptools.__version__.split(".")[0]) < 71:  # older versions need the package `wheel`
        return SHARED
    source, target = tmp_path_factory.mktemp("source") / "shared", tmp_path_factory.mktemp("target")
    shutil.copytree(SHARED, source)
    command = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target", target, source]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=120)
    return target


def run(script, *flags, path=""):
    command = [sys.executable, str(EXAMPLES_FOLDER / script), *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert not re.search("Warning|Error|Traceback", done.stderr), done.stderr
    return done


def main(module, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    return module.main()


@pytest.mark.parametrize(("script", "flags"), RESUMABLE)
def test_example_passes_its_check_and_a_second_start_does_nothing(script, flags, tmp_path, shared):
    first = run(script, "--fast", *flags, "--directory", tmp_path / "run", path=shared)
    assert first.returncode == 0, first.stdout + first.stderr
    reached = first.stdout.splitlines()[-1]
    assert re.search(r"\d\.\d\d", reached)
    assert "the target" not in reached
    before = files(tmp_path / "run")
    assert before

    second = run(script, "--fast", *flags, "--directory", tmp_path / "run", path=shared)
    assert second.returncode == 0, second.stderr
    assert "nothing to do" in second.stderr
    assert second.stdout.splitlines()[-1] == reached
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("template.py", ["--epochs", 1]),
        ("libraries.py", ["--epochs", 1]),
        ("advanced_step.py", ["--epochs", 1]),
        ("reinforce.py", ["--steps", 1]),
        ("language_model.py", ["--fast", "--steps", 2]),
        ("functional_loop.py", ["--epochs", 1]),
        ("two_projects/project_a.py", ["--epochs", 1]),
        ("two_projects/project_b.py", ["--epochs", 1]),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else "",
)
def test_example_below_its_target_exits_with_status_1(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SHARED)
    assert main(load(script), monkeypatch, *flags, "--directory", tmp_path / "run") == 1
    assert re.search(r", (below|above) the target of \d", capsys.readouterr().out.splitlines()[-1])


def weights(key):
    """Return the weights of one network, with shapes (inputs, outputs)."""
    keys, sizes = jax.random.split(key, 4), [(64, 128), (128,), (128, 10), (10,)]
    return [0.1 * jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]


def with_weights(model, state, new):
    """Return the state with these weights, in the layout of each library."""
    if model == "linen":
        layers = [{"kernel": new[0], "bias": new[1]}, {"kernel": new[2], "bias": new[3]}]
        return state.replace(params=dict(zip(state.params, layers, strict=True)))
    if model == "nnx":
        state[0]["layers"][0]["kernel"].set_value(new[0])
        state[0]["layers"][0]["bias"].set_value(new[1])
        state[0]["layers"][2]["kernel"].set_value(new[2])
        state[0]["layers"][2]["bias"].set_value(new[3])
        return state
    params = jax.tree.unflatten(jax.tree.structure(state[0]), [new[0].T, new[1], new[2].T, new[3]])
    return params, state[1]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_same_weights_give_the_same_losses_in_linen_nnx_and_equinox(optimizer):
    template = load("template.py")
    train, _ = template.digits()
    curves = []
    for model, build in template.MODELS.items():
        state, step, _ = build(jax.random.key(0), template.OPTIMIZERS[optimizer]())
        state = with_weights(model, state, weights(jax.random.key(1)))
        result = Engine(step, log_every=1).run(state, Batches(train, 32), epochs=2)
        curves.append(result.history["train/loss"])
    assert len(curves[0]) == 88
    assert curves[0][-1] < curves[0][0] / 4
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-3)


def test_template_prints_the_mean_loss_of_each_epoch(tmp_path, monkeypatch, capsys):
    main(load("template.py"), monkeypatch, "--epochs", 3, "--directory", tmp_path)
    losses = re.findall(r"^epoch +(\d)  loss (\d\.\d{4})  accuracy 0\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert [number for number, _ in losses] == ["1", "2", "3"]
    assert losses[0][1] > losses[1][1] > losses[2][1]


def test_template_says_how_to_install_equinox(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    template = load("template.py")
    with pytest.raises(SystemExit, match="needs Equinox: pip install equinox"):
        template.equinox_model(jax.random.key(0), template.OPTIMIZERS["sgd"]())


LIBRARIES = [
    *("linen", "nnx", "nnx-split", "equinox"),
    pytest.param("haiku", marks=[NEEDS_HAIKU, pytest.mark.filterwarnings("ignore:jax.core:DeprecationWarning")]),
]


def library_run(library):
    """Return a function that trains with a library on a few batches: `run(earlier result, steps)`."""
    libraries = load("libraries.py")
    train, _ = libraries.digits()
    state, step, _ = libraries.LIBRARIES[library](jax.random.key(0), optax.adam(2e-3))
    engine = Engine(step, [onstep.callbacks.GradNorm()], log_every=1)
    data, key = Batches(train, 32), jax.random.key(1)
    return lambda earlier, steps: engine.run(earlier or state, data, steps=steps, rng=key)


@pytest.mark.parametrize("library", LIBRARIES)
def test_resumed_run_ends_in_the_same_bytes_with_every_library(library):
    run = library_run(library)
    whole, cut = run(None, 9), run(run(None, 4), 9)
    assert same_bytes(jax.tree.leaves(whole.snapshot.tree), jax.tree.leaves(cut.snapshot.tree))
    assert whole.latest == cut.latest
    assert whole.latest["train/grad_norm"] > 0


def test_nnx_modules_and_their_arrays_train_to_the_same_bytes():
    modules, arrays = library_run("nnx")(None, 9), library_run("nnx-split")(None, 9)
    assert same_bytes(jax.tree.leaves(nnx.state(modules.state)), jax.tree.leaves(arrays.state))
    assert modules.history == arrays.history


@pytest.mark.parametrize("library", LIBRARIES[1:])
def test_every_library_trains_the_same_network(library, monkeypatch):
    """Without dropout, the same weights give the same losses as Linen; biases begin at zero."""
    libraries = load("libraries.py")
    monkeypatch.setattr(libraries, "DROPOUT", 0.0)
    train, _ = libraries.digits()
    first, _, last, _ = weights(jax.random.key(1))
    new = {w.shape: w for w in (first, first.T, last, last.T, jnp.zeros(10))}

    def losses(library):
        state, step, _ = libraries.LIBRARIES[library](jax.random.key(0), optax.adam(2e-3))
        state = jax.tree.map(lambda x: new[x.shape] if x.shape in new and x.any() else x, state)  # not Adam's moments
        return Engine(step, log_every=1).run(state, Batches(train, 32), epochs=2, rng=jax.random.key(1)).history

    expected, got = losses("linen")["train/loss"], losses(library)["train/loss"]
    assert expected[-1] < expected[0] / 4
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize(("library", "package"), [("equinox", "equinox"), ("haiku", "dm-haiku")])
def test_libraries_say_how_to_install_an_optional_library(library, package, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SystemExit, match=f"--library {library} needs {library.title()}: pip install {package}"):
        load("libraries.py").LIBRARIES[library](jax.random.key(0), optax.sgd(0.1))


def test_every_batch_is_played_with_the_newest_policy():
    reinforce, batches = load("reinforce.py"), []
    engine = Engine(reinforce.train_step, [reinforce.Actor(seed=0)])
    before = engine.run(reinforce.new_state(0), steps=2)
    engine.on("step_end", when=3)(lambda loop: batches.append(loop.batch))
    engine.run(reinforce.new_state(0), steps=3)
    expected = reinforce.play(before.state.params, np.random.default_rng((0, 2)), reinforce.EPISODES)
    assert same_bytes(batches, [expected])
    older = reinforce.play(reinforce.new_state(0).params, np.random.default_rng((0, 2)), reinforce.EPISODES)
    assert not same_bytes(older, expected)


def test_resumed_reinforcement_learning_ends_in_the_same_bytes(tmp_path):
    reinforce = load("reinforce.py")

    def run(steps, *callbacks):
        return Engine(reinforce.train_step, [reinforce.Actor(0), *callbacks]).run(reinforce.new_state(0), steps=steps)

    run(3, onstep.callbacks.Checkpoint(tmp_path, when=1))
    resumed = run(5, onstep.callbacks.Checkpoint(tmp_path, when=1))
    assert same_bytes(jax.tree.leaves(resumed.state), jax.tree.leaves(run(5).state))
    assert resumed.history.steps("train/moves") == [5]


def test_cart_pole_moves_as_in_gymnasium():
    reinforce = load("reinforce.py")
    carts = reinforce.CartPole(np.random.default_rng(0), 2)
    carts.state = np.zeros((2, 4))
    assert carts.move(np.array([True, False])).all()
    expected = [0, 0.19512195, 0, -0.29268293]  # of CartPole-v1, from rest in the middle
    np.testing.assert_allclose(carts.state, [expected, np.negative(expected)], atol=1e-8)
    for _ in range(8):
        up = carts.move(np.array([True, False]))
    assert not up.any()


def test_without_conflict_removes_the_conflicting_part_of_a_gradient():
    advanced = load("advanced_step.py")
    others = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    kept, conflict = advanced.without_conflict({"a": jnp.array([-1.0, 2.0]), "b": jnp.array([-3.0])}, others)
    np.testing.assert_allclose(kept["a"], [-1 + 15 * 3 / 25, 2.0], rtol=1e-6)
    np.testing.assert_allclose(kept["b"], [-3 + 15 * 4 / 25], rtol=1e-6)
    assert bool(conflict)
    same, conflict = advanced.without_conflict(others, others)
    assert same_bytes(same, others)
    assert not conflict


def test_advanced_step_has_the_advertised_parts():
    advanced = load("advanced_step.py")
    train, _ = advanced.digits()
    state, batch = advanced.new_state(0, train["image"]), next(iter(Batches(train, 8)))
    step = jax.jit(advanced.train_step)
    after, metrics, aux = step(state, batch)
    _, other, _ = step(state.replace(step=jnp.int32(1)), batch)
    assert set(metrics) == {"loss", "accuracy", "conflict"}
    assert jax.tree.structure(aux["grads"]) == jax.tree.structure(state.params)
    assert not same_bytes(after.batch_stats, state.batch_stats)
    assert float(metrics["loss"]) != float(other["loss"])  # dropout gets another key
    clip, noise, _ = after.opt_state
    assert isinstance(clip, optax.ClipByGlobalNormState)
    assert int(noise.count) == 1


def test_resumed_advanced_step_ends_in_the_same_bytes():
    advanced = load("advanced_step.py")
    train, _ = advanced.digits()
    state, data = advanced.new_state(0, train["image"]), Batches(train, 16)
    ema = onstep.callbacks.EMA(0.9, of=("params", "batch_stats"))
    engine = Engine(advanced.train_step, [ema, onstep.callbacks.GradNorm()])
    whole = engine.run(state, data, steps=6)
    cut = engine.run(engine.run(state, data, steps=4), data, steps=6)
    assert same_bytes(whole.snapshot.tree, cut.snapshot.tree)
    assert whole.latest["train/grad_norm"] == cut.latest["train/grad_norm"] > 0


def test_language_model_never_sees_a_future_letter():
    language = load("language_model.py")
    model, text = language.Transformer(7), jnp.arange(language.CONTEXT) % 7
    variables = model.init(jax.random.key(0), text)
    before, after = model.apply(variables, text), model.apply(variables, text.at[40].set(6))
    np.testing.assert_allclose(before[:40], after[:40], rtol=1e-5, atol=1e-6)
    assert float(abs(before[40:] - after[40:]).max(-1).min()) > 1e-6


def test_windows_predict_each_letter_once(monkeypatch):
    language = load("language_model.py")
    monkeypatch.setattr(language, "CONTEXT", 3)
    assert language.windows(np.arange(11)).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_perplexities_match_letter_and_pair_counts():
    language = load("language_model.py")
    alone, pairs = language.perplexities(np.array([0, 1, 0, 1, 1]), np.array([[0, 1, 0]]), 2)
    assert alone == pytest.approx(math.sqrt(7 / 4 * 7 / 3))  # 1: (3 + 1) / (5 + 2), 0: (2 + 1) / (5 + 2)
    assert pairs == pytest.approx(math.sqrt(4 / 3 * 4 / 2))  # 0 to 1: (2 + 1) / (2 + 2), 1 to 0: (1 + 1) / (2 + 2)


def add(state, batch, rng):
    return state + batch, {"loss": jnp.float32(batch)}


def test_train_loop_has_the_usual_signature():
    names = ", ".join(inspect.signature(load("functional_loop.py").train_loop).parameters)
    assert names.startswith("state, train_step, data_fn, num_epochs, num_batches, rng, checkpoint_dir, ")
    assert names.endswith(", show_progress")


def test_train_loop_returns_the_state_and_one_value_per_epoch(capsys):
    state, history = load("functional_loop.py").train_loop(
        jnp.int32(0),
        add,
        lambda number: [3 * number + i for i in (1, 2, 3)],
        num_epochs=2,
        num_batches=3,
        rng=jax.random.key(0),
        val_step=lambda state, batch: {"accuracy": state / batch},
        val_data_fn=lambda number: [10, 10],
        show_progress=False,
    )
    assert int(state) == 21
    assert history == {"train_loss": [2.0, 5.0], "val_accuracy": pytest.approx([0.6, 2.1])}
    assert capsys.readouterr() == ("", "")


def test_train_loop_reads_endless_data_in_epochs_of_num_batches():
    def endless(number):
        while True:
            yield 1

    loop = load("functional_loop.py").train_loop
    state, history = loop(jnp.int32(0), add, endless, 3, 4, jax.random.key(0), show_progress=False)
    assert int(state) == 12
    assert history == {"train_loss": [1.0, 1.0, 1.0]}


def test_train_loop_saves_every_few_epochs_and_resumes(tmp_path):
    loop, seen = load("functional_loop.py").train_loop, []

    def data(number):
        seen.append(number)
        return [1, 2]

    def train(epochs):
        key = jax.random.key(0)
        return loop(jnp.int32(0), add, data, epochs, 2, key, tmp_path, checkpoint_every=2, show_progress=False)

    train(5)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [4, 8, 10]
    state, history = train(7)
    assert (int(state), seen[-1]) == (21, 6)
    assert history == {"train_loss": [1.5, 1.5]}


def test_custom_loop_reverts_changes_that_did_not_help_and_continues(tmp_path):
    done = run("custom_loop.py", "--fast", "--directory", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^step +\d+ +(\d+) periods  (.*) dB$", done.stdout, re.MULTILINE)
    left, best = re.search(
        r"^the for loop was left early, reverted to (\d+) periods  (.*) dB$", done.stdout, re.MULTILINE
    ).groups()
    assert int(tried[-1][0]) == 2 * int(left)
    assert best == [quality for periods, quality in tried if periods == left][-1]
    assert re.search(r"^unseen pixels  (.*) dB$", done.stdout, re.MULTILINE)
    assert (tmp_path / "custom-loop.png").stat().st_size > 10_000


def test_shared_package_passes_its_own_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, cwd=SHARED, capture_output=True, text=True, timeout=300)
    assert re.search(r"^7 passed", done.stdout, re.MULTILINE), done.stdout


def test_project_a_undoes_exactly_the_corrupted_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SHARED)
    project = load("two_projects/project_a.py")
    train, _ = project.patients()
    batches = project.with_wrong_units(Batches(train, 16, seed=3), 3)
    corrupt = sum(abs(batch["y"]).max() > 100 for epoch in range(12) for batch in batches(epoch))
    main(project, monkeypatch, "--epochs", 12, "--seed", 3, "--directory", tmp_path)
    assert f"skipped steps       {corrupt} of 240\n" in capsys.readouterr().out
    assert corrupt > 5


@pytest.mark.slow
def test_nan_is_found_in_its_layer_by_the_example(tmp_path, monkeypatch, capsys):
    module = load("find_nan.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", module.__file__, raising=False)  # as for a script
    assert main(module, monkeypatch, "--fast", "--directory", tmp_path / "run") == 0
    error, command, _, step, found, code, *_ = capsys.readouterr().out.splitlines()
    number = re.search(r"non-finite loss at step (\d+)", error)[1]
    assert command.lstrip().startswith(f"python -m onstep replay --step {number} --run ")
    assert step.startswith(f"step {number}, replayed from checkpoint ")
    assert re.search(r"first bad operation  div at .*find_nan.py:35 \(attend\), in scan, iteration 1 of 2$", found)
    assert code == "  code scores / scores.std((-1, -2), keepdims=True)"
