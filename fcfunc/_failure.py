"""What `fcfunc.train.fit` does about a number that is not finite: finds the step, its examples and the first array."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc._loop import TrainState, guards, skips


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


def watched(state: TrainState) -> tuple[bool, ...]:
    """Which arrays of a state are to stay finite: some optimisers begin with an infinity, as the best loss so far."""
    return tuple(map(bool, jax.tree.leaves(_finite(_carried(state)))))


@functools.partial(jax.jit, static_argnames="watch")
def all_finite(tree, watch: tuple[bool, ...] | None = None) -> jax.Array:
    """Whether the arrays of a tree are finite, or those of them that are watched."""
    flags = jax.tree.leaves(_finite(tree))
    return jnp.all(jnp.array([fine for fine, w in zip(flags, watch or [True] * len(flags), strict=True) if w]))


def good(state: TrainState, outcomes, watch: tuple[bool, ...]) -> bool:
    """Whether some steps may stand: each by itself, and the state after them.

    A guard lets the first step through that exceeds the number it was told to skip; that one is no good.
    """
    stand = np.asarray(outcomes["finite"]) | np.asarray(outcomes["skipped"])
    return bool(np.all(stand)) and bool(all_finite(_carried(state), watch))


def _probe_update(updates, state, params=None):
    return jax.tree.map(jnp.zeros_like, updates), _finite(updates)


PROBE = optax.GradientTransformation(lambda params: jax.tree.map(lambda _: jnp.bool_(True), params), _probe_update)
"""An optimiser that moves nothing, and whose state tells of each gradient whether it is finite."""


def replay(take: Callable, state: TrainState, sizes, watch) -> tuple[TrainState, str, float] | None:
    """Takes steps again, one at a time: `(the last good state, the first bad leaf, the loss)`, None if all are good.

    `take(optimizer, size, state) -> (state, (metrics, outcomes))` takes one of them, of so many examples; optimizer
    None is the run's own.
    """
    for size in sizes:
        before = copied(state)
        state, (metrics, outcomes) = take(None, size, state)
        if not good(state, outcomes, watch):
            probed = copied(before)._replace(opt_state=PROBE.init(before.params))
            of = {"grads": take(PROBE, size, probed)[0].opt_state, **_finite(_carried(state)), "loss": False}
            leaves = jax.tree.leaves_with_path(_carried(state))
            calm = {path for (path, _), w in zip(leaves, watch, strict=True) if not w}
            paths = (path for path, fine in jax.tree.leaves_with_path(of) if not fine and path not in calm)
            first = min(paths, key=lambda path: list(of).index(path[0].key))
            return before, first[0].key + jax.tree_util.keystr(first[1:]), float(metrics["loss"][0])
    return None
