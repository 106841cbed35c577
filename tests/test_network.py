"""Networks, `init` and `apply`: options, shapes, the reference implementation, and errors that name the layer."""

import dataclasses
import functools
import json
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fcfunc
from fcfunc import ops, reference
from fcfunc.network import ACTIVATIONS, NORMS
from tests.rules import slow

KEY = jax.random.key(0)
DIMS = [6, 5, 4, 3]


@pytest.fixture
def params():
    return fcfunc.init(KEY, DIMS)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (7, 6))


def with_options(params, x, dims=DIMS, **options):
    return fcfunc.mlp(dims, **options).apply(params, x)


OPTIONS = [
    {},
    {"activation": "gelu_exact", "final_activation": "softmax"},
    {"activation": [("leaky_relu", 0.2), "linear"], "norm": "layer_norm", "norm_eps": 1e-3},
    {"activation": ("elu", 0.5), "residual": True, "dropout_rate": 0.25, "use_bias": False},
    {"compute_dtype": "bfloat16", "norm": "batch_norm", "ops": reference},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_network_equals_the_one_made_from_its_dict_by_json(options):
    net = fcfunc.mlp(DIMS, **options)
    again = fcfunc.mlp(**json.loads(json.dumps(net.to_dict())))
    assert again == net
    assert hash(again) == hash(net)


def test_networks_with_different_options_differ():
    nets = [fcfunc.mlp(DIMS, **options) for options in OPTIONS]
    assert len(set(nets)) == len(nets)


def test_the_dtype_and_the_namespace_may_be_objects_or_names():
    by_name = fcfunc.mlp(DIMS, compute_dtype="bfloat16", ops="reference")
    assert fcfunc.mlp(np.array(DIMS), compute_dtype=jnp.bfloat16, ops=reference) == by_name


def test_a_network_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fcfunc.mlp(DIMS).norm = "layer_norm"  # pyright: ignore[reportAttributeAccessIssue]


def test_replacing_an_option_validates_it():
    with pytest.raises(ValueError, match="unknown norm 'group'"):
        dataclasses.replace(fcfunc.mlp(DIMS), norm="group")


def test_a_network_is_a_static_argument_of_jit(params, x):
    apply = jax.jit(lambda net, params, x: net.apply(params, x), static_argnums=0)
    np.testing.assert_allclose(apply(fcfunc.mlp(DIMS), params, x), fcfunc.apply(params, x), rtol=1e-6)


def test_a_network_can_be_copied_between_processes():
    net = fcfunc.mlp(DIMS, ops=reference)
    assert pickle.loads(pickle.dumps(net)) == net


def test_a_network_prints_as_a_table_of_its_layers():
    lines = str(fcfunc.mlp([784, 128, 10], norm="layer_norm")).splitlines()
    assert lines[0] == "mlp([784, 128, 10], norm='layer_norm')"
    assert lines[2].split() == [
        "0",
        "w",
        "[784,",
        "128],",
        "b",
        "[128],",
        "scale",
        "[128],",
        "offset",
        "[128]",
        "100,736",
        "402,944",
    ]
    assert lines[-1].split() == ["total", "102,026", "408,104", "in", "float32"]


def test_the_printed_count_is_that_of_the_params():
    net = fcfunc.mlp([30, 20, 20, 4], norm="rms_norm", use_bias=False)
    assert f"{sum(a.size for a in jax.tree.leaves(net.init(KEY))):,}" in str(net).splitlines()[-1]


def test_a_function_of_ones_own_says_that_it_cannot_be_saved():
    net = fcfunc.mlp(DIMS, activation=["relu", jnp.sin])
    with pytest.raises(TypeError, match="the activation sin is a function, which cannot be saved; give it"):
        net.to_dict()


def test_an_operation_given_as_a_function_is_its_name():
    assert fcfunc.mlp(DIMS, activation=ops.gelu) == fcfunc.mlp(DIMS, activation="gelu")


def test_default_weights_are_he_normal_and_biases_zero():
    (layer,) = fcfunc.init(KEY, [400, 300])
    assert abs(float(layer["w"].std()) / (2 / 400) ** 0.5 - 1) < 0.02
    np.testing.assert_array_equal(layer["b"], 0)


def test_initializers_and_dtype_are_the_callers():
    init = jax.nn.initializers
    (layer,) = fcfunc.mlp([400, 300]).init(
        KEY, w_init=init.normal(1e-3), b_init=init.constant(0.1), param_dtype=jnp.bfloat16
    )
    chex.assert_type([layer["w"], layer["b"]], jnp.bfloat16)
    assert abs(float(layer["w"].astype(jnp.float32).std()) - 1e-3) < 2e-5
    np.testing.assert_array_equal(layer["b"], jnp.bfloat16(0.1))


def test_an_initializer_without_a_hash_is_accepted():
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, key, shape, dtype):
            return jnp.full(shape, 2, dtype)

    (layer,) = fcfunc.mlp([3, 2]).init(KEY, w_init=Unhashable())
    np.testing.assert_array_equal(layer["w"], 2)


