"""Images, read back with Pillow and with TensorBoard's own reader."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine, at
from onstep.callbacks import EMA
from onstep.callbacks.images import Images
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def step(state, batch):
    return {"params": state["params"] + batch}, {}


def pixels(source):
    """Return the pixels of a PNG file, after Pillow has verified every checksum."""
    with Image.open(source) as image:
        image.verify()
    with Image.open(source) as image:
        return np.asarray(image)


def events(directory):
    """Return the image of each step that TensorBoard shows, by name."""
    reader = EventAccumulator(str(directory), size_guidance={"images": 0})
    reader.Reload()
    return {
        tag: {event.step: pixels(io.BytesIO(event.encoded_image_string)) for event in reader.Images(tag)}
        for tag in reader.Tags()["images"]
    }


def drawn(directory, images):
    """Return the pixels of the file that a run draws of these images."""
    Engine(step, [Images(lambda state: {"x": images}, png=directory)]).run({"params": 0.0}, [1.0], epochs=1)
    return pixels(directory / "step-000001-x.png")


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 4), (1, 1, 3), (300, 200, 3)], ids=str)
def test_uint8_is_written_unchanged(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(drawn(tmp_path, image), image)


def test_image_with_one_channel_is_grey(tmp_path):
    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert drawn(tmp_path, image).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_floats_are_clipped_and_nan_is_black(tmp_path, dtype):
    image = np.array([0, 0.5, 1, -3, 7, np.nan, np.inf, -np.inf]).astype(dtype).reshape(2, 4, 1)
    assert drawn(tmp_path, image).tolist() == [[0, 128, 255, 0], [255, 0, 255, 0]]


@pytest.mark.parametrize(
    ("n", "grid"),
    [
        pytest.param(1, [[1]], id="one"),
        pytest.param(2, [[1, 2]], id="two"),
        pytest.param(5, [[1, 2, 3], [4, 5, 0]], id="five"),
        pytest.param(9, [[1, 2, 3], [4, 5, 6], [7, 8, 9]], id="nine"),
    ],
)
def test_several_images_form_a_grid(tmp_path, n, grid):
    images = np.broadcast_to(np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None], (n, 2, 3, 1))
    assert np.array_equal(drawn(tmp_path, images), np.kron(grid, np.ones((2, 3), int)))


def test_image_in_a_grid_keeps_its_rows_and_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3), np.uint8)
    grid = drawn(tmp_path, images)
    assert np.array_equal(grid[2:, 3:], images[3])


def shade(state):
    """Draw one pixel whose brightness is the state."""
    return {"shade": jnp.full((1, 1, 1), state["params"].astype(jnp.uint8))}


def test_images_are_drawn_from_the_state_at_due_steps(tmp_path):
    images = Images(shade, png=tmp_path, events=tmp_path, when=at(1) | 3)
    Engine(step, [images]).run({"params": 0.0}, [10.0] * 7, epochs=1)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"step-00000{n}-shade.png" for n in (1, 3, 6)]
    assert [pixels(tmp_path / name).item() for name in names] == [10, 30, 60]
    assert {n: image.item() for n, image in events(tmp_path)["shade"].items()} == {1: 10, 3: 30, 6: 60}


def test_images_are_drawn_at_the_end_of_each_epoch_by_default(tmp_path):
    Engine(step, [Images(shade, png=tmp_path)]).run({"params": 0.0}, [1.0] * 2, epochs=2)
    assert sorted(path.name[5:11] for path in tmp_path.iterdir()) == ["000002", "000004"]


def test_using_draws_from_the_state_of_another_callback(tmp_path):
    ema = EMA(0.5)
    Engine(step, [ema, Images(shade, png=tmp_path, using=ema)]).run({"params": 0.0}, [100.0], epochs=1)
    assert pixels(tmp_path / "step-000001-shade.png") == 50


def test_using_a_callback_that_is_not_in_the_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"This EMA is not among the run's callbacks \['Images'\]"):
        Engine(step, [Images(shade, png=tmp_path, using=EMA())]).run({"params": 0.0}, [1.0], epochs=1)


def test_each_image_is_written_under_its_name(tmp_path):
    def draw(state):
        return {"val/in": np.zeros((1, 2, 1)), "out": np.zeros((2, 1, 3))}

    Engine(step, [Images(draw, png=tmp_path, events=tmp_path / "events")]).run({"params": 0.0}, [1.0], epochs=1)
    assert {path.name for path in tmp_path.glob("*.png")} == {"step-000001-val-in.png", "step-000001-out.png"}
    assert {tag: p[1].shape for tag, p in events(tmp_path / "events").items()} == {"val/in": (1, 2), "out": (2, 1, 3)}


def test_resumed_run_replaces_images_that_it_draws_again(tmp_path):
    first = Engine(step).run({"params": 0.0}, [1.0] * 9, steps=2)
    for shift in (0.0, 5.0):
        images = Images(lambda state: shade({"params": state["params"] + shift}), png=tmp_path, events=tmp_path, when=1)  # noqa: B023
        Engine(step, [images]).run(first, [1.0] * 9, steps=4)
    assert {n: image.item() for n, image in events(tmp_path)["shade"].items()} == {3: 8, 4: 9}
    assert [pixels(path).item() for path in sorted(tmp_path.glob("*.png"))] == [8, 9]


def test_nothing_is_created_if_nothing_is_drawn(tmp_path):
    images = Images(lambda state: {}, png=tmp_path / "png", events=tmp_path / "events", when=1)
    Engine(step, [images]).run({"params": 0.0}, [1.0], epochs=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(np.zeros((8, 8)), id="no channels"),
        pytest.param(np.zeros((8, 8, 2)), id="two channels"),
        pytest.param(np.zeros((8, 8, 3), int), id="integers"),
        pytest.param(np.zeros((0, 8, 8, 3)), id="none"),
    ],
)
def test_array_that_is_not_an_image_is_refused_by_name(tmp_path, image):
    with pytest.raises(ValueError, match=r"Images needs floats or uint8 of shape .* of shape \(.*8.*\) for 'x'"):
        drawn(tmp_path, image)


def test_missing_directory_is_an_error():
    with pytest.raises(ValueError, match="Images needs a directory: png= for files, events= for TensorBoard"):
        Images(shade)


def test_characters_that_a_file_name_may_not_contain_on_every_system_become_dashes(tmp_path):
    names = {"loss->top@5": "loss--top@5", 'a:b?"c"': "a-b--c-", "..\\x": "..-x"}
    images = dict.fromkeys(names, np.zeros((1, 1, 1)))
    Engine(step, [Images(lambda state: images, png=tmp_path)]).run({"params": 0.0}, [1.0], epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {f"step-000001-{name}.png" for name in names.values()}
