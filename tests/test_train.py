"""The train step, the epoch, evaluation and fit."""

import io
import operator
import re
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, sharding, train
from fcfunc.data import Dataset
from fcfunc.train import _memory, _progress
from fcfunc.train._progress import ProgressBar
from tests.table import slow


def make_data(n, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n, dtype=np.int32)
    return Dataset((rng.standard_normal((n, 4)) + 2 * y[:, None]).astype(np.float32), y)


def loss_fn(params, batch, key):
    del key
    logits = fcfunc.apply(params, batch.x)
    loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))
    return loss, {"accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == batch.y, dtype=jnp.float32)}


def make_state(optimizer, seed=0):
    return train.init_state(fcfunc.init(jax.random.key(seed), [4, 8, 3]), optimizer, jax.random.key(seed))


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
def test_any_optax_optimiser_lowers_the_loss(optimizer):
    data, state = make_data(64), make_state(optimizer)
    before = train.evaluate(loss_fn, state.params, data)["loss"]
    epoch = train.make_train_epoch(loss_fn, optimizer, 16)
    for _ in range(5):
        state, _ = epoch(state, data)
    assert train.evaluate(loss_fn, state.params, data)["loss"] < 0.9 * before


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"), [(12, 4, [4, 4, 4]), (10, 4, [4, 4, 2]), (3, 3, [3]), (5, 4, [4, 1])]
)
def test_an_epoch_uses_every_example_once_and_counts_the_short_batch(n, batch_size, sizes):
    """The loss is linear in a weight per example, so that the step of SGD records what was in the batch."""
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
    compilations = []
    listen = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(9):
        state, _ = epoch(state, data)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert int(state.step) == 1000
    assert sorted(traces) == [2, 4]  # once for whole batches, once for the short one, in one program
    assert not compilations


def test_evaluate_weighs_the_short_batch_by_its_size():
    data, params = make_data(10), fcfunc.init(jax.random.key(0), [4, 8, 3])
    whole = loss_fn(params, data, None)
    for batch_size in (1, 3, 4, 10, 1000):
        metrics = train.evaluate(loss_fn, params, data, batch_size=batch_size)
        np.testing.assert_allclose(metrics["loss"], whole[0], rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], whole[1]["accuracy"], rtol=1e-5)


def fit(data=None, **options):
    optimizer = optax.sgd(0.1)
    arguments: dict = {"epochs": 5, "batch_size": 16} | options
    return train.fit(loss_fn, optimizer, make_state(optimizer), data or make_data(50), **arguments)


def test_fit_learns_and_records_every_epoch():
    seen = []
    state, history = fit(
        epochs=30, validation_data=make_data(500, 1), num_classes=3, on_epoch=lambda s, r: seen.append(int(s.step))
    )
    assert [r["epoch"] for r in history] == list(range(1, 31))
    assert seen == [r["step"] for r in history] == list(range(4, 121, 4))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["validation_accuracy"] > 0.7  # three clusters that overlap
    assert int(state.step) == 120


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples():
    optimizer = optax.sgd(0.0)
    data, state = make_data(50), make_state(optimizer)
    _, history = train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=16)
    np.testing.assert_allclose(history[0]["loss"], loss_fn(state.params, data, None)[0], rtol=1e-5)


def test_early_stopping_returns_the_best_epochs_parameters():
    weights = []

    def rising(params, batch, key):  # the validation loss falls to a minimum at params 1 and rises again
        del batch
        return -params if key is not None else (params - 1.0) ** 2

    optimizer = optax.sgd(0.25)  # each step adds 0.25
    state = train.init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    state, history = train.fit(
        rising, optimizer, state, jnp.zeros(4), epochs=50, batch_size=4, validation_data=jnp.zeros(2), patience=3,
        on_epoch=lambda s, r: weights.append(float(s.params)),
    )  # fmt: skip
    assert weights == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert float(state.params) == 1.0
    assert len(history) == 7


