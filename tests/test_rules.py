"""Every rule in the table against its reference, against finite differences, and on extreme inputs.

Behavior under JAX transformations is tested with `check_vjp` in test_check_vjp.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from tests.rules import RULES, cotangent, gradients, rows, slow, split_real

TOLERANCE = {"float16": 2e-2, "bfloat16": 2e-1, "float32": 2e-5, "float64": 1e-13}
SIZES = [(4, 3), slow(1, 1), slow(1, 5), slow(7, 1), slow(33, 17)]


def scalar(fun, args):
    """Returns a scalar function of the real arguments, with random weights so that no two outputs cancel."""
    reals, fill = split_real(args)

    g = cotangent(fun, args)
    return lambda *reals: jnp.sum(fun(*fill(reals)) * g), reals


def assert_like_reference(row, args, dtype):
    g = cotangent(row.fun, args)
    out, grads = gradients(row.fun, args, g)
    reference_out, reference_grads = gradients(row.reference, args, g)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, reference_out)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, reference_grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, split_real(args)[0])
    tolerance = TOLERANCE["bfloat16" if "compute_dtype=bfloat16" in row.name else jnp.dtype(dtype).name]
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    chex.assert_trees_all_close(wide(out), wide(reference_out), rtol=tolerance, atol=tolerance)
    chex.assert_trees_all_close(wide(grads), wide(reference_grads), rtol=tolerance, atol=tolerance)


@rows(variants_are_slow=False, options=True)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_rule_equals_autodiff_of_its_reference(row, n, d):
    assert_like_reference(row, row.draw(0, n, d, jnp.float32), "float32")


@rows()
@pytest.mark.parametrize("dtype", [slow("float16"), "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(4, 3), slow(1, 5), slow(33, 17)])
def test_rule_equals_autodiff_of_its_reference_in_half_precision(row, dtype, n, d):
    assert_like_reference(row, row.draw(0, n, d, jnp.dtype(dtype)), dtype)


@rows()
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_rule_equals_autodiff_of_its_reference_in_float64(row, n, d, x64):
    assert_like_reference(row, row.draw(0, n, d, jnp.float64), "float64")


@rows()
@pytest.mark.parametrize(("n", "d"), [(0, 4), slow(0, 1), slow(3, 0)])
def test_rule_takes_empty_arrays(row, n, d):
    assert_like_reference(row, row.draw(0, n, d, jnp.float32), "float32")


@pytest.mark.slow
@rows()
def test_rule_equals_finite_differences_in_float64(row, x64):
    args = row.draw(3, 4, 3, jnp.float64)
    fun, reals = scalar(row.fun, args)
    grads = jax.grad(fun, argnums=tuple(range(len(reals))))(*reals)
    flat, unravel = ravel_pytree(reals)
    slopes = [(fun(*unravel(flat + e)) - fun(*unravel(flat - e))) / 2e-6 for e in 1e-6 * np.eye(flat.size)]
    np.testing.assert_allclose(ravel_pytree(grads)[0], np.array(slopes), rtol=1e-7, atol=1e-8)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(row=st.sampled_from(RULES), n=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_rule_equals_autodiff_of_its_reference_for_any_shape(row, n, d, seed):
    assert_like_reference(row, row.draw(seed, n, d, jnp.float32), "float32")


@pytest.mark.slow
@rows()
def test_second_derivatives_equal_those_of_the_reference(row, x64):
    args = row.draw(0, 3, 2, jnp.float64)
    (fun, reals), (reference, _) = scalar(row.fun, args), scalar(row.reference, args)
    argnums = tuple(range(len(reals)))
    for second in (
        lambda f: jax.hessian(f, argnums)(*reals),
        lambda f: jax.jvp(jax.grad(f, argnums), reals, reals)[1],
        lambda f: jax.grad(lambda *r: squares(jax.grad(f, argnums)(*r)), argnums)(*reals),
        lambda f: jax.jacrev(jax.grad(f, argnums), argnums)(*reals),
    ):
        chex.assert_trees_all_close(
            jax.jit(second, static_argnums=0)(fun), jax.jit(second, static_argnums=0)(reference), rtol=1e-10, atol=1e-11
        )


def squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


@rows()
@pytest.mark.parametrize("value", [0.0, slow(-0.0), slow(1e30), slow(-1e30), np.inf, slow(-np.inf), np.nan])
def test_extreme_inputs_give_what_the_reference_gives_and_stay_in_their_row(row, value):
    """Outputs and gradients match the reference; a NaN or infinity in one row does not affect other rows."""
    if row.name in ("l2_penalty", "softmax-axis=0", "log_softmax-axis=0", "batch_norm"):
        pytest.skip("its rows are not independent")
    args = row.draw(0, 4, 3, jnp.float32)
    hostile = (args[0].at[1].set(value), *args[1:])
    g = cotangent(row.fun, args)
    out, grads = gradients(row.fun, args, g)
    hostile_out, hostile_grads = gradients(row.fun, hostile, g)
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(out[others], hostile_out[others])
    np.testing.assert_array_equal(grads[0][others], hostile_grads[0][others])
    reference_out, reference_grads = gradients(row.reference, hostile, g)
    np.testing.assert_allclose(hostile_out, reference_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hostile_grads[0], reference_grads[0], rtol=1e-4, atol=1e-6)
    if np.isnan(value) and "ignore_index" not in row.name and "negative_log" not in row.name:
        masked = ~np.asarray(args[1][1]) if row.name == "softmax-where" else False
        assert (np.isnan(hostile_out[1]) | masked).all()


def test_relu_has_derivative_zero_at_zero():
    relu = next(row.fun for row in RULES if row.name == "relu")
    _, pull = jax.vjp(relu, jnp.array([-1.0, -0.0, 0.0, 2e-38, 1.0]))
    np.testing.assert_array_equal(pull(jnp.full(5, 7.0))[0], [0, 0, 0, 7, 7])


def test_svm_has_derivative_zero_at_its_kink():
    svm = next(row.fun for row in RULES if row.name == "multiclass_svm")
    scores = jnp.array([[1.0, 0.0, 0.5]])  # class 1 is exactly one margin below the correct class 0
    np.testing.assert_array_equal(jax.grad(lambda s: svm(s, jnp.array([0]))[0])(scores), [[-1, 0, 1]])