def test_init_is_a_pure_function_of_its_key():
    one, again = fcfunc.init(KEY, [6, 5]), fcfunc.init(KEY, [6, 5])
    chex.assert_trees_all_equal(one, again)
    assert not np.array_equal(one[0]["w"], fcfunc.init(jax.random.key(1), [6, 5])[0]["w"])


def test_a_deeper_network_begins_with_the_layers_of_a_shallower_one():
    chex.assert_trees_all_equal(fcfunc.init(KEY, [6, 5]), fcfunc.init(KEY, [6, 5, 4])[:1])


def test_init_and_apply_work_under_vmap_over_keys_and_params(x):
    keys = jax.random.split(KEY, 3)
    ensemble = jax.vmap(lambda key: fcfunc.init(key, [6, 5, 2]))(keys)
    outputs = jax.vmap(fcfunc.apply, in_axes=(0, None))(ensemble, x)
    for i, key in enumerate(keys):
        np.testing.assert_allclose(outputs[i], fcfunc.apply(fcfunc.init(key, [6, 5, 2]), x), rtol=1e-5, atol=1e-6)


def test_apply_is_affine_layers_with_an_activation_between(params, x):
    h = x
    for p in params[:-1]:
        h = np.tanh(h @ p["w"] + p["b"][None])
    expected = h @ params[-1]["w"] + params[-1]["b"][None]
    np.testing.assert_allclose(fcfunc.apply(params, x, activation="tanh"), expected, rtol=1e-4, atol=1e-5)


def test_features_are_the_input_of_the_last_layer(params, x):
    net = fcfunc.mlp(DIMS, activation="tanh")
    last = ops.affine(net.features(params, x), params[-1]["w"], params[-1]["b"])
    np.testing.assert_allclose(last, net.apply(params, x), rtol=1e-6, atol=1e-6)


def test_features_of_one_layer_are_the_inputs(x):
    np.testing.assert_array_equal(fcfunc.mlp([6, 3]).features(fcfunc.init(KEY, [6, 3]), x), x)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)])
def test_apply_accepts_any_leading_axes(params, shape):
    assert fcfunc.apply(params, jnp.ones(shape)).shape == (*shape[:-1], 3)


def test_an_activation_is_a_name_a_function_none_or_one_per_hidden_layer(params, x):
    mixed = with_options(params, x, activation=["relu", jnp.sin], final_activation="softmax")
    h = np.maximum(x @ params[0]["w"], 0)
    h = np.sin(h @ params[1]["w"])
    np.testing.assert_allclose(mixed, jax.nn.softmax(h @ params[2]["w"], axis=-1), rtol=1e-4, atol=1e-6)


def test_none_and_linear_are_no_activation(params, x):
    expected = x @ params[0]["w"] @ params[1]["w"] @ params[2]["w"]
    for activation in (None, "linear"):
        np.testing.assert_allclose(fcfunc.apply(params, x, activation=activation), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (("leaky_relu", 0.3), functools.partial(jax.nn.leaky_relu, negative_slope=0.3)),
        (["elu", 0.5], functools.partial(jax.nn.elu, alpha=0.5)),
        ("gelu", jax.nn.gelu),
        ("gelu_exact", functools.partial(jax.nn.gelu, approximate=False)),
    ],
)
@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_names_with_numbers_are_the_functions_of_jax(activation, expected, norm, x):
    params = fcfunc.mlp(DIMS, norm=norm).init(KEY)
    by_name = with_options(params, x, activation=activation, norm=norm)
    by_function = with_options(params, x, activation=expected, norm=norm)
    np.testing.assert_allclose(by_name, by_function, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [name if name in ("relu", "softmax") else slow(name) for name in ACTIVATIONS])
