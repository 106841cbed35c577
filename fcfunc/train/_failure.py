"""Diagnosis of non-finite values in `fit`: the step, its examples and the first non-finite array."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc._arguments import clipped
from fcfunc.train._chunks import Chunk
from fcfunc.train._mesh import shardings
from fcfunc.train._state import TrainState
from fcfunc.train._step import finite_guards, skipped_steps, uniform


class NonFiniteError(FloatingPointError):
    """Raised when a step of `fit` produces a non-finite loss or a non-finite value in the state.

    `fit` finds the step by repeating the last steps one at a time. That is a different compiled program, whose results
    may differ in their last bits; if all its steps are finite, `indices` is empty and `state` is the state before them.

    Attributes:
      state: the state before that step; `fit` can resume from it.
      step: the number of the bad step, counted from 0.
      indices: the examples of its batch, as indices into `data`.
      leaf: the path of the first non-finite array, in `grads`, `params`, `opt_state`, `model_state` or `loss`.
      history: the history of the previous epochs, as `fit` returns it.
    """

    def __init__(self, message: str, state: TrainState, step: int, indices: np.ndarray, leaf: str, history: dict):
        super().__init__(message)
        self.state, self.step, self.indices, self.leaf, self.history = state, step, indices, leaf, history


def step_flags(before: TrainState, after: TrainState, metrics) -> dict[str, jax.Array]:
    """In a compiled step: whether its loss is finite, and whether a guard skipped it.

    After the allowed number of skipped steps in a row, the guard applies the next one, which is not counted as skipped.
    """
    finite = jnp.isfinite(metrics["loss"])
    if not finite_guards(after.opt_state):
        return {"finite": finite, "skipped": jnp.zeros_like(finite)}
    return {"finite": finite, "skipped": skipped_steps(after.opt_state) > skipped_steps(before.opt_state)}


def _carried(state: TrainState) -> dict:
    return {"params": state.params, "opt_state": state.opt_state, "model_state": state.model_state}


def _finite(tree):
    """For each array of a pytree, whether all its values are finite."""
    known = jnp.bool_(True)
    return jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)) if jnp.issubdtype(a.dtype, jnp.inexact) else known, tree)


def still_finite(before: TrainState, after: TrainState) -> jax.Array:
    """Whether every array that was finite still is. Some start infinite, such as an optimizer's best loss."""
    kept = jax.tree.map(lambda a, b: b | ~a, _finite(_carried(before)), _finite(_carried(after)))
    return jnp.all(jnp.array(jax.tree.leaves(kept)))


def non_finite_error(
    run_chunk, loss_fn, before: TrainState, chunk: Chunk, sizes, epoch: int, history: dict, *, shuffle: bool
) -> NonFiniteError:
    """The error that ends a run, found by repeating the last steps, of the given sizes, one by one.

    `run_chunk(probe, size, state) -> (state, metrics, skipped, ok)` takes one step with `size` examples; if `probe` is
    None, it uses the run's own optimizer. The data of `chunk` is as the caller passed it.
    """
    found = find_bad_step(run_chunk, before, sizes)
    if found is None:  # one by one, the steps are a different program, whose last bits may differ
        message = (
            f"fit: epoch {epoch} produced non-finite values, but its steps were finite when repeated one by one; "
            "the exception's state is the one before these steps"
        )
        return NonFiniteError(message, before, int(before.step), np.arange(0), "loss", history)
    leaf, good, step = first_bad_leaf(run_chunk, found), found.before, int(found.before.step)
    places = np.asarray(chunk.order(good, int(found.size), shuffle=shuffle))
    indices = places + chunk.first
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    message = (
        f"fit: {leaf} was not finite at step {step} (epoch {epoch}), with a loss of {found.loss:.6g} on the examples "
        f"{shown}; {_advice(loss_fn, good, chunk.data, places)}. The exception's state is the one before this step"
    )
    return NonFiniteError(message, good, step, indices, leaf, history)


def _advice(loss_fn: Callable, state: TrainState, data, indices: np.ndarray) -> str:
    """The likely cause of a non-finite loss: a label, or the learning rate.

    `data` is as the caller passed it. The loss is tried without and with a random key, since it may need one.
    """
    if not any(shardings(data)):
        for key in (None, state.key):
            try:
                return _blame(loss_fn, state, data, indices, key) or "try a lower learning rate"
            except Exception:  # the loss may also reject a batch of one example
                continue
    return "try a lower learning rate"


def _blame(loss_fn, state, data, indices, key) -> str | None:
    """Names a label that makes an example's loss NaN; None if there is none.

    A label is blamed only if no other example with the same label has a finite loss: after divergence, the loss may be
    NaN or overflow for some labels only.
    """
    leaves = [(f"data{jax.tree_util.keystr(path)}", np.asarray(a)) for path, a in jax.tree.leaves_with_path(data)]

    @jax.jit
    def loss_of(*example):
        example = jax.tree.unflatten(jax.tree.structure(data), example)
        return uniform(loss_fn)(state.params, example, key, state.model_state)[0]

    def loss(i, **swapped):
        """The loss of example i by itself, with the named leaves taken from other examples."""
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
        same = [i for i in np.flatnonzero((a == a[bad]).reshape(count, -1).all(axis=1))[:16] if i != bad]
        if not any(np.isfinite(loss(int(i))) for i in same):
            return (
                f"the loss is finite with a value other than {name}[{bad}] = {a[bad]!s:.40}: labels must be in "
                "[0, classes), and num_classes= checks them before training"
            )
    return None


class BadStep(NamedTuple):
    """The first bad step: the states before and after it, the number of its examples, and its loss."""

    before: TrainState
    after: TrainState
    size: int
    loss: float


def find_bad_step(run_chunk: Callable, state: TrainState, sizes) -> BadStep | None:
    """Repeats steps one by one and returns the first bad one; None if all are ok."""
    for size in sizes:
        before = state
        state, metrics, _, ok = run_chunk(None, size, before)
        if not ok:
            return BadStep(before, state, size, float(metrics["loss"][0]))
    return None


def first_bad_leaf(run_chunk: Callable, step: BadStep) -> str:
    """The path of the first non-finite array after a step, in the order of computation."""
    probed = step.before._replace(opt_state=GRADIENT_PROBE.init(step.before.params))
    grads = run_chunk(GRADIENT_PROBE, step.size, probed)[0].opt_state
    was_bad = {path for path, finite in jax.tree.leaves_with_path(_finite(_carried(step.before))) if not finite}
    finite_after = {"grads": grads, **_finite(_carried(step.after))}
    for name in ("grads", "params", "opt_state", "model_state"):
        for path, finite in jax.tree.leaves_with_path({name: finite_after[name]}):
            if not finite and path not in was_bad:
                return name + jax.tree_util.keystr(path[1:])
    return "loss"


GRADIENT_PROBE = optax.GradientTransformation(
    lambda params: jax.tree.map(lambda _: jnp.bool_(True), params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), _finite(updates)),
)
"""An optimizer that leaves the params unchanged; its state says whether each gradient is finite."""
