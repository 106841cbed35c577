"""The training step: updates, donation, and errors."""

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


def test_an_sgd_step_subtracts_the_gradient_and_counts():
    optimizer, batch = optax.sgd(0.5), make_data(8)
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])
    state, metrics = train.make_train_step(loss_fn, optimizer)(make_state(optimizer), batch)
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, None)
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert int(state.step) == 1


def test_steps_donate_the_state_and_never_the_callers_params():
    params, optimizer = fcfunc.init(jax.random.key(0), [4, 8, 3]), optax.adam(1e-3)
    state = train.init_state(params, optimizer, jax.random.key(0))
    new, _ = train.make_train_step(loss_fn, optimizer)(state, make_data(8))
    assert state.params[0]["w"].is_deleted()
    assert not params[0]["w"].is_deleted()
    assert not new.params[0]["w"].is_deleted()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        slow(optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.adamw(1e-2),
        slow(optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-2))),
        slow(optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)),
        slow(optax.MultiSteps(optax.sgd(0.1), 2)),
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
        slow(optax.lbfgs()),
    ],
    ids=["sgd", "nesterov", "adamw", "clip", "inject", "multi_steps", "plateau", "lbfgs"],
)
def test_any_optax_optimizer_lowers_the_loss(optimizer):
    data, state = make_data(64), make_state(optimizer)
    before = train.evaluate(loss_fn, state.params, data)["loss"]
    epoch = train.make_train_epoch(loss_fn, optimizer, 16)
    for _ in range(5):
        state, _ = epoch(state, data)
    assert train.evaluate(loss_fn, state.params, data)["loss"] < 0.9 * before


def test_a_loss_per_example_is_refused_with_advice():
    step = train.make_train_step(lambda p, b, k: losses.squared_error(p * b, b), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"must return a scalar.*got float32\[4\]; take jnp.mean"):
        step(train.init_state(jnp.float32(1), optax.sgd(0.1), jax.random.key(0)), jnp.ones(4))


@pytest.mark.parametrize("entry", ["fit", "evaluate", "make_train_step", "make_train_epoch", "make_fit"])
def test_a_label_of_64_bits_is_not_wrapped_into_a_class(entry):
    data, optimizer = make_data(16), optax.sgd(0.1)
    data = data._replace(y=data.y.astype(np.int64) + 2**32)
    state = make_state(optimizer)
    if entry == "fit":
        with pytest.raises(train.NonFiniteError, match="no example has a finite loss with the initial parameters"):
            train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=8)
        return
    loss = {
        "evaluate": lambda: train.evaluate(loss_fn, state.params, data)["loss"],
        "make_train_step": lambda: train.make_train_step(loss_fn, optimizer)(state, data)[1]["loss"],
        "make_train_epoch": lambda: train.make_train_epoch(loss_fn, optimizer, 8)(state, data)[1]["loss"],
        "make_fit": lambda: train.make_fit(loss_fn, optimizer, epochs=1, batch_size=8)(state, data)[1]["loss"],
    }[entry]()
    assert np.isnan(loss).all()


def test_a_label_of_64_bits_is_not_wrapped_on_its_way_to_a_mesh():
    labels = sharding.global_batch(np.arange(8) + 2**32, sharding.make_mesh())
    np.testing.assert_array_equal(labels, 2**31 - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: (x.tolist(), y), r"data\[0\]\[0\]\[0\] must be an array, got float; np.asarray converts lists"),
        (lambda x, y: (x, list("abc" * 4)), r"data\[1\]\[0\] must be an array, got str"),
        (lambda x, y: (x, np.array(list("abc" * 4))), r"data\[1\] must hold numbers, got dtype <U1; np.unique"),
        (lambda x, y: (x, np.array(list("abc" * 4), object)), r"data\[1\] must hold numbers, got dtype object"),
        (lambda x, y: (Sparse(), y), r"data\[0\] must be an array, got tests Sparse; use data\[0\]\.toarray\(\)"),
        (lambda x, y: (x, y[:5]), r"same leading axis, got 12 in data\[0\] and 5 in data\[1\]"),
        (lambda x, y: (x, y[0]), r"data\[1\] must be an array, got numpy int32"),
        (lambda x, y: (), "data must hold at least one array of examples, got none"),
    ],
    ids=["lists", "strings", "texts", "objects", "sparse", "lengths", "scalar", "nothing"],
)
@pytest.mark.parametrize("entry", ["fit", "evaluate", "make_train_step"])
def test_data_that_is_no_array_is_a_short_error_that_names_it(entry, make, message):
    optimizer, data = optax.sgd(0.1), make(*make_data(12))
    call = {
        "fit": lambda state: train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=4),
        "evaluate": lambda state: train.evaluate(loss_fn, state.params, data),
        "make_train_step": lambda state: train.make_train_step(loss_fn, optimizer)(state, data),
    }[entry]
    with pytest.raises((TypeError, ValueError), match=f"^{entry}: (a batch)?.*{message}") as e:
        call(make_state(optimizer))
    assert len(str(e.value)) < 200