def test_the_best_epoch_is_the_highest_where_more_is_better_and_the_first_of_equals():
    def score(params, batch, key):
        del batch, key
        return params * 0.0 - params, {"score": -jnp.round(jnp.abs(params - 1.0))}

    optimizer = optax.sgd(0.25)  # params 0.25, 0.5, ...: the score rises to 0 at 0.5, stays to 1.5 and falls
    state = train.init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    options: dict = {"epochs": 20, "batch_size": 4, "validation_data": jnp.zeros(2), "patience": 6}
    state, history = train.fit(score, optimizer, state, jnp.zeros(4), monitor="score", mode="max", **options)
    assert float(state.params) == 0.5
    assert len(history) == 8


def test_validation_labels_are_checked_too():
    with pytest.raises(ValueError, match=r"validation_data\.y\[0\]: labels in \[0, 3\)"):
        fit(validation_data=Dataset(np.zeros((2, 4), np.float32), np.array([3, 0])), num_classes=3)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss: (loss, {"step": loss}), ValueError, "must not be called 'step'"),
        (lambda loss: (loss, {"many": jnp.stack([loss, loss])}), ValueError, "each metric must be one number"),
        (lambda loss: (loss, None), TypeError, "a loss or \\(loss, dict of metrics\\)"),
        (lambda loss: [loss, {}], TypeError, "a loss or"),
    ],
)
def test_what_a_history_cannot_hold_is_refused_before_training(result, error, message):
    optimizer = optax.sgd(0.1)
    spoiled = lambda p, b, k: result(loss_fn(p, b, k)[0])
    with pytest.raises(error, match=message):
        train.fit(spoiled, optimizer, make_state(optimizer), make_data(50), epochs=1, batch_size=16)


def test_integer_and_low_precision_metrics_are_averaged_in_float32():
    def counted(params, batch, key):
        return loss_fn(params, batch, key)[0].astype(jnp.bfloat16), {"hits": jnp.sum(batch.y >= 0)}

    optimizer, data = optax.sgd(0.0), make_data(7)
    metrics = train.evaluate(counted, make_state(optimizer).params, data, batch_size=3)
    np.testing.assert_allclose(metrics["hits"], (3 * 3 + 3 * 3 + 1 * 1) / 7)
    _, history = train.fit(counted, optimizer, make_state(optimizer), data, epochs=1, batch_size=3)
    np.testing.assert_allclose(history[0]["hits"], (3 * 3 + 3 * 3 + 1 * 1) / 7)


def test_fit_leaves_the_callers_state_alone_and_repeats_to_the_bit():
    optimizer, data = optax.adam(1e-2), make_data(50)
    state = make_state(optimizer)
    one, _ = train.fit(loss_fn, optimizer, state, data, epochs=3, batch_size=16)
    two, _ = train.fit(loss_fn, optimizer, state, data, epochs=3, batch_size=16)
    chex.assert_trees_all_equal(one.params, two.params)


def test_two_runs_of_two_epochs_equal_one_of_four():
    optimizer, data = optax.adam(1e-2), make_data(50)
    whole, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=4, batch_size=16)
    half, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=16)
    rest, _ = train.fit(loss_fn, optimizer, half, data, epochs=2, batch_size=16)
    chex.assert_trees_all_equal(whole.params, rest.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 51}, r"at least 51 examples \(one batch\) expected, got 50"),
        ({"patience": 3}, "patience needs validation_data"),
        ({"mode": "least"}, 'mode must be "min" or "max"'),
        ({"validation_data": make_data(0)}, "at least 1 examples"),
        (
            {"validation_data": make_data(5), "patience": 2, "monitor": "f1"},
            "monitor 'f1' is not among the metrics: loss, accuracy",
        ),
    ],
)
def test_fit_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: Dataset(d.x, np.where(np.arange(50) == 7, 3, d.y)),
            r"data\.y\[7\]: labels in \[0, 3\) expected, got 3",
        ),
        (lambda d: Dataset(d.x, d.y - 1), r"data\.y\[\d+\]: labels in \[0, 3\) expected, got -1"),
        (
            lambda d: Dataset(np.where(d.x == d.x[4, 1], np.nan, d.x), d.y),
            r"data\.x\[4, 1\]: finite numbers expected, got nan",
        ),
        (lambda d: Dataset(d.x[:40], d.y), "same leading axis, got 40 in data.x and 50 in data.y"),
        (lambda d: Dataset(d.x[:0], d.y[:0]), "at least 16 examples"),
    ],
    ids=["label too large", "label negative", "nan", "lengths", "empty"],
)
def test_fit_refuses_bad_data_before_anything_runs(spoil, message):
    def never(params, batch, key):
        raise AssertionError("the loss was traced")

    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        train.fit(never, optimizer, make_state(optimizer), spoil(make_data(50)), epochs=1, batch_size=16, num_classes=3)


