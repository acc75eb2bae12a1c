"""Many devices in one process: the eight virtual devices that conftest.py configures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from models import refilled
from onstep import Batches, Callback, Engine, evaluate
from onstep.callbacks import EMA, SWA, Checkpoint, Evaluate, GradNorm, Histograms, NaNGuard, Target
from onstep.callbacks.checkpoint import load, save
from onstep.sharding import by_path, create, fsdp, make_mesh, replicated
from onstep.testing import same_bytes

TX = optax.adam(1e-2)


def make(key):
    first, second = jax.random.split(key)
    params = {
        "w1": jax.random.normal(first, (16, 64)) / 4,
        "bias": jnp.zeros(64),
        "w2": jax.random.normal(second, (64, 4)) / 8,
    }
    return {"params": params, "opt": TX.init(params)}


def predict(params, x):
    return jnp.tanh(x @ params["w1"] + params["bias"]) @ params["w2"]


def step(state, batch, rng):
    kept = jax.random.bernoulli(rng, 0.9, batch["x"].shape)

    def loss_fn(params):
        return ((predict(params, batch["x"] * kept) - batch["y"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt = TX.update(grads, state["opt"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, {"loss": loss}, {"grads": grads}


def score(state, batch):
    return {"error": ((predict(state["params"], batch["x"]) - batch["y"]) ** 2).mean()}


def arrays(examples=512):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 16)).astype(np.float32)
    return {"x": x, "y": (x @ rng.normal(size=(16, 4))).astype(np.float32)}


def data():
    return Batches(arrays(), 64)


def count(state, batch):
    return state + batch.sum(), {"rows": jnp.float32(batch.shape[0])}


def run(state, mesh, *callbacks, steps=50, **options):
    engine = Engine(step, callbacks, mesh=mesh, log_every=1, **options)
    return engine.run(state, data(), steps=steps, rng=jax.random.key(1))


def states(kind):
    """Return a mesh, and a state that is placed on it in one of the usual layouts."""
    mesh = make_mesh(data=4, model=2) if kind == "tensor parallel" else make_mesh()
    rules = {"w1": PartitionSpec(None, "model"), "w2": PartitionSpec("model")}
    if kind == "plain":
        return mesh, make(jax.random.key(0))
    layouts = {
        "replicated": replicated,
        "fsdp": lambda m: fsdp(m, small=0),
        "tensor parallel": lambda m: by_path(m, rules),
    }
    return mesh, create(make, layouts[kind](mesh), jax.random.key(0))


KINDS = ["plain", "replicated", "fsdp", "tensor parallel"]


@pytest.fixture(scope="module")
def alone():
    return run(make(jax.random.key(0)), None, GradNorm(), steps_per_call=1)


def layout(tree):
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 8}, {"prefetch": 2}], ids=["plain", "blocks", "prefetch"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_on_a_mesh_equal_those_of_one_device(kind, options, alone):
    mesh, state = states(kind)
    result = run(state, mesh, GradNorm(), **options)
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(result.history[name], alone.history[name], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_carries_keep_their_layout(kind):
    mesh, state = states(kind)
    ema, average = EMA(0.9), SWA(start=1)
    result = run(state, mesh, ema, average, GradNorm(), steps=3)
    if kind != "plain":
        assert layout(result.state) == layout(state)
    assert layout(ema.params(result)) == layout(result.state["params"])
    assert layout(average.params(result)) == layout(result.state["params"])
    assert len(jax.tree.leaves(result.state)[0].sharding.device_set) == 8


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_state_and_carries_are_donated_on_a_mesh(steps_per_call):
    engine, earlier = Engine(count, [EMA(0.9, of=None)], mesh=make_mesh(), steps_per_call=steps_per_call), []
    engine.on("step_end", when=4)(lambda loop: earlier.append(jax.tree.leaves((loop.state, loop.carries))))
    engine.run(jnp.float32(0), [np.ones(8, np.float32)] * 8, epochs=1)
    assert [all(leaf.is_deleted() for leaf in leaves) for leaves in earlier] == [True, False]


def test_step_is_compiled_once_on_a_mesh():
    mesh, state = states("fsdp")
    engine = Engine(step, [EMA(0.9), GradNorm(), NaNGuard()], mesh=mesh)
    engine.run(state, data(), steps=20, rng=jax.random.key(1))
    assert engine._compiled.function.trace_count == 1


def test_each_device_receives_its_part_of_a_batch():
    seen = []

    class Look(Callback):
        def on_step_end(self, loop):
            seen.append(loop.metrics["rows"])

    mesh = make_mesh()
    Engine(count, [Look()], mesh=mesh, steps_per_call=1).run(jnp.float32(0), [np.ones(16, np.float32)], epochs=1)
    assert float(seen[0]) == 16
    text = jax.jit(lambda b: b.sum()).lower(
        jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, PartitionSpec("data")))
    )
    assert "all-reduce" in text.compile().as_text()


def test_engine_adds_no_collective_to_the_step():
    """There are the means of the gradients and of the loss, as in a loop written by hand, and no others."""
    mesh, state = states("replicated")
    engine = Engine(step, [EMA(0.9)], mesh=mesh)
    engine.run(state, data(), steps=1, rng=jax.random.key(1))
    bundle = engine._compiled.bundle(state, engine._compiled.init(state), 0)
    batch = next(iter(data()))
    compiled = engine._compiled.call.trace(bundle, batch, jax.random.key(1), None).lower().compile().as_text()
    by_hand = jax.jit(lambda s, b: step(s, b, jax.random.key(1))[:2], donate_argnums=0)
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    plain = by_hand.lower(state, sharded).compile().as_text()
    for collective in ("all-reduce(", "all-gather(", "reduce-scatter(", "collective-permute(", "all-to-all("):
        assert compiled.count(collective) <= plain.count(collective)
    assert "all-reduce(" in compiled


@pytest.mark.parametrize("many", [True, False])
def test_indivisible_batch_is_refused_naming_leaf_axis_and_devices(many):
    engine = Engine(lambda s, b: (s, {}), mesh=make_mesh(data=8 if many else 4, model=1 if many else 2))
    batch = {"a": np.zeros((8, 2)), "b": np.zeros(60 if many else 62)}
    parts = 8 if many else 4
    with pytest.raises(
        ValueError, match=rf"{parts} parts along the mesh's axes \('data',\) \(8 devices\), got 'b'.* with 6"
    ):
        engine.run(jnp.float32(0), [batch], epochs=1)


def test_short_last_batch_of_an_evaluation_is_replicated():
    mesh, state = states("fsdp")
    held_out = Batches(arrays(100), 64, shuffle=False, drop_last=False)
    there = evaluate(score, state, held_out, mesh=mesh)
    here = evaluate(score, make(jax.random.key(0)), held_out)
    assert there["error"] == pytest.approx(here["error"], rel=1e-5)


def test_evaluation_in_a_run_is_sharded_along_the_mesh():
    mesh, state = states("fsdp")
    shapes = []

    def look(state, batch):
        jax.debug.inspect_array_sharding(
            batch["x"], callback=lambda sharding: shapes.append(sharding.shard_shape((64, 16)))
        )
        return score(state, batch)

    run(state, mesh, Evaluate(look, Batches(arrays(64), 64)), steps=8)
    assert shapes == [(8, 16)]


@pytest.mark.parametrize(
    ("before", "after"),
    [("plain", "fsdp"), ("fsdp", "replicated"), ("fsdp", "tensor parallel"), ("tensor parallel", "plain")],
)
def test_checkpoint_resumes_in_another_layout(before, after, tmp_path, alone):
    mesh, state = states(before)
    ema = EMA(0.9)
    run(state, mesh, ema, Checkpoint(tmp_path, when=10), steps=20)
    mesh, state = states(after)
    result = run(state, mesh, ema, Checkpoint(tmp_path, when=10), steps=50)
    np.testing.assert_allclose(result.history["train/loss"], alone.history["train/loss"][20:], rtol=1e-5)
    fresh = run(states(after)[1], mesh, steps=1)
    assert layout(result.state) == layout(fresh.state)
    assert layout(ema.params(result)) == layout(fresh.state["params"])


@pytest.mark.parametrize("kind", ["fsdp", "plain"])
def test_run_on_one_device_resumes_on_many_and_back(kind, tmp_path, alone, capsys):
    run(make(jax.random.key(0)), None, GradNorm(), Checkpoint(tmp_path, when=10), steps=20)
    mesh, state = states(kind)
    run(state, mesh, GradNorm(), Checkpoint(tmp_path, when=10), steps=30)
    result = run(make(jax.random.key(0)), None, GradNorm(), Checkpoint(tmp_path, when=10), steps=50)
    np.testing.assert_allclose(result.history["train/loss"], alone.history["train/loss"][30:], rtol=1e-5)
    assert len(jax.tree.leaves(result.state)[0].sharding.device_set) == 1
    assert "changed since" not in capsys.readouterr().err  # a mesh adds operations to the same step


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 8}], ids=["plain", "blocks"])
def test_resumed_run_ends_in_the_same_bytes_on_the_same_mesh(options, tmp_path):
    def once(directory, *cuts):
        for steps in cuts:
            mesh, state = states("fsdp")
            result = run(state, mesh, EMA(0.9), GradNorm(), Checkpoint(directory, when=7), steps=steps, **options)
        return result

    whole, cut = once(tmp_path / "a", 40), once(tmp_path / "b", 13, 14, 40)
    assert same_bytes(whole.snapshot.tree, cut.snapshot.tree)


def test_result_resumes_in_the_layout_of_its_run():
    mesh, state = states("fsdp")
    engine = Engine(step, [EMA(0.9)], mesh=mesh, log_every=1)
    rng = jax.random.key(1)
    cut = engine.run(engine.run(state, data(), steps=20, rng=rng), data(), steps=40, rng=rng)
    whole = engine.run(state, data(), steps=40, rng=rng)
    assert same_bytes(whole.state, cut.state)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(cut.state), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.parametrize("replicate", [False, True], ids=["from the host", "replicated"])
def test_assigned_state_keeps_the_layout_of_the_previous_state(replicate):
    class Double(Callback):
        when = 2

        def on_step_end(self, loop):
            doubled = 2 * np.asarray(loop.state)
            loop.state = jax.device_put(doubled, NamedSharding(mesh, PartitionSpec())) if replicate else doubled
            assert loop.state.sharding == state.sharding

    mesh = make_mesh()
    state = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    engine = Engine(lambda s, b: (s + b.mean(), {}), [Double()], mesh=mesh)
    result = engine.run(state, [np.ones(8, np.float32)] * 3, epochs=1)
    assert result.state.sharding == state.sharding
    np.testing.assert_allclose(result.state, 2 * (np.arange(8) + 2) + 1)


def test_uncompiled_steps_run_on_a_mesh():
    engine = Engine(count, mesh=make_mesh(), jit=False)
    assert float(engine.run(jnp.float32(0), [np.ones(16, np.float32)] * 2, epochs=1).state) == 32


def test_batches_already_on_the_devices_stay_there():
    mesh = make_mesh()
    batch = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, PartitionSpec()))
    assert float(Engine(count, mesh=mesh).run(jnp.float32(0), [batch] * 2, epochs=1).state) == 32


def test_scalars_in_a_batch_are_replicated():
    engine = Engine(lambda s, b: (s + (b["x"] * b["scale"] * b["two"]).sum(), {}), mesh=make_mesh())
    batch = {"x": np.ones(8, np.float32), "scale": np.float32(3), "two": 2}
    assert float(engine.run(jnp.float32(0), [batch], epochs=1).state) == 48


def test_batch_sharding_may_split_further_axes():
    mesh = make_mesh(rows=4, sequence=2)
    seen = []

    def look(state, batch):
        jax.debug.inspect_array_sharding(batch, callback=lambda sharding: seen.append(sharding.shard_shape((8, 6))))
        return state + batch.sum(), {}

    engine = Engine(look, mesh=NamedSharding(mesh, PartitionSpec("rows", "sequence")))
    assert float(engine.run(jnp.float32(0), [np.ones((8, 6), np.float32)], epochs=1).state) == 48
    assert seen == [(2, 3)]


def test_target_networks_and_histograms_work_on_sharded_parameters(tmp_path):
    mesh = make_mesh()
    start = create(lambda: {"params": jnp.ones((16, 4)), "target": jnp.zeros((16, 4))}, fsdp(mesh, small=0))

    def move(state, batch):
        return {**state, "params": state["params"] + batch.mean()}, {}

    engine = Engine(move, [Target(rate=0.5), Histograms(tmp_path)], mesh=mesh)
    result = engine.run(start, [np.ones(8, np.float32)] * 2, epochs=1)
    np.testing.assert_allclose(result.state["target"], 0.5 * (0.5 * 2) + 0.5 * 3)
    assert result.state["target"].sharding == start["target"].sharding


def test_saved_trees_load_into_another_layout(tmp_path):
    mesh = make_mesh()
    tree = create(lambda: {"w": jnp.arange(32.0).reshape(8, 4)}, fsdp(mesh, small=0))
    save(tmp_path, tree)
    here = load(tmp_path, like={"w": jnp.zeros((8, 4))})
    there = load(tmp_path, like=create(lambda: {"w": jnp.zeros((8, 4))}, replicated(mesh)))
    assert len(here["w"].sharding.device_set) == 1
    assert there["w"].sharding.is_fully_replicated
    np.testing.assert_array_equal(here["w"], np.arange(32.0).reshape(8, 4))
    np.testing.assert_array_equal(there["w"], here["w"])


def test_state_on_other_devices_is_refused():
    half = Mesh(np.array(jax.devices()[:4]), ("data",))
    state = jax.device_put(jnp.zeros(8), NamedSharding(half, PartitionSpec("data")))
    with pytest.raises(ValueError, match="mesh's 8 devices, got a leaf of shape .* on 4 others"):
        Engine(lambda s, b: (s, {}), mesh=make_mesh()).run(state, [np.ones(8)], epochs=1)


def two_meshes():
    return {name: NamedSharding(make_mesh(**{name: 8}), PartitionSpec()) for name in ("x", "y")}


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 8}], ids=["plain", "blocks"])
def test_mesh_with_explicit_axes_trains_like_one_device(options, alone):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    result = run(make(jax.random.key(0)), mesh, GradNorm(), EMA(0.9), Evaluate(score, data(), when=50), **options)
    for name in ("train/loss", "train/grad_norm"):
        np.testing.assert_allclose(result.history[name], alone.history[name], rtol=1e-5)
    error = evaluate(score, alone.state, data())["error"]
    assert result.history["val/error"] == [pytest.approx(error, rel=1e-4)]


def test_step_can_ask_for_the_mesh_with_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    seen = set()

    def look(state, batch):
        seen.add(jax.sharding.get_abstract_mesh().axis_names)
        return state + batch.sum(), {}

    Engine(look, mesh=mesh).run(jnp.float32(0), [np.ones(8, np.float32)], epochs=1)
    assert seen == {("data",)}


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_arrays_of_a_batch_stay_where_the_user_put_them(steps_per_call):
    mesh = make_mesh(data=4, model=2)
    seen = {}

    def look(state, batch):
        for name, leaf in batch.items():
            jax.debug.inspect_array_sharding(leaf, callback=lambda s, name=name: seen.setdefault(name, s))
        return state + sum(leaf.sum() for leaf in batch.values()), {}

    table = jax.device_put(np.ones((3, 2), np.float32), NamedSharding(mesh, PartitionSpec(None, "model")))
    whole = jax.device_put(np.ones(5, np.float32), NamedSharding(mesh, PartitionSpec()))
    batches = [{"x": np.ones(8, np.float32), "table": table, "whole": whole}] * 4
    result = Engine(look, mesh=mesh, steps_per_call=steps_per_call).run(jnp.float32(0), batches, epochs=1)
    assert float(result.state) == 4 * (8 + 6 + 5)
    assert [seen[name].shard_shape(shape) for name, shape in (("x", (8,)), ("table", (3, 2)), ("whole", (5,)))] == [
        (2,),
        (3, 1),
        (5,),
    ]


def test_mesh_may_be_a_sharding_for_each_part_of_a_batch():
    mesh = make_mesh()
    there = {"x": NamedSharding(mesh, PartitionSpec("data")), "shared": NamedSharding(mesh, PartitionSpec())}
    seen = {}

    def look(state, batch):
        for name, leaf in (("x", batch["x"]), ("a", batch["shared"]["a"])):
            jax.debug.inspect_array_sharding(leaf, callback=lambda s, name=name: seen.setdefault(name, s))
        return state + batch["x"].sum() + batch["shared"]["a"].sum(), {}

    batch = {"x": np.ones(16, np.float32), "shared": {"a": np.ones(3, np.float32)}}
    engine = Engine(look, mesh=there)
    assert float(engine.run(jnp.float32(0), [batch] * 2, epochs=1).state) == 38
    assert (seen["x"].shard_shape((16,)), seen["a"].shard_shape((3,))) == ((2,), (3,))
    with pytest.raises(ValueError, match=r"the leaves \['y'\], got them for \['shared', 'x'\]"):
        engine.run(jnp.float32(0), [{"y": np.ones(16, np.float32)}], epochs=1)


def test_state_on_many_devices_without_a_mesh_is_warned_of():
    state = jax.device_put(np.zeros(8, np.float32), NamedSharding(make_mesh(), PartitionSpec("data")))
    engine = Engine(lambda s, b: (s + b.sum(), {}), steps_per_call=1)
    with pytest.warns(UserWarning, match="state is on 8 devices, but the engine has no mesh"):
        engine.run(state, [np.ones(8, np.float32)], epochs=1)


@pytest.mark.parametrize(
    ("mesh", "error", "match"),
    [
        (lambda: 8, TypeError, "jax.sharding.Mesh, a NamedSharding or a tree of them, got int"),
        (lambda: make_mesh(a=4, b=2), ValueError, "an axis 'data' over which batches are divided"),
        (lambda: two_meshes(), ValueError, "shardings over one mesh"),
    ],
    ids=["a number", "unknown axes", "two meshes"],
)
def test_unusable_mesh_is_refused_when_the_engine_is_made(mesh, error, match):
    with pytest.raises(error, match=match):
        Engine(step, mesh=mesh())


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "model": 3}, {"a": -1, "b": -1}, {"data": 4}])
def test_axis_sizes_that_do_not_match_the_device_count_are_refused(sizes):
    with pytest.raises(ValueError, match="make up 8 devices"):
        make_mesh(**sizes)


def test_make_mesh_has_auto_axes_of_the_given_sizes():
    mesh = make_mesh(data=-1, model=2)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh().shape) == {"data": 8}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 64), PartitionSpec(None, "data")),
        ((64, 16), PartitionSpec("data")),
        ((7, 24), PartitionSpec(None, "data")),
        ((7, 9), PartitionSpec()),
        ((), PartitionSpec()),
    ],
)
def test_fsdp_shards_the_largest_divisible_axis(shape, spec):
    assert fsdp(make_mesh(), small=0)(jax.ShapeDtypeStruct(shape, jnp.float32)).spec == spec


def test_fsdp_replicates_small_leaves():
    layout = fsdp(make_mesh(), small=100)
    assert layout(jax.ShapeDtypeStruct((96,), jnp.float32)).spec == PartitionSpec()
    assert layout(jax.ShapeDtypeStruct((104,), jnp.float32)).spec == PartitionSpec("data")


def test_fsdp_holds_an_eighth_of_the_state_on_each_device():
    state = create(make, fsdp(make_mesh(), small=0), jax.random.key(0))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert here < whole / 8 + 8


def test_rules_by_path_apply_to_the_optimizer_state():
    mesh = make_mesh(data=4, model=2)
    rules = {"w1": PartitionSpec(None, "model"), "w2": PartitionSpec("model")}
    specs = layout(create(make, by_path(mesh, rules, otherwise=fsdp(mesh, small=0)), jax.random.key(0)))
    assert specs["['params']['w1']"] == specs["['opt'][0].mu['w1']"] == PartitionSpec(None, "model")
    assert specs["['params']['bias']"] == PartitionSpec("data")


def test_rule_that_matches_no_leaf_or_does_not_divide_is_refused():
    mesh = make_mesh(data=4, model=2)
    with pytest.raises(ValueError, match=r"no leaf matches \['kernel'\]"):
        create(make, by_path(mesh, {"kernel": PartitionSpec("model")}), jax.random.key(0))
    with pytest.raises(
        ValueError, match="by_path: w has an axis of size 7, which does not divide evenly over 2 devices"
    ):
        by_path(mesh, {"w": PartitionSpec("model")})({"w": jax.ShapeDtypeStruct((7,), jnp.float32)})
    with pytest.raises(ValueError, match="fsdp needs an axis of the mesh, got 'rows'"):
        fsdp(mesh, "rows")


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 4}, {"prefetch": 2}], ids=["plain", "blocks", "prefetch"])
def test_source_may_reuse_its_arrays(options):
    engine = Engine(lambda state, batch: (state, {"mean": batch.mean()}), mesh=make_mesh(), log_every=1, **options)
    result = engine.run(jnp.int32(0), lambda epoch: refilled(), epochs=1)
    assert result.history["train/mean"] == list(range(40))


def test_host_and_device_arrays_may_mix_in_a_batch():
    engine = Engine(lambda s, b: (s + (b["host"] * b["device"] * b["number"]).sum(), {}), mesh=make_mesh())
    batch = {"host": np.ones(8, np.float32), "device": jnp.ones(8), "number": 2}
    assert float(engine.run(jnp.float32(0), [batch, {**batch, "device": np.ones(8, np.float32)}], epochs=1).state) == 32
