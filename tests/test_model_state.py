"""Model state: values that a loss carries from step to step in addition to the parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, train
from tests.helpers import loss_fn, make_data

NORMED = fcfunc.mlp([3, 8, 8, 1], norm="batch_norm")


@pytest.mark.parametrize("as_a_function", [True, False])
def test_a_model_state_that_begins_infinite_ends_no_run(as_a_function):
    def lowest(params, batch, key, model_state):
        loss, metrics = loss_fn(params, batch, key)
        return loss, metrics, {"lowest": model_state["lowest"], "first": jnp.minimum(model_state["first"], loss)}

    optimizer, begins = optax.sgd(0.1), {"lowest": jnp.float32(-jnp.inf), "first": jnp.float32(jnp.inf)}
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])
    start = train.init_state(params, optimizer, jax.random.key(0), model_state=begins)
    if as_a_function:
        state, _ = train.make_fit(lowest, optimizer, epochs=3, batch_size=4)(start, make_data(12))
    else:
        state, _ = train.fit(lowest, optimizer, start, make_data(12), epochs=3, batch_size=4)
    assert int(state.step) == 9


def test_a_guard_keeps_the_model_state_of_before_a_step_that_it_skips():
    def running(params, batch, key, model_state):
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(1 / batch.x[:, 0])
        return loss_fn(params, batch, key)[0] + 0 * mean * params[0]["b"][0], {}, {"mean": mean}

    data, optimizer = make_data(50), optax.apply_if_finite(optax.sgd(0.1), 5)
    data.x[17, 0] = 0.0
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])
    start = train.init_state(params, optimizer, jax.random.key(0), model_state={"mean": jnp.zeros(())})
    state, _ = train.fit(running, optimizer, start, data, epochs=2, batch_size=4)
    assert int(state.opt_state.total_notfinite) == 2
    assert np.isfinite(state.model_state["mean"])


def batch_normed(params, batch, key, model_state):
    x, y = batch
    out, model_state = NORMED.apply_batch_norm(params, model_state, x, training=key is not None)
    return jnp.mean(losses.squared_error(out[:, 0], y)), {"mean": jnp.mean(out)}, model_state


@pytest.fixture
def batch_norm_run():
    params = NORMED.init(jax.random.key(0))
    data = (2 + jax.random.normal(jax.random.key(1), (40, 3)), jnp.arange(40.0) / 40)
    optimizer = optax.sgd(0.05)
    state = train.init_state(params, optimizer, jax.random.key(2), model_state=NORMED.init_batch_norm_state(params))
    return optimizer, state, data


def test_a_model_state_goes_through_step_epoch_fit_and_evaluation(batch_norm_run):
    optimizer, start, data = batch_norm_run
    stats = start.model_state
    out, by_hand = NORMED.apply_batch_norm(start.params, stats, data[0], training=True)
    state, metrics = train.make_train_step(batch_normed, optimizer)(jax.tree.map(jnp.copy, start), data)
    chex.assert_trees_all_close(state.model_state, by_hand, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], jnp.mean((out[:, 0] - data[1]) ** 2), rtol=1e-5)
    state, history = train.fit(
        batch_normed, optimizer, start, data, epochs=30, batch_size=16, validation_data=data, patience=30
    )
    assert history["loss"][-1] < history["loss"][0] / 2
    scores = train.evaluate(batch_normed, state.params, data, model_state=state.model_state)
    np.testing.assert_allclose(scores["loss"], history["validation_loss"][history["kept_epoch"] - 1], rtol=1e-4)
    evaluated, same = NORMED.apply_batch_norm(state.params, state.model_state, data[0], training=False)
    np.testing.assert_allclose(scores["mean"], jnp.mean(evaluated), rtol=1e-4)
    chex.assert_trees_all_equal(same, state.model_state)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, b, k, s: jnp.float32(0), TypeError, r"must return \(loss, metrics, model_state\)"),
        (lambda p, b, k, s: (jnp.float32(0), {}, s[:1]), ValueError, "model_state like the one it was given"),
    ],
)
def test_a_loss_that_loses_its_model_state_is_refused(loss, error, message, batch_norm_run):
    optimizer, state, data = batch_norm_run
    with pytest.raises(error, match=message):
        train.make_train_step(loss, optimizer)(state, data)