def reciprocal(params, batch, key):
    """A loss that is infinite where a parameter meets a zero of the batch."""
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
    assert (error.step, error.leaf, error.history) == (int(error.state.step), "grads[0]['b']", [])
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
def test_a_guard_skips_steps_up_to_its_number_and_fit_stops_at_the_one_it_lets_through():
    data = make_data(50)
    data.x[17, 0] = 0.0
    guarded = optax.apply_if_finite(optax.sgd(0.01), 2)
    state, history = train.fit(reciprocal, guarded, make_state(guarded), data, epochs=3, batch_size=4)
    assert int(state.opt_state.total_notfinite) == 3
    assert int(state.step) == 39
    assert all(np.isfinite(record["loss"]) for record in history)
    data.x[:, 0] = 0.0  # every step now
    with pytest.raises(train.NonFiniteError, match=r"was not finite at step 2") as caught:
        train.fit(reciprocal, guarded, make_state(guarded), data, epochs=3, batch_size=4)
    chex.assert_trees_all_equal(caught.value.state.params, make_state(guarded).params)


@pytest.mark.parametrize("stop", [slow(1), 3, slow(7), slow(12)])
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_takes_the_steps_it_would_have_taken(stop):
    optimizer, data = optax.adam(1e-2), make_data(50)
    options = {"batch_size": 4, "every": 3}
    whole, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=3, on_steps=lambda s: None, **options)
    saved = []

    def on_steps(state):
        if int(state.step) >= 13 + stop and not saved:
            saved.append(jax.tree.map(jnp.copy, state))

    train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, on_steps=on_steps, **options)
    assert int(saved[0].position) == {1: 12, 3: 12, 7: 36, 12: 48}[stop]
    left = 3 - int(saved[0].step) // 13
    resumed, _ = train.fit(loss_fn, optimizer, saved[0], data, epochs=left, on_steps=lambda s: None, **options)
    assert int(resumed.step) == 39
    chex.assert_trees_all_equal(resumed.params, whole.params)
    chex.assert_trees_all_equal(resumed.opt_state, whole.opt_state)


@pytest.mark.slow
def test_an_epoch_in_parts_is_the_epoch_and_a_step_of_its_own_leaves_it():
    optimizer, data = optax.sgd(0.1), make_data(50)
    whole, records = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4)
    steps = []
    options = {"every": 5, "on_steps": lambda s: steps.append((int(s.step), int(s.position)))}
    state, history = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4, **options)
    chex.assert_trees_all_close(state.params, whole.params, rtol=1e-6)
    np.testing.assert_allclose(history[1]["loss"], records[1]["loss"], rtol=1e-6)
    assert steps == [(5, 20), (10, 40), (13, 0), (18, 20), (23, 40), (26, 0)]
    middle = state._replace(position=jnp.int32(5))
    middle, _ = train.make_train_step(loss_fn, optimizer)(middle, jax.tree.map(lambda a: a[:4], data))
    assert int(middle.position) == 0


@pytest.mark.slow
def test_a_run_repeats_to_the_bit():
    optimizer, data = optax.adam(1e-2), make_data(50)

    def run():
        def dropped(params, batch, key):
            logits = fcfunc.apply(params, batch.x, dropout_rate=0.3, key=key)
            return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))

        state, _ = train.fit(dropped, optimizer, make_state(optimizer), data, epochs=2, batch_size=4)
        return state.params, train.evaluate(dropped, state.params, data)

    chex.assert_trees_all_equal(run(), run())  # traced and compiled anew: the function is another one