def test_the_reference_gives_the_same_network_and_forward_mode(activation, params, x):
    by_rules = lambda x: with_options(params, x, activation=activation)
    by_reference = lambda x: with_options(params, x, activation=activation, ops=reference)
    np.testing.assert_allclose(by_rules(x), by_reference(x), rtol=1e-5, atol=1e-6)
    jacobian = jax.jacfwd(by_reference)(x[:2])
    np.testing.assert_allclose(jax.jacrev(by_rules)(x[:2]), jacobian, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(by_rules, (x,), (x,))


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_the_reference_network_has_no_custom_rule(options, x):
    net = fcfunc.mlp(DIMS, **options, ops=reference)
    params = net.init(KEY)
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda x: net.apply(params, x, key=KEY))(x))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norm_is_applied_between_affine_and_activation(norm, x):
    params = fcfunc.mlp(DIMS, norm=norm).init(KEY)
    leaves = NORMS[norm]
    assert [sorted(p) for p in params] == [sorted(("b", "w", *leaves))] * 2 + [["b", "w"]]
    h = x
    for p in params[:-1]:
        z = getattr(reference, norm)(h @ p["w"], *(p[name] for name in leaves))
        h = jnp.tanh(z)
    expected = h @ params[-1]["w"]
    np.testing.assert_allclose(with_options(params, x, norm=norm, activation="tanh"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norm_eps_is_that_of_the_norm(norm, x):
    net = fcfunc.mlp([6, 5, 3], norm=norm, norm_eps=0.7, activation=None)
    params = net.init(KEY)
    z = getattr(ops, norm)(x @ params[0]["w"], *(params[0][name] for name in NORMS[norm]), eps=0.7)
    np.testing.assert_allclose(net.apply(params, x), z @ params[1]["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", jnp.sin])
@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_a_network_without_biases_is_one_with_biases_of_zero(activation, norm, x):
    net = fcfunc.mlp(DIMS, use_bias=False, activation=activation, norm=norm)
    params = net.init(KEY)
    assert all("b" not in p for p in params)
    biased = [p | {"b": jnp.zeros(p["w"].shape[1])} for p in params]
    loss = lambda p, use_bias: jnp.sum(with_options(p, x, use_bias=use_bias, activation=activation, norm=norm) ** 2)
    ours, theirs = jax.grad(loss)(params, False), jax.grad(loss)(biased, True)
    chex.assert_trees_all_close(ours, [{k: a for k, a in p.items() if k != "b"} for p in theirs], rtol=1e-5, atol=1e-6)


def test_residual_connections_are_added_where_widths_are_equal(x):
    net = fcfunc.mlp([6, 6, 4, 4, 4], activation="tanh", residual=True)
    params = net.init(KEY)
    h = x
    for p in params[:-1]:
        y = jnp.tanh(h @ p["w"])
        h = h + y if h.shape == y.shape else y
    expected = h @ params[-1]["w"]  # no residual connection around the last layer
    np.testing.assert_allclose(net.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.apply(fcfunc.stack(params), x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_needs_a_key(params, x):
    with pytest.raises(TypeError, match=r"apply: dropout_rate 0.5 needs key: a random key in training, or None"):
        with_options(params, x, dropout_rate=0.5)


def test_a_key_of_none_drops_nothing(params, x):
    net = fcfunc.mlp(DIMS, dropout_rate=0.5)
    np.testing.assert_array_equal(net.apply(params, x, key=None), fcfunc.apply(params, x))


def test_dropout_is_a_function_of_its_key(params, x):
    net = fcfunc.mlp(DIMS, dropout_rate=0.5)
    one, again, other = (net.apply(params, x, key=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_each_hidden_layer_drops_its_own_elements_stacked_or_not():
    net = fcfunc.mlp([50, 50, 50, 50, 2], activation=None, dropout_rate=0.5)
    identity = [{"w": jnp.eye(50), "b": jnp.zeros(50)}] * 3 + net.init(KEY)[-1:]
    run = lambda params: net.features(params, jnp.ones((1, 50)), key=KEY)
    kept = run(identity)
    np.testing.assert_array_equal(run(fcfunc.stack(identity)), kept)
    assert set(np.unique(kept)) == {0.0, 8.0}
    assert 1 <= int(jnp.sum(kept == 8)) <= 15  # about 1/8 of 50; reusing one mask for all layers would keep about 1/2


def test_params_of_another_network_are_refused(x):
    with_norm, without = (fcfunc.mlp([6, 5, 3], norm=norm).init(KEY) for norm in ("layer_norm", None))
    with pytest.raises(ValueError, match="layer 0: expected the leaves b, offset, scale, w, got b, w"):
        with_options(without, x, [6, 5, 3], norm="layer_norm")
    with pytest.raises(ValueError, match="layer 0: expected the leaves b, w, got b, offset, scale, w"):
        with_options(with_norm, x, [6, 5, 3])
    with pytest.raises(ValueError, match="layer 0: expected the leaves b, scale, w, got b, offset, scale, w"):
        with_options(with_norm, x, [6, 5, 3], norm="rms_norm")


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([3], ValueError, r"mlp: dims must be at least two widths.* got \[3\]"),
        ([], ValueError, "at least two widths"),
        ([3, 0, 2], ValueError, r"each at least 1, got \[3, 0, 2\]"),
        ([3, -1], ValueError, "each at least 1"),
        ([3, 2.5], TypeError, "sequence of integers"),
        (7, TypeError, "sequence of integers, got 7"),
    ],
)
def test_impossible_dims_are_refused(dims, error, message):
    with pytest.raises(error, match=message):
        fcfunc.init(KEY, dims)


@pytest.mark.parametrize("key", [None, 0, "0", jnp.zeros(3), jax.random.split(KEY)])
def test_a_missing_or_wrong_key_is_refused(key):
    with pytest.raises(TypeError, match="init: key must be one random key"):
        fcfunc.init(key, [3, 2])


def test_a_raw_key_is_accepted():
    assert len(fcfunc.init(jax.random.PRNGKey(0), [3, 2])) == 1


def test_a_wrong_width_of_the_inputs_names_both_shapes(params, x):
    with pytest.raises(ValueError, match=r"layer 0 expects 6 features \(w is \[6, 5\]\), but x is \[7, 5\]"):
        fcfunc.apply(params, x[:, :5])


def test_params_of_a_wrong_width_name_the_layer(params, x):
    broken = [params[0], params[2] | {"w": jnp.ones((4, 4))}, params[2]]
    with pytest.raises(ValueError, match=r"apply, layer 1: w must be \[5, 4\], got \[4, 4\]"):
        with_options(broken, x)


def test_too_few_layers_are_counted(params, x):
    with pytest.raises(ValueError, match=r"dims \[6, 5, 4, 3\] need params of 3 layers, got 2"):
        with_options(params[:2], x)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"activation": "swishy"},
            ValueError,
            "mlp: activation: unknown activation 'swishy'; known are elu",
        ),
        ({"activation": ["relu"]}, ValueError, "activation must list 2 entries, one per hidden layer, got 1"),
        ({"activation": ("relu", 0.5)}, ValueError, "only elu and leaky_relu take a number, got"),
        ({"activation": ("elu", -1)}, ValueError, "the number for elu must be finite and at least 0, got -1"),
        ({"final_activation": "soft"}, ValueError, "unknown activation 'soft'"),
        ({"norm": "group"}, ValueError, "unknown norm 'group'; known are batch_norm, layer_norm, rms_norm"),
        ({"norm": ["layer_norm"]}, ValueError, r"unknown norm \['layer_norm'\]"),
        ({"norm": "rms_norm", "norm_eps": 0}, ValueError, "norm_eps must be above 0 and finite, got 0.0"),
        ({"norm_eps": 1e-3}, ValueError, "norm_eps needs a norm, got 0.001 without one"),
        ({"dropout_rate": 1.5}, ValueError, r"dropout_rate must be in \[0, 1\], got 1.5"),
        ({"residual": 1}, TypeError, "residual must be True or False, got 1"),
        ({"compute_dtype": "bf16"}, TypeError, "compute_dtype must be bfloat16 .*'bf16'"),
        ({"compute_dtype": "float16"}, TypeError, "float16 is not supported.*use bfloat16"),
        ({"compute_dtype": "int8"}, TypeError, "must be bfloat16.*got int8"),
        ({"compute_dtype": "float64"}, TypeError, "float64"),
        ({"ops": jnp}, TypeError, "ops must be fcfunc.ops or fcfunc.reference, got"),
    ],
)
def test_wrong_options_are_refused_on_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        fcfunc.mlp(DIMS, **kwargs)


