"""Normalization: comparison with NumPy in float64, running statistics, hostile inputs, and errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcfunc
from fcfunc import ops, reference


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def test_layer_norm_is_that_of_numpy(x64):
    x, scale, offset = normal(0, 5, 7), normal(1, 7), normal(2, 7)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * scale[None] + offset[None]
    np.testing.assert_allclose(ops.layer_norm(x, scale, offset), expected, rtol=1e-12)


def test_rms_norm_is_that_of_numpy(x64):
    x, scale = normal(0, 2, 5, 7), normal(1, 7)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(ops.rms_norm(x, scale), expected, rtol=1e-12)


def test_layer_norm_of_a_large_mean_keeps_its_digits():
    x = np.float32(1e4) + np.arange(8, dtype=np.float32)[None]
    expected = (np.arange(8) - 3.5) / np.sqrt(5.25 + 1e-5)
    np.testing.assert_allclose(ops.layer_norm(x, jnp.ones(8), jnp.zeros(8))[0], expected, rtol=1e-6)


@pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
def test_what_overflows_is_nan_in_value_and_gradient_not_zero(value):
    x = jnp.asarray(normal(0, 3, 4), jnp.float32).at[1, 2].set(value)
    for norm in (lambda x: ops.layer_norm(x, jnp.ones(4), jnp.zeros(4)), lambda x: ops.rms_norm(x, jnp.ones(4))):
        out, pull = jax.vjp(norm, x)
        (dx,) = pull(jnp.ones_like(out))
        assert np.isnan(out[1]).all()
        assert np.isnan(dx[1]).all()
        assert np.isfinite(out[::2]).all()
        assert np.isfinite(dx[::2]).all()


def test_a_constant_row_is_all_offset():
    np.testing.assert_array_equal(ops.layer_norm(jnp.full((1, 4), 3.0), jnp.ones(4), jnp.arange(4.0)), [[0, 1, 2, 3]])


def test_batch_norm_normalizes_by_the_batch_and_moves_the_running_statistics(x64):
    x, scale, offset = normal(0, 3, 4, 5), normal(1, 5), normal(2, 5)
    state = {"mean": normal(3, 5), "var": normal(4, 5) ** 2}
    out, new = ops.batch_norm(x, scale, offset, state, training=True, decay=0.8)
    rows = x.reshape(12, 5)
    expected = (rows - rows.mean(0)[None]) / np.sqrt(rows.var(0) + 1e-5)[None] * scale[None] + offset[None]
    np.testing.assert_allclose(out.reshape(12, 5), expected, rtol=1e-11)
    np.testing.assert_allclose(new["mean"], 0.8 * state["mean"] + 0.2 * rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(new["var"], 0.8 * state["var"] + 0.2 * rows.var(0, ddof=1), rtol=1e-12)


def test_batch_norm_in_evaluation_uses_the_state_and_leaves_it(x64):
    x, scale, offset = normal(0, 1, 5), normal(1, 5), normal(2, 5)
    state = {"mean": normal(3, 5), "var": normal(4, 5) ** 2}
    out, new = ops.batch_norm(x, scale, offset, state, training=False)
    expected = (x - state["mean"][None]) / np.sqrt(state["var"] + 1e-5)[None] * scale[None] + offset[None]
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    assert new is state


@pytest.mark.slow
def test_the_running_statistics_have_their_gradients(x64):
    x, scale, offset = normal(0, 6, 3), normal(1, 3), normal(2, 3)
    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

    def total(batch_norm):
        def of(x):
            out, new = batch_norm(x, scale, offset, state, training=True)
            return jnp.sum(out**3) + jnp.sum(new["mean"] ** 2) + jnp.sum(new["var"] ** 2)

        return of

    np.testing.assert_allclose(jax.grad(total(ops.batch_norm))(x), jax.grad(total(reference.batch_norm))(x), rtol=1e-9)


def test_bfloat16_activations_beside_float32_masters():
    x = jnp.asarray(normal(0, 64, 33), jnp.bfloat16)
    out, pull = jax.vjp(ops.layer_norm, x, jnp.ones(33), jnp.zeros(33))
    chex.assert_type([out, *pull(jnp.ones_like(out))], [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32])
    state = {"mean": jnp.zeros(33), "var": jnp.ones(33)}
    out, new = ops.batch_norm(x, jnp.ones(33), jnp.zeros(33), state, training=True)
    chex.assert_type([out, new["mean"], new["var"]], [jnp.bfloat16, jnp.float32, jnp.float32])


def batch_norm(x, state=None, **options):
    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)} if state is None else state
    return ops.batch_norm(x, jnp.ones(3), jnp.zeros(3), state, training=True, **options)


def test_a_network_with_batch_norm_carries_its_state_stacked_or_not():
    net = fcfunc.mlp([6, 5, 5, 5, 3], norm="batch_norm")
    params = net.init(jax.random.key(0))
    x = jnp.asarray(normal(0, 8, 6), jnp.float32)
    out, state = net.apply_batch_norm(params, net.init_batch_norm_state(params), x, training=True)
    stacked = fcfunc.stack(params)
    start = net.init_batch_norm_state(stacked)
    stacked_out, stacked_state = net.apply_batch_norm(stacked, start, x, training=True)
    np.testing.assert_allclose(stacked_out, out, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(stacked_state[0], state[0], rtol=1e-5)
    chex.assert_trees_all_close(
        stacked_state[1], jax.tree.map(lambda *a: jnp.stack(a), *state[1:]), rtol=1e-4, atol=1e-6
    )
    h = x
    for p in params[:-1]:
        z = h @ p["w"]
        h = jnp.maximum((z - z.mean(0)[None]) / jnp.sqrt(z.var(0)[None] + 1e-5), 0)
    np.testing.assert_allclose(out, h @ params[-1]["w"], rtol=1e-3, atol=1e-4)


def test_a_state_that_does_not_fit_is_refused():
    net = fcfunc.mlp([6, 5, 3], norm="batch_norm")
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match="state must have 1 entries, one per hidden entry of params, got 0"):
        net.apply_batch_norm(params, [], jnp.ones((2, 6)), training=True)
    wrong = [{"mean": jnp.zeros(4), "var": jnp.ones(4)}]
    with pytest.raises(ValueError, match=r"state 0: mean must be \[5\], got \[4\]"):
        net.apply_batch_norm(params, wrong, jnp.ones((2, 6)), training=True)


def test_a_mean_that_is_large_against_the_spread_is_no_variance():
    row = jnp.full((1, 5), 30000.7)
    np.testing.assert_array_equal(ops.layer_norm(row, jnp.ones(5), jnp.zeros(5)), 0)
    row = row.at[0, 4].set(30000.71)
    exact = np.asarray(row, np.float64)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    np.testing.assert_allclose(ops.layer_norm(row, jnp.ones(5), jnp.zeros(5)), exact, rtol=1e-3)
    out, _ = batch_norm(jnp.full((5, 3), 30000.7))
    np.testing.assert_array_equal(out, 0)


def test_a_state_in_half_precision_is_refused():
    state = {"mean": jnp.zeros(3, jnp.bfloat16), "var": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(TypeError, match="the state must be in at least float32, got bfloat16"):
        batch_norm(jnp.ones((2, 3)), state=state)


def test_a_training_batch_of_one_row_is_refused():
    with pytest.raises(ValueError, match=r"at least two rows to have a variance, got \[1, 3\]"):
        batch_norm(jnp.ones((1, 3)))