@pytest.mark.slow
def test_an_epoch_goes_on_with_the_examples_that_are_left_whatever_the_batch_size():
    seen, optimizer = [], optax.sgd(0.1)

    def note(params, batch, key):
        jax.debug.callback(lambda rows: seen.extend(rows.tolist()), batch)
        return params["a"] * jnp.mean(batch.astype(jnp.float32))

    states = []
    start = train.init_state({"a": jnp.ones(())}, optimizer, jax.random.key(0))
    keep = {"every": 2, "on_steps": lambda state: states.append(jax.tree.map(jnp.copy, state))}
    train.fit(note, optimizer, start, np.arange(50, dtype=np.int32), epochs=1, batch_size=4, **keep)
    jax.effects_barrier()
    first, seen[:] = seen[:8], []
    resumed, _ = train.fit(note, optimizer, states[0], np.arange(50, dtype=np.int32), epochs=1, batch_size=5)
    jax.effects_barrier()
    assert sorted(first + seen) == list(range(50))
    assert int(resumed.position) == 0


@pytest.mark.parametrize("position", [-1, 50])
def test_what_does_not_fit_a_position_is_refused(position):
    optimizer, data = optax.sgd(0.1), make_data(50)
    state = make_state(optimizer)._replace(position=jnp.int32(position))
    with pytest.raises(ValueError, match=rf"the state is at example {position} of its epoch, and data has 50 of them"):
        train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=r"every and on_steps go together"):
        train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=1, batch_size=4, every=2)


def test_a_run_as_a_function_ends_with_the_state_of_before_its_parameters_overflowed():
    optimizer = optax.chain(optax.sgd(1e30), optax.scale(1e15))
    fit = train.make_fit(loss_fn, optimizer, epochs=3, batch_size=40)
    state, history = fit(make_state(optimizer), make_data(40))
    assert int(history["epochs"]) == 1
    chex.assert_trees_all_equal(state.params, make_state(optimizer).params)


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


def test_the_record_leaves_out_the_steps_that_a_guard_skips_and_the_sizes_may_be_numpys():
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
    assert history[0]["loss"] == 1.0


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


@pytest.mark.slow
@pytest.mark.parametrize("every", [slow(None), 1])
def test_a_bad_step_is_found_whatever_others_a_guard_skips_and_wherever_its_trace_stays(every):
    """One step has a finite loss and no gradient, and is skipped; another a loss that is not finite and a gradient."""

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


def test_a_loss_that_is_an_object_or_a_method_is_compiled_once_and_never_taken_for_another():
    class Scaled:
        scale = 1.0
        traces = 0

        def loss(self, params, batch, key):
            self.traces += 1
            return self.scale * loss_fn(params, batch, key)[0]

        __call__ = loss
        __hash__ = None  # type: ignore[assignment]

    optimizer, data, scaled = optax.sgd(0.1), make_data(48), Scaled()
    options = {"epochs": 3, "batch_size": 4, "every": 3, "on_steps": lambda state: None}
    _, one = train.fit(scaled, optimizer, make_state(optimizer), data, **options)
    assert scaled.traces <= 2  # the check of its metrics, and the program
    _, two = train.fit(scaled.loss, optimizer, make_state(optimizer), data, **options)
    scaled.scale = 10.0
    _, ten = train.fit(scaled.loss, optimizer, make_state(optimizer), data, **options)
    assert one[0]["loss"] == two[0]["loss"]
    assert ten[0]["loss"] > 5 * two[0]["loss"]


def test_many_small_fits_compile_once_and_keep_no_array():
    optimizer, data, seen = optax.sgd(0.1), make_data(10), []
    run = lambda: train.fit(
        loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4, validation_data=data
    )
    for _ in range(2):
        run()
    listen = lambda event, *_, **__: seen.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    arrays = len(jax.live_arrays())
    for _ in range(20):
        run()
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not seen
    assert len(jax.live_arrays()) == arrays


def test_data_that_the_memory_does_not_hold_are_refused_with_their_size_before_anything_is_copied(monkeypatch):
    monkeypatch.setattr(_memory, "_free", lambda device: 700)
    optimizer, data = optax.sgd(0.1), make_data(40)
    with pytest.raises(MemoryError, match=r"fit: data of 0\.00 GB .*to copy, and 0\.00 GB are free on"):
        train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=1, batch_size=4)
    train.fit(loss_fn, optimizer, make_state(optimizer), jax.tree.map(jnp.asarray, data), epochs=1, batch_size=4)


