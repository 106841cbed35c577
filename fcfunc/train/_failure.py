"""What `fcfunc.train.fit` does about a number that is not finite: finds the step, its examples and the first array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _layout
from fcfunc._arguments import clipped
from fcfunc.train._epoch import TrainState, guards, loss_and_metrics, skips


class NonFiniteError(FloatingPointError):
    """A step of `fit` whose loss, or whose new state, is not finite.

    Attributes:
      state: the last good one, of before that step; `fit` can go on from it.
      step: how many steps were good: the number of the bad one, counted from 0.
      indices: the examples of its batch, as indices of `data`; none where the steps, taken again one by one, were good:
        that is another program, whose last bits may differ. `state` is then that of before them.
      leaf: the path of the first array that is not finite, of `grads`, `params`, `opt_state`, `model_state` and `loss`.
      history: the records of the epochs before.
    """

    def __init__(self, message: str, state: TrainState, step: int, indices: np.ndarray, leaf: str, history: list):
        super().__init__(message)
        self.state, self.step, self.indices, self.leaf, self.history = state, step, indices, leaf, history


def copied(state: TrainState) -> TrainState:
    """The same state in memory of its own, that a step does not donate."""
    return jax.tree.map(jnp.copy, state)


def outcome(before: TrainState, state: TrainState, metrics) -> dict[str, jax.Array]:
    """In a compiled step: whether its loss is finite, and whether a guard has skipped it."""
    finite = jnp.isfinite(metrics["loss"])
    guarded = bool(guards(state.opt_state))
    skipped = skips(state.opt_state) > skips(before.opt_state) if guarded else jnp.zeros_like(finite)
    return {"finite": finite, "skipped": skipped}


def _carried(state: TrainState) -> dict:
    return {"params": state.params, "opt_state": state.opt_state, "model_state": state.model_state}


@jax.jit
def _finite(tree):
    """Of each array of a tree, whether it is finite."""
    return jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)) if jnp.issubdtype(a.dtype, jnp.inexact) else True, tree)


@jax.jit
def still_finite(before: TrainState, after: TrainState) -> jax.Array:
    """Whether every array of a state is finite that was so before: some begin infinite, as an optimiser's best loss."""
    kept = jax.tree.map(lambda a, b: b | ~a, _finite(_carried(before)), _finite(_carried(after)))
    return jnp.all(jnp.array(jax.tree.leaves(kept)))


def good(before: TrainState, state: TrainState, outcomes) -> bool:
    """Whether some steps may stand: each by itself, and the state after them.

    A guard lets the first step through that exceeds the number it was told to skip; that one is no good.
    """
    stand = np.asarray(outcomes["finite"]) | np.asarray(outcomes["skipped"])
    return bool(np.all(stand)) and bool(still_finite(before, state))


def advice(loss_fn: Callable, state: TrainState, data, indices: np.ndarray) -> str:
    """What may be wrong where some examples have a loss that is not finite: a label, or the learning rate.

    `data` is as the caller gave it. A loss may need a random key, or none.
    """
    if not any(_layout.layouts(data)):
        for key in (None, state.key):
            try:
                return _blame(loss_fn, state, data, indices, key) or "try a lower learning rate"
            except Exception:  # nor may it take a batch of one example
                continue
    return "try a lower learning rate"


def _blame(loss_fn, state, data, indices, key) -> str | None:
    """The label without which an example's loss would not be NaN; None if there is none.

    A label is to blame only if no other example has a finite loss with it: a loss that diverged may be NaN, or an
    overflow, for some labels alone.
    """
    leaves = [(f"data{jax.tree_util.keystr(path)}", np.asarray(a)) for path, a in jax.tree.leaves_with_path(data)]

    @jax.jit
    def loss_of(*example):
        example = jax.tree.unflatten(jax.tree.structure(data), example)
        return loss_and_metrics(loss_fn, state.params, example, key, state.model_state)[0]

    def loss(i, **swapped):
        """The loss of example i alone, with the named leaves taken from other examples."""
        return float(loss_of(*(clipped(a[[swapped.get(name, i)]]) for name, a in leaves)))

    count = len(leaves[0][1])
    bad = next((int(i) for i in indices if np.isnan(loss(i))), None)
    good = next((i for i in range(min(count, 256)) if np.isfinite(loss(i))), None)
    if bad is None:
        return None
    if good is None:
        first = "no example has a finite loss with the initial parameters: check the labels and loss_fn"
        return None if int(state.step) else first
    for name, a in leaves:
        if not np.issubdtype(a.dtype, np.integer) or a.ndim > 2 or not np.isfinite(loss(bad, **{name: good})):
            continue
        alike = [i for i in np.flatnonzero((a == a[bad]).reshape(count, -1).all(axis=1))[:16] if i != bad]
        if not any(np.isfinite(loss(int(i))) for i in alike):
            return (
                f"with another value than {name}[{bad}] = {a[bad]!s:.40} the loss is finite: labels must lie in "
                "[0, classes), and num_classes= checks them before training"
            )
    return None


def _probe_update(updates, state, params=None):
    return jax.tree.map(jnp.zeros_like, updates), _finite(updates)


PROBE = optax.GradientTransformation(lambda params: jax.tree.map(lambda _: jnp.bool_(True), params), _probe_update)
"""An optimiser that moves nothing, and whose state tells of each gradient whether it is finite."""


def replay(take: Callable, state: TrainState, sizes) -> tuple[TrainState, str, float] | None:
    """Takes steps again, one at a time: `(the last good state, the first bad leaf, the loss)`, None if all are good.

    `take(optimizer, size, state) -> (state, (metrics, outcomes))` takes one of them, of so many examples; optimizer
    None is the run's own.
    """
    for size in sizes:
        before = copied(state)
        state, (metrics, outcomes) = take(None, size, state)
        if not good(before, state, outcomes):
            probed = copied(before)._replace(opt_state=PROBE.init(before.params))
            of = {"grads": take(PROBE, size, probed)[0].opt_state, **_finite(_carried(state)), "loss": False}
            calm = {path for path, fine in jax.tree.leaves_with_path(_finite(_carried(before))) if not fine}
            paths = (path for path, fine in jax.tree.leaves_with_path(of) if not fine and path not in calm)
            first = min(paths, key=lambda path: list(of).index(path[0].key))
            return before, first[0].key + jax.tree_util.keystr(first[1:]), float(metrics["loss"][0])
    return None
