"""How fit handles non-finite numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, sharding, train
from tests.helpers import loss_fn, make_data, make_state
from tests.rules import slow


def reciprocal(params, batch, key):
    """A loss that divides by the first feature, and so is non-finite if that is zero."""
    loss, metrics = loss_fn(params, batch, key)
    return loss + jnp.mean(1 / batch.x[:, 0] * params[0]["b"][0]), metrics


@pytest.mark.parametrize("on_a_mesh", [False, slow(True)])
def test_fit_stops_at_a_step_that_is_not_finite_with_the_state_of_before_it(on_a_mesh):
    optimizer, data = optax.adam(0.01), make_data(50)
    data.x[17, 0] = 0.0
    if on_a_mesh:
        data = sharding.global_batch(data, sharding.make_mesh(data=2, devices=jax.devices()[:2]))
    with pytest.raises(train.NonFiniteError, match=r"fit: grads\[0\]\['b'\] was not finite at step \d+") as caught:
        train.fit(reciprocal, optimizer, make_state(optimizer), data, epochs=2, batch_size=4)
    error = caught.value
    assert 17 in error.indices
    assert (error.step, error.leaf, error.history) == (
        int(error.state.step),
        "grads[0]['b']",
        {"epochs": 0, "kept_epoch": 0},
    )
    states, good = [], make_state(optimizer)
    if error.step:
        options = {
            "epochs": 1,
            "batch_size": 4,
            "every": 1,
            "on_steps": lambda s: states.append(jax.tree.map(jnp.copy, s)),
        }
        with pytest.raises(train.NonFiniteError):
            train.fit(reciprocal, optimizer, good, data, **options)
        good = states[error.step - 1]
    chex.assert_trees_all_equal(error.state.params, good.params)
    chex.assert_trees_all_equal(error.state.opt_state, good.opt_state)
    bad = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[error.indices]), data)
    assert not np.isfinite(reciprocal(jax.device_get(error.state.params), bad, None)[0])


def test_fit_stops_where_parameters_overflow_after_a_finite_loss():
    optimizer = optax.chain(optax.sgd(1e30), optax.scale(1e15))
    with pytest.raises(
        train.NonFiniteError, match=r"params\[0\]\['b'\] was not finite at step 0 .* loss of [\d.]+ on"
    ) as e:
        train.fit(loss_fn, optimizer, make_state(optimizer), make_data(40), epochs=3, batch_size=40)
    chex.assert_trees_all_equal(e.value.state.params, make_state(optimizer).params)


@pytest.mark.slow
def test_fit_stops_at_the_step_that_a_guard_lets_through():
    data = make_data(50)
    data.x[17, 0] = 0.0
    guarded = optax.apply_if_finite(optax.sgd(0.01), 2)
    state, history = train.fit(reciprocal, guarded, make_state(guarded), data, epochs=3, batch_size=4)
    assert int(state.opt_state.total_notfinite) == 3
    assert int(state.step) == 39
    assert np.isfinite(history["loss"]).all()
    data.x[:, 0] = 0.0  # now every step is non-finite
    with pytest.raises(train.NonFiniteError, match=r"was not finite at step 2") as caught:
        train.fit(reciprocal, guarded, make_state(guarded), data, epochs=3, batch_size=4)
    chex.assert_trees_all_equal(caught.value.state.params, make_state(guarded).params)


def test_the_history_leaves_out_the_steps_that_a_guard_skips():
    @jax.custom_jvp
    def no_gradient(x):
        return x

    no_gradient.defjvp(lambda primals, tangents: (primals[0], tangents[0] * jnp.nan))

    def loss(params, batch, key):
        x = params["a"] * 0 + jnp.mean(batch)
        return jax.lax.cond(jnp.mean(batch) > 2, no_gradient, lambda x: x, x)

    guarded = optax.apply_if_finite(optax.sgd(1e-4), 5)
    start = train.init_state({"a": jnp.ones(())}, guarded, jax.random.key(0))
    data = np.array([1, 1, 1, 7], np.float32)
    _, history = train.fit(loss, guarded, start, data, epochs=np.int64(1), batch_size=np.int64(1))
    assert history["loss"][0] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("every", [slow(None), 1])
def test_a_bad_step_is_found_among_steps_that_a_guard_skips(every):
    """One step has a finite loss and a NaN gradient, and is skipped; another has a NaN loss and a finite gradient."""

    @jax.custom_jvp
    def no_gradient(x, here):
        return x

    no_gradient.defjvp(lambda primals, tangents: (primals[0], tangents[0] * jnp.where(primals[1], jnp.nan, 1.0)))

    def mixed(params, batch, key):
        x = params["a"] * jnp.mean(batch.astype(jnp.float32))
        lost = jnp.where(jnp.any(batch == 3), jnp.nan, 0.0)
        return no_gradient(x, jnp.any(batch == 30)) + jax.lax.stop_gradient(lost), {}

    options = {} if every is None else {"every": every, "on_steps": lambda state: None}
    guarded = optax.apply_if_finite(optax.sgd(1e-4), 5)
    start = train.init_state({"a": jnp.ones(())}, guarded, jax.random.key(0))
    with pytest.raises(train.NonFiniteError, match=r"fit: loss was not finite") as caught:
        train.fit(mixed, guarded, start, np.arange(50, dtype=np.int32), epochs=1, batch_size=4, **options)
    assert 3 in caught.value.indices
    late = optax.chain(optax.scale_by_adam(), optax.apply_if_finite(optax.scale(-0.1), 3))
    data = make_data(50)
    data.x[17, 0] = 0.0
    with pytest.raises(train.NonFiniteError, match=r"grads\[0\]\['b'\] was not finite") as caught:
        train.fit(reciprocal, late, make_state(late), data, epochs=1, batch_size=4, **options)
    assert 17 in caught.value.indices
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(caught.value.state.opt_state))


def test_a_bad_label_is_named_and_not_taken_for_a_learning_rate():
    data, optimizer = make_data(60), optax.sgd(0.1)
    data.y[17] = 7
    with pytest.raises(
        train.NonFiniteError, match=r"the loss is finite with a value other than data\.y\[17\] = 7: labels"
    ) as e:
        train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)
    assert "learning rate" not in str(e.value)
    assert 17 in e.value.indices


def test_a_loss_that_diverges_is_not_blamed_on_a_valid_label():
    optimizer, data = optax.sgd(1e4), make_data(60)

    def plain(params, batch, key):
        probs = jax.nn.softmax(fcfunc.apply(params, batch.x), axis=-1)
        return -jnp.mean(jnp.log(jnp.take_along_axis(probs, batch.y[:, None], axis=-1)))

    with pytest.raises(train.NonFiniteError, match="try a lower learning rate"):
        train.fit(plain, optimizer, make_state(optimizer), data, epochs=3, batch_size=8)


def test_a_bad_label_is_named_if_the_loss_needs_its_key_and_labels_are_a_column():
    data, optimizer = make_data(60), optax.sgd(0.1)
    data = data._replace(y=data.y[:, None].astype(np.int64))
    data.y[17] = 2**32 + 1

    def dropping(params, batch, key):
        x = batch.x * jax.random.bernoulli(key, 0.9, batch.x.shape).astype(batch.x.dtype)
        logits = fcfunc.apply(params, x)
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y[:, 0]))

    with pytest.raises(train.NonFiniteError, match=r"with a value other than data\.y\[17\] = \[4294967297\]: labels"):
        train.fit(dropping, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)