def test_the_free_memory_is_that_of_the_machine_or_of_its_container(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4500\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 3500\n")
    monkeypatch.setattr(_memory, "CGROUP", tmp_path)
    (device, *_) = jax.local_devices()
    assert _memory._free(device) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    free = _memory._free(device)
    assert free is None or 2**20 < free < 2**50


def test_a_loss_per_example_is_refused_with_advice():
    step = train.make_train_step(lambda p, b, k: losses.squared_error(p * b, b), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"must return one number.*got float32\[4\]; take jnp.mean"):
        step(train.init_state(jnp.float32(1), optax.sgd(0.1), jax.random.key(0)), jnp.ones(4))


def test_a_missing_key_is_refused():
    with pytest.raises(TypeError, match="init_state: key must be one random key"):
        train.init_state(jnp.zeros(3), optax.sgd(0.1), None)  # pyright: ignore[reportArgumentType]


def batch_normed(params, batch, key, model_state):
    x, y = batch
    out, model_state = fcfunc.apply_batch_norm(params, model_state, x, training=key is not None)
    return jnp.mean(losses.squared_error(out[:, 0], y)), {"mean": jnp.mean(out)}, model_state


@pytest.fixture
def batch_norm_run():
    params = fcfunc.init(jax.random.key(0), [3, 8, 8, 1], norm="batch_norm")
    data = (2 + jax.random.normal(jax.random.key(1), (40, 3)), jnp.arange(40.0) / 40)
    optimizer = optax.sgd(0.05)
    state = train.init_state(params, optimizer, jax.random.key(2), model_state=fcfunc.init_batch_norm_state(params))
    return optimizer, state, data


def test_a_model_state_goes_through_step_epoch_fit_and_evaluation(batch_norm_run):
    optimizer, start, data = batch_norm_run
    stats = start.model_state
    out, by_hand = fcfunc.apply_batch_norm(start.params, stats, data[0], training=True)
    state, metrics = train.make_train_step(batch_normed, optimizer)(jax.tree.map(jnp.copy, start), data)
    chex.assert_trees_all_close(state.model_state, by_hand, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], jnp.mean((out[:, 0] - data[1]) ** 2), rtol=1e-5)
    state, history = train.fit(
        batch_normed, optimizer, start, data, epochs=30, batch_size=16, validation_data=data, patience=30
    )
    assert history[-1]["loss"] < history[0]["loss"] / 2
    scores = train.evaluate(batch_normed, state.params, data, model_state=state.model_state)
    np.testing.assert_allclose(scores["loss"], min(r["validation_loss"] for r in history), rtol=1e-4)
    evaluated, same = fcfunc.apply_batch_norm(state.params, state.model_state, data[0], training=False)
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


def without_seconds(history):
    return [
        {name: value for name, value in record.items() if name not in ("epoch", "seconds", "step")}
        for record in history
    ]


@pytest.mark.parametrize("patience", [slow(None), 2])
def test_a_whole_fit_as_one_program_is_the_fit_of_the_host(patience):
    options = {"epochs": 12, "batch_size": 8, "monitor": "accuracy", "mode": "max", "patience": patience}
    data, validation_data, optimizer = make_data(50), make_data(30, 1), optax.adam(3e-2)
    expected, records = train.fit(
        loss_fn, optimizer, make_state(optimizer), data, validation_data=validation_data, **options
    )
    run = jax.jit(train.make_fit(loss_fn, optimizer, **options))
    state, history = run(make_state(optimizer), data, validation_data)
    chex.assert_trees_all_close(state._replace(key=0), expected._replace(key=0), rtol=1e-5, atol=1e-6)
    done = int(history.pop("epochs"))
    assert done == len(records)
    assert patience is None or 2 < done < 12
    assert all(np.isnan(m[done:]).all() for m in history.values())
    for i, record in enumerate(without_seconds(records)):
        chex.assert_trees_all_close({name: float(m[i]) for name, m in history.items()}, record, rtol=1e-5)


