"""The examples with several networks: run as a user runs them, and checked in parts against exact values."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from models import EXAMPLES_FOLDER, files
from models import load_example as example
from onstep import Batches, Engine
from onstep.callbacks import EMA, Checkpoint
from onstep.callbacks.target import Target
from onstep.testing import same_bytes

IMAGES = np.random.default_rng(0).integers(0, 17, (256, 64)).astype(np.float32)
KEY = jax.random.key(3)


def script(name, *flags):
    command = [sys.executable, str(EXAMPLES_FOLDER / name), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def ends_as(one, other):
    """Return whether two runs ended in the same bytes: state, carries, host states, counters, position in the data."""
    ends = [(jax.tree.leaves(run.snapshot.tree), run.snapshot.host) for run in (one, other)]
    return same_bytes(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def starts(engine):
    """Return a list that gets the step at which each run of the engine begins."""
    steps = []
    engine.on("run_begin")(lambda loop: steps.append(loop.step))
    return steps


# The examples as scripts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("gan", ["gan.png", "step-002000-samples.png"]),
        ("vae", ["vae.png", "schedule.png", "step-000880-samples.png", "step-000880-reconstructions.png"]),
        ("target_network", ["target-network.png"]),
    ],
    ids=["gan", "vae", "target_network"],
)
def test_example_passes_its_check_saves_its_pictures_and_a_second_start_does_nothing(name, pictures, tmp_path):
    run = script(f"{name}.py", "--fast", "--directory", tmp_path / "run")
    assert run.returncode == 0, run.stdout + run.stderr
    assert not re.search("Warning|Error|Traceback", run.stderr), run.stderr
    before = files(tmp_path / "run")
    assert {path.name for path in before} >= {*pictures}
    again = script(f"{name}.py", "--fast", "--directory", tmp_path / "run")
    assert again.stdout == run.stdout
    assert "nothing to do" in again.stderr
    assert files(tmp_path / "run") == before


@pytest.mark.slow
def test_mean_teacher_beats_training_on_labels_only_for_every_seed(tmp_path):
    run = script("mean_teacher.py", "--fast", "--seeds", 3, "--directory", tmp_path / "run")
    assert run.returncode == 0, run.stdout + run.stderr
    assert not re.search("Warning|Error|Traceback", run.stderr), run.stderr
    reached = re.findall(r"^ +(\d) +(\d\.\d{4}) +(\d\.\d{4})$", run.stdout, re.MULTILINE)
    assert [seed for seed, _, _ in reached] == ["0", "1", "2"]
    assert all(float(taught) > float(alone) for _, alone, taught in reached), run.stdout
    assert (tmp_path / "run" / "mean-teacher.png").exists()


@pytest.mark.slow
def test_values_diverge_without_a_target_network_and_the_example_says_so(tmp_path):
    run = script("target_network.py", "--fast", "--rate", 1, "--directory", tmp_path / "run")
    assert run.returncode == 1, run.stderr
    assert re.search(r"^largest error +\d+\.\d+, above the target of 0\.02$", run.stdout, re.MULTILINE)


# The GAN


def gan_engine(gan, *callbacks):
    ema = EMA(0.9, of="gen.params", when=gan.GENERATOR_EVERY)
    return Engine(gan.train_step, [gan.TrainGenerator(), gan.Penalty(), ema, *callbacks], log_every=1)


@pytest.mark.slow
def test_gan_interrupted_between_two_updates_ends_in_the_same_bytes(tmp_path):
    gan = example("gan.py")
    state, data = gan.new_state(KEY, 64), Batches(IMAGES / 16, gan.BATCH)
    whole = gan_engine(gan).run(state, data, steps=17, rng=KEY)
    engine = gan_engine(gan, Checkpoint(tmp_path))
    began = starts(engine)
    first = engine.run(state, data, steps=7, rng=KEY)  # the generator was last updated at 6, the penalty is due at 8
    assert (int(first.state.disc.step), int(first.state.gen.step)) == (7, 3)
    assert ends_as(engine.run(state, data, steps=17, rng=KEY), whole)
    assert began == [0, 7]


@pytest.mark.slow
def test_networks_of_the_gan_keep_their_own_update_counts():
    gan = example("gan.py")
    engine, data = gan_engine(gan), Batches(IMAGES / 16, gan.BATCH)
    result = engine.run(gan.new_state(KEY, 16), data, steps=14, rng=KEY)
    assert result.history.steps("train/disc_loss") == list(range(1, 15))
    assert result.history.steps("train/gen_loss") == [2, 4, 6, 8, 10, 12, 14]
    assert result.history.steps("train/penalty") == [8]
    assert counts(result.state) == [(7, 7, 7), (15, 15, 15)]
    assert rates_are_zero(result.state) == [False, False]
    last = engine.run(result, data, steps=16, rng=KEY)
    assert (last.step, counts(last.state)) == (16, [(8, 8, 8), (18, 18, 18)])
    assert rates_are_zero(last.state) == [True, True]  # each schedule ends with the last update of its network


def counts(state):
    """Return the updates of generator and discriminator, as counted by the network, Adam and the schedule."""
    nets = [(net, *net.opt_state) for net in (state.gen, state.disc)]
    return [(int(net.step), int(adam.count), int(schedule.count)) for net, adam, schedule in nets]


def rates_are_zero(state):
    """Return whether another update would change nothing, for generator and discriminator."""
    nets = [(net, net.apply_gradients(grads=net.params)) for net in (state.gen, state.disc)]
    return [same_bytes(net.params, after.params) for net, after in nets]


def test_frechet_distance_agrees_with_scipy():
    one, other = np.random.default_rng(0).normal(size=(2, 200, 5)) * [[[1]], [[3]]] + [[[0]], [[1]]]
    covariances = [np.cov(x, rowvar=False) for x in (one, other)]
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(sum(covariances)) - 2 * root
    assert example("gan.py").frechet(jnp.asarray(one), jnp.asarray(other)) == pytest.approx(expected, rel=1e-4)


# The VAE


VAE_CONFIG = """
optimizer: {{name: adam}}
scheduler: {{name: constant, learning_rate: {rate}, warmup_steps: {steps}}}
batch_size: 64
steps: {steps}
eval_every: 4
save_every: 4
directory: {directory}
keep: 1
metric: val/loss
patience: 50
latent: 2
hidden: 8
"""


def vae_main(vae, tmp_path, monkeypatch, text):
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["vae.py", "--config", str(tmp_path / "config.yaml")])
    return vae.main()


@pytest.mark.slow
def test_best_vae_is_kept_and_loaded_although_training_diverges_later(tmp_path, monkeypatch, capsys):
    vae, drawn = example("vae.py"), []
    monkeypatch.setattr(vae, "draw", lambda *given: drawn.append(given))
    text = VAE_CONFIG.format(rate=20.0, steps=40, directory=tmp_path / "run")
    assert vae_main(vae, tmp_path, monkeypatch, text) == 1
    [(_, best, history, _)] = drawn
    values = dict(zip(history.steps("val/loss"), history["val/loss"], strict=True))
    assert best == min(values, key=values.get) < 40
    assert values[40] > values[best] + 20
    assert re.search(
        rf"^best model, step {best} +{values[best]:.2f} nats, above the target of 93$", capsys.readouterr().out, re.M
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {str(best), "40", "config.yaml", "schedule.png"}
    assert vae.Config.from_yaml(tmp_path / "run" / "config.yaml") == vae.Config.from_yaml(text)


def test_likelihood_of_the_vae_agrees_with_scipy():
    logits = np.random.default_rng(1).normal(size=(5, 64)) * 3
    expected = -scipy.stats.binom.logpmf(IMAGES[:5], 16, 1 / (1 + np.exp(-logits))).sum(-1).mean()
    assert example("vae.py").binomial(jnp.asarray(logits), IMAGES[:5]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("latent: 2", "latnt: 2", "there is no field 'latnt'. Did you mean latent?"),
        ("latent: 2", "latent: '2'", "latent\n  Input should be a valid integer"),
        ("latent: 2", "latent: 0", "latent\n  Input should be greater than or equal to 1"),
        ("latent: 2", "latent: 2\nlatent: 3", "latent is given twice, in lines 12 and 13"),
        ("hidden: 8", "hidden: 8\nema_decay: 0.9", "ema_decay\n  Input should be null"),
        ("name: adam", "name: adam, momentum: 0.9", "optimizer\n  Value error, adam has no momentum"),
        ("\nsteps: 40", "\nsteps: 30", "scheduler.warmup_steps needs to be <= steps, 30, got 40"),
    ],
    ids=["unknown", "wrong type", "out of range", "twice", "unused field", "of another optimizer", "contradictory"],
)
def test_wrong_vae_configuration_is_refused_naming_the_field(field, wrong, message, tmp_path, monkeypatch, capsys):
    text = VAE_CONFIG.format(rate=20.0, steps=40, directory=tmp_path / "run").replace(field, wrong)
    with pytest.raises(SystemExit, match="2"):
        vae_main(example("vae.py"), tmp_path, monkeypatch, text)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# The target network


@pytest.mark.parametrize("cut", [32, 37, 50], ids=["at an act", "between two acts", "between two epochs"])
def test_resumed_q_learning_ends_in_the_same_bytes_including_its_buffer(cut, tmp_path):
    rooms = example("target_network.py")
    state = rooms.new_state(KEY, 100)

    def run(steps, *callbacks):
        actor = rooms.Actor(0)
        engine = Engine(rooms.train_step, [actor, Target(rate=0.1), *callbacks])
        began = starts(engine)
        return engine.run(state, rooms.Replay(actor, 0), steps=steps, epoch_steps=50), actor, began

    run(cut, Checkpoint(tmp_path))
    (whole, actor, _), (resumed, again, began) = run(75), run(75, Checkpoint(tmp_path))
    assert began == [cut]
    assert ends_as(resumed, whole)
    assert again.moves == actor.moves == 5  # one or two of them came after resuming
    assert same_bytes(again.seen, actor.seen)


def test_actor_acts_at_the_start_and_every_16_steps():
    rooms = example("target_network.py")
    actor, moves = rooms.Actor(0), []
    engine = Engine(rooms.train_step, [actor])
    engine.on("step_end")(lambda loop: moves.append(actor.moves))
    engine.run(rooms.new_state(KEY, 1), rooms.Replay(actor, 0), steps=33, epoch_steps=50)
    assert moves == [1] * 15 + [2] * 16 + [3] * 2


def test_environment_moves_with_the_assumed_probabilities():
    rooms = example("target_network.py")
    cells = np.full(200_000, 5)
    seen = rooms.move(rooms.new_state(KEY, 1).params, cells, 1.0, KEY)
    often = np.zeros((4, len(rooms.CELLS)))
    np.add.at(often, (np.asarray(seen["move"]), np.asarray(seen["after"])), 1 / len(cells))
    assert often == pytest.approx(rooms.CHANCE[5] / 4, abs=0.005)


def test_value_of_the_best_policy_matches_value_iteration():
    rooms = example("target_network.py")
    best = rooms.optimal_values()
    assert rooms.policy_values(best.argmax(1)) == pytest.approx(best.max(1), abs=1e-5)


# The mean teacher


@pytest.mark.slow
def test_unlabelled_images_with_weight_zero_change_nothing():
    teacher = example("mean_teacher.py")
    labelled = teacher.labelled_subset(IMAGES / 16, np.arange(256) % 10, seed=0)
    sources = [teacher.mixed_batches(labelled, images / 16, seed=0) for images in (IMAGES, IMAGES[::-1])]
    engine = Engine(teacher.train_step, [Target(rate=0.1)])
    for weight, same in ((0.0, True), (3.0, False)):
        states = [engine.run(teacher.new_state(0, weight), data, steps=20, rng=KEY).state for data in sources]
        assert same_bytes(states[0].target, states[1].target) is same


def test_mean_teacher_has_four_labels_of_each_digit():
    labelled = example("mean_teacher.py").labelled_subset(IMAGES, np.arange(256) % 10, seed=1)
    assert np.bincount(labelled["label"]).tolist() == [4] * 10
    assert len(np.unique(labelled["image"], axis=0)) == 40
