"""`make_fit`: a whole training run as a pure function."""

import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import train
from fcfunc.data import Dataset
from tests.helpers import DIMS, loss_fn, make_data, make_state
from tests.rules import slow


def test_a_run_as_a_function_ends_with_the_state_of_before_its_parameters_overflowed():
    optimizer = optax.chain(optax.sgd(1e30), optax.scale(1e15))
    fit = train.make_fit(loss_fn, optimizer, epochs=3, batch_size=40)
    state, history = fit(make_state(optimizer), make_data(40))
    assert int(history["epochs"]) == 1
    chex.assert_trees_all_equal(state.params, make_state(optimizer).params)


@pytest.mark.parametrize("patience", [slow(None), 2])
def test_a_whole_fit_as_one_program_is_the_fit_of_the_host(patience):
    options = {"epochs": 12, "batch_size": 8, "monitor": "accuracy", "mode": "max", "patience": patience}
    data, validation_data, optimizer = make_data(50), make_data(30, 1), optax.adam(3e-2)
    expected, by_host = train.fit(
        loss_fn, optimizer, make_state(optimizer), data, validation_data=validation_data, **options
    )
    run = jax.jit(train.make_fit(loss_fn, optimizer, **options))
    state, history = run(make_state(optimizer), data, validation_data)
    chex.assert_trees_all_close(state._replace(key=0), expected._replace(key=0), rtol=1e-5, atol=1e-6)
    done = int(history["epochs"])
    assert patience is None or 2 < done < 12
    assert done == by_host["epochs"]
    assert int(history["kept_epoch"]) == by_host["kept_epoch"]
    assert by_host.keys() - history.keys() == {"step", "seconds"}
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        assert np.isnan(history[name][done:]).all()
        np.testing.assert_allclose(history[name][:done], by_host[name], rtol=1e-5)


def make_sweep():
    """Returns one member of a sweep, and the states and histories for two seeds and three learning rates."""
    optimizer = lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    data, validation_data = make_data(50), make_data(30, 1)
    run = train.make_fit(loss_fn, optimizer(0.1), epochs=10, batch_size=8, patience=2)

    def member(key, rate):
        state = train.init_state(fcfunc.init(key, DIMS), optimizer(rate), key)
        return run(state, data, validation_data)

    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array([1e-3, 0.3, 1e6])
    traced_once = chex.assert_max_traces(member, n=1)
    sweep = jax.jit(jax.vmap(jax.vmap(traced_once, in_axes=(None, 0)), in_axes=(0, None)))
    states, histories = sweep(keys, rates)
    sweep(keys, 2 * rates)
    return lambda i, j: member(keys[i], rates[j]), states, histories


@pytest.mark.slow
def test_each_member_of_a_sweep_is_the_run_by_itself():
    chex.clear_trace_counter()
    member, states, histories = make_sweep()
    for at in [(0, 0), (1, 1), (0, 2)]:
        alone, history = member(*at)
        chex.assert_trees_all_close(
            jax.tree.map(operator.itemgetter(at), states.params), alone.params, rtol=1e-4, atol=1e-6
        )
        assert int(histories["epochs"][at]) == int(history["epochs"])


@pytest.mark.slow
def test_each_member_of_a_sweep_stops_for_itself_and_keeps_its_best_epoch():
    chex.clear_trace_counter()
    _, states, histories = make_sweep()
    assert histories["epochs"][0, 0] == 10
    assert histories["epochs"][0, 2] < 10
    for at in [(0, 0), (1, 1)]:
        params = jax.tree.map(operator.itemgetter(at), states.params)
        scores = train.evaluate(loss_fn, params, make_data(30, 1))
        kept = int(histories["kept_epoch"][at])
        np.testing.assert_allclose(scores["loss"], histories["validation_loss"][at][kept - 1], rtol=1e-5)
        np.testing.assert_allclose(scores["loss"], np.nanmin(histories["validation_loss"][at]), rtol=1e-5)


def test_a_whole_fit_stops_at_a_loss_that_is_not_finite():
    nan_later = lambda params, batch, key: jnp.where(params["a"] > 2.5, jnp.nan, 0 * params["a"]) - params["a"]
    state = train.init_state({"a": jnp.zeros(())}, optax.sgd(1.0), jax.random.key(0))
    _, history = jax.jit(train.make_fit(nan_later, optax.sgd(1.0), epochs=9, batch_size=4))(state, np.zeros(4))
    assert int(history["epochs"]) == 4
    np.testing.assert_array_equal(np.isfinite(history["loss"]), [True] * 3 + [False] * 6)


def test_a_whole_fit_refuses_what_it_cannot_judge():
    data, optimizer = make_data(12), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"make_fit: monitor .validation_loss. needs validation_data"):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, patience=1, monitor="validation_loss")(
            make_state(optimizer), data
        )
    with pytest.raises(ValueError, match=r"make_fit: monitor 'f1' is not among the metrics: loss, accuracy"):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, monitor="f1")(make_state(optimizer), data, data)
    with pytest.raises(ValueError, match=r'make_fit: mode must be "min" or "max"'):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=4, mode="less")


