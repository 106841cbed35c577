"""fit: the history, early stopping, resuming, and the arguments that it rejects before it runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, train
from fcfunc.data import Dataset
from fcfunc.train import _memory
from tests.helpers import DIMS, loss_fn, make_data, make_state
from tests.rules import slow


def fit(data=None, **options):
    optimizer = optax.sgd(0.1)
    arguments: dict = {"epochs": 5, "batch_size": 16} | options
    return train.fit(loss_fn, optimizer, make_state(optimizer), data or make_data(50), **arguments)


def test_fit_learns_and_records_every_epoch():
    seen = []
    state, history = fit(
        epochs=30, validation_data=make_data(500, 1), num_classes=3, on_epoch=lambda s, r: seen.append(int(s.step))
    )
    np.testing.assert_array_equal(history["epoch"], range(1, 31))
    assert seen == history["step"].tolist() == list(range(4, 121, 4))
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["validation_accuracy"][-1] > 0.7  # three overlapping clusters
    assert (history["epochs"], history["kept_epoch"], int(state.step)) == (30, 30, 120)


def test_the_loss_of_an_epoch_is_the_mean_over_its_examples():
    optimizer = optax.sgd(0.0)
    data, state = make_data(50), make_state(optimizer)
    _, history = train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=16)
    np.testing.assert_allclose(history["loss"][0], loss_fn(state.params, data, None)[0], rtol=1e-5)


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
    assert (history["epochs"], history["kept_epoch"]) == (7, 4)


def test_the_best_epoch_is_the_highest_where_more_is_better_and_the_first_of_equals():
    def score(params, batch, key):
        del batch, key
        return params * 0.0 - params, {"score": -jnp.round(jnp.abs(params - 1.0))}

    optimizer = optax.sgd(0.25)  # params 0.25, 0.5, ...: the score rises to 0 at 0.5, stays to 1.5 and falls
    state = train.init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    options: dict = {"epochs": 20, "batch_size": 4, "validation_data": jnp.zeros(2), "patience": 6}
    state, history = train.fit(score, optimizer, state, jnp.zeros(4), monitor="score", mode="max", **options)
    assert float(state.params) == 0.5
    assert (history["epochs"], history["kept_epoch"]) == (8, 2)


def test_validation_labels_are_checked_too():
    with pytest.raises(ValueError, match=r"validation_data\.y\[0\] must be a label in \[0, 3\)"):
        fit(validation_data=Dataset(np.zeros((2, 4), np.float32), np.array([3, 0])), num_classes=3)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss: (loss, {"step": loss}), ValueError, "must not be called 'step'"),
        (lambda loss: (loss, {"many": jnp.stack([loss, loss])}), ValueError, "each metric must be a scalar"),
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
    np.testing.assert_allclose(history["hits"][0], (3 * 3 + 3 * 3 + 1 * 1) / 7)


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
        ({"patience": 3, "monitor": "validation_loss"}, "monitor 'validation_loss' needs validation_data"),
        ({"patience": 3, "monitor": "f1"}, "monitor 'f1' is not among the metrics: loss, accuracy"),
        ({"tol": 0.1}, "tol must be finite and at least 0, and tol above 0 needs patience"),
        ({"tol": -0.1, "patience": 3}, "tol must be finite and at least 0"),
        ({"every": 2}, "every needs on_steps or saver"),
        ({"on_steps": print}, "on_steps needs every"),
        ({"validation_data": make_data(0)}, "validation_data must hold at least one example"),
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
            r"data\.y\[7\] must be a label in \[0, 3\), got 3",
        ),
        (lambda d: Dataset(d.x, d.y - 1), r"data\.y\[\d+\] must be a label in \[0, 3\), got -1"),
        (
            lambda d: Dataset(np.where(d.x == d.x[4, 1], np.nan, d.x), d.y),
            r"data\.x\[4, 1\] must be finite, got nan",
        ),
        (lambda d: Dataset(d.x[:40], d.y), "same leading axis, got 40 in data.x and 50 in data.y"),
        (lambda d: Dataset(d.x[:0], d.y[:0]), "data must hold at least one example"),
    ],
    ids=["label too large", "label negative", "nan", "lengths", "empty"],
)
def test_fit_refuses_bad_data_before_anything_runs(spoil, message):
    def never(params, batch, key):
        raise AssertionError("the loss was traced")

    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match=message):
        train.fit(never, optimizer, make_state(optimizer), spoil(make_data(50)), epochs=1, batch_size=16, num_classes=3)


def test_unshuffled_examples_are_taken_in_the_order_given():
    def last_seen(params, batch, key):
        return 0 * params + batch[-1], {"first": batch[0]}

    optimizer, data = optax.sgd(0.0), np.arange(10.0, dtype=np.float32)
    state = train.init_state(jnp.float32(0), optimizer, jax.random.key(0))
    seen = []
    options = {"epochs": 2, "batch_size": 4, "every": 1, "on_steps": lambda s: seen.append(int(s.epoch_position))}
    train.fit(last_seen, optimizer, state, data, shuffle=False, **options)
    assert seen == [4, 8, 0, 4, 8, 0]
    epoch = train.make_train_epoch(last_seen, optimizer, 4, shuffle=False, donate=False)
    _, metrics = epoch(state, data)
    assert (metrics["first"].tolist(), metrics["loss"].tolist()) == ([0, 4, 8], [3, 7, 9])
    _, history = jax.jit(train.make_fit(last_seen, optimizer, epochs=1, batch_size=4, shuffle=False))(state, data)
    np.testing.assert_allclose(history["first"], (4 * 0 + 4 * 4 + 2 * 8) / 10)


def test_the_examples_of_a_bad_step_are_named_in_the_order_given():
    def diverges(params, batch, key):
        return jnp.where(jnp.any(batch == 5), jnp.nan, 0.0) + 0 * params

    state = train.init_state(jnp.float32(0), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(train.NonFiniteError) as raised:
        train.fit(diverges, optax.sgd(0.1), state, jnp.arange(10.0), epochs=1, batch_size=4, shuffle=False)
    assert raised.value.indices.tolist() == [4, 5, 6, 7]


def falling(params, batch, key):
    """A loss of 1, 1/2, 1/4, ... in successive epochs of one step; the parameter counts the epochs."""
    return 0.5**params - jax.lax.stop_gradient(0.0 * params) + 0.0 * jnp.sum(batch)


COUNT = optax.GradientTransformation(
    lambda params: (), lambda updates, state, params=None: (jax.tree.map(jnp.ones_like, updates), state)
)
"""An optimizer that adds 1 to every parameter."""


@pytest.mark.parametrize("program", ["fit", "make_fit"])
@pytest.mark.parametrize(("tol", "epochs"), [(0.0, 20), (0.1, 4 + 2), (0.3, 2 + 2)])
def test_patience_waits_for_a_training_loss_that_is_better_by_the_tolerance(program, tol, epochs):
    state = train.init_state(jnp.float32(0), COUNT, jax.random.key(0))
    options = {"epochs": 20, "batch_size": 4, "patience": 2, "tol": tol}
    if program == "fit":
        state, history = train.fit(falling, COUNT, state, jnp.ones(4), **options)
    else:
        state, history = jax.jit(train.make_fit(falling, COUNT, **options))(state, jnp.ones(4))
    # In 1, 0.5, 0.25, 0.125, 0.0625, ... the fourth is the last to improve by 0.1, and the second by 0.3.
    assert (int(history["epochs"]), int(history["kept_epoch"]), float(state.params)) == (epochs,) * 3


def test_the_training_loss_can_be_monitored_beside_validation_data():
    def loss(params, batch, key):
        return 0.5**params + 0.0 * jnp.sum(batch) if key is not None else params

    state = train.init_state(jnp.float32(0), COUNT, jax.random.key(0))
    options = {"epochs": 9, "batch_size": 4, "validation_data": jnp.ones(4), "patience": 2}
    _, history = train.fit(loss, COUNT, state, jnp.ones(4), monitor="training_loss", **options)
    assert (history["epochs"], history["kept_epoch"]) == (9, 9)
    _, history = train.fit(loss, COUNT, state, jnp.ones(4), monitor="loss", **options)
    assert (history["epochs"], history["kept_epoch"]) == (3, 1)


@pytest.mark.parametrize("answer", [True, np.True_, jnp.array(True)])
def test_a_run_ends_with_the_epoch_whose_callback_returns_true(answer):
    state, history = fit(epochs=9, on_epoch=lambda s, record: answer if record["epoch"] == 3 else None)
    assert (history["epochs"], history["kept_epoch"], int(state.step)) == (3, 3, 12)


def test_what_a_logger_returns_does_not_end_a_run():
    assert fit(epochs=3, on_epoch=lambda s, record: record)[1]["epochs"] == 3


def test_a_batch_size_above_the_number_of_examples_is_one_batch_with_a_warning():
    with pytest.warns(UserWarning, match="fit: batch_size 64 exceeds the number of examples, so all 50 form one batch"):
        state, _ = fit(batch_size=64)
    chex.assert_trees_all_equal(state.params, fit(batch_size=50)[0].params)
    optimizer, data = optax.sgd(0.1), make_data(50)
    for make in (
        lambda size: train.make_train_epoch(loss_fn, optimizer, size, donate=False),
        lambda size: train.make_fit(loss_fn, optimizer, epochs=1, batch_size=size),
    ):
        with pytest.warns(UserWarning, match="batch_size 64 exceeds the number of examples"):
            state, _ = make(64)(make_state(optimizer), data)
        chex.assert_trees_all_equal(state.params, make(50)(make_state(optimizer), data)[0].params)


def test_the_number_of_steps_is_that_of_a_run():
    assert int(fit(epochs=3, batch_size=16)[0].step) == train.num_steps(50, epochs=3, batch_size=16) == 12
    assert train.num_steps(50, epochs=3, batch_size=64) == 3
    with pytest.raises(ValueError, match="num_steps: epochs must be an integer of at least 1, got 0"):
        train.num_steps(50, epochs=0, batch_size=16)


def test_data_frames_are_trained_on_as_their_numbers():
    pandas = pytest.importorskip("pandas")
    data = make_data(50)
    frame = Dataset(pandas.DataFrame(data.x, columns=list("abcd")), pandas.Series(data.y))  # type: ignore[arg-type]
    chex.assert_trees_all_equal(fit(frame)[0].params, fit(data)[0].params)
    of_several_dtypes = frame.x.assign(b=frame.x["b"] > 0).convert_dtypes()  # nullable numbers and booleans
    as_numbers = data.x.copy()
    as_numbers[:, 1] = as_numbers[:, 1] > 0
    chex.assert_trees_all_equal(
        fit(Dataset(of_several_dtypes, frame.y))[0].params, fit(Dataset(as_numbers, data.y))[0].params
    )
    for names in (pandas.Series(["a"] * 50), pandas.Series(["a"] * 50, dtype="category")):
        with pytest.raises(TypeError, match=r"fit: data\.y must hold numbers.*turns names into labels"):
            fit(Dataset(data.x, names))  # type: ignore[arg-type]
    mixed = frame.x.assign(city="here")
    with pytest.raises(TypeError, match=r"fit: data\.x must hold numbers, got dtype object in the columns city"):
        fit(Dataset(mixed, frame.y))  # type: ignore[arg-type]
    scores = train.evaluate(loss_fn, make_state(optax.sgd(0.1)).params, frame)
    np.testing.assert_array_equal(
        scores["loss"], train.evaluate(loss_fn, make_state(optax.sgd(0.1)).params, data)["loss"]
    )


class Tensor:
    """Converts to NumPy as a PyTorch tensor does: not if it requires a gradient."""

    def __init__(self, values, requires_grad=False):
        self.values, self.requires_grad = values, requires_grad

    def __array__(self, dtype=None, copy=None):
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.values


def test_tensors_of_other_libraries_are_converted():
    data = make_data(50)
    tensors = Dataset(Tensor(data.x), Tensor(data.y))  # type: ignore[arg-type]
    chex.assert_trees_all_equal(fit(tensors)[0].params, fit(data)[0].params)
    with pytest.raises(
        TypeError, match=r"data\.x must be an array, got tests Tensor that NumPy cannot convert \(Can't"
    ):
        fit(Dataset(Tensor(data.x, requires_grad=True), data.y))  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [slow(1), 3, slow(7), slow(12)])
def test_a_run_resumed_within_an_epoch_takes_the_steps_of_the_uninterrupted_run(stop):
    optimizer, data = optax.adam(1e-2), make_data(50)
    options = {"batch_size": 4, "every": 3}
    whole, _ = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=3, on_steps=lambda s: None, **options)
    saved = []

    def on_steps(state):
        if int(state.step) >= 13 + stop and not saved:
            saved.append(jax.tree.map(jnp.copy, state))

    train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, on_steps=on_steps, **options)
    assert int(saved[0].epoch_position) == {1: 12, 3: 12, 7: 36, 12: 48}[stop]
    left = 3 - int(saved[0].step) // 13
    resumed, _ = train.fit(loss_fn, optimizer, saved[0], data, epochs=left, on_steps=lambda s: None, **options)
    assert int(resumed.step) == 39
    chex.assert_trees_all_equal(resumed.params, whole.params)
    chex.assert_trees_all_equal(resumed.opt_state, whole.opt_state)


@pytest.mark.slow
def test_an_epoch_in_parts_is_the_epoch_and_a_step_of_its_own_leaves_it():
    optimizer, data = optax.sgd(0.1), make_data(50)
    whole, expected = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4)
    steps = []
    options = {"every": 5, "on_steps": lambda s: steps.append((int(s.step), int(s.epoch_position)))}
    state, history = train.fit(loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4, **options)
    chex.assert_trees_all_close(state.params, whole.params, rtol=1e-6)
    np.testing.assert_allclose(history["loss"][1], expected["loss"][1], rtol=1e-6)
    assert steps == [(5, 20), (10, 40), (13, 0), (18, 20), (23, 40), (26, 0)]
    middle = state._replace(epoch_position=jnp.int32(5))
    middle, _ = train.make_train_step(loss_fn, optimizer)(middle, jax.tree.map(lambda a: a[:4], data))
    assert int(middle.epoch_position) == 0


@pytest.mark.slow
def test_a_run_repeats_to_the_bit():
    optimizer, data = optax.adam(1e-2), make_data(50)

    def run():
        def dropped(params, batch, key):
            logits = fcfunc.mlp(DIMS, dropout_rate=0.3).apply(params, batch.x, key=key)
            return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))

        state, _ = train.fit(dropped, optimizer, make_state(optimizer), data, epochs=2, batch_size=4)
        return state.params, train.evaluate(dropped, state.params, data)

    chex.assert_trees_all_equal(run(), run())  # traced and compiled again, because the function is a new one


@pytest.mark.slow
def test_a_resumed_epoch_uses_the_remaining_examples():
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
    assert int(resumed.epoch_position) == 0


@pytest.mark.parametrize("position", [-1, 50])
def test_a_position_outside_of_the_data_is_refused(position):
    optimizer, data = optax.sgd(0.1), make_data(50)
    state = make_state(optimizer)._replace(epoch_position=jnp.int32(position))
    with pytest.raises(ValueError, match=rf"the state is at example {position} of its epoch, but data has 50 examples"):
        train.fit(loss_fn, optimizer, state, data, epochs=1, batch_size=4)


def test_data_larger_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(_memory, "_free", lambda device: 700)
    optimizer, data = optax.sgd(0.1), make_data(40)
    with pytest.raises(MemoryError, match=r"fit: data \(0\.00 GB\) .*cannot be copied to .*, which has 0\.00 GB free"):
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
