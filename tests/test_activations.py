"""Properties of the activations beyond their gradients: limits, tails, kinks, options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcfunc import ops, reference

SMOOTH = ["elu", "gelu", "sigmoid", "silu", "softplus", "tanh"]


def value_and_slope(function, x):
    out, pull = jax.vjp(function, x)
    return out, pull(jnp.ones_like(out))[0]


@pytest.mark.parametrize(
    ("function", "value", "slope"),
    [
        (ops.gelu, 0, 0),
        (functools.partial(ops.gelu, approximate=False), 0, 0),
        (ops.silu, 0, 0),
        (ops.softplus, 0, 0),
        (ops.elu, -1, 0),
        (ops.leaky_relu, -np.inf, 0.01),
    ],
)
def test_minus_infinity_has_the_limit_and_its_slope(function, value, slope):
    out, grad = value_and_slope(function, jnp.array([-jnp.inf]))
    assert float(out[0]) == value
    np.testing.assert_allclose(grad, slope, rtol=1e-6)


@pytest.mark.parametrize("name", [*SMOOTH, "relu", "leaky_relu"])
def test_a_nan_is_kept_in_value_and_gradient(name):
    out, pull = jax.vjp(getattr(ops, name), jnp.array([jnp.nan]))
    assert np.isnan(out).all()
    assert np.isnan(pull(jnp.array([jnp.nan]))[0]).all()


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "elu"])
@pytest.mark.parametrize("x", [1e4, 1e30])
def test_far_right_they_are_the_identity(name, x):
    out, slope = value_and_slope(getattr(ops, name), jnp.array([x]))
    np.testing.assert_array_equal(out, jnp.float32(x))
    np.testing.assert_array_equal(slope, 1)


@pytest.mark.parametrize("x", [-1.0, -3.0, -5.0])
def test_gelu_keeps_the_digits_of_its_left_tail(x):
    """Computed as x (1 + erf(x/√2)) / 2 in float32, it would lose all but one of its digits at -5."""
    exact = x * 0.5 * math.erfc(-x / math.sqrt(2))
    np.testing.assert_allclose(ops.gelu(jnp.float32(x), approximate=False), exact, rtol=2e-6)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    np.testing.assert_allclose(ops.gelu(jnp.float32(x)), x / (1 + math.exp(-2 * u)), rtol=1e-5)


def gelu_without_cancellation(x, approximate):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (jax.nn.sigmoid(2 * u) if approximate else jax.scipy.special.ndtr(x))


@pytest.mark.parametrize("x", [-1.0, -3.0, -6.0, -10.0])
@pytest.mark.parametrize("approximate", [True, False])
def test_the_reference_gelu_keeps_the_digits_of_its_left_tail_in_value_and_slope(x, approximate):
    got = jax.jvp(lambda x: reference.gelu(x, approximate=approximate), (jnp.float32(x),), (jnp.float32(1),))
    with jax.enable_x64(True):
        exact = jax.jvp(lambda x: gelu_without_cancellation(x, approximate), (jnp.float64(x),), (jnp.float64(1),))
    np.testing.assert_allclose(got, exact, rtol=1e-4)


@pytest.mark.parametrize("name", [*SMOOTH, "relu", "leaky_relu"])
@pytest.mark.parametrize("x", [100.0, 1e4, 3e38, np.inf])
def test_far_out_the_second_derivative_is_zero_and_not_nan(name, x):
    second = jax.vmap(jax.grad(jax.grad(getattr(ops, name))))
    np.testing.assert_allclose(second(jnp.float32([x, -x])), 0, atol=1e-30)


@pytest.mark.parametrize("x", [3e38, np.inf])
def test_far_out_the_second_derivative_of_the_exact_gelu_is_zero(x):
    second = jax.vmap(jax.grad(jax.grad(functools.partial(ops.gelu, approximate=False))))
    np.testing.assert_array_equal(second(jnp.float32([x, -x])), 0)


@pytest.mark.parametrize("name", [*SMOOTH, "relu", "leaky_relu"])
def test_references_take_python_floats_and_refuse_integers_as_the_rules_do(name):
    np.testing.assert_allclose(getattr(reference, name)(-0.75), getattr(ops, name)(-0.75), rtol=1e-6)
    with pytest.raises(TypeError, match=f"{name}: x must be of dtype"):
        getattr(reference, name)(jnp.arange(3))


@pytest.mark.parametrize("x", [-80.0, -20.0, -1.0, 0.0, 3.0])
def test_the_slope_of_softplus_is_exact_where_its_value_is_small(x):
    _, slope = value_and_slope(ops.softplus, jnp.float32(x))
    np.testing.assert_allclose(slope, 1 / (1 + math.exp(-x)), rtol=5e-6)


def test_values_are_those_of_jax():
    x = jnp.linspace(-4, 4, 33)
    for name in (*SMOOTH, "relu", "leaky_relu"):
        np.testing.assert_allclose(getattr(ops, name)(x), getattr(jax.nn, name)(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ops.gelu(x, approximate=False), jax.nn.gelu(x, approximate=False), rtol=1e-5, atol=1e-6)


def test_slopes_at_the_kink_are_as_declared():
    zero = jnp.zeros(1)
    assert float(value_and_slope(functools.partial(ops.leaky_relu, negative_slope=0.25), zero)[1][0]) == 0.25
    assert float(value_and_slope(functools.partial(ops.elu, alpha=0.5), zero)[1][0]) == 0.5


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_dropout_drops_that_share_and_keeps_the_mean(rate):
    x = jnp.full(40_000, 3.0)
    out, slope = value_and_slope(functools.partial(ops.dropout, rate=rate, key=jax.random.key(0)), x)
    assert abs(float(jnp.mean(out == 0)) - rate) < 0.01
    np.testing.assert_allclose(out, x * slope)  # the same mask in both passes
    np.testing.assert_allclose(slope[slope != 0], 1 / (1 - rate) if rate < 1 else 0)


def test_dropout_saves_the_key_alone():
    key = jax.random.key(0)
    _, saved = ops.dropout_fwd(jnp.ones(3), key, rate=0.5)
    assert saved is key


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rate": 1.5, "key": jax.random.key(0)}, ValueError, r"must be in \[0, 1\], got 1.5"),
        ({"rate": 0.5, "key": None}, TypeError, "key must be one random key"),
        ({"rate": 0.5, "key": 3}, TypeError, "key must be one random key"),
    ],
)
def test_dropout_refuses_a_wrong_rate_and_a_missing_key(options, error, message):
    with pytest.raises(error, match=f"dropout: .*{message}"):
        ops.dropout(jnp.ones(3), **options)


def test_dropout_and_leaky_relu_compute_in_float32_whatever_the_dtype():
    x = jnp.full(64, 1.4609375, jnp.bfloat16)
    out = ops.dropout(x, rate=0.1, key=jax.random.key(0))
    assert float(out.max()) == float(jnp.bfloat16(1.4609375 / 0.9))  # not multiplied by a rounded 1 / 0.9
    small = ops.dropout(jnp.full(400_000, 0.01, jnp.float16), rate=0.99999, key=jax.random.key(0))
    assert np.isfinite(small).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, number: ops.dropout(x, rate=number(0.5), key=jax.random.key(0)),
        lambda x, number: ops.leaky_relu(x, negative_slope=number(0.5)),
        lambda x, number: ops.elu(x, alpha=number(0.5)),
        lambda x, number: ops.rms_norm(x, x[0], eps=number(0.5)),
    ],
)
def test_options_of_any_kind_of_scalar_leave_the_dtype_alone(call, x64):
    x = -jnp.ones((2, 3), jnp.bfloat16)
    expected = call(x, float)
    for number in (np.float16, np.float32, np.float64, jnp.float32):
        got = call(x, number)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))


def test_an_option_that_is_traced_is_refused_by_name():
    with pytest.raises(TypeError, match="dropout: rate must be a number that is known at trace time"):
        jax.jit(lambda r: ops.dropout(jnp.ones(3), rate=r, key=jax.random.key(0)))(0.5)
    with pytest.raises(TypeError, match="gelu: approximate must be True or False, got 'none'"):
        ops.gelu(jnp.ones(3), approximate="none")


def test_leaky_relu_of_slope_zero_is_relu_at_minus_infinity_too():
    out, grad = value_and_slope(functools.partial(ops.leaky_relu, negative_slope=0.0), jnp.array([-jnp.inf, 2.0]))
    np.testing.assert_array_equal(out, [0, 2])
    np.testing.assert_array_equal(grad, [0, 1])


@pytest.mark.parametrize("rate", [0, 1, True])
def test_a_rate_may_be_an_integer(rate):
    out = ops.dropout(jnp.ones(3), rate=rate, key=jax.random.key(0, impl="rbg"))
    np.testing.assert_array_equal(out, 1 - int(rate))
