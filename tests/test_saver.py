"""A run with a saver, however often it is interrupted, returns what the uninterrupted run returns."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import checkpoint, losses, sharding, stream, train
from fcfunc.checkpoint import _saver

NET = fcfunc.mlp([5, 7, 3], dropout_rate=0.2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((50, 5), np.float32)
Y = (np.abs(X[:, 0]) + X[:, 1] > 0.7).astype(np.int32) + (X[:, 2] > 1)
VALIDATION = (X[40:], Y[40:])


class Interrupted(Exception):
    pass


def loss_fn(params, batch, key):
    x, y = batch
    logits = NET.apply(params, x, key=key)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == y, dtype=jnp.float32)
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y)), {"accuracy": accuracy}


def start(optimizer, mesh=None):
    params = NET.init(jax.random.key(0))
    if mesh is not None:
        params = sharding.shard(params, jax.P(), mesh)
    return train.init_state(params, optimizer, jax.random.key(1))


def bits(tree):
    plain = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    return [np.asarray(plain(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def same_history(a, b):
    assert a.keys() == b.keys()
    for name in a.keys() - {"seconds"}:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=isinstance(a[name], np.ndarray))


def interrupting(calls):
    """A callback that raises at its n-th call."""
    left = [calls]

    def callback(*_):
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return callback


def fit(optimizer, state, data, **options):
    defaults = {"epochs": 4, "batch_size": 8, "every": 2, "on_steps": lambda state: None}
    return train.fit(loss_fn, optimizer, state, data, **(defaults | options))


ADAM = optax.adam(0.05)
RUNS = {
    "training alone": (ADAM, (X[:40], Y[:40]), {}),
    "validation and patience": (optax.sgd(0.9, momentum=0.9), (X[:40], Y[:40]), {"patience": 2, "epochs": 30}),
    "a shorter last batch": (ADAM, (X[:37], Y[:37]), {"patience": 3}),
    "a stream": (ADAM, stream.from_arrays((X[:40], Y[:40]), chunk_size=16), {"patience": 3}),
    "skipped steps": (optax.apply_if_finite(optax.adam(0.05), 3), (X[:40] / (Y[:40, None] > -1), Y[:40]), {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_returns_the_history_and_the_bits_of_the_uninterrupted_one(tmp_path, name):
    optimizer, data, options = RUNS[name]
    options = options | ({"validation_data": VALIDATION} if "patience" in options else {})
    whole, history = fit(optimizer, start(optimizer), data, **options)
    for calls in (1, 3, 4, 7):
        saver = checkpoint.Saver(tmp_path / str(calls), share=1.0)
        again = None
        while again is None:
            with contextlib.suppress(Interrupted):
                more = {"saver": saver, "on_steps": interrupting(calls)}
                again = fit(optimizer, start(optimizer), data, **options | more)
        assert bits(again[0]) == bits(whole)
        same_history(again[1], history)


def test_a_run_interrupted_at_the_end_of_an_epoch_calls_on_epoch_once_more(tmp_path):
    saver, seen = checkpoint.Saver(tmp_path), []

    def on_epoch(state, record):
        seen.append(record["epoch"])
        if seen == [1, 2]:
            raise Interrupted

    options = {"every": None, "on_steps": None, "saver": saver, "on_epoch": on_epoch}
    with pytest.raises(Interrupted):
        fit(ADAM, start(ADAM), (X, Y), **options)
    _, history = fit(ADAM, start(ADAM), (X, Y), **options)
    assert seen == [1, 2, 2, 3, 4]
    assert history["epoch"].tolist() == [1, 2, 3, 4]


def test_a_complete_run_returns_without_training(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    first, history = fit(ADAM, start(ADAM), (X, Y), saver=saver, patience=3)
    again, same = fit(ADAM, start(ADAM), (X, Y), saver=saver, patience=3, on_epoch=interrupting(1))
    assert bits(again) == bits(first)
    same_history(same, history)
    np.testing.assert_array_equal(same["seconds"], history["seconds"])


def test_a_run_that_on_epoch_ended_stays_ended(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    fit(ADAM, start(ADAM), (X, Y), saver=saver, on_epoch=lambda state, record: record["epoch"] == 2)
    assert fit(ADAM, start(ADAM), (X, Y), saver=saver, on_epoch=interrupting(1))[1]["epochs"] == 2


def test_more_epochs_continue_a_complete_run(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    fit(ADAM, start(ADAM), (X, Y), saver=saver, epochs=2)
    more, history = fit(ADAM, start(ADAM), (X, Y), saver=saver, epochs=5)
    whole, expected = fit(ADAM, start(ADAM), (X, Y), epochs=5)
    assert bits(more) == bits(whole)
    same_history(history, expected)


def test_a_run_on_a_mesh_resumes_to_the_same_bits_and_on_fewer_devices(tmp_path):
    eight, four = sharding.make_mesh(), sharding.make_mesh(data=4, devices=jax.devices()[:4])
    shard = lambda mesh: sharding.shard((X[:48], Y[:48]), jax.P("data"), mesh)
    options = {"validation_data": VALIDATION, "patience": 3}
    whole, history = fit(ADAM, start(ADAM, eight), shard(eight), **options)
    for mesh, folder in ((eight, tmp_path / "eight"), (four, tmp_path / "four")):
        options["saver"] = checkpoint.Saver(folder)
        with pytest.raises(Interrupted):
            fit(ADAM, start(ADAM, eight), shard(eight), **options | {"on_steps": interrupting(4)})
        again, found = fit(ADAM, start(ADAM, mesh), shard(mesh), **options)
        if mesh is eight:
            assert bits(again) == bits(whole)
            same_history(found, history)
        np.testing.assert_allclose(found["validation_loss"], history["validation_loss"], rtol=1e-4)
        assert again.params[0]["w"].sharding.mesh == mesh


def test_training_does_not_wait_for_a_save(tmp_path, monkeypatch):
    may_write, steps = threading.Event(), []
    write = _saver.write
    monkeypatch.setattr(_saver, "write", lambda *a: (may_write.wait(60), write(*a)))

    def on_steps(state):
        steps.append(int(state.step))
        if len(steps) == 9:
            may_write.set()  # if training had waited for the first save, it would not have come this far

    fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path), on_steps=on_steps)
    assert may_write.is_set()
    assert checkpoint.steps(tmp_path)[-1] == steps[-1]


def test_a_newer_checkpoint_replaces_the_one_that_waits(tmp_path):
    state, _ = fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path, share=1e-9, keep=100))
    assert len(checkpoint.steps(tmp_path)) <= 2
    assert checkpoint.steps(tmp_path)[-1] == int(state.step)


def test_a_failed_save_ends_the_run_with_an_error_that_names_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    saver = checkpoint.Saver(folder)
    folder.write_text("in the way")
    with pytest.raises(OSError, match="run"):
        fit(ADAM, start(ADAM), (X, Y), saver=saver)


def test_an_error_of_the_run_tells_of_a_failed_save_too(tmp_path, monkeypatch):
    monkeypatch.setattr(_saver, "write", lambda *a: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(Interrupted) as raised:
        fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path), on_steps=interrupting(1))
    assert raised.value.__notes__ == ["In addition, saving failed: no space"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 10}, "batch_size 8, not 10"),
        ({"patience": 2}, "patience None, not 2"),
        ({"every": 3}, "every 2, not 3"),
        ({"data": (X[:41], Y[:41])}, "examples 40, not 41"),
        ({"saver": {"rate": 2}}, r"config\['rate'\] 1, not 2"),
        ({"key": 2}, "random key"),
    ],
)
def test_a_folder_of_another_run_is_an_error_that_names_the_difference(tmp_path, changed, message):
    saver = checkpoint.Saver(tmp_path, config={"rate": 1})
    fit(ADAM, start(ADAM), (X[:40], Y[:40]), saver=saver, epochs=1)
    state = start(ADAM)._replace(key=jax.random.key(changed.pop("key", 1)))
    saver = checkpoint.Saver(tmp_path, config=changed.pop("saver", {"rate": 1}))
    with pytest.raises(ValueError, match=message):
        fit(ADAM, state, changed.pop("data", (X[:40], Y[:40])), saver=saver, **changed)


def test_a_folder_of_checkpoint_save_is_an_error(tmp_path):
    checkpoint.save(tmp_path, start(ADAM))
    with pytest.raises(ValueError, match=r"has checkpoints of checkpoint\.save"):
        fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path))


def test_losses_that_are_not_numbers_come_back(tmp_path):
    """With a NaN in the validation data, an epoch's record holds NaN and infinity, which JSON lacks."""
    options = {
        "validation_data": (np.float32([[1.0]]),),
        "eval_fn": lambda params, batch, key: (jnp.float32(jnp.nan), {"bound": jnp.float32(-jnp.inf)}),
        "saver": checkpoint.Saver(tmp_path),
    }
    _, history = fit(ADAM, start(ADAM), (X, Y), **options)
    _, again = fit(ADAM, start(ADAM), (X, Y), **options)
    assert np.isnan(history["validation_loss"]).all()
    assert np.isneginf(history["validation_bound"]).all()
    same_history(again, history)


