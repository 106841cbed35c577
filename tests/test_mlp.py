"""init and apply: shapes, initialisers, activations, the plain twins, and errors that name the layer."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fcfunc
from fcfunc import mlp, ops, reference
from tests.table import slow


@pytest.fixture
def params():
    return fcfunc.init(jax.random.key(0), [6, 5, 4, 3])


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (7, 6))


def test_default_weights_are_he_normal_and_biases_zero():
    (layer,) = fcfunc.init(jax.random.key(0), [400, 300])
    assert abs(float(layer["w"].std()) / (2 / 400) ** 0.5 - 1) < 0.02
    np.testing.assert_array_equal(layer["b"], 0)


def test_initialisers_and_dtype_are_the_callers():
    init = jax.nn.initializers
    (layer,) = fcfunc.init(
        jax.random.key(0), [400, 300], w_init=init.normal(1e-3), b_init=init.constant(0.1), param_dtype=jnp.bfloat16
    )
    chex.assert_type([layer["w"], layer["b"]], jnp.bfloat16)
    assert abs(float(layer["w"].astype(jnp.float32).std()) - 1e-3) < 2e-5
    np.testing.assert_array_equal(layer["b"], jnp.bfloat16(0.1))


def test_init_is_a_pure_function_of_its_key_and_a_deeper_network_begins_alike():
    one, again, deeper = (fcfunc.init(jax.random.key(s), d) for s, d in [(0, [6, 5]), (0, [6, 5]), (0, [6, 5, 4])])
    chex.assert_trees_all_equal(one, again, deeper[:1])
    assert not np.array_equal(one[0]["w"], fcfunc.init(jax.random.key(1), [6, 5])[0]["w"])


def test_init_and_apply_work_under_vmap_over_keys_and_params(x):
    keys = jax.random.split(jax.random.key(0), 3)
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


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)])
def test_apply_takes_any_leading_axes(params, shape):
    assert fcfunc.apply(params, jnp.ones(shape)).shape == (*shape[:-1], 3)


def test_apply_flattens_images(params):
    images = jax.random.normal(jax.random.key(0), (7, 3, 2))
    np.testing.assert_array_equal(
        fcfunc.apply(params, images, flatten=True), fcfunc.apply(params, images.reshape(7, 6))
    )


def test_an_activation_is_a_name_a_function_none_or_one_per_hidden_layer(params, x):
    mixed = fcfunc.apply(params, x, activation=["relu", jnp.sin], final_activation="softmax")
    h = np.maximum(x @ params[0]["w"], 0)
    h = np.sin(h @ params[1]["w"])
    np.testing.assert_allclose(mixed, jax.nn.softmax(h @ params[2]["w"], axis=-1), rtol=1e-4, atol=1e-6)
    linear = fcfunc.apply(params, x, activation=None)
    np.testing.assert_array_equal(linear, fcfunc.apply(params, x, activation="linear"))


@pytest.mark.parametrize(
    "activation", [name if name in ("relu", "softmax") else slow(name) for name in mlp.ACTIVATIONS]
)
def test_the_plain_twins_give_the_same_network_and_forward_mode(activation, params, x):
    by_rules = lambda x: fcfunc.apply(params, x, activation=activation)
    by_twins = lambda x: fcfunc.apply(params, x, activation=activation, ops=reference)
    np.testing.assert_allclose(by_rules(x), by_twins(x), rtol=1e-5, atol=1e-6)
    jacobian = jax.jacfwd(by_twins)(x[:2])
    np.testing.assert_allclose(jax.jacrev(by_rules)(x[:2]), jacobian, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(by_rules, (x,), (x,))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_norm_stands_between_affine_and_activation(norm, x):
    params = fcfunc.init(jax.random.key(0), [6, 5, 4, 3], norm=norm)
    leaves = mlp.NORMS[norm]
    assert [sorted(p) for p in params] == [sorted(("b", "w", *leaves))] * 2 + [["b", "w"]]
    h = x
    for p in params[:-1]:
        z = getattr(reference, norm)(h @ p["w"], *(p[name] for name in leaves))
        h = jnp.tanh(z)
    expected = h @ params[-1]["w"]
    np.testing.assert_allclose(fcfunc.apply(params, x, norm=norm, activation="tanh"), expected, rtol=1e-4, atol=1e-5)


def test_residual_connections_stand_where_widths_are_equal(x):
    params = fcfunc.init(jax.random.key(0), [6, 6, 4, 4, 4])
    h = x
    for p in params[:-1]:
        y = jnp.tanh(h @ p["w"])
        h = h + y if h.shape == y.shape else y
    expected = h @ params[-1]["w"]  # no connection around the last layer
    got = fcfunc.apply(params, x, activation="tanh", residual=True)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    stacked = fcfunc.apply(mlp.stack(params), x, activation="tanh", residual=True)
    np.testing.assert_allclose(stacked, expected, rtol=1e-4, atol=1e-5)


def test_dropout_needs_a_key_and_none_means_that_nothing_is_dropped(params, x):
    with pytest.raises(TypeError, match=r"dropout_rate 0.5 needs key: a random key in training, or None"):
        fcfunc.apply(params, x, dropout_rate=0.5)
    np.testing.assert_array_equal(fcfunc.apply(params, x, dropout_rate=0.5, key=None), fcfunc.apply(params, x))
    one, again, other = (fcfunc.apply(params, x, dropout_rate=0.5, key=jax.random.key(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_each_hidden_layer_drops_its_own_elements_stacked_or_not():
    params = fcfunc.init(jax.random.key(0), [50, 50, 50, 50, 2])
    x, key = jnp.ones((1, 50)), jax.random.key(0)
    run = lambda params: fcfunc.apply(params, x, activation=None, dropout_rate=0.5, key=key, head=lambda h, w, b: h)
    identity = [{"w": jnp.eye(50), "b": jnp.zeros(50)}] * 3 + params[-1:]
    kept = run(identity)
    np.testing.assert_array_equal(run(mlp.stack(identity)), kept)
    assert set(np.unique(kept)) == {0.0, 8.0}
    assert 1 <= int(jnp.sum(kept == 8)) <= 15  # an eighth of 50, were one mask used thrice it would be half


def test_a_partial_of_an_operation_counts_as_its_name_and_is_switched_with_it(params, x):
    leaky = functools.partial(ops.leaky_relu, negative_slope=0.5)
    by_rule = jax.make_jaxpr(lambda x: fcfunc.apply(params, x, activation=leaky))(x)
    assert "name=layer" in str(by_rule)
    plain = fcfunc.apply(params, x, activation=leaky, ops=reference)
    np.testing.assert_allclose(fcfunc.apply(params, x, activation=leaky), plain, rtol=1e-5, atol=1e-6)
    assert "custom_vjp" not in str(
        jax.make_jaxpr(lambda x: fcfunc.apply(params, x, activation=leaky, ops=reference))(x)
    )
    np.testing.assert_array_equal(
        fcfunc.apply(params, x, activation=ops.gelu), fcfunc.apply(params, x, activation="gelu")
    )


def test_params_of_a_norm_and_the_norm_go_together(x):
    with_norm, without = (fcfunc.init(jax.random.key(0), [6, 5, 3], norm=norm) for norm in ("layer_norm", None))
    with pytest.raises(
        ValueError, match=r"layer 0: layer_norm needs the leaf 'scale'; init\(..., norm='layer_norm'\) makes it"
    ):
        fcfunc.apply(without, x, norm="layer_norm")
    with pytest.raises(ValueError, match="layer 0: the params have a leaf .*, which is not used with norm=None"):
        fcfunc.apply(with_norm, x)
    with pytest.raises(
        ValueError, match="layer 0: the params have a leaf 'offset', which is not used with norm='rms_norm'"
    ):
        fcfunc.apply(with_norm, x, norm="rms_norm")
    with pytest.raises(ValueError, match="unknown norm 'group'; known are batch_norm, layer_norm, rms_norm"):
        fcfunc.init(jax.random.key(0), [6, 5, 3], norm="group")


def test_a_namespace_of_ones_own_needs_affine_and_its_activations_alone(params, x):
    own = types.SimpleNamespace(affine=lambda x, w, b: x @ w, tanh=jnp.sin)
    expected = jnp.sin(jnp.sin(x @ params[0]["w"]) @ params[1]["w"]) @ params[2]["w"]
    np.testing.assert_allclose(fcfunc.apply(params, x, activation="tanh", ops=own), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([3], ValueError, r"at least two widths.* got \[3\]"),
        ([], ValueError, "at least two widths"),
        ([3, 0, 2], ValueError, r"each at least 1, got \[3, 0, 2\]"),
        ([3, -1], ValueError, "each at least 1"),
        ([3, 2.5], TypeError, "sequence of integers"),
        (7, TypeError, "sequence of integers, got 7"),
    ],
)
def test_impossible_dims_are_refused(dims, error, message):
    with pytest.raises(error, match=message):
        fcfunc.init(jax.random.key(0), dims)


@pytest.mark.parametrize("key", [None, 0, "0", jnp.zeros(3), jax.random.split(jax.random.key(0))])
def test_a_missing_or_wrong_key_is_refused(key):
    with pytest.raises(TypeError, match="init: key must be one random key"):
        fcfunc.init(key, [3, 2])


def test_a_raw_key_is_accepted():
    assert len(fcfunc.init(jax.random.PRNGKey(0), [3, 2])) == 1


def test_a_wrong_width_names_the_layer_and_both_shapes(params, x):
    with pytest.raises(ValueError, match=r"layer 0: w \[5, fan_out\] .* follow x \[7, 5\], got w \[6, 5\]"):
        fcfunc.apply(params, x[:, :5])
    broken = [params[0], params[2]]
    with pytest.raises(ValueError, match=r"layer 1: w \[5, fan_out\] .* layer 0's w \[6, 5\], got w \[4, 3\]"):
        fcfunc.apply(broken, x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "swishy"}, "unknown activation 'swishy'; known are elu, gelu, leaky_relu"),
        ({"activation": ["relu"]}, "2 activations expected, one per hidden layer, got 1"),
        ({"final_activation": "soft"}, "unknown activation 'soft'"),
    ],
)
def test_wrong_activations_are_refused(kwargs, message, params, x):
    with pytest.raises(ValueError, match=message):
        fcfunc.apply(params, x, **kwargs)


@pytest.mark.parametrize("bad", [jnp.ones((7, 6), jnp.int32), jnp.ones((7, 6), jnp.bfloat16)])
def test_another_dtype_of_x_is_refused(bad, params):
    with pytest.raises(TypeError, match=rf"apply.*{bad.dtype}\[7,6\]"):
        fcfunc.apply(params, bad)


def test_no_layers_and_scalars_are_refused(params):
    with pytest.raises(ValueError, match="at least one layer"):
        fcfunc.apply([], jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="got a scalar"):
        fcfunc.apply(params, jnp.float32(1))


def options_of(norm, residual, dropout, compute_dtype):
    options = {"residual": residual, "compute_dtype": compute_dtype, "activation": "gelu"}
    return options | ({"dropout_rate": 0.3, "key": jax.random.key(5)} if dropout else {})


@pytest.mark.parametrize("compute_dtype", [slow(None), "bfloat16"])
@pytest.mark.parametrize("norm", [None, slow("layer_norm"), slow("rms_norm"), "batch_norm"])
@pytest.mark.parametrize(("residual", "dropout", "stacked"), [slow(False, True, True), (True, False, False)])
def test_rules_and_twins_agree_on_every_kind_of_network(norm, residual, dropout, compute_dtype, stacked):
    params = fcfunc.init(jax.random.key(0), [6, 6, 6, 6, 3], norm=norm)
    params = mlp.stack(params) if stacked else params
    x = jax.random.normal(jax.random.key(1), (16, 3, 2))
    options = options_of(norm, residual, dropout, compute_dtype) | {"flatten": True}

    def outputs(params, ops):
        if norm == "batch_norm":
            state = fcfunc.init_batch_norm_state(params)
            return fcfunc.apply_batch_norm(params, state, x, training=True, decay=0.7, ops=ops, **options)
        return fcfunc.apply(params, x, norm=norm, ops=ops, **options), ()

    def loss(params, ops):
        out, state = outputs(params, ops)
        return jnp.sum(out**2), state

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    tolerance = 1e-4 if compute_dtype is None else 5e-2
    # All together: the gradient of a bias before a batch norm is 0, and what is left of it is rounding.
    for ours, theirs in zip(gradient(params, ops), gradient(params, reference), strict=True):
        chex.assert_type(jax.tree.leaves(ours), jnp.float32)
        ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
        assert float(jnp.linalg.norm(ours - theirs)) <= tolerance * float(jnp.linalg.norm(theirs))
    hidden = fcfunc.init(jax.random.key(0), [6, 6, 3], norm=norm)
    jaxpr = str(jax.make_jaxpr(lambda p: outputs(p, ops)[0])(mlp.stack(hidden)))
    assert ("bf16" in jaxpr) == (compute_dtype == "bfloat16")


def test_batch_norm_in_evaluation_uses_the_running_statistics_and_decay_moves_them():
    params = fcfunc.init(jax.random.key(0), [6, 5, 3], norm="batch_norm")
    x = 3 + jax.random.normal(jax.random.key(1), (8, 6))
    start = fcfunc.init_batch_norm_state(params)
    z = x @ params[0]["w"]
    _, moved = fcfunc.apply_batch_norm(params, start, x, training=True, decay=0.75)
    np.testing.assert_allclose(moved[0]["mean"], 0.25 * z.mean(0), rtol=1e-4, atol=1e-5)
    out, same = fcfunc.apply_batch_norm(params, moved, x, training=False)
    chex.assert_trees_all_equal(same, moved)
    normal = (z - moved[0]["mean"][None]) / jnp.sqrt(moved[0]["var"][None] + 1e-5)
    np.testing.assert_allclose(out, jnp.maximum(normal, 0) @ params[1]["w"], rtol=1e-4, atol=1e-4)


def test_rounding_of_cotangents_reaches_every_product():
    params, x = fcfunc.init(jax.random.key(0), [6, 5, 3]), jnp.ones((4, 6))
    programs = {
        rounded: str(
            jax.make_jaxpr(
                jax.grad(lambda p, r=rounded: jnp.sum(fcfunc.apply(p, x, compute_dtype="bfloat16", round_cotangent=r)))
            )(params)
        )
        for rounded in (True, False)
    }
    assert programs[True] != programs[False]


def test_leaves_of_norms_and_statistics_have_the_dtypes_that_they_should():
    params = fcfunc.init(jax.random.key(0), [6, 5, 3], norm="batch_norm", param_dtype=jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(params), jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(fcfunc.init_batch_norm_state(params)), jnp.float32)
    one, two = fcfunc.init(jax.random.key(0), [4, 4, 4, 2])[:2]
    mixed = [one, jax.tree.map(lambda a: a.astype(jnp.bfloat16), two), {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}]
    assert len(mlp.stack(mixed)) == 3  # layers of two dtypes are not alike


@pytest.mark.parametrize("stacked", [False, True])
def test_a_function_of_the_callers_keeps_the_dtype_and_must_keep_the_shape(stacked):
    params = fcfunc.init(jax.random.key(0), [4, 4, 4, 2])
    params, x = mlp.stack(params) if stacked else params, jnp.ones((3, 4))
    dtypes = []

    def widening(z):
        dtypes.append(z.dtype)
        return jnp.sin(z.astype(jnp.float32))

    fcfunc.apply(params, x, activation=widening, compute_dtype="bfloat16")
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"a hidden activation must keep the shape \[3, 4\], got \[3, 2\]"):
        fcfunc.apply(params, x, activation=lambda z: z[:, :2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, x: fcfunc.apply(p, x, dropout_rate=1.5, key=None), ValueError, r"dropout_rate must be in \[0, 1\]"),
        (lambda p, x: fcfunc.apply(p, x, dropout_rate=0.5, key=0), TypeError, "apply: key must be one random key"),
        (lambda p, x: fcfunc.apply(p, x, compute_dtype="bf16"), TypeError, "compute_dtype must be bfloat16 .*'bf16'"),
        (lambda p, x: fcfunc.apply(None, x), TypeError, "params must be a list of layers, as from init, got NoneType"),
        (lambda p, x: fcfunc.apply(p, x, norm=["layer_norm"]), ValueError, r"unknown norm \['layer_norm'\]"),
        (lambda p, x: fcfunc.apply([p[0] | {"gamma": x}, *p[1:]], x), ValueError, "a leaf 'gamma', which is not used"),
        (
            lambda p, x: fcfunc.apply(p, x, activation=functools.partial(ops.elu, **{"beta": 3})),
            ValueError,
            "elu has no option 'beta'",
        ),
        (lambda p, x: fcfunc.apply_batch_norm(p, None, x, training=True), TypeError, "state must be a list.*got None"),
        (lambda p, x: mlp.stack([]), ValueError, r"stack: params must be a list of at least one layer, got \[\]"),
        (lambda p, x: mlp.unstack(jax.tree.map(lambda a: a[None], p)), ValueError, r"take jax.vmap\(unstack\)"),
        (lambda p, x: mlp.stack(jax.tree.map(lambda a: a[None], p)), ValueError, r"take jax.vmap\(stack\)"),
    ],
)
def test_mistakes_are_named(call, error, message, params, x):
    with pytest.raises(error, match=message):
        call(params, x)


def test_scales_of_a_wrong_shape_or_dtype_name_their_layer(x):
    params = fcfunc.init(jax.random.key(0), [6, 5, 3], norm="layer_norm")
    with pytest.raises(ValueError, match=r"layer 0: scale \[5\] expected, got \[4\]"):
        fcfunc.apply([params[0] | {"scale": jnp.ones(4)}, params[1]], x, norm="layer_norm")
    with pytest.raises(TypeError, match="layer 0: one dtype expected for all of w, b, scale, offset"):
        fcfunc.apply([params[0] | {"scale": jnp.ones(5, jnp.bfloat16)}, params[1]], x, norm="layer_norm")


def test_numpy_float64_inputs_and_params_are_taken_without_a_warning():
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])
    x = np.random.default_rng(0).standard_normal((6, 4))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = fcfunc.apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(fcfunc.apply(params, x), expected)  # warnings are errors here
    np.testing.assert_array_equal(fcfunc.apply(wide, x), expected)
