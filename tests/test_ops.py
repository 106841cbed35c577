"""Properties of the operations other than their gradients: residuals, conventions, and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcfunc import ops
from tests.rules import slow


def test_public_pairs_chain_by_hand_to_the_gradient():
    keys = jax.random.split(jax.random.key(0), 4)
    x, w, b, g = (jax.random.normal(k, s) for k, s in zip(keys, [(6, 2, 2), (4, 3), (3,), (6, 3)], strict=True))
    z, affine_residuals = ops.affine_fwd(x, w, b, flatten=True)
    out, relu_residuals = ops.relu_fwd(z)
    dx, dw, db = ops.affine_bwd(affine_residuals, *ops.relu_bwd(relu_residuals, g))
    expected_out, pull = jax.vjp(lambda x, w, b: jnp.maximum(x.reshape(6, 4) @ w + b[None], 0), x, w, b)
    np.testing.assert_allclose(out, expected_out, rtol=1e-6)
    chex.assert_trees_all_close((dx, dw, db), pull(g), rtol=1e-5, atol=1e-6)


def test_bias_gradient_is_the_sum_over_every_batch_axis():
    x, w, b = jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.ones(5)
    g = jax.random.normal(jax.random.key(0), (2, 3, 5))
    _, pull = jax.vjp(ops.affine, x, w, b)
    np.testing.assert_allclose(pull(g)[2], np.asarray(g).sum((0, 1)), rtol=1e-5)


def test_affine_takes_one_example_without_a_batch_axis():
    x, w, b, g = jnp.arange(3.0), jnp.ones((3, 2)), jnp.zeros(2), jnp.array([1.0, 2.0])
    out, pull = jax.vjp(ops.affine, x, w, b)
    dx, dw, db = pull(g)
    np.testing.assert_array_equal(out, [3, 3])
    np.testing.assert_array_equal(dx, [3, 3, 3])
    np.testing.assert_array_equal(dw, np.outer(x, g))
    np.testing.assert_array_equal(db, g)


def test_affine_sums_long_bfloat16_columns_in_float32():
    x, w, b = jnp.ones((4096, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    _, pull = jax.vjp(ops.affine, x, w, b)
    _, dw, db = pull(jnp.ones((4096, 1), jnp.bfloat16))
    assert float(dw[0, 0]) == float(db[0]) == 4096  # a sum accumulated in bfloat16 would stop at 256


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_bfloat16_gradients_work_under_vmap_over_inputs_or_cotangents_alone(in_axes):
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((4, 5, d)).astype(jnp.bfloat16) for d in (3, 7))
    w, b = jnp.ones((3, 7), jnp.bfloat16), jnp.ones(7, jnp.bfloat16)
    pull = lambda x, g: jax.vjp(ops.affine, x, w, b)[1](g)
    x, g = (a if axis == 0 else a[0] for a, axis in zip((x, g), in_axes, strict=True))
    dw = jax.vmap(pull, in_axes)(jnp.asarray(x), jnp.asarray(g))[1]
    expected = np.swapaxes(np.broadcast_to(x, (4, 5, 3)), 1, 2).astype(np.float32) @ np.asarray(g, np.float32)
    np.testing.assert_allclose(dw.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)


def test_softmax_of_many_equal_float16_logits_is_uniform():
    np.testing.assert_allclose(ops.softmax(jnp.zeros(100_000, jnp.float16)), 1e-5, rtol=2e-2)
    np.testing.assert_allclose(ops.log_softmax(jnp.zeros(100_000, jnp.float16)), -np.log(1e5), rtol=1e-3)


def test_sigmoid_does_not_overflow():
    np.testing.assert_array_equal(ops.sigmoid(jnp.array([-1e30, -jnp.inf, 0.0, jnp.inf])), [0, 0, 0.5, 1])


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "softmax", "log_softmax"])
@pytest.mark.parametrize(
    "x", [jnp.arange(3), jnp.ones(3, bool), jnp.ones(3, jnp.complex64), jnp.ones(3, jnp.float8_e4m3fn)]
)
def test_other_than_real_floating_input_is_a_type_error_that_names_it(name, x):
    with pytest.raises(TypeError, match=rf"{name}: x must be of dtype .* got {x.dtype}\[3\]"):
        getattr(ops, name)(x)


def test_a_wrong_axis_is_named():
    with pytest.raises(ValueError, match=r"softmax: x has no axis 2, its shape is \[3, 4\]"):
        ops.softmax(jnp.ones((3, 4)), axis=2)


@pytest.mark.parametrize(
    ("x", "w", "b"),
    [
        ((2, 3), (4, 5), (5,)),
        ((2, 3), (3, 5), (4,)),
        ((2, 3), (3,), (3,)),
        ((), (1, 1), (1,)),
        ((2, 3), (3, 5), (1, 5)),
    ],
)
def test_affine_names_all_three_shapes_of_a_misfit(x, w, b):
    with pytest.raises(ValueError, match="affine: expected x .*, got x .*, w .*, b "):
        ops.affine(jnp.ones(x), jnp.ones(w), jnp.ones(b))


def test_affine_promotes_nothing_silently():
    with pytest.raises(TypeError, match=r"affine: x, w, b must have the same dtype.*bfloat16\[2,3\], w float32\[3,4\]"):
        ops.affine(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4)), jnp.ones(4))


MASKS = [np.array([[True, False, True], [False] * 3]), np.array([True, True, False]), np.array([[True], [False]])]


@pytest.mark.parametrize("where", MASKS, ids=["elements", "columns", "rows"])
@pytest.mark.parametrize("axis", [-1, slow(0), (0, 1), slow(None)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_masked_elements_take_no_part_as_in_jax(name, axis, where):
    x = jnp.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])
    g = jnp.array([[0.5, 2.0, -1.0], [1.0, -0.25, 4.0]])

    def finite(f):  # log_softmax is -inf where it is masked
        return lambda x: jnp.where(jnp.broadcast_to(where, x.shape), f(x, axis=axis, where=where), 0)

    with jax.numpy_rank_promotion("allow"):
        expected, expected_pull = jax.vjp(finite(getattr(jax.nn, name)), x)
    got, pull = jax.vjp(finite(getattr(ops, name)), jnp.where(jnp.broadcast_to(where, x.shape), x, jnp.nan))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(pull(g)[0], expected_pull(g)[0], rtol=1e-6, atol=1e-7)
    masked = getattr(ops, name)(x, axis, where)[~jnp.broadcast_to(where, x.shape)]
    np.testing.assert_array_equal(masked, 0 if name == "softmax" else -np.inf)


def test_a_mask_that_cannot_be_broadcast_is_named():
    with pytest.raises(
        ValueError, match=r"softmax: where must be broadcastable to the shape of x, \[2, 3\], got \[2\]"
    ):
        ops.softmax(jnp.ones((2, 3)), where=np.ones(2, bool))
