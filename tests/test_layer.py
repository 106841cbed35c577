"""The layer rule saves the documented residuals, and stacked networks keep the promised memory and code size."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import ops, reference
from fcfunc.network import ACTIVATIONS
from tests.helpers import temporaries
from tests.rules import slow

NAMES = sorted(set(ACTIVATIONS) - {"gelu_exact"})


def saved_bytes(*args, **options):
    """The bytes that the rule of a layer saves in addition to its arguments."""
    _, (_, _, _, saved) = jax.eval_shape(functools.partial(ops.layer_fwd, **options), *args)
    return saved.size * saved.dtype.itemsize


@pytest.fixture
def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, [(16, 9), (9, 40), (40,)], strict=True))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_rectifiers_save_one_bit_per_output(activation, arguments):
    assert saved_bytes(*arguments, activation=activation) == 16 * 40 // 8


@pytest.mark.parametrize("activation", ["elu", "gelu", "silu"])
def test_elu_gelu_and_silu_save_nothing_but_the_biases_they_were_given(activation, arguments):
    x, w, b = arguments
    _, (*saved, has_bias, saved_b) = ops.layer_fwd(x, w, b, activation=activation)
    assert has_bias == ()
    assert all(saved is given for saved, given in zip((*saved, saved_b), arguments, strict=True))


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "softplus"])
def test_the_others_save_their_output(activation, arguments):
    out, (*_, saved) = ops.layer_fwd(*arguments, activation=activation)
    assert saved is out


@pytest.mark.parametrize("fan_out", [slow(1), slow(7), 8, 9, slow(40)])
def test_bits_of_any_width_give_the_gradient_of_the_two_rules(fan_out):
    keys = jax.random.split(jax.random.key(fan_out), 4)
    shapes = [(6, 5), (5, fan_out), (fan_out,), (6, fan_out)]
    x, w, b, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    _, pull = jax.vjp(functools.partial(ops.layer, activation="relu"), x, w, b)
    _, expected = jax.vjp(lambda x, w, b: ops.relu(ops.affine(x, w, b)), x, w, b)
    chex.assert_trees_all_equal(pull(g), expected(g))


@pytest.mark.parametrize("activation", NAMES)
def test_every_layer_is_its_affine_map_and_its_activation(activation, arguments):
    def layered(x, w, b):
        return ops.layer(x, w, b, activation=activation)

    def apart(x, w, b):
        return getattr(reference, activation)(x @ w + jnp.broadcast_to(b, (16, 40)))

    out, pull = jax.vjp(layered, *arguments)
    expected, expected_pull = jax.vjp(apart, *arguments)
    g = jax.random.normal(jax.random.key(1), out.shape)
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(pull(g), expected_pull(g), rtol=1e-4, atol=1e-4)


def test_options_of_the_activation_reach_it(arguments):
    out = ops.layer(*arguments, activation="leaky_relu", negative_slope=0.5)
    np.testing.assert_allclose(out, ops.leaky_relu(ops.affine(*arguments), negative_slope=0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "plain", "scanned", "at_most"),
    [
        ("relu", jax.nn.relu, True, 0.87),
        ("gelu", jax.nn.gelu, True, 0.25),
        slow("relu", jax.nn.relu, False, 1.0),
        slow("gelu", jax.nn.gelu, False, 1.0),
    ],
)
def test_the_gradient_of_eight_layers_needs_less_memory_than_by_autodiff(activation, plain, scanned, at_most):
    layers = fcfunc.init(jax.random.key(0), [512] * 9)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x = jnp.ones((2048, 512))

    def layer(h, p):
        return plain(h @ p["w"] + jnp.broadcast_to(p["b"], h.shape)), None

    def by_autodiff(params, x):
        if scanned:
            return jnp.sum(jax.lax.scan(layer, x, params)[0] ** 2)
        for p in params:
            x, _ = layer(x, p)
        return jnp.sum(x**2)

    net = fcfunc.mlp([512] * 10, activation=activation)  # its features are the output of the eight hidden layers

    def by_rules(params, x):
        return jnp.sum(net.features(params, x) ** 2)

    gradient = lambda fun: jax.grad(fun, argnums=(0, 1))
    network = [*layers, layers[-1]]
    ours = temporaries(gradient(by_rules), fcfunc.stack(network) if scanned else network, x)
    assert ours <= at_most * temporaries(gradient(by_autodiff), stacked if scanned else layers, x)


def test_a_stacked_network_is_the_network_and_has_its_gradients():
    params = fcfunc.init(jax.random.key(0), [6, 5, 5, 5, 5, 3])
    x = jax.random.normal(jax.random.key(1), (7, 6))

    def loss(params):
        return jnp.sum(fcfunc.apply(params, x, activation="tanh") ** 2)

    stacked = fcfunc.stack(params)
    assert [p["w"].shape for p in stacked] == [(6, 5), (3, 5, 5), (5, 3)]
    chex.assert_trees_all_equal(fcfunc.unstack(stacked), params)
    chex.assert_trees_all_close(loss(stacked), loss(params), rtol=1e-6)
    chex.assert_trees_all_close(fcfunc.unstack(jax.grad(loss)(stacked)), jax.grad(loss)(params), rtol=1e-5, atol=1e-6)


def test_the_program_of_a_stacked_network_does_not_grow_with_its_depth():
    def program(depth):
        params = jax.eval_shape(lambda: fcfunc.stack(fcfunc.init(jax.random.key(0), [8] * (depth + 1) + [2])))
        loss = lambda params, x: jnp.sum(fcfunc.apply(params, x, activation="gelu"))
        return len(jax.jit(jax.grad(loss)).lower(params, jnp.ones((4, 8))).as_text().splitlines())

    assert program(64) == program(4)


def test_only_square_layers_that_are_alike_are_stacked():
    def shapes(dims, **options):
        return [p["w"].shape for p in fcfunc.stack(fcfunc.mlp(dims, **options).init(jax.random.key(0)))]

    assert shapes([3, 4, 2]) == [(3, 4), (4, 2)]
    assert shapes([4, 4, 4]) == [(4, 4), (4, 4)]  # the last layer stays separate
    assert shapes([4, 4, 4, 5, 5, 5, 4]) == [(2, 4, 4), (4, 5), (2, 5, 5), (5, 4)]
    assert shapes([4, 4, 4, 4], norm="layer_norm") == [(2, 4, 4), (4, 4)]


def test_the_layers_of_one_stack_have_one_activation():
    params = fcfunc.stack(fcfunc.init(jax.random.key(0), [4, 4, 4, 2]))
    with pytest.raises(ValueError, match="the 2 layers of a stack must have the same activation"):
        fcfunc.apply(params, jnp.ones((3, 4)), activation=["relu", "tanh"])
    same = fcfunc.apply(params, jnp.ones((3, 4)), activation=["tanh", "tanh"])
    np.testing.assert_array_equal(same, fcfunc.apply(params, jnp.ones((3, 4)), activation="tanh"))


def test_a_stack_of_a_wrong_width_is_named():
    params = fcfunc.stack(fcfunc.init(jax.random.key(0), [4, 4, 4, 2]))
    with pytest.raises(ValueError, match=r"layer 0: a stack of 2 layers must represent hidden layers of equal width"):
        fcfunc.mlp([4, 5, 4, 2]).apply(params, jnp.ones((3, 4)))


def test_elu_in_float16_reads_the_sign_of_a_tiny_input_right():
    x = w = jnp.full((1, 1), 1e-4, jnp.float16)
    total = lambda b: jnp.sum(ops.layer(x, w, b, activation="elu", alpha=2.0).astype(jnp.float32))
    assert float(jax.grad(total)(jnp.zeros(1, jnp.float16))[0]) == 1.0


@pytest.mark.parametrize("dtype", [slow("float16"), "bfloat16"])
def test_one_example_without_a_batch_has_gradients_in_half_precision(dtype):
    x, w, b = jnp.ones(3, dtype), jnp.ones((3, 4), dtype), jnp.zeros(4, dtype)
    for layer in (ops.affine, functools.partial(ops.layer, activation="relu")):
        dw = jax.grad(lambda w, f=layer: jnp.sum(f(x, w, b).astype(jnp.float32)))(w)
        np.testing.assert_array_equal(dw.astype(jnp.float32), 1)
        rows = jax.vmap(jax.grad(lambda w, x, f=layer: jnp.sum(f(x, w, b).astype(jnp.float32))), (None, 0))
        np.testing.assert_array_equal(rows(w, jnp.stack([x, x])).astype(jnp.float32), 1)


def test_options_of_a_layer_that_its_activation_does_not_know_are_refused(arguments):
    with pytest.raises(ValueError, match="layer: relu has no option 'alpha'"):
        ops.layer(*arguments, activation="relu", alpha=2.0)
    for wrong in ("int32", "foo", "complex64"):
        with pytest.raises(TypeError, match=f"layer: out_dtype must be of float16, .* got '{wrong}'"):
            ops.layer(*arguments, activation="relu", out_dtype=wrong)


@pytest.mark.parametrize("kind", [slow(AxisType.Auto), AxisType.Explicit])
@pytest.mark.parametrize(
    "spec",
    [("data", None), slow((None, "data")), ("data", "model"), slow(("model", "data")), slow((None, "model"))],
)
@pytest.mark.parametrize("activation", ["relu", "gelu", slow("tanh")])
def test_gradients_on_a_mesh_are_those_of_one_device_and_lie_as_their_primals(kind, spec, activation):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    keys = jax.random.split(jax.random.key(0), 4)
    x, w, b, g = (jax.random.normal(k, s) for k, s in zip(keys, [(16, 8), (8, 24), (24,), (16, 24)], strict=True))

    @jax.jit
    def pull(x, w, b, g):
        out, back = jax.vjp(functools.partial(ops.layer, activation=activation), x, w, b)
        return back(g if kind is AxisType.Auto else jax.sharding.reshard(g, jax.typeof(out).sharding))

    expected = pull_alone(activation)(x, w, b, g)
    with jax.set_mesh(mesh):
        place = lambda a, *names: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*names)))
        primals = place(x, "data"), place(w, *spec), place(b, spec[1])
        got = pull(*primals, place(g, "data"))
    for d, e, p in zip(got, expected, primals, strict=True):
        np.testing.assert_allclose(d, e, rtol=1e-4, atol=1e-5)
        assert kind is AxisType.Auto or d.sharding.is_equivalent_to(p.sharding, p.ndim)


def pull_alone(activation):
    return lambda x, w, b, g: jax.vjp(functools.partial(ops.layer, activation=activation), x, w, b)[1](g)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "elu", "alpha": -1.0}, ValueError, "alpha must be at least 0, got -1"),
        ({"activation": "leaky_relu", "negative_slope": "0.1"}, TypeError, "negative_slope must be a number"),
        ({"activation": "gelu", "approximate": 3}, TypeError, "approximate must be True or False, got 3"),
    ],
)
def test_options_of_a_layer_are_those_of_its_activation(options, error, message, arguments):
    with pytest.raises(error, match=message):
        ops.layer(*arguments, **options)
