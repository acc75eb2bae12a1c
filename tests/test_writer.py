"""Writer: records passed to clu's writers, and to any object with `write_scalars`."""

import importlib
import logging
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import pytest
from onstep import Engine
from onstep.callbacks import Writer
from onstep.testing import counting_step


class ListWriter:
    """Appends what it receives to a list, and has no `flush`."""

    def __init__(self):
        self.received = []

    def write_scalars(self, step, scalars):
        self.received.append((step, dict(scalars)))


class HparamsWriter(ListWriter):
    def write_hparams(self, hparams):
        self.received.append(hparams)


def run(writer, start=0.0, epochs=1, **options):
    start = jnp.float32(start) if isinstance(start, float) else start
    return Engine(counting_step, [Writer(writer, **options)], log_every=2).run(start, [1.0, 3.0], epochs=epochs)


@pytest.fixture
def clu(monkeypatch):
    """Import clu's writers without their package, which imports TensorFlow."""
    package = types.ModuleType("clu.metric_writers")
    package.__path__ = [str(Path(find_spec("clu").origin).parent / "metric_writers")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield lambda module: importlib.import_module(f"clu.metric_writers.{module}")
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers.")]:
        monkeypatch.delitem(sys.modules, name)


def test_every_record_is_passed_with_its_step():
    writer = ListWriter()
    run(writer)
    assert writer.received == [(2, {"train/loss": 2.0}), (2, {"epoch/loss": 2.0})]


def test_clu_logging_writer_receives_records_and_hyperparameters(clu, caplog):
    caplog.set_level(logging.INFO)
    run(clu("logging_writer").LoggingWriter(), config={"rate": 0.1, "token": "x"})
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "[Hyperparameters] {'rate': 0.1, 'token': '***'}" in messages
    assert "[2] train/loss=2" in messages


def test_clu_asynchronous_writer_has_written_everything_when_the_run_ends(clu):
    inner = ListWriter()
    inner.flush = inner.close = lambda: None
    writer = clu("async_writer").AsyncWriter(inner)
    run(writer)
    assert [step for step, _ in inner.received] == [2, 2]
    writer.close()


def test_hyperparameters_are_passed_once_when_a_run_starts_from_scratch():
    writer = HparamsWriter()
    first = run(writer, config={"url": "https://u:p@h"})
    run(writer, first, epochs=2, config={"url": "https://u:p@h"})
    assert [item for item in writer.received if isinstance(item, dict)] == [{"url": "https://***@h"}]


@pytest.mark.parametrize(
    ("writer", "config", "method"),
    [(object(), None, "write_scalars"), (ListWriter(), {}, "write_hparams")],
    ids=["no scalars", "no hparams"],
)
def test_writer_without_the_method_is_refused(writer, config, method):
    with pytest.raises(TypeError, match=f"Writer needs an object with {method}, got {type(writer).__name__}"):
        Writer(writer, config=config)