@pytest.mark.parametrize("bad", [jnp.ones((7, 6), jnp.int32), jnp.ones((7, 6), jnp.bfloat16)])
def test_another_dtype_of_x_is_refused(bad, params):
    with pytest.raises(TypeError, match=rf"apply.*{bad.dtype}\[7,6\]"):
        fcfunc.apply(params, bad)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        fcfunc.apply([], jnp.ones((2, 3)))


def test_a_scalar_input_is_refused(params):
    with pytest.raises(ValueError, match=r"layer 0 expects 6 features .*, but x is \[\]"):
        fcfunc.apply(params, jnp.float32(1))


@pytest.mark.parametrize("compute_dtype", [slow(None), "bfloat16"])
@pytest.mark.parametrize("norm", [None, slow("layer_norm"), slow("rms_norm"), "batch_norm"])
@pytest.mark.parametrize(("residual", "dropout", "stacked"), [slow(False, True, True), (True, False, False)])
def test_rules_and_reference_agree_on_every_kind_of_network(norm, residual, dropout, compute_dtype, stacked):
    rate = 0.3 if dropout else 0.0
    options = {"norm": norm, "residual": residual, "dropout_rate": rate, "compute_dtype": compute_dtype}
    nets = [fcfunc.mlp([6, 6, 6, 6, 3], activation="gelu", ops=namespace, **options) for namespace in (ops, reference)]
    params = nets[0].init(KEY)
    params = fcfunc.stack(params) if stacked else params
    x, key = jax.random.normal(jax.random.key(1), (16, 6)), jax.random.key(5)

    def outputs(params, net):
        if norm == "batch_norm":
            state = net.init_batch_norm_state(params)
            return net.apply_batch_norm(params, state, x, training=True, decay=0.7, key=key)
        return net.apply(params, x, key=key), ()

    def loss(params, net):
        out, state = outputs(params, net)
        return jnp.sum(out**2), state

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    tolerance = 1e-4 if compute_dtype is None else 5e-2
    # Compare norms over all leaves: the gradient of a bias before batch norm is 0 up to rounding error.
    for ours, theirs in zip(*(gradient(params, net) for net in nets), strict=True):
        chex.assert_type(jax.tree.leaves(ours), jnp.float32)
        ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
        assert float(jnp.linalg.norm(ours - theirs)) <= tolerance * float(jnp.linalg.norm(theirs))
    jaxpr = str(jax.make_jaxpr(lambda p: outputs(p, nets[0])[0])(params))
    assert ("bf16" in jaxpr) == (compute_dtype == "bfloat16")


