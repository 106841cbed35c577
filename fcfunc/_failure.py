"""What `fcfunc.train.fit` does about a number that is not finite: finds the step, its examples and the first array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc._loop import TrainState


class NonFiniteError(FloatingPointError):
    """A step of `fit` whose loss or whose new parameters are not finite.

    Attributes:
      state: the last good one, of before that step; `fit` can go on from it.
      step: how many steps were good: the number of the bad one, counted from 0.
      indices: the examples of its batch, as indices of `data`.
      leaf: the path of the first array that is not finite, of `grads`, `params`, `model_state` and `loss`.
      history: the records of the epochs before.
    """

    def __init__(self, message: str, state: TrainState, step: int, indices: np.ndarray, leaf: str, history: list):
        super().__init__(message)
        self.state, self.step, self.indices, self.leaf, self.history = state, step, indices, leaf, history


def copied(state: TrainState) -> TrainState:
    """The same state in memory of its own, that a step does not donate."""
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _finite(tree):
    """Of each array of a tree, whether it is finite."""
    return jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)) if jnp.issubdtype(a.dtype, jnp.inexact) else True, tree)


def _is_guard(node) -> bool:
    return isinstance(node, optax.ApplyIfFiniteState)


def skips(state: TrainState) -> int:
    """How many steps `optax.apply_if_finite` has skipped so far, where it guards the optimiser."""
    nodes = jax.tree.leaves(state.opt_state, is_leaf=_is_guard)
    return sum(int(node.total_notfinite) for node in nodes if _is_guard(node))


def failed(before: int, state: TrainState, losses) -> bool:
    """Whether the steps that gave some losses, and before which there were some skips, include one that must not stand.

    A loss may be not finite only where a guard skipped the step; parameters never: a guard lets the first step through
    that exceeds the number it was told to skip.
    """
    bad = int(np.sum(~np.isfinite(np.asarray(losses, np.float64))))
    finite = all(map(bool, jax.tree.leaves(_finite((state.params, state.model_state)))))
    return not finite or bad > skips(state) - before


def _probe_update(updates, state, params=None):
    return jax.tree.map(jnp.zeros_like, updates), _finite(updates)


PROBE = optax.GradientTransformation(lambda params: jax.tree.map(lambda _: jnp.bool_(True), params), _probe_update)
"""An optimiser that moves nothing, and whose state tells of each gradient whether it is finite."""


def replay(take: Callable, state: TrainState, sizes) -> tuple[TrainState, str, float] | None:
    """Takes steps again, one at a time: `(the last good state, the first bad leaf, the loss)`, None if all are good.

    `take(optimizer, size, state) -> (state, metrics)` takes one of them, of so many examples; optimizer None is the
    run's own.
    """
    for size in sizes:
        before, skipped = copied(state), skips(state)
        state, metrics = take(None, size, state)
        (loss,) = np.asarray(metrics["loss"], np.float64)
        if failed(skipped, state, loss):
            probed = copied(before)._replace(opt_state=PROBE.init(before.params))
            of = {"grads": take(PROBE, size, probed)[0].opt_state, "params": _finite(state.params)}
            of |= {"model_state": _finite(state.model_state), "loss": False}
            paths = (path for path, fine in jax.tree.leaves_with_path(of) if not fine)
            first = min(paths, key=lambda path: list(of).index(path[0].key))
            return before, first[0].key + jax.tree_util.keystr(first[1:]), float(loss)
    return None
