"""Gradients against 200-digit finite differences, and the jaxpr interpreter that computes them."""

import math
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from fcfunc import ops
from fcfunc.testing import _interpreter, check_vjp
from tests.rules import rows

NORMAL = np.random.default_rng(0).standard_normal((3, 4))
POSITIVE, BELOW_ONE = np.abs(NORMAL) + 0.1, np.tanh(NORMAL)

FUNCTIONS = {
    **{
        name: (getattr(jnp, name), NORMAL)
        for name in (
            "abs",
            "arctan",
            "arcsinh",
            "cbrt",
            "ceil",
            "cos",
            "cosh",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "isfinite",
            "negative",
            "round",
            "sign",
            "sin",
            "sinc",
            "sinh",
            "square",
            "tan",
            "tanh",
            "trunc",
            "argmax",
            "argmin",
            "cumprod",
            "cumsum",
            "flip",
            "max",
            "mean",
            "min",
            "prod",
            "ptp",
            "ravel",
            "sort",
            "std",
            "sum",
            "transpose",
            "tril",
            "var",
            "nansum",
            "median",
            "diff",
            "gradient",
        )
    },
    **{name: (getattr(jnp, name), POSITIVE) for name in ("log", "log10", "log1p", "log2", "reciprocal", "sqrt")},
    **{name: (getattr(jnp, name), BELOW_ONE) for name in ("arccos", "arcsin", "arctanh")},
    **{
        name: (getattr(jax.nn, name), NORMAL)
        for name in (
            "celu",
            "elu",
            "gelu",
            "glu",
            "hard_sigmoid",
            "hard_swish",
            "hard_tanh",
            "leaky_relu",
            "log_sigmoid",
            "log_softmax",
            "logsumexp",
            "mish",
            "relu",
            "relu6",
            "selu",
            "sigmoid",
            "silu",
            "soft_sign",
            "softmax",
            "softplus",
            "squareplus",
            "standardize",
            "log1mexp",
        )
    },
    "arccosh": (jnp.arccosh, POSITIVE + 1),
    "erf": (jax.scipy.special.erf, NORMAL),
    "erfc": (jax.scipy.special.erfc, NORMAL),
    "erfinv": (jax.scipy.special.erfinv, BELOW_ONE),
    "gammaln": (jax.scipy.special.gammaln, POSITIVE),
    "digamma": (jax.scipy.special.digamma, POSITIVE),
    "rsqrt": (jax.lax.rsqrt, POSITIVE),
    "power": (lambda x: x**1.7 + x**3 + 2.0**x, POSITIVE),
    "arctan2": (lambda x: jnp.arctan2(x, x + 1), NORMAL),
    "remainder": (lambda x: jnp.remainder(x, 0.7) + jnp.fmod(x, 0.3), NORMAL),
    "where": (lambda x: jnp.where(x > 0, x, -2 * x), NORMAL),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.5), NORMAL),
    "matmul": (lambda x: x @ x.T, NORMAL),
    "batched product": (lambda x: jnp.einsum("ij,kj,kl->il", x, x, x), NORMAL),
    "concatenate": (lambda x: jnp.concatenate([x, 2 * x]), NORMAL),
    "stack": (lambda x: jnp.stack([x, x]), NORMAL),
    "pad": (lambda x: jnp.pad(x, 1), NORMAL),
    "roll": (lambda x: jnp.roll(x, 1, axis=1), NORMAL),
    "indexing": (lambda x: x[jnp.array([2, 0]), jnp.array([1, 3])], NORMAL),
    "out of bounds": (lambda x: x.at[jnp.array([7])].get(mode="fill"), NORMAL),
    "take along axis": (lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1), NORMAL),
    "add at": (lambda x: x.at[jnp.array([0, 0, 2])].add(x), NORMAL),
    "set at": (lambda x: x.at[1].set(x[0]), NORMAL),
    "dynamic slice": (lambda x: jax.lax.dynamic_slice(x, (1, 1), (2, 2)), NORMAL),
    "dynamic update": (lambda x: jax.lax.dynamic_update_slice(x, x[:1] * 2, (1, 0)), NORMAL),
    "cumulative maximum": (lambda x: jax.lax.cummax(x, 1, reverse=True), NORMAL),
    "cumulative logsumexp": (lambda x: jax.lax.cumlogsumexp(x, 0), NORMAL),
    "scan": (lambda x: jax.lax.scan(lambda c, row: (c * row, jnp.sin(c)), x[0], x, reverse=True), NORMAL),
    "while": (lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 50, lambda c: c * 2 + 1, x), NORMAL),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), NORMAL),
    "remat": (jax.checkpoint(jnp.sin), NORMAL),
    "map": (lambda x: jax.lax.map(jnp.sin, x), NORMAL),
    "masked": (lambda x: jnp.tensordot(x, x > 0, 1, preferred_element_type=jnp.float64), NORMAL[0]),
    "random": (lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape).astype(x.dtype), NORMAL),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_interpreter_computes_what_jax_computes_in_float64(name, x64):
    fun, x = FUNCTIONS[name]
    x = jnp.asarray(x)
    with mpmath.workdps(30):
        got = jax.tree.leaves(_interpreter.Program(fun, x)(_interpreter.exact(x)))
    for a, b in zip(got, jax.tree.leaves(fun(x)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-13, atol=1e-13)


def test_the_interpreter_has_as_many_digits_as_are_asked_for(x64):
    with mpmath.workdps(60):
        (third,) = jax.tree.leaves(_interpreter.Program(lambda x: 1 / x, 3.0)(_interpreter.exact(np.float64(3))))
        assert abs(third[()] * 3 - 1) < mpmath.mpf("1e-58")


@rows(options=True)
def test_every_rule_is_equal_to_sixty_digits_or_names_its_rounded_constants(row):
    draw = lambda rng, n, d: row.draw(int(rng.integers(2**31)), n, d, np.float32)
    report = check_vjp(row.fun, draw, only=["multiprecision", "second_multiprecision"])
    assert report.ok, report
    undefined = row.name == "log_softmax-where"  # masked outputs are -inf, so every sum of outputs is -inf
    for result in report.results[undefined:]:
        assert result.status == "passed"
        digits, rounded = int(result.reason.split()[2]), 7 if "compute_dtype" in row.name else 15
        assert digits >= 60 or (digits >= rounded and "these constants are rounded" in result.reason), result


def sine_times(factor):
    made = jax.custom_vjp(jnp.sin)
    made.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x) * factor(x),))
    return made


