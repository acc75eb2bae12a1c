"""The test kit `onstep.testing`, as far as its docstring examples do not show it."""

import jax.numpy as jnp
import numpy as np
import pytest
from onstep import Engine
from onstep.testing import (
    EVENT_NAMES,
    FakeLoader,
    LogValues,
    RaiseIn,
    SizedData,
    StopAt,
    Transcript,
    counting_step,
    same_bytes,
)


def run(*callbacks, data=range(6), **options):
    return Engine(counting_step, callbacks, **options).run(jnp.int32(0), data, epochs=1)


def test_transcripts_with_names_share_lines_and_tell_their_own_steps():
    lines = []
    often = Transcript("often", lines=lines, quiet=set(EVENT_NAMES) - {"step_end"})
    rare = Transcript("rare", lines=lines, quiet=set(EVENT_NAMES) - {"step_end"}, when=3)
    run(often, rare)
    assert lines[:4] == ["often step_end 1/0", "often step_end 2/0", "often step_end 3/0", "rare step_end 3/0"]
    assert (often.steps("step_end"), rare.steps("step_end")) == ([1, 2, 3, 4, 5, 6], [3, 6])
    assert often.steps("save") == []


def test_transcript_appends_what_show_returns_and_the_values_sorted_by_name():
    quiet = set(EVENT_NAMES) - {"step_end", "log"}
    transcript = Transcript(quiet=quiet, show=lambda loop, event: "seen" if event == "step_end" else "")
    run(LogValues({1: {"b": 2, "a": 1.5}}), transcript, data=[5])
    assert transcript.lines == [
        "log 1/1 a=1.5 b=2",
        "step_end 1/1 seen",
        "log 1/1 epoch/loss=5",
        "log 1/1 train/loss=5",
    ]


def test_quiet_event_does_not_end_a_block_of_steps():
    def draws(quiet):
        data, seen = SizedData(range(6), 6), []
        transcript = Transcript(quiet=quiet, show=lambda loop, event: seen.append(len(data.drawn)) or "")
        run(transcript, data=data, steps_per_call=3, log_every=100)
        return seen

    assert draws(set(EVENT_NAMES) - {"epoch_end", "log"})[0] == 6
    assert draws(set(EVENT_NAMES) - {"step_end"}) == [1, 2, 3, 4, 5, 6]


def test_transcript_refuses_to_leave_out_an_unknown_event():
    with pytest.raises(ValueError, match=r"Transcript cannot leave out \['on_step_end'\]"):
        Transcript(quiet=["on_step_end"])


@pytest.mark.parametrize("event", ["step_begin", "on_step_begin", "step_end", "save", "log"])
def test_error_is_raised_in_one_event_at_one_step(event):
    with pytest.raises(OSError, match="disk gone") as caught:
        run(RaiseIn(event, OSError("disk gone"), step=4), log_every=2)
    method = event if event.startswith("on_") else f"on_{event}"
    assert caught.value.__notes__ == [f"onstep: raised by RaiseIn.{method} at step 4"]


@pytest.mark.parametrize("event", ["load", "run_begin", "epoch_begin", "step_begin"])
def test_error_can_be_raised_before_the_first_step(event):
    with pytest.raises(OSError, match="disk gone"):
        run(RaiseIn(event, OSError("disk gone"), step=0))


def test_error_in_an_unknown_event_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="'step_ends' is not an event"):
        RaiseIn("step_ends", OSError("disk gone"))


def test_stop_has_the_given_reason_and_can_be_resumed():
    first = run(StopAt(2, final=False, reason="pause"))
    assert (first.step, first.stopped) == (2, "pause")
    assert Engine(counting_step).run(first, range(6), epochs=1).step == 6


def test_loader_remembers_what_was_drawn_and_the_restored_positions():
    first = run(StopAt(2, final=False), data=FakeLoader(range(6)))
    loader = FakeLoader(range(6))
    Engine(counting_step).run(first, loader, epochs=1)
    assert (loader.sought, loader.drawn) == ([2], [2, 3, 4, 5])


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"a": np.float32(1)}, True),
        ({"a": np.float64(1)}, False),
        ({"a": np.ones(1, np.float32)}, False),
        ({"b": np.float32(1)}, False),
    ],
    ids=["equal", "dtype", "shape", "structure"],
)
def test_same_bytes_compares_structure_dtype_and_shape(other, same):
    assert same_bytes({"a": jnp.float32(1)}, other) is same
