"""Summary: the tables that it prints."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from onstep import Engine
from onstep.callbacks import EMA
from onstep.callbacks.summary import Summary


def stay(state, batch):
    return state, {}


def printed(state, *arguments, others=(), **options):
    """Return the cells of the two tables, by the first cell of each line."""
    file = io.StringIO()
    Engine(stay, [*others, Summary(*arguments, file=file, **options)]).run(state, [0], epochs=1)
    tables = file.getvalue().split("| Field")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}


def make_state():
    params = {"dense": {"kernel": jnp.ones((30, 40)), "bias": jnp.zeros(40, jnp.bfloat16)}}
    return TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9))


def test_tables_list_parameters_and_the_size_of_each_field():
    rows = printed(make_state(), others=[EMA()])
    assert rows["Name"] == ["Shape", "Dtype", "Size", "Bytes"]
    assert rows["dense/kernel"] == ["(30, 40)", "float32", "1,200", "4,800"]
    assert rows["dense/bias"] == ["(40,)", "bfloat16", "40", "80"]
    fields = {"step": ["1", "4"], "params": ["1,240", "4,880"], "opt_state": ["1,240", "4,880"]}
    fields |= {"carries": ["1,240", "4,960"], "total": ["3,721", "14,724"]}
    assert {name: rows[name] for name in fields} == fields


def test_totals_are_the_bytes_on_the_device():
    state = {"params": {"w": jnp.ones((3, 5))}, "rng": jax.random.key(0), "step": 0}
    expected = sum(leaf.nbytes for leaf in jax.tree.leaves(Engine(stay).run(state, [0], epochs=1).state))
    assert printed(state)["total"][1] == str(expected)


def test_stats_add_mean_and_standard_deviation():
    values = np.random.default_rng(0).normal(size=99).astype(np.float32)
    rows = printed({"params": {"w": values, "half": jnp.bfloat16([1, 3]), "n": 7}}, stats=True)
    assert [float(x) for x in rows["w"][-2:]] == pytest.approx([values.mean(), values.std()], rel=0.01)
    assert (rows["Name"][-2:], rows["half"][-2:], rows["n"][-2:]) == (["Mean", "Std"], ["2.0", "1.0"], ["", ""])


@pytest.mark.parametrize("stats", [True, False])
def test_every_kind_of_leaf_is_listed(stats):
    params = {"key": jax.random.key(0), "nan": jnp.nan, "no": jnp.zeros((0, 3)), "z": 1j, "flag": True, "none": None}
    rows = printed({"params": params}, stats=stats)
    assert [rows[name][1] for name in ("key", "nan", "no", "z", "flag")] == [
        "key<fry>",
        "float32",
        "float32",
        "complex64",
        "bool",
    ]
    assert rows["params"] == ["4", "21"]


def test_empty_tree_prints_an_empty_table_to_stderr(capsys):
    Engine(stay, [Summary()]).run({"params": {}}, [0], epochs=1)
    out = capsys.readouterr()
    assert (out.out, out.err.startswith("(empty table)\n")) == ("", True)


@pytest.mark.parametrize(
    ("state", "of", "names"),
    [
        pytest.param({"gen": {"params": {"w": 1.0}}, "disc": 2.0}, "gen.params", {"w"}, id="nested"),
        pytest.param({"gen": {"params": {"w": 1.0}}, "disc": 2.0}, None, {"gen/params/w", "disc"}, id="all"),
        pytest.param(nnx.State({"w": nnx.Param(jnp.ones(2))}), None, {"w/value"}, id="NNX"),
        pytest.param(1.0, None, {"(the tree itself)"}, id="bare array"),
    ],
)
def test_of_selects_the_leaves_to_list(state, of, names):
    assert names <= set(printed(state, of))


def test_summary_is_printed_once_per_run():
    file = io.StringIO()
    engine = Engine(stay, [Summary(file=file)])
    first = engine.run({"params": 1.0}, [0] * 4, steps=2)
    assert file.getvalue().count("Name") == 1
    engine.run(first, [0] * 4, steps=4)
    assert file.getvalue().count("Name") == 2


def test_missing_field_is_an_error_that_lists_the_fields():
    with pytest.raises(ValueError, match=r"Summary needs 'weights' in the state, but dict has \['params'\]"):
        printed({"params": 1.0}, "weights")