def test_numbers_that_on_epoch_adds_to_the_record_are_saved_and_other_things_are_an_error(tmp_path):
    options = {
        "saver": checkpoint.Saver(tmp_path),
        "on_epoch": lambda state, record: record.update(rate=np.float64(0.1), late=np.bool_(True)),
    }
    _, history = fit(ADAM, start(ADAM), (X, Y), **options)
    _, again = fit(ADAM, start(ADAM), (X, Y), **options)
    same_history(again, history)
    assert list(again) == list(history)
    options["on_epoch"] = lambda state, record: record.update(name="third")
    with pytest.raises(TypeError, match="on_epoch made 'name' 'third'"):
        fit(ADAM, start(ADAM), (X, Y), **options | {"epochs": 5})


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saver = checkpoint.Saver("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fit(ADAM, start(ADAM), (X, Y), saver=saver)
    assert checkpoint.steps(tmp_path / "run")
    assert not checkpoint.steps(tmp_path / "elsewhere" / "run")


def test_the_smallest_share_saves_the_first_and_the_last(tmp_path):
    first = threading.Event()
    saver = checkpoint.Saver(tmp_path, share=1e-300, keep=100)
    state, _ = fit(ADAM, start(ADAM), (X, Y), saver=saver, on_epoch=lambda *_: first.wait(0.3))
    assert len(checkpoint.steps(tmp_path)) == 2
    assert checkpoint.steps(tmp_path)[-1] == int(state.step)


def test_fewer_epochs_than_the_run_has_begun_are_an_error(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    with pytest.raises(Interrupted):
        fit(ADAM, start(ADAM), (X, Y), saver=saver, on_steps=interrupting(6))
    with pytest.raises(ValueError, match="is in epoch 2; epochs must not be lower, got 1"):
        fit(ADAM, start(ADAM), (X, Y), saver=saver, epochs=1)


def test_other_metrics_than_the_saved_ones_are_an_error(tmp_path):
    saver = checkpoint.Saver(tmp_path)
    options = {"saver": saver, "monitor": "training_loss"}
    fit(ADAM, start(ADAM), (X, Y), **options, epochs=1, validation_data=VALIDATION)
    with pytest.raises(ValueError, match="has metrics"):
        fit(ADAM, start(ADAM), (X, Y), **options, epochs=2)


def test_restore_says_how_to_read_the_checkpoint_of_a_saver(tmp_path):
    fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path))
    with pytest.raises(ValueError, match="saved by a Saver: call fit with the same saver"):
        checkpoint.restore(tmp_path, start(ADAM))


def test_a_damaged_manifest_is_an_error_that_names_the_previous_checkpoint(tmp_path):
    fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path, share=1.0), on_steps=lambda state: None)
    before, last = checkpoint.steps(tmp_path)[-2:]
    manifest = tmp_path / str(last) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"the previous checkpoint is step={before}"):
        fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path))


def test_a_setting_of_none_differs_from_a_missing_one(tmp_path):
    fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path, config={}))
    with pytest.raises(ValueError, match=r"config\['decay'\] 'missing', not None"):
        fit(ADAM, start(ADAM), (X, Y), saver=checkpoint.Saver(tmp_path, config={"decay": None}))