class Sparse:
    def toarray(self):
        raise AssertionError("nothing is converted silently")


def test_without_donation_the_old_state_stays_valid():
    optimizer, batch = optax.adam(1e-2), make_data(8)
    state = make_state(optimizer)
    step = train.make_train_step(loss_fn, optimizer, donate=False)
    once, _ = step(state, batch)
    again, _ = step(state, batch)
    chex.assert_trees_all_equal(once.params, again.params)


def test_an_epoch_without_donation_leaves_the_old_state_valid():
    optimizer, data = optax.adam(1e-2), make_data(8)
    state = make_state(optimizer)
    train.make_train_epoch(loss_fn, optimizer, 4, donate=False)(state, data)
    assert not state.params[0]["w"].is_deleted()


@pytest.mark.parametrize(
    "call",
    [
        lambda params, data: train.make_train_step(loss_fn, optax.sgd(0.1))(params, data),
        lambda params, data: train.make_train_epoch(loss_fn, optax.sgd(0.1), 4)(params, data),
        lambda params, data: train.make_fit(loss_fn, optax.sgd(0.1), epochs=1, batch_size=4)(params, data),
        lambda params, data: train.fit(loss_fn, optax.sgd(0.1), params, data, epochs=1, batch_size=4),
    ],
)
def test_params_in_the_place_of_a_state_are_refused(call):
    with pytest.raises(TypeError, match="state must be a TrainState, as from init_state, got list"):
        call(make_state(optax.sgd(0.1)).params, make_data(8))


def test_a_state_in_the_place_of_params_is_refused():
    with pytest.raises(TypeError, match="got a TrainState; pass state.params"):
        train.evaluate(loss_fn, make_state(optax.sgd(0.1)), make_data(8))


def test_a_loss_with_other_arguments_is_told_which_it_is_given():
    step = train.make_train_step(lambda params, batch: jnp.float32(0), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"loss_fn must accept \(params, batch, key\)"):
        step(make_state(optax.sgd(0.1)), make_data(8))


def test_a_new_state_follows_the_data_to_its_device():
    optimizer, data = optax.sgd(0.1), jax.device_put(make_data(16), jax.devices()[1])
    state, _ = train.make_train_step(loss_fn, optimizer)(make_state(optimizer), data)
    assert state.step.devices() == {jax.devices()[1]}
    mesh = jax.make_mesh((2,), ("data",))
    replicated = jax.device_put(make_data(16), jax.NamedSharding(mesh, jax.P()))
    params = make_state(optimizer).params
    make = jax.jit(lambda data: train.init_state(params, optimizer, jax.random.key(0)).params[0]["w"] + data[0][0, 0])
    assert make(replicated).sharding.is_fully_replicated


def test_the_states_that_init_state_makes_share_no_buffer():
    params = fcfunc.init(jax.random.key(0), [4, 8, 3])
    state = train.init_state(params, optax.sgd(0.1), jax.random.key(1))
    leaves = [a for a in jax.tree.leaves((params, state)) if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
    assert len({a.unsafe_buffer_pointer() for a in leaves}) == len(leaves)
