"""An epoch as a single compiled program, and evaluation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import train
from fcfunc.data import Dataset
from tests.helpers import compilations, loss_fn, make_data, make_state


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(12, 4, [4, 4, 4]), (10, 4, [4, 4, 2]), (3, 3, [3]), (5, 4, [4, 1])]
)
def test_an_epoch_uses_every_example_once_and_counts_the_short_batch(n, batch_size, sizes):
    """The loss is linear in one weight per example, so each SGD step records which examples were in the batch."""
    data = {"index": jnp.arange(n)}

    def record(params, batch, key):
        del key
        seen = jnp.zeros(n).at[batch["index"]].add(1.0)
        return jnp.mean(params[batch["index"]]), {"seen": seen, "size": jnp.sum(seen)}

    optimizer = optax.sgd(1.0)
    state = train.init_state(jnp.zeros(n), optimizer, jax.random.key(0))
    state, metrics = train.make_train_epoch(record, optimizer, batch_size)(state, data)
    np.testing.assert_array_equal(metrics["size"], sizes)
    np.testing.assert_array_equal(metrics["seen"].sum(axis=0), np.ones(n))
    step_of = np.argmax(metrics["seen"], axis=0)
    np.testing.assert_allclose(state.params, -1 / np.array(sizes)[step_of], rtol=1e-6)
    assert int(state.step) == len(sizes)


def test_an_epoch_equals_its_steps_one_by_one():
    optimizer, data = optax.adam(1e-2), make_data(10)
    order = []

    def spying(params, batch, key):
        loss, _ = loss_fn(params, batch, key)
        return loss, {"first": batch.x[:, 0]} if batch.x.shape[0] == 5 else {}

    state, metrics = train.make_train_epoch(spying, optimizer, 5)(make_state(optimizer), data)
    by_steps, step = make_state(optimizer), train.make_train_step(loss_fn, optimizer)
    for first in np.asarray(metrics["first"]):
        rows = [int(np.argmax(data.x[:, 0] == value)) for value in first]
        by_steps, _ = step(by_steps, Dataset(data.x[rows], data.y[rows]))
        order += rows
    assert sorted(order) == list(range(10))
    chex.assert_trees_all_close(state.params, by_steps.params, rtol=1e-5, atol=1e-6)


def test_every_epoch_has_another_order_and_every_step_another_key():
    def draw(params, batch, key):
        return jnp.sum(params) * 0.0, {"draw": jax.random.uniform(key), "first": batch[0]}

    optimizer = optax.sgd(0.1)
    state = train.init_state(jnp.zeros(1), optimizer, jax.random.key(0))
    epoch = train.make_train_epoch(draw, optimizer, 10)
    state, one = epoch(state, jnp.arange(100))
    state, two = epoch(state, jnp.arange(100))
    assert len(np.unique(np.concatenate([one["draw"], two["draw"]]))) == 20
    assert not np.array_equal(one["first"], two["first"])


def test_a_run_of_a_thousand_steps_is_traced_and_compiled_once():
    optimizer, data, traces = optax.sgd(0.1), make_data(398), []

    def counting(params, batch, key):
        traces.append(batch.x.shape[0])
        return loss_fn(params, batch, key)

    epoch, state = train.make_train_epoch(counting, optimizer, 4), make_state(optimizer)
    state, _ = epoch(state, data)
    with compilations() as compiled:
        for _ in range(9):
            state, _ = epoch(state, data)
    assert int(state.step) == 1000
    assert sorted(traces) == [2, 4]  # once for full batches and once for the short one, in the same program
    assert not compiled


def test_evaluate_weighs_the_short_batch_by_its_size():
    data, params = make_data(10), fcfunc.init(jax.random.key(0), [4, 8, 3])
    whole = loss_fn(params, data, None)
    for batch_size in (1, 3, 4, 10, 1000):
        metrics = train.evaluate(loss_fn, params, data, batch_size=batch_size)
        np.testing.assert_allclose(metrics["loss"], whole[0], rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], whole[1]["accuracy"], rtol=1e-5)