def test_batch_norm_in_evaluation_uses_the_running_statistics():
    net = fcfunc.mlp([6, 5, 3], norm="batch_norm")
    params, x = net.init(KEY), 3 + jax.random.normal(jax.random.key(1), (8, 6))
    state = [{"mean": jnp.arange(5.0), "var": 1 + jnp.arange(5.0)}]
    out, same = net.apply_batch_norm(params, state, x, training=False)
    chex.assert_trees_all_equal(same, state)
    normal = (x @ params[0]["w"] - state[0]["mean"][None]) / jnp.sqrt(state[0]["var"][None] + 1e-5)
    np.testing.assert_allclose(out, jnp.maximum(normal, 0) @ params[1]["w"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("unbiased", "ddof"), [(True, 1), (False, 0)])
def test_training_moves_the_running_statistics_by_decay(unbiased, ddof):
    net = fcfunc.mlp([6, 5, 3], norm="batch_norm")
    params, x = net.init(KEY), 3 + jax.random.normal(jax.random.key(1), (8, 6))
    start, options = net.init_batch_norm_state(params), {"decay": 0.75, "unbiased_variance": unbiased}
    _, moved = net.apply_batch_norm(params, start, x, training=True, **options)
    z = np.asarray(x @ params[0]["w"])
    np.testing.assert_allclose(moved[0]["mean"], 0.25 * z.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved[0]["var"], 0.75 + 0.25 * z.var(0, ddof=ddof), rtol=1e-4)


def test_statistics_are_at_least_float32():
    net = fcfunc.mlp([6, 5, 3], norm="batch_norm")
    params = net.init(KEY, param_dtype=jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(params), jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(net.init_batch_norm_state(params)), jnp.float32)


def test_layers_of_two_dtypes_are_not_stacked():
    one, two = fcfunc.init(KEY, [4, 4, 4, 2])[:2]
    mixed = [one, jax.tree.map(lambda a: a.astype(jnp.bfloat16), two), {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}]
    assert len(fcfunc.stack(mixed)) == 3


@pytest.mark.parametrize("stacked", [False, True])
def test_a_function_of_the_callers_keeps_the_dtype_and_must_keep_the_shape(stacked):
    params = fcfunc.init(KEY, [4, 4, 4, 2])
    params, x = fcfunc.stack(params) if stacked else params, jnp.ones((3, 4))
    dtypes = []

    def widening(z):
        dtypes.append(z.dtype)
        return jnp.sin(z.astype(jnp.float32))

    with_options(params, x, [4, 4, 4, 2], activation=widening, compute_dtype="bfloat16")
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"activation of a hidden layer must keep the shape \[3, 4\], got \[3, 2\]"):
        fcfunc.apply(params, x, activation=lambda z: z[:, :2])


