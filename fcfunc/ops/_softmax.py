"""Softmax and its logarithm."""

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout
from fcfunc._rule import rule, upcast


def softmax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, where: jax.Array | None = None) -> jax.Array:
    r"""Softmax: :math:`p_i = e^{x_i} / \sum_k e^{x_k}`, computed from `x - max(x)`.

    The Jacobian is dense, :math:`∂p_i/∂x_j = p_i (δ_{ij} - p_j)`; its diagonal `p (1 - p)` alone is not the gradient.
    An element of -inf has probability 0. A slice gives NaN if it contains +inf or NaN, or only -inf.

    Args:
      x: logits, with at least one axis.
      axis: the axis over which the output sums to 1, or a tuple of axes over which it does jointly; None for all axes.
      where: booleans that can be broadcast to the shape of `x`. Elements where it is False are excluded: their output
        and their gradient are 0, even if they are NaN.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` does not have a floating-point dtype; `where` is not boolean.
      ValueError: `x` has no such axis; `where` cannot be broadcast to `x`.

    Source: derived in docs/background/derivations.md#softmax.

    Example:
      >>> softmax(jnp.array([1e8, 1e8]))
      Array([0.5, 0.5], dtype=float32)
    """
    _arguments.floating("softmax", x=x)
    axes = _arguments.axes("softmax", axis, x=x)
    if where is None:
        return _softmax(x, axis=axes)
    x, where = _exclude_masked("softmax", x, axes, where)
    return jnp.where(where, _softmax(x, axis=axes), 0)


def softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `softmax`."""
    # p = exp(x − max x) / Σ exp(x − max x)
    e = jnp.exp(_shifted(x, axis))
    p = e / jnp.sum(e, axis=axis, keepdims=True)
    return p.astype(x.dtype), p


def softmax_bwd(p, g, *, axis=-1):
    """Cotangent `(dx,)` of `softmax`."""
    p, g_ = upcast(p), upcast(g)
    # dx_j = Σ_i g_i p_i (δ_ij − p_j), that is, dx = p ∘ (g − Σ p g)
    return ((p * (g_ - jnp.sum(p * g_, axis=axis, keepdims=True))).astype(g.dtype),)


_softmax = rule(softmax_fwd, softmax_bwd)


def log_softmax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, where: jax.Array | None = None) -> jax.Array:
    r"""Logarithm of the softmax: :math:`\log p_i = x_i - \log \sum_k e^{x_k}`, computed from `x - max(x)`.

    Args:
      x: logits, with at least one axis.
      axis: the axis over which the probabilities sum to 1, or a tuple of axes over which they do jointly; None for
        all axes.
      where: booleans that can be broadcast to the shape of `x`. Elements where it is False are excluded: their output
        is -inf and their gradient 0, even if they are NaN.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` does not have a floating-point dtype; `where` is not boolean.
      ValueError: `x` has no such axis; `where` cannot be broadcast to `x`.

    Source: derived in docs/background/derivations.md#log-softmax.

    Example:
      >>> log_softmax(jnp.array([0., 0.]))
      Array([-0.6931472, -0.6931472], dtype=float32)
    """
    _arguments.floating("log_softmax", x=x)
    axes = _arguments.axes("log_softmax", axis, x=x)
    if where is None:
        return _log_softmax(x, axis=axes)
    x, where = _exclude_masked("log_softmax", x, axes, where)
    return jnp.where(where, _log_softmax(x, axis=axes), -jnp.inf)


def log_softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `log_softmax`."""
    # log p = (x − max x) − log Σ exp(x − max x)
    shifted = _shifted(x, axis)
    log_p = shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True))
    return log_p.astype(x.dtype), log_p


def log_softmax_bwd(log_p, g, *, axis=-1):
    """Cotangent `(dx,)` of `log_softmax`."""
    p, g_ = jnp.exp(upcast(log_p)), upcast(g)
    # dx_j = Σ_i g_i (δ_ij − p_j), that is, dx = g − p Σ g
    return ((g_ - p * jnp.sum(g_, axis=axis, keepdims=True)).astype(g.dtype),)


_log_softmax = rule(log_softmax_fwd, log_softmax_bwd)


def _exclude_masked(name, x, axes, where):
    """`x` with masked elements set to -inf, which has probability 0, or to 0 in slices that are entirely masked."""
    _arguments.array(name, where=where)
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"{name}: where must be booleans, got {_arguments.describe(where)}")
    x = jnp.asarray(x)
    try:
        where = jnp.broadcast_to(where, x.shape)
    except ValueError:
        shapes = f"{list(x.shape)}, got {list(np.shape(where))}"
        raise ValueError(f"{name}: where must be broadcastable to the shape of x, {shapes}") from None
    where = _layout.reshard_like(where, x)
    return jnp.where(where, x, jnp.where(jnp.any(where, axis=axes, keepdims=True), -jnp.inf, 0)), where


def _shifted(x, axis):
    """`x - max(x)`, so that the largest exponential is 1. The shift cancels, so its derivative is stopped."""
    x = upcast(x)
    return x - jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))