@pytest.mark.parametrize("score", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_score_that_is_never_finite_does_not_bring_the_initial_parameters_back(score, on_host):
    optimizer, data = optax.sgd(0.1), jnp.ones((8, 2))
    loss = lambda params, batch, key: jnp.mean((batch @ params["w"] - 1) ** 2)
    never = lambda params, batch, key: jnp.sum(params["w"]) * 0 + score
    state = train.init_state({"w": jnp.zeros(2)}, optimizer, jax.random.key(0))
    options = {"epochs": 3, "batch_size": 4, "patience": 2, "eval_fn": never}
    if on_host:
        end, history = train.fit(loss, optimizer, state, data, validation_data=data, **options)
    else:
        end, history = train.make_fit(loss, optimizer, **options)(state, data, data)
    kept = 1 if score == jnp.inf else 2  # the first of equal scores; the last epoch if every score is NaN
    assert (int(history["epochs"]), int(history["kept_epoch"])) == (kept + (score == jnp.inf) * 2, kept)
    assert float(end.params["w"][0]) > 0


def make_members(optimizer, count):
    keys = jax.random.split(jax.random.key(3), count)
    return jax.vmap(lambda key: train.init_state(fcfunc.init(key, DIMS), optimizer, key))(keys)


def without_key(state):
    return state._replace(key=0)


@pytest.mark.parametrize(("members", "at_once"), [(6, 3), (7, 4), (2, 8), (5, 1)])
def test_each_member_of_a_population_is_trained_as_it_would_be_alone(members, at_once):
    optimizer, options = optax.adam(3e-2), {"epochs": 6, "batch_size": 8, "patience": 1}
    data, validation_data = make_data(50), make_data(30, 1)
    states = make_members(optimizer, members)
    run = train.make_fit(loss_fn, optimizer, members_at_once=at_once, **options)
    found, histories = jax.jit(run)(states, data, validation_data)
    alone = jax.jit(train.make_fit(loss_fn, optimizer, **options))
    member_of = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    for i in range(members):
        expected, history = alone(member_of(states, i), data, validation_data)
        member = member_of(found, i)
        chex.assert_trees_all_close(without_key(member), without_key(expected), rtol=1e-5, atol=1e-6)
        assert histories["epochs"][i] == history["epochs"]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["Explicit", slow("Auto")])
def test_members_that_are_sharded_are_trained_on_their_own_devices(kind, compiled):
    if kind == "Auto" and compiled:
        pytest.skip("inside jit, an Auto mesh does not show the sharding")
    mesh = jax.make_mesh((4,), ("members",), axis_types=(jax.sharding.AxisType[kind],))
    optimizer, data = optax.sgd(0.1), make_data(24)
    states = make_members(optimizer, 8)
    run = train.make_fit(loss_fn, optimizer, epochs=2, batch_size=8, members_at_once=2)
    expected, _ = run(states, data)
    each = jax.NamedSharding(mesh, jax.P("members"))
    found, histories = (jax.jit(run) if compiled else run)(jax.device_put(states, each), data)
    chex.assert_trees_all_close(without_key(found), without_key(expected), rtol=1e-5, atol=1e-6)
    assert found.params[0]["w"].sharding.is_equivalent_to(each, 3)
    assert histories["loss"].sharding.is_equivalent_to(each, 2)
    if compiled:
        text = str(jax.jit(run).lower(jax.device_put(states, each), data).compile().as_text())
        assert "all-reduce" not in text
        assert "all-gather" not in text


def test_a_population_without_an_axis_of_members_is_rejected():
    optimizer = optax.sgd(0.1)
    run = train.make_fit(loss_fn, optimizer, epochs=1, batch_size=8, members_at_once=2)
    states = make_members(optimizer, 4)
    with pytest.raises(TypeError, match="state must be a TrainState"):
        run(None, make_data(8))
    one = make_state(optimizer).params
    for bad, message in (
        (make_state(optimizer), r"state.params.* must have a leading axis of at least one member, got"),
        (
            states._replace(params=one),
            r"state.params\[0\]\['b'\] must have a leading axis of 4 members, as step has, got",
        ),
        (jax.tree.map(lambda a: a[:0], states), "at least one member"),
    ):
        with pytest.raises(ValueError, match=message):
            run(bad, make_data(8))
    with pytest.raises(ValueError, match="members_at_once"):
        train.make_fit(loss_fn, optimizer, epochs=1, batch_size=8, members_at_once=0)


def test_data_of_sharded_members_must_be_replicated_and_is_converted_as_usual():
    optimizer, (x, y) = optax.sgd(0.1), make_data(24)
    mesh = jax.make_mesh((4,), ("members",))
    each = jax.NamedSharding(mesh, jax.P("members"))
    run = train.make_fit(loss_fn, optimizer, epochs=1, batch_size=8, members_at_once=2)
    states = jax.device_put(make_members(optimizer, 8), each)
    _, history = run(states, Dataset(x, y.astype(np.int64) + 2**32))
    assert np.isnan(history["loss"]).all()  # not the loss of the classes that remain after the integers have wrapped
    with pytest.raises(ValueError, match="with sharded members, the data must be replicated"):
        run(states, jax.device_put(Dataset(x, y), each))
    with pytest.raises(ValueError, match=r"state.key must be sharded along the axis of members alone"):
        run(states._replace(key=make_members(optimizer, 8).key), Dataset(x, y))


def test_any_number_of_members_at_once_is_accepted():
    optimizer, data = optax.sgd(0.1), make_data(8)
    run = train.make_fit(loss_fn, optimizer, epochs=1, batch_size=8, members_at_once=10**15)
    assert jax.eval_shape(run, make_members(optimizer, 3), data)[1]["loss"].shape == (3, 1)