@pytest.mark.slow
def test_a_sweep_is_one_program_in_which_each_member_stops_for_itself_and_keeps_its_best():
    optimizer = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    data, validation_data = make_data(50), make_data(30, 1)
    options = {"epochs": 10, "batch_size": 8, "patience": 2}
    run, traces = train.make_fit(loss_fn, optimizer(0.1), **options), []

    def member(key, rate):
        traces.append(None)
        state = train.init_state(fcfunc.init(key, [4, 8, 3]), optimizer(rate), key)
        return run(state, data, validation_data)

    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array([1e-3, 0.3, 1e6])
    sweep = jax.jit(jax.vmap(jax.vmap(member, in_axes=(None, 0)), in_axes=(0, None)))
    states, histories = sweep(keys, rates)
    sweep(keys, 2 * rates)
    assert len(traces) == 1
    for at in [(0, 0), (1, 1), (0, 2)]:
        alone, history = member(keys[at[0]], rates[at[1]])
        params = jax.tree.map(operator.itemgetter(at), states.params)
        chex.assert_trees_all_close(params, alone.params, rtol=1e-4, atol=1e-6)
        assert int(histories["epochs"][at]) == int(history["epochs"])
        if at[1] < 2:
            best = float(np.nanmin(histories["validation_loss"][at]))
            np.testing.assert_allclose(train.evaluate(loss_fn, params, validation_data)["loss"], best, rtol=1e-5)
    assert histories["epochs"][0, 0] == 10
    assert histories["epochs"][0, 2] < 10


def test_a_whole_fit_stops_at_a_loss_that_is_not_finite():
    nan_later = lambda params, batch, key: jnp.where(params["a"] > 2.5, jnp.nan, 0 * params["a"]) - params["a"]
    state = train.init_state({"a": jnp.zeros(())}, optax.sgd(1.0), jax.random.key(0))
    _, history = jax.jit(train.make_fit(nan_later, optax.sgd(1.0), epochs=9, batch_size=4))(state, np.zeros(4))
    assert int(history["epochs"]) == 4
    np.testing.assert_array_equal(np.isfinite(history["loss"]), [True] * 3 + [False] * 6)


def test_a_whole_fit_refuses_what_it_cannot_judge():
    data, optimizer = make_data(12), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"make_fit: patience needs validation_data"):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, patience=1)(make_state(optimizer), data)
    with pytest.raises(ValueError, match=r"make_fit: monitor 'f1' is not among the metrics: loss, accuracy"):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, monitor="f1")(make_state(optimizer), data, data)
    with pytest.raises(ValueError, match=r'make_fit: mode must be "min" or "max"'):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, mode="less")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("on_a_mesh", [False, slow(True)])
def test_the_bar_moves_within_an_epoch_and_the_numbers_are_those_without_it(on_a_mesh, monkeypatch):
    moves, optimizer, data = [], optax.sgd(0.1), make_data(50)
    if on_a_mesh:
        data = sharding.global_batch(data, sharding.make_mesh(data=2, devices=jax.devices()[:2]))
    options = {"epochs": 3, "batch_size": 4}
    expected, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, **options)
    monkeypatch.setattr(sys, "stderr", Terminal())
    move = ProgressBar.move
    monkeypatch.setattr(ProgressBar, "move", lambda bar, step: (moves.append(int(step)), move(bar, step)))
    address = ProgressBar.address
    monkeypatch.setattr(ProgressBar, "address", lambda bar: address(bar) | {"every": jnp.int32(5)})
    state, history = train.fit(loss_fn, optimizer, make_state(optimizer), data, progress=True, **options)
    assert sorted(moves) == list(range(5, 40, 5))  # 13 steps an epoch, the last a short one
    chex.assert_trees_all_equal(state.params, expected.params)
    assert len(history) == 3