@pytest.mark.parametrize(
    ("factor", "status", "text"),
    [
        (lambda x: 1, "passed", "equal to 99 digits"),
        (lambda x: 1.1 / 1.1000000000000003, "passed", "these constants are rounded: 0.9999999999999998"),
        (lambda x: 1 + 2.0**-30, "failed", "central differences in 200-digit arithmetic, at ordinary points"),
        (
            lambda x: jnp.where(jnp.abs(x) < 5, 1, 1.5),
            "failed",
            "central differences in 200-digit arithmetic, in t",
        ),
        (lambda x: jnp.where(x < 1e5, 1, 1.5), "failed", "200-digit arithmetic, at a common offset"),
        (lambda x: 1 + jnp.exp(-1000 * x * x - 50), "failed", "central differences in 200-digit arithmetic"),
    ],
    ids=["right", "a constant", "off by 1e-9", "wrong in tails", "wrong at an offset", "wrong in a term of 1e-22"],
)
def test_the_verdict_is_equal_or_constants_or_a_finding(factor, status, text):
    (result,) = check_vjp(sine_times(factor), "n d", only="multiprecision").results
    assert result.status == status
    assert text in result.reason + "".join(f.message for f in result.findings)


def test_a_finding_has_the_element_and_both_values():
    made = jax.custom_vjp(lambda x: x**3)
    made.defvjp(lambda x: (x**3, x), lambda x, g: ((3 * g * x**2).at[1, 1].multiply(2),))
    (found,) = check_vjp(made, "n d", only="multiprecision").findings
    assert found.index == (1, 1)
    assert found.got is not None
    assert found.expected is not None
    assert math.isclose(found.got.real, 2 * found.expected.real, rel_tol=1e-12)


