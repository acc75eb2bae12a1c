"""Records handed to metric writers: clu's own, and any object with the method."""

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


class Kept:
    """A writer that keeps what it is given, and cannot flush."""

    def __init__(self):
        self.given = []

    def write_scalars(self, step, scalars):
        self.given.append((step, dict(scalars)))


class Hparams(Kept):
    def write_hparams(self, hparams):
        self.given.append(hparams)


def add(state, batch):
    return state + batch, {"loss": batch}


def run(writer, start=0.0, epochs=1, **options):
    start = jnp.float32(start) if isinstance(start, float) else start
    return Engine(add, [Writer(writer, **options)], log_every=2).run(start, [1.0, 3.0], epochs=epochs)


@pytest.fixture
def clu(monkeypatch):
    """Clu's writers that need no TensorFlow; their package imports one that does."""
    package = types.ModuleType("clu.metric_writers")
    package.__path__ = [str(Path(find_spec("clu").origin).parent / "metric_writers")]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield lambda module: importlib.import_module(f"clu.metric_writers.{module}")
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers.")]:
        monkeypatch.delitem(sys.modules, name)


def test_every_record_is_given_with_its_step():
    writer = Kept()
    run(writer)
    assert writer.given == [(2, {"train/loss": 2.0}), (2, {"epoch/loss": 2.0})]


def test_clus_writer_takes_records_and_hyper_parameters(clu, caplog):
    caplog.set_level(logging.INFO)
    run(clu("logging_writer").LoggingWriter(), config={"rate": 0.1, "token": "x"})
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "[Hyperparameters] {'rate': 0.1, 'token': '***'}" in said
    assert "[2] train/loss=2" in said


def test_clus_asynchronous_writer_has_written_all_when_the_run_ends(clu):
    kept = Kept()
    kept.flush = kept.close = lambda: None
    writer = clu("async_writer").AsyncWriter(kept)
    run(writer)
    assert [step for step, _ in kept.given] == [2, 2]
    writer.close()  # whoever made it does


def test_hyper_parameters_are_given_once_when_a_run_begins():
    writer = Hparams()
    first = run(writer, config={"url": "https://u:p@h"})
    run(writer, first, epochs=2, config={"url": "https://u:p@h"})
    assert [given for given in writer.given if isinstance(given, dict)] == [{"url": "https://***@h"}]


@pytest.mark.parametrize(
    ("writer", "config", "method"),
    [(object(), None, "write_scalars"), (Kept(), {}, "write_hparams")],
    ids=["no scalars", "no hparams"],
)
def test_a_writer_that_cannot_is_refused(writer, config, method):
    with pytest.raises(TypeError, match=f"Writer needs an object with {method}, got {type(writer).__name__}"):
        Writer(writer, config=config)