def test_the_estimate_of_the_bar_leaves_compilation_out(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(_progress.time, "time", lambda: now[0])
    monkeypatch.setattr(_progress.time, "perf_counter", lambda: now[0])
    with ProgressBar(epochs=10, steps=4, first_step=0) as bar:
        monkeypatch.setattr(bar.bar, "_time", lambda: now[0])
        now[0] += 60  # compilation
        bar.move(1)
        now[0] += 0.5
        bar.move(2)
        drawn = bar.bar.format_dict
    assert (drawn["n"], drawn["initial"], drawn["elapsed"]) == (0.5, 0.25, 0.5)
    assert "0.50/10 [00:00<00:19" in terminal.getvalue()  # 9.5 epochs at half a second for a quarter of one


def test_outside_of_a_terminal_each_epoch_is_a_line_with_the_digits_of_small_numbers(capsys):
    optimizer = optax.sgd(1e-9)

    def tiny(params, batch, key):
        return 1e-7 * loss_fn(params, batch, key)[0]

    train.fit(tiny, optimizer, make_state(optimizer), make_data(50), epochs=2, batch_size=25, progress=True)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"loss \d\.\d+e-07 ", line) for line in lines), lines


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


def test_a_bad_label_is_named_and_not_taken_for_a_learning_rate():
    data, optimizer = make_data(60), optax.sgd(0.1)
    data.y[17] = 7
    with pytest.raises(
        train.NonFiniteError, match=r"with another value than data\.y\[17\] = 7 the loss is finite"
    ) as e:
        train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)
    assert "learning rate" not in str(e.value)
    assert 17 in e.value.indices


SCALE = 1.0
SETTINGS = types.ModuleType("settings")
SETTINGS.scale = 1.0  # type: ignore[attr-defined]


class Scaled:
    factor = 1.0

    def scale(self):
        return SCALE * self.factor * SETTINGS.scale

    def __call__(self, params, batch, key):
        return loss_fn(params, batch, key)[0] * self.scale()


@pytest.mark.parametrize(
    "change",
    [
        lambda patch, captured: captured["weights"].__setitem__(slice(None), [3, 0.5, 1]),  # in place
        lambda patch, captured: captured["box"].__setitem__(0, 2.0),
        lambda patch, captured: patch.setitem(globals(), "SCALE", 3.0),
        lambda patch, captured: patch.setattr(Scaled, "factor", 3.0),
        lambda patch, captured: patch.setattr(SETTINGS, "scale", 3.0),
    ],
    ids=["array in place", "list", "global name", "class attribute", "module attribute"],
)
def test_a_second_evaluation_uses_what_the_function_captures_now(change, monkeypatch):
    params, data, traces, scaled = make_state(optax.sgd(0.1)).params, make_data(32), [], Scaled()
    captured = {"weights": np.ones(3, np.float32), "box": [1.0]}

    def weighted_loss(params, batch, key, *, of_class=captured["weights"]):
        traces.append(None)
        logits = fcfunc.apply(params, batch.x) * jnp.broadcast_to(of_class, (len(batch.x), 3))
        loss = jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))
        return loss * captured["box"][0] + scaled(params, batch, key)

    before = train.evaluate(weighted_loss, params, data)
    assert train.evaluate(weighted_loss, params, data) == before
    assert len(traces) == 3  # once compiled, and once traced for each call
    change(monkeypatch, captured)
    after = train.evaluate(weighted_loss, params, data)
    assert after == train.evaluate(lambda *args: weighted_loss(*args), params, data) != before


def test_a_second_fit_uses_what_its_loss_captures_now_and_compiles_nothing_if_that_is_the_same():
    optimizer, data, weights = optax.adamw(optax.cosine_decay_schedule(0.1, 100)), make_data(32), np.ones(3, np.float32)

    def weighted_loss(params, batch, key):
        logits = fcfunc.apply(params, batch.x) * jnp.broadcast_to(weights, (len(batch.x), 3))
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))

    def run(function=weighted_loss):
        return train.fit(function, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)[0].params

    params, compilations = run(), []
    listen = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    chex.assert_trees_all_equal(run(), params)
    assert not compilations
    jax.monitoring.clear_event_listeners()
    weights[:] = [3, 0.5, 1]
    again = run()
    chex.assert_trees_all_equal(again, run(lambda *args: weighted_loss(*args)))
    assert not np.array_equal(again[0]["w"], params[0]["w"])


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

    with pytest.raises(train.NonFiniteError, match=r"with another value than data\.y\[17\] = \[4294967297\] the loss"):
        train.fit(dropping, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)


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
