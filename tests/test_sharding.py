"""Training on a mesh matches training on one device: results, layouts, collectives, and memory."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import losses, sharding, train
from tests.helpers import compiled_collectives
from tests.rules import slow

P = PartitionSpec
KINDS = [AxisType.Auto, AxisType.Explicit]
SOME_KINDS = [slow(AxisType.Auto), AxisType.Explicit]
SOME_MODES = [mode if mode in ("data", "fsdp+tensor") else slow(mode) for mode in sharding.MODES]
DIMS = [16, 64, 32, 8]


def make_data(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, DIMS[0]), np.float32), rng.integers(0, DIMS[-1], n, np.int32)


def loss_fn(params, batch, key, net=None):
    x, labels = batch
    logits = fcfunc.apply(params, x) if net is None else net.apply(params, x, key=key)
    loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, labels))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)}


def placed(mode, kind, data, params=None):
    """Returns params and data on a 4 x 2 mesh, or on a mesh of 8 devices for modes without tensor parallelism."""
    params = fcfunc.init(jax.random.key(0), DIMS) if params is None else params
    mesh = sharding.make_mesh(model=2 if "tensor" in mode else 1, axis_type=kind)
    specs = sharding.param_specs(params, mesh, mode)
    return sharding.shard(params, specs, mesh), sharding.global_batch(data, mesh)


def lie_alike(tree, like):
    return jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), tree, like))


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("mode", SOME_MODES)
@pytest.mark.parametrize("accumulate", [slow(1), 2])
def test_a_step_is_that_of_one_device_and_the_state_stays_where_it_lies(kind, mode, accumulate):
    optimizer, data = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9)), make_data(32)

    def steps(params, data):
        state = train.init_state(params, optimizer, jax.random.key(1))
        before = jax.tree.map(jnp.copy, state)
        step = train.make_train_step(loss_fn, optimizer, accumulate=accumulate)
        return before, *step(step(state, data)[0], data)

    _, expected, expected_metrics = steps(fcfunc.init(jax.random.key(0), DIMS), data)
    params, data = placed(mode, kind, data)
    before, state, metrics = steps(params, data)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
    assert lie_alike(state, before)
    momentum = optax.tree.get(state.opt_state, "trace")
    assert lie_alike(momentum, params)


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("mode", [slow(mode) if mode != "fsdp+tensor" else mode for mode in sharding.MODES])
def test_the_whole_epoch_and_fit_run_unchanged_on_a_mesh(kind, mode):
    optimizer, data = optax.adam(1e-3), make_data(88)  # two batches of 32 and one of 24

    def run(params, data):
        state = train.init_state(params, optimizer, jax.random.key(1))
        options = {"epochs": 2, "batch_size": 32, "validation_data": data, "patience": 2, "num_classes": DIMS[-1]}
        return train.fit(loss_fn, optimizer, state, data, **options)

    expected, expected_history = run(fcfunc.init(jax.random.key(0), DIMS), data)
    params, data = placed(mode, kind, data)
    state, history = run(params, data)
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-4, atol=1e-6)
    assert lie_alike(state.params, params)
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(history[name], expected_history[name], rtol=1e-5)


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("accumulate", [slow(1), 2])
def test_a_mesh_of_one_device_is_a_mesh(kind, accumulate):
    optimizer, data = optax.sgd(0.1), make_data(40)
    mesh = sharding.make_mesh(devices=jax.devices()[:1], axis_type=kind)

    def run(params, data):
        state, epoch = train.init_state(params, optimizer, jax.random.key(1)), train.make_train_epoch
        return epoch(loss_fn, optimizer, 16, accumulate=accumulate)(state, data)[0].params

    params = fcfunc.init(jax.random.key(0), DIMS)
    there = run(sharding.shard(params, P(), mesh), sharding.global_batch(data, mesh))
    chex.assert_trees_all_close(there, run(params, data), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_a_last_batch_that_the_devices_do_not_divide_is_taken_by_each_of_them(kind):
    optimizer, (x, labels) = optax.sgd(0.1), make_data(36)
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4], axis_type=kind)

    def run(params, data):
        epoch = train.make_train_epoch(loss_fn, optimizer, 32)
        return epoch(train.init_state(params, optimizer, jax.random.key(1)), data)[0].params

    params = fcfunc.init(jax.random.key(0), DIMS)
    sharded = run(sharding.shard(params, P(), mesh), sharding.global_batch((x, labels), mesh))
    chex.assert_trees_all_close(sharded, run(params, (x, labels)), rtol=1e-5, atol=1e-6)


def test_params_that_lie_nowhere_in_particular_train_beside_data_on_a_mesh():
    optimizer, data = optax.sgd(0.1), make_data(64)
    state = train.init_state(fcfunc.init(jax.random.key(0), DIMS), optimizer, jax.random.key(1))
    expected, _ = train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=32)
    mesh = sharding.make_mesh()
    got, _ = train.fit(loss_fn, optimizer, state, sharding.global_batch(data, mesh), epochs=1, batch_size=32)
    chex.assert_trees_all_close(got.params, expected.params, rtol=1e-5, atol=1e-6)
    assert got.params[0]["w"].sharding.is_fully_replicated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        *((kind, optax.adafactor(1e-3, min_dim_size_to_factor=8)) for kind in KINDS),
        *((kind, optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)) for kind in KINDS),
        *((kind, optax.MultiSteps(optax.adam(1e-3), 2)) for kind in KINDS),
        (AxisType.Auto, optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1))),
    ],
)
def test_optimizers_of_every_kind_run_where_weights_are_divided(kind, optimizer):
    data = make_data(32)

    def run(params, data):
        state = train.init_state(params, optimizer, jax.random.key(1))
        step = train.make_train_step(loss_fn, optimizer)
        return step(step(state, data)[0], data)[0].params

    expected = run(fcfunc.init(jax.random.key(0), DIMS), data)
    chex.assert_trees_all_close(run(*placed("fsdp+tensor", kind, data)), expected, rtol=1e-3, atol=1e-5)


NETWORKS = {
    "gelu, dropout": fcfunc.mlp([16, 32, 32, 8], activation="gelu", dropout_rate=0.5),
    "layer_norm, residual": fcfunc.mlp([16, 32, 32, 8], norm="layer_norm", residual=True, activation="silu"),
    "bfloat16": fcfunc.mlp([16, 32, 32, 8], compute_dtype="bfloat16"),
    "without bias": fcfunc.mlp([16, 32, 32, 8], use_bias=False, activation=("elu", 0.5)),
    "stacked": fcfunc.mlp([16, 32, 32, 32, 8], norm="rms_norm", residual=True),
    "stacked at once": fcfunc.mlp([16, 16, 16, 8]),
}


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("name", [slow(name) if "," in name else name for name in NETWORKS])
def test_every_kind_of_network_has_the_gradients_of_one_device(kind, name):
    net = NETWORKS[name]
    params = fcfunc.stack(net.init(jax.random.key(0)))
    data, key = make_data(32), jax.random.key(3)
    gradient = jax.jit(jax.grad(functools.partial(loss_fn, net=net), has_aux=True))
    expected, _ = gradient(params, data, key)
    got, _ = gradient(*placed("fsdp+tensor", kind, data, params), key)
    tolerance = 2e-2 if net.compute_dtype else 1e-5
    chex.assert_trees_all_close(got, expected, rtol=tolerance, atol=tolerance / 10)


def compiled_step(mode, kind=AxisType.Explicit, accumulate=1, dims=DIMS, rows=32, stacked=False):
    optimizer = optax.sgd(0.1, momentum=0.9)
    params = fcfunc.init(jax.random.key(0), dims)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((rows, dims[0]), np.float32), rng.integers(0, dims[-1], rows, np.int32)
    params, data = placed(mode, kind, data, fcfunc.stack(params) if stacked else params)
    state = train.init_state(params, optimizer, jax.random.key(1))
    return train.make_train_step(loss_fn, optimizer, accumulate=accumulate).lower(state, data).compile(), params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_data_parallel_steps_communicate_one_fused_sum_of_the_gradients(kind, accumulate):
    compiled, params = compiled_step("data", kind, accumulate)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    [(what, elements)] = compiled_collectives(compiled)
    assert what == "all-reduce"
    assert sorted(elements) == sorted([*sizes, 1, 1])  # plus the mean loss and accuracy


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fully_sharded_steps_gather_each_weight_and_leave_no_gradient_whole(accumulate):
    compiled, params = compiled_step("fsdp", accumulate=accumulate)
    exchanged = compiled_collectives(compiled)
    gathered = sorted(n for what, elements in exchanged if what == "all-gather" for n in elements)
    divided = sorted(leaf.size for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated)
    assert gathered == divided
    assert len([what for what, _ in exchanged if what == "all-reduce"]) == 1
    new_state, _ = compiled.output_shardings
    assert jax.tree.all(jax.tree.map(lambda a, s: s.is_equivalent_to(a.sharding, a.ndim), params, new_state.params))


def test_tensor_parallel_steps_gather_no_weight_and_sum_activations_once_for_two_layers():
    """A column-parallel, then a row-parallel layer: one sum after the pair forward, one before the pair backward."""
    compiled, _ = compiled_step("tensor")
    exchanged = compiled_collectives(compiled)
    rows, devices = 32 // 4, 2
    assert {what for what, _ in exchanged} == {"all-reduce", "all-gather"}
    gathered = [elements for what, elements in exchanged if what == "all-gather"]
    assert gathered == [[rows * devices]] * 2  # for the accuracy: each device's best class and its logit
    activations = [elements for what, elements in exchanged if what == "all-reduce" and rows * DIMS[2] in elements]
    assert len(activations) == 2


def test_accumulated_parts_are_summed_before_anything_is_communicated():
    one, four = (compiled_step("data", accumulate=n)[0] for n in (1, 4))
    assert [what for what, _ in compiled_collectives(four)] == ["all-reduce"]
    assert sorted(compiled_collectives(four)[0][1]) == sorted(compiled_collectives(one)[0][1])
    others, entry = four.as_text().split("\nENTRY ")
    assert re.search(r" while\(", others + entry)  # the loop over microbatches calls its own computations,
    assert re.search(r" all-reduce\(", entry)  # and the all-reduce is not in any of them
    assert "all-reduce" not in others


@pytest.mark.parametrize(
    ("mode", "share"), [slow("data", 1.0), ("fsdp", 1 / 8), slow("tensor", 1 / 2), slow("fsdp+tensor", 1 / 8)]
)
def test_the_memory_of_the_state_per_device_falls_as_the_mode_promises(mode, share):
    compiled, params = compiled_step(mode, dims=[128, 512, 512, 128])
    state = 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # params and momentum
    of_weights = 2 * 4 * sum(p["w"].size for p in params)
    batch = 32 // (4 if "tensor" in mode else 8) * (128 + 1) * 4
    expected = of_weights * share + batch
    assert expected <= compiled.memory_analysis().argument_size_in_bytes <= expected + (state - of_weights) + 64


@pytest.mark.slow
def test_scanned_layers_that_are_fully_sharded_are_gathered_one_at_a_time():
    """Gathering all layers would take eight weights; one at a time, with its gradient, takes about three."""
    compiled, params = compiled_step("fsdp", dims=[512] * 9 + [8], stacked=True)
    weight = 4 * 512 * 512
    local = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * weight + 2 * local


@pytest.mark.parametrize("kind", KINDS)
def test_the_large_output_layer_keeps_the_logits_of_its_classes_on_each_device(kind):
    rows, width, classes = 64, 32, 2048
    mesh = sharding.make_mesh(data=2, model=4, axis_type=kind)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, width), np.float32), rng.standard_normal((width, classes), np.float32)
    args = (x, w, rng.standard_normal(classes, np.float32), rng.integers(0, classes, rows, np.int32))
    chunk_size = classes if kind is AxisType.Auto else None

    def loss(x, w, b, labels):
        return jnp.mean(losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    laid = sharding.shard(args, (P("data"), P(None, "model"), P("model"), P("data")), mesh)
    chex.assert_trees_all_close(gradient(*laid), gradient(*args), rtol=1e-4, atol=1e-6)
    compiled = gradient.lower(*laid).compile()
    exchanged = compiled_collectives(compiled)
    assert {what for what, _ in exchanged} == {"all-reduce"}
    assert max(n for _, elements in exchanged for n in elements) <= width * classes // 4
    assert f"[{rows // 2},{classes}]" not in str(compiled.as_text())


def test_each_mode_lays_columns_and_rows_in_turn():
    mesh = sharding.make_mesh(model=2)
    params = fcfunc.mlp([16, 64, 32, 64, 8], norm="layer_norm").init(jax.random.key(0))
    weights = {mode: [s["w"] for s in sharding.param_specs(params, mesh, mode)] for mode in sharding.MODES}
    assert weights["data"] == [P(None, None)] * 4
    assert weights["fsdp"] == [P(None, "data"), P("data", None)] * 2
    assert weights["tensor"] == [P(None, "model"), P("model", None)] * 2
    assert weights["fsdp+tensor"] == [P("data", "model"), P("model", "data")] * 2
    first = sharding.param_specs(params, mesh, "tensor")[0]
    assert first["b"] == first["scale"] == first["offset"] == P("model")


def test_a_stack_is_one_layer_whose_first_axis_is_whole():
    mesh = sharding.make_mesh(model=2)
    params = fcfunc.stack(fcfunc.init(jax.random.key(0), [16, 64, 64, 64, 64, 8]))
    specs = sharding.param_specs(params, mesh, "fsdp+tensor")
    assert [s["w"] for s in specs] == [P("data", "model"), P(None, "model", "data"), P("model", "data")]
    assert specs[1]["b"] == P(None, "data")


def test_rules_of_ones_own_take_logical_names_and_several_mesh_axes():
    mesh = sharding.make_mesh(model=2)
    params = fcfunc.init(jax.random.key(0), [16, 64, 8])
    specs = sharding.param_specs(params, mesh, [("mlp", ("data", "model"))])
    assert [s["w"] for s in specs] == [P(None, ("data", "model")), P(("data", "model"), None)]
    tree = {"table": np.zeros((6, 32)), "shift": np.zeros(32)}
    names = {"table": P(None, "embed"), "shift": P("embed")}
    assert sharding.logical_specs(names, tree, mesh, [("embed", "model")]) == {
        "table": P(None, "model"),
        "shift": P("model"),
    }


def test_a_width_that_another_rule_makes_good_is_left_to_that_rule():
    mesh = sharding.make_mesh()
    params = fcfunc.init(jax.random.key(0), [16, 30, 64, 10])
    assert [s["w"] for s in sharding.param_specs(params, mesh, "fsdp")] == [
        P("data", None),
        P(None, "data"),
        P("data", None),
    ]


def test_what_cannot_be_divided_is_an_error_that_names_layer_width_and_axis():
    mesh, params = sharding.make_mesh(model=4), fcfunc.init(jax.random.key(0), [16, 64, 32, 10])
    with pytest.raises(ValueError, match=r"layer 2, \[32, 10\]: width 10 \(classes\).* 4 devices of mesh axis 'model'"):
        sharding.param_specs(params, mesh, "tensor")
    specs = sharding.param_specs(params, mesh, "tensor", replicate=("classes",))
    assert specs[2]["w"] == P(None, None)
    with pytest.raises(ValueError, match=r"unknown mode 'zero'; expected data, fsdp"):
        sharding.param_specs(params, mesh, "zero")
    with pytest.raises(ValueError, match=r"unknown logical axis 'heads'"):
        sharding.param_specs(params, mesh, [("heads", "model")])
    with pytest.raises(ValueError, match=r"unknown or repeated mesh axis 'expert'; expected data, model"):
        sharding.param_specs(params, mesh, [("mlp", "expert")])
    with pytest.raises(ValueError, match=r"'a'.*width 5 \(embed\).* 2 devices of mesh axis 'data'"):
        sharding.logical_specs({"a": P("embed")}, {"a": np.zeros(5)}, mesh, [("embed", "data")])
    with pytest.raises(ValueError, match=r"no rule for the logical axis 'mpl'; \('mpl', None\) replicates it"):
        sharding.logical_specs(P("mpl"), np.zeros(8), mesh, [("mlp", "model")])
    assert sharding.logical_specs(P("mpl"), np.zeros(8), mesh, [("mpl", None)]) == P(None)
    with pytest.raises(ValueError, match=r"same leading axis, got 8 in local\[0\] and 4 in local\[1\]"):
        sharding.global_batch((np.zeros(8), np.zeros(4)), mesh)
    with pytest.raises(ValueError, match=r"unknown or repeated mesh axis 'x'"):
        sharding.global_batch(np.zeros(8), mesh, axis="x")
    mixed = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    with pytest.raises(ValueError, match=r"all Explicit or all Auto"):
        sharding.shard(params, P(), mixed)
    with pytest.raises(TypeError, match=r"for other pytrees use logical_specs"):
        sharding.param_specs({"w": np.zeros((2, 2))}, mesh, "data")
    with pytest.raises(ValueError, match=r"\['x'\]: width 5 of \[5, 2\].* 2 devices of mesh axis 'data'"):
        sharding.shard({"x": np.zeros((5, 2))}, P("data"), mesh)
    with pytest.raises(ValueError, match=r"\['x'\].*\[5, 2\]; drop"):
        sharding.global_batch({"x": np.zeros((5, 2))}, mesh)
    with pytest.raises(ValueError, match=r"number of devices, 8, got data=3, model=2"):
        sharding.make_mesh(data=3, model=2)


def test_a_batch_that_the_devices_or_the_parts_do_not_divide_is_an_error():
    params, data = placed("data", AxisType.Explicit, make_data(40))
    state = train.init_state(params, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match=r"batches of 20 examples cannot be divided evenly over 8 devices that hold"):
        train.make_train_epoch(loss_fn, optax.sgd(0.1), 20)(state, data)
    with pytest.raises(ValueError, match=r"a batch of 40 examples .* over 8 devices .* times 2 microbatches"):
        train.make_train_step(loss_fn, optax.sgd(0.1), accumulate=2)(state, data)


def test_params_made_where_they_shall_lie_are_those_made_on_one_device():
    mesh, init = sharding.make_mesh(model=2), functools.partial(fcfunc.init, dims=DIMS)
    key = jax.random.key(5)
    specs = sharding.param_specs(jax.eval_shape(init, key), mesh, "fsdp+tensor")
    there = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    chex.assert_trees_all_close(jax.jit(init, out_shardings=there)(key), init(key), rtol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_on_one_device_accumulated_parts_are_the_batch(accumulate):
    optimizer, data = optax.sgd(1.0), make_data(32)
    state = lambda: train.init_state(fcfunc.init(jax.random.key(0), DIMS), optimizer, jax.random.key(1))
    whole, metrics = train.make_train_step(loss_fn, optimizer)(state(), data)
    parts, metrics_of_parts = train.make_train_step(loss_fn, optimizer, accumulate=accumulate)(state(), data)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics_of_parts, metrics, rtol=1e-5)


def test_each_part_and_device_draws_its_own_dropout():
    """The loss is the mean of one draw per example, so its spread shows the number of independent draws."""
    draws = lambda params, batch, key: jnp.mean(params["a"] * 0 + jax.random.normal(key, batch.shape))
    params, data = {"a": jnp.zeros(())}, np.zeros(64, np.float32)
    step = train.make_train_step(draws, optax.sgd(0.1), accumulate=4)
    mesh = sharding.make_mesh()
    state = train.init_state(params, optax.sgd(0.1), jax.random.key(0))
    _, alone = train.make_train_step(draws, optax.sgd(0.1))(jax.tree.map(jnp.copy, state), data)
    _, parts = step(jax.tree.map(jnp.copy, state), data)
    _, shares = step(jax.tree.map(jnp.copy, state), sharding.global_batch(data, mesh))
    assert len({float(m["loss"]) for m in (alone, parts, shares)}) == 3
    assert max(abs(float(m["loss"])) for m in (parts, shares)) < 4 / 64**0.5


@pytest.mark.parametrize("mode", [slow("data"), "fsdp+tensor"])
@pytest.mark.parametrize("kind", [slow(None), *SOME_KINDS])
def test_accumulation_averages_the_model_states_of_the_devices(kind, mode):
    net = fcfunc.mlp(DIMS, norm="batch_norm")
    params = net.init(jax.random.key(0))
    data, optimizer, start = make_data(64), optax.sgd(0.1), net.init_batch_norm_state(params)
    devices = 1 if kind is None else 4 if "tensor" in mode else 8

    def normed(params, batch, key, model_state):
        logits, statistics = net.apply_batch_norm(params, model_state["bn"], batch[0], training=True)
        loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]))
        model_state = {"bn": statistics, "steps": model_state["steps"] + 1, "key": model_state["key"]}
        return loss, {"constant": jnp.float32(3)}, model_state

    def of_a_device(x):
        state = start
        for part in x.reshape(4, -1, x.shape[-1]):
            _, state = net.apply_batch_norm(params, state, part, training=True)
        return state

    each = [of_a_device(x) for x in np.split(data[0], devices)]
    expected = jax.tree.map(lambda *a: sum(a) / devices, *each)
    placed_params, data = (params, data) if kind is None else placed(mode, kind, data, params)
    carried = {"bn": start, "steps": jnp.int32(2**24 + 1), "key": jax.random.key(5)}
    state = train.init_state(placed_params, optimizer, jax.random.key(1), model_state=carried)
    lay = jax.tree.map(lambda a: a.sharding, state.model_state)
    state, metrics = train.make_train_step(normed, optimizer, accumulate=4)(state, data)
    chex.assert_trees_all_close(state.model_state["bn"], expected, rtol=1e-4, atol=1e-5)
    assert int(state.model_state["steps"]) == 2**24 + 5
    assert (jax.random.key_data(state.model_state["key"]) == jax.random.key_data(carried["key"])).all()
    assert float(metrics["constant"]) == 3
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state.model_state, lay))


def test_metrics_that_are_no_means_are_refused_where_parts_are_averaged():
    state = train.init_state(fcfunc.init(jax.random.key(0), DIMS), optax.sgd(0.1), jax.random.key(1))
    per_example = lambda params, batch, key: (loss_fn(params, batch, key)[0], {"hits": batch[1] == 0})
    with pytest.raises(ValueError, match=r"each metric must be a scalar, a mean, got 'hits' \[16\]"):
        train.make_train_step(per_example, optax.sgd(0.1), accumulate=2)(state, make_data(32))


def test_a_mask_of_single_logits_works_where_the_classes_are_sharded():
    rng = np.random.default_rng(0)
    where = rng.uniform(size=(4, 6)) < 0.6
    where[:, 0] = True
    logits, labels = rng.standard_normal((4, 6)).astype(np.float32), where.argmax(axis=1).astype(np.int32)

    def gradient(logits, labels, where):
        loss = losses.softmax_cross_entropy_with_integer_labels
        return jax.grad(lambda logits: jnp.sum(loss(logits, labels, where=where)))(logits)

    expected = gradient(logits, labels, where)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    for spec in (PartitionSpec("x", "y"), PartitionSpec(None, "x")):
        with jax.set_mesh(mesh):
            put = [
                jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec[: a.ndim]))) for a in (logits, labels, where)
            ]
            np.testing.assert_allclose(jax.jit(gradient)(*put), expected, rtol=1e-6, atol=1e-7)