def test_a_wrong_second_derivative_is_found():
    inner = jax.custom_vjp(jnp.cos)
    inner.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (g * jnp.sin(x),))  # the sign is wrong
    made = jax.custom_vjp(jnp.sin)
    made.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * inner(x),))
    results = check_vjp(made, "n d", only=["multiprecision", "second_multiprecision"]).results
    assert [r.status for r in results] == ["passed", "failed"]


def test_an_unknown_primitive_is_named():
    product = lambda x: jnp.fft.irfft(jnp.fft.rfft(x))
    made = jax.custom_vjp(product)
    made.defvjp(lambda x: (product(x), None), lambda _, g: (g,))
    (result,) = check_vjp(made, "n 4", only="multiprecision").results
    assert (result.status, result.reason) == ("not applicable", "the primitive fft is not supported")


def test_a_surrogate_is_not_compared_with_differences_of_its_reference():
    rounded = jax.custom_vjp(lambda x: jnp.round(x))
    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    straight_through = lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)
    (result,) = check_vjp(rounded, "n d", reference=straight_through, only="multiprecision").results
    assert result.status == "not applicable"
    assert "the reference is a surrogate" in result.reason


def test_without_mpmath_the_check_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcfunc.testing._multiprecision", None)
    monkeypatch.delattr("fcfunc.testing._multiprecision", raising=False)
    (result,) = check_vjp(ops.relu, "n d", only="multiprecision").results
    assert (result.status, result.reason) == ("not applicable", "needs mpmath: pip install mpmath")


@pytest.mark.parametrize(
    ("fun", "slope"),
    [
        (lambda x: jnp.exp(-jnp.exp(x)), lambda x: -jnp.exp(x - jnp.exp(x))),
        (lambda x: jnp.exp(jnp.exp(x)), lambda x: jnp.exp(x + jnp.exp(x))),
        (lambda x: jnp.sin(x**5), lambda x: 5 * x**4 * jnp.cos(x**5)),
    ],
    ids=["exp of -exp", "exp of exp", "sine of a power"],
)
def test_a_steep_function_ends_and_is_equal_to_sixty_digits(fun, slope):
    made = jax.custom_vjp(fun)
    made.defvjp(lambda x: (fun(x), x), lambda x, g: (g * slope(x),))
    (result,) = check_vjp(made, "n d", only="multiprecision").results
    assert result.status == "passed", result
    assert int(result.reason.split()[2]) >= 60


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (lambda x, k: x * jnp.bitwise_or.reduce(k, axis=-1).astype(jnp.float64), (np.float64(3), np.array([1, 2, 4]))),
        (lambda x: jnp.where(x.astype(bool), 1.0, 0.0), (np.array([0.0, 0.5, -2.0]),)),
        (lambda x: jnp.argmax(x).astype(jnp.float64), (np.array([1.0, np.nan, 3, np.nan]),)),
        (lambda x: jnp.sort(x), (np.array([2.0, np.nan, 1, 3]),)),
        (lambda x: x[:, :0] @ jnp.ones((0, 2)), (np.ones((3, 4)),)),
        (lambda x: jnp.tile(x, 2), (np.array([1.0, 2]),)),
        (lambda x: jnp.zeros(3).at[jnp.array([0, 0, 5])].max(x), (np.array([1.0, 2, 3]),)),
    ],
    ids=["or", "to bool", "argmax of NaN", "sort of NaN", "empty product", "tile", "scatter of maxima"],
)
def test_the_interpreter_computes_odd_cases_as_jax_does(fun, args):
    with jax.enable_x64(True):
        expected = np.asarray(fun(*map(jnp.asarray, args)), np.float64)
        out = _interpreter.Program(fun, *map(jnp.asarray, args))(*map(_interpreter.exact, args))
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)


def test_complex_numbers_inside_are_not_evaluated():
    def power(x):
        return jnp.sum(jnp.abs(jnp.fft.fft(x)) ** 2, axis=-1)

    made = jax.custom_vjp(power)
    made.defvjp(lambda x: (power(x), x), lambda x, g: (2 * x.shape[-1] * g[:, None] * x,))
    (result,) = check_vjp(made, "n 4", only="multiprecision").results
    assert result.status == "not applicable", result
