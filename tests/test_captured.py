"""Values that a loss captures: a compiled program is reused only while they are unchanged."""

import gc
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, train
from tests.helpers import compilations, loss_fn, make_data, make_state


def test_a_loss_that_is_an_object_or_a_method_is_compiled_once():
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
    assert scaled.traces <= 2  # one to check its metrics, and one to compile
    _, two = train.fit(scaled.loss, optimizer, make_state(optimizer), data, **options)
    scaled.scale = 10.0
    _, ten = train.fit(scaled.loss, optimizer, make_state(optimizer), data, **options)
    assert one["loss"][0] == two["loss"][0]
    assert ten["loss"][0] > 5 * two["loss"][0]


def test_many_small_fits_compile_once_and_keep_no_array():
    optimizer, data = optax.sgd(0.1), make_data(10)
    run = lambda: train.fit(
        loss_fn, optimizer, make_state(optimizer), data, epochs=2, batch_size=4, validation_data=data
    )
    for _ in range(2):
        run()
    gc.collect()
    arrays = len(jax.live_arrays())
    with compilations() as compiled:
        for _ in range(20):
            run()
    assert not compiled
    gc.collect()
    assert len(jax.live_arrays()) == arrays


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
    assert len(traces) == 3  # compiled once, and traced once for each call
    change(monkeypatch, captured)
    after = train.evaluate(weighted_loss, params, data)
    assert after == train.evaluate(lambda *args: weighted_loss(*args), params, data) != before


def test_a_second_fit_uses_what_its_loss_captures_now():
    optimizer, data, weights = optax.adamw(optax.cosine_decay_schedule(0.1, 100)), make_data(32), np.ones(3, np.float32)

    def weighted_loss(params, batch, key):
        logits = fcfunc.apply(params, batch.x) * jnp.broadcast_to(weights, (len(batch.x), 3))
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, batch.y))

    def run(function=weighted_loss):
        return train.fit(function, optimizer, make_state(optimizer), data, epochs=1, batch_size=8)[0].params

    params = run()
    with compilations() as compiled:
        chex.assert_trees_all_equal(run(), params)
    assert not compiled
    weights[:] = [3, 0.5, 1]
    again = run()
    chex.assert_trees_all_equal(again, run(lambda *args: weighted_loss(*args)))
    assert not np.array_equal(again[0]["w"], params[0]["w"])