PLAIN, BATCH_NORM = fcfunc.mlp(DIMS), fcfunc.mlp(DIMS, norm="batch_norm")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p, x: fcfunc.mlp(DIMS, dropout_rate=0.5).apply(p, x, key=0),
            TypeError,
            "apply: key must be one random",
        ),
        (lambda p, x: fcfunc.apply(None, x), TypeError, "params must be a list of layers, as from init, got NoneType"),
        (lambda p, x: PLAIN.apply([p[0] | {"gamma": x}, *p[1:]], x), ValueError, "leaves b, w, got b, gamma, w"),
        (lambda p, x: PLAIN.apply_batch_norm(p, [], x, training=True), ValueError, "norm=None; use apply"),
        (lambda p, x: PLAIN.init_batch_norm_state(p), ValueError, "norm=None, which has no state"),
        (lambda p, x: BATCH_NORM.apply(p, x), ValueError, "apply: batch_norm has a state; use apply_batch_norm"),
        (lambda p, x: BATCH_NORM.features(p, x), ValueError, "features: batch_norm has a state; features does not"),
        (lambda p, x: BATCH_NORM.apply_batch_norm(p, None, x, training=True), TypeError, "state must be a list.*None"),
        (lambda p, x: fcfunc.stack([]), ValueError, r"stack: params must be a list of at least one layer, got \[\]"),
        (lambda p, x: fcfunc.unstack(jax.tree.map(lambda a: a[None], p)), ValueError, r"use jax.vmap\(unstack\)"),
        (lambda p, x: fcfunc.stack(jax.tree.map(lambda a: a[None], p)), ValueError, r"use jax.vmap\(stack\)"),
    ],
)
def test_mistakes_are_named(call, error, message, params, x):
    with pytest.raises(error, match=message):
        call(params, x)


def test_scales_of_a_wrong_shape_or_dtype_name_their_layer(x):
    net = fcfunc.mlp([6, 5, 3], norm="layer_norm")
    params = net.init(KEY)
    with pytest.raises(ValueError, match=r"layer 0: scale must be \[5\], got \[4\]"):
        net.apply([params[0] | {"scale": jnp.ones(4)}, params[1]], x)
    with pytest.raises(TypeError, match="layer 0: .*scale.* must have the same dtype"):
        net.apply([params[0] | {"scale": jnp.ones(5, jnp.bfloat16)}, params[1]], x)


def test_numpy_float64_inputs_and_params_are_accepted_without_a_warning():
    params = fcfunc.init(KEY, [4, 8, 3])
    x = np.random.default_rng(0).standard_normal((6, 4))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = fcfunc.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(fcfunc.apply(params, x), expected)  # warnings are errors here
    np.testing.assert_array_equal(fcfunc.apply(wide, x), expected)


@pytest.mark.parametrize("argument", ["activation", "final_activation"])
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda z: z > 0, TypeError, "must return floating-point numbers, got bool"),
        (lambda z: None, TypeError, "must return floating-point numbers, got NoneType"),
        (lambda z: z.sum(-1), ValueError, "must keep the shape"),
    ],
)
def test_a_function_that_is_no_activation_is_refused(argument, function, error, message, params, x):
    with pytest.raises(error, match=message):
        with_options(params, x, **{argument: function})


@pytest.mark.parametrize(
    "options",
    [
        {"dims": [True, 2]},
        {"dims": b"ab"},
        {"dims": {3: 1, 4: 2}},
        {"dropout_rate": "0.5"},
        {"dropout_rate": 10**400},
        {"norm": "rms_norm", "norm_eps": "1e-5"},
        {"activation": ["elu", 10**400]},
        {"compute_dtype": ""},
    ],
)
def test_a_configuration_of_other_kinds_is_a_type_error(options):
    with pytest.raises(TypeError, match="mlp: "):
        fcfunc.mlp(**{"dims": DIMS, **options})


@pytest.mark.parametrize("options", [{"activation": ("leaky_relu", np.nan)}, {"norm": "rms_norm", "norm_eps": np.inf}])
def test_numbers_that_are_not_finite_are_refused(options):
    with pytest.raises(ValueError, match="finite"):
        fcfunc.mlp(DIMS, **options)
