"""The examples with several networks: run as a user runs them, and what is exact in them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from models import same_bytes
from onstep import Batches, Engine, evaluate
from onstep.callbacks import EMA, Checkpoint, Evaluate
from onstep.callbacks.checkpoint import load
from onstep.callbacks.target import Target
from onstep.state import TrainState
from onstep.storage import Storage

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGES = np.random.default_rng(0).integers(0, 17, (256, 64)).astype(np.float32)
KEY = jax.random.key(3)


def example(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name, *flags):
    command = [sys.executable, str(EXAMPLES / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def files(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def ends_as(one, other):
    """Whether two runs ended in the same bytes: state, carries, host states, counters, position in the data."""
    ends = [(jax.tree.leaves(run.snapshot.tree), run.snapshot.host) for run in (one, other)]
    return same_bytes(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


# As a user runs them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("gan", ["gan.png", "step-002000-samples.png"]),
        ("vae", ["vae.png", "schedule.png", "step-000880-samples.png", "step-000880-reconstructions.png"]),
        ("target_network", ["target-network.png"]),
        ("mean_teacher", ["mean-teacher.png"]),
    ],
    ids=["gan", "vae", "target_network", "mean_teacher"],
)
def test_an_example_passes_its_own_check_and_leaves_its_pictures(name, pictures, tmp_path):
    run = script(f"{name}.py", "--fast", "--directory", tmp_path / "run")
    assert run.returncode == 0, run.stdout + run.stderr
    assert not re.search("Warning|Error|Traceback", run.stderr), run.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {*pictures}
    if name != "mean_teacher":  # which keeps no checkpoints
        before = files(tmp_path / "run")
        again = script(f"{name}.py", "--fast", "--directory", tmp_path / "run")
        assert again.stdout == run.stdout
        assert "nothing to do" in again.stderr
        assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_without_a_target_network_the_values_run_away_and_the_example_says_so(tmp_path):
    run = script("target_network.py", "--fast", "--rate", 1, "--directory", tmp_path / "run")
    assert run.returncode == 1, run.stderr
    assert re.search(r"^largest error +\d+\.\d+, short of 0\.02$", run.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_configuration_of_ones_own_that_is_too_short_falls_short(tmp_path):
    config = (EXAMPLES / "vae.yaml").read_text().replace("epochs: 300", "epochs: 10")
    (tmp_path / "short.yaml").write_text(config)
    run = script("vae.py", "--config", tmp_path / "short.yaml", "--directory", tmp_path / "run")
    assert run.returncode == 1, run.stderr
    assert "nats, short of 93" in run.stdout


# The GAN


def gan_engine(gan, *callbacks):
    ema = EMA(0.9, of="gen.params", when=gan.TURN)
    return Engine(gan.train_step, [gan.TrainGenerator(), gan.Penalty(), ema, *callbacks])


def test_a_gan_cut_between_two_turns_ends_in_the_same_bytes(tmp_path):
    gan = example("gan")
    state, data = gan.new_state(KEY, 64), Batches(IMAGES / 16, gan.BATCH)
    whole = gan_engine(gan).run(state, data, steps=17, rng=KEY)
    engine = gan_engine(gan, Checkpoint(tmp_path))
    first = engine.run(state, data, steps=7, rng=KEY)  # the generator's turn was at 6, the penalty's is at 8
    assert (int(first.state.disc.step), int(first.state.gen.step)) == (7, 3)
    assert ends_as(engine.run(state, data, steps=17, rng=KEY), whole)


def test_each_optimizer_of_the_gan_counts_its_own_updates():
    gan = example("gan")
    result = gan_engine(gan).run(gan.new_state(KEY, 64), Batches(IMAGES / 16, gan.BATCH), steps=17, rng=KEY)
    counts = [int(net.opt_state[0].count) for net in (result.state.gen, result.state.disc)]
    assert (result.step, counts) == (17, [17 // gan.TURN, 17 + 17 // gan.LAZY])


def test_the_frechet_distance_agrees_with_scipys_square_root():
    one, other = np.random.default_rng(0).normal(size=(2, 200, 5)) * [[[1]], [[3]]] + [[[0]], [[1]]]
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * root
    assert example("gan").frechet(jnp.asarray(one), jnp.asarray(other)) == pytest.approx(expected, rel=1e-4)


# The VAE


def test_the_best_vae_that_was_kept_scores_what_was_recorded(tmp_path):
    vae = example("vae")
    config = vae.Config.from_yaml(EXAMPLES / "vae.yaml")
    model = vae.VAE(latent=2, hidden=8)
    variables = model.init(KEY, IMAGES[:1], KEY)
    state = TrainState.create(apply_fn=model.apply, tx=config.optimizer.build(0.1), **variables)  # too fast: it swings
    callbacks = [Evaluate(vae.eval_step, [IMAGES[:50]]), Checkpoint(tmp_path, keep=1, best="val/loss")]
    result = Engine(vae.train_step, callbacks).run(state, Batches(IMAGES, 32), epochs=6, rng=KEY)

    best = Storage(tmp_path, best="val/loss").best_step()
    kept = load(tmp_path, like=result.state, step=best)
    values = dict(zip(result.history.steps("val/loss"), result.history["val/loss"], strict=True))
    assert evaluate(vae.eval_step, kept, [IMAGES[:50]])["loss"] == values[best] == min(values.values())


def test_the_vaes_likelihood_agrees_with_scipy():
    logits = np.random.default_rng(1).normal(size=(5, 64)) * 3
    expected = -scipy.stats.binom.logpmf(IMAGES[:5], 16, 1 / (1 + np.exp(-logits))).sum(-1).mean()
    assert example("vae").binomial(jnp.asarray(logits), IMAGES[:5]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("latnt: 16", "there is no field 'latnt'. Did you mean latent?"),
        ("latent: 0", "latent\n  Input should be greater than or equal to 1"),
        ("latent: 16\nema_decay: 0.9", "ema_decay\n  Input should be null"),
    ],
    ids=["misspelt", "out of range", "of no use"],
)
def test_a_wrong_field_of_the_vaes_configuration_is_refused(line, message):
    text = (EXAMPLES / "vae.yaml").read_text().replace("latent: 16", line)
    with pytest.raises(ValueError, match=re.escape(message)):
        example("vae").Config.from_yaml(text)


# The target network


@pytest.mark.parametrize("cut", [32, 37, 50], ids=["as it acts", "between two acts", "between two epochs"])
def test_q_learning_that_was_cut_ends_in_the_same_bytes_buffer_and_all(cut, tmp_path):
    rooms = example("target_network")
    state = rooms.new_state(KEY, 100)

    def run(steps, *callbacks):
        actor = rooms.Actor(0)
        engine = Engine(rooms.train_step, [actor, Target(rate=0.1), *callbacks])
        return engine.run(state, rooms.Replay(actor, 0), steps=steps, epoch_steps=50)

    run(cut, Checkpoint(tmp_path))
    assert ends_as(run(75, Checkpoint(tmp_path)), run(75))


def test_the_actor_acts_at_the_start_and_at_every_16th_step():
    rooms = example("target_network")
    actor, moves = rooms.Actor(0), []
    engine = Engine(rooms.train_step, [actor])
    engine.on("step_end")(lambda loop: moves.append(actor.moves))
    engine.run(rooms.new_state(KEY, 1), rooms.Replay(actor, 0), steps=33, epoch_steps=50)
    assert moves == [1] * 15 + [2] * 16 + [3] * 2


def test_the_environments_move_as_often_as_the_exact_values_suppose():
    rooms = example("target_network")
    cells = np.full(200_000, 5)
    seen = rooms.move(rooms.new_state(KEY, 1).params, cells, 1.0, KEY)
    often = np.zeros((4, len(rooms.CELLS)))
    np.add.at(often, (np.asarray(seen["move"]), np.asarray(seen["after"])), 1 / len(cells))
    assert often == pytest.approx(rooms.CHANCE[5] / 4, abs=0.005)


def test_the_best_policy_is_worth_what_value_iteration_says():
    rooms = example("target_network")
    best = rooms.optimum()
    assert rooms.worth(best.argmax(1)) == pytest.approx(best.max(1), abs=1e-5)


# The mean teacher


def test_without_weight_the_images_without_labels_change_nothing():
    teacher = example("mean_teacher")
    labelled = teacher.few(IMAGES / 16, np.arange(256) % 10, seed=0)
    sources = [teacher.epochs_of(labelled, images / 16, seed=0) for images in (IMAGES, IMAGES[::-1])]
    engine = Engine(teacher.train_step, [Target(rate=0.1)])
    for weight, same in ((0.0, True), (3.0, False)):
        states = [engine.run(teacher.new_state(0, weight), data, steps=20, rng=KEY).state for data in sources]
        assert same_bytes(states[0].target, states[1].target) is same


def test_the_mean_teacher_has_four_labels_of_each_digit():
    few = example("mean_teacher").few(IMAGES, np.arange(256) % 10, seed=1)
    assert np.bincount(few["label"]).tolist() == [4] * 10
    assert len(np.unique(few["image"], axis=0)) == 40
