"""Differentiable operations with hand-written backward rules.

Every rule reads the same way: the public function; `<name>_fwd(*args) -> (out, residuals)`;
`<name>_bwd(residuals, g) -> cotangents`, the derived formula over the line that computes it; and the line that
joins them. The formulas are derived in docs/derivations.md. `fcfunc.reference` holds the plain twin of each.

All take float16, bfloat16, float32 or float64, compute in at least float32 and return the dtype they were given.
All are differentiable in reverse mode to any order and in forward-over-reverse; `jax.jvp` alone needs the twin.
"""

import math

import jax
import jax.numpy as jnp

from fcfunc import _check, _compat
from fcfunc._precision import accumulator, wide
from fcfunc._rule import rule

__all__ = [
    "affine",
    "affine_bwd",
    "affine_fwd",
    "log_softmax",
    "log_softmax_bwd",
    "log_softmax_fwd",
    "relu",
    "relu_bwd",
    "relu_fwd",
    "sigmoid",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax",
    "softmax_bwd",
    "softmax_fwd",
    "tanh",
    "tanh_bwd",
    "tanh_fwd",
]


def affine(x: jax.Array, w: jax.Array, b: jax.Array, *, flatten: bool = False) -> jax.Array:
    r"""An affine layer: :math:`y_{nj} = \sum_i x_{ni} w_{ij} + b_j`.

    The bias reaches every row as if through an invisible input of ones, `y = x w + 1 b`; so its gradient is
    `1ᵀ g`, the sum over the batch. The products accumulate in at least float32.

    Args:
      x: inputs, `[..., fan_in]`; with `flatten=True` `[batch, d1, ..., dk]` with `d1 * ... * dk == fan_in`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`.
      flatten: every axis of `x` after the first is features, as for images.

    Returns:
      `[..., fan_out]` (with `flatten=True` `[batch, fan_out]`), in the dtype of the arguments. The gradient of `x`
      has the shape of `x` in both cases. Saved for the backward pass: `x` and `w`.

    Raises:
      ValueError: the shapes do not fit together.
      TypeError: the arguments are not of one floating-point dtype.

    Source: derived in docs/derivations.md#affine.

    Example:
      >>> affine(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., 3.]]), jnp.array([0.5, 0.5]))
      Array([[1.5, 6.5]], dtype=float32)
    """
    return _affine(x, w, b, flatten=flatten)


def affine_fwd(x, w, b, *, flatten=False):
    """`(out, residuals)` of `affine`."""
    _check.one_dtype("affine", x=x, w=w, b=b)
    features = x.shape[1:] if flatten else x.shape[-1:]
    if x.ndim < 1 or w.ndim != 2 or b.shape != w.shape[1:] or math.prod(features) != w.shape[0]:
        raise ValueError(
            "affine: x [..., fan_in], w [fan_in, fan_out] and b [fan_out] expected, "
            f"got x {list(x.shape)}, w {list(w.shape)}, b {list(b.shape)}{' with flatten=True' if flatten else ''}"
        )
    rows = x.reshape(x.shape[0], w.shape[0]) if flatten else x
    out = _compat.product(rows, w, (((rows.ndim - 1,), (0,)), ((), ())), accumulate=accumulator(x.dtype))
    out = out + jnp.broadcast_to(wide(b), out.shape)
    return out.astype(x.dtype), (x, w)


def affine_bwd(residuals, g):
    """Cotangents `(dx, dw, db)` of `affine`, `dx` in the shape of `x`, flattened or not."""
    x, w = residuals
    rows = x.reshape(*g.shape[:-1], w.shape[0])  # the same array, unless the forward pass flattened it
    batch = tuple(range(g.ndim - 1))
    wide_in = accumulator(g.dtype)
    # dx = g wᵀ
    by_w = (((g.ndim - 1,), (1,)), ((), ()))
    dx = _compat.product(g, w, by_w, accumulate=wide_in, out_sharding=_compat.explicit_sharding(rows))
    # dw = xᵀ g
    by_rows = ((batch, batch), ((), ()))
    dw = _compat.product(rows, g, by_rows, accumulate=wide_in, out_sharding=_compat.explicit_sharding(w))
    # db = 1ᵀ g, the sum over the batch: b is broadcast, that is, multiplied by an invisible input of ones
    db = jnp.sum(g, axis=batch, dtype=wide_in)
    return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype), db.astype(w.dtype)


_affine = rule(affine_fwd, affine_bwd)


def relu(x: jax.Array) -> jax.Array:
    r"""The rectifier: :math:`y = \max(x, 0)`.

    The derivative is 1 for `x > 0` and 0 for `x < 0`. At the kink it is 0, by convention. A NaN stays a NaN and
    passes the cotangent on, so that it is seen.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: one boolean per element.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

    Source: derived in docs/derivations.md#relu.

    Example:
      >>> relu(jnp.array([-1., 0., 2.]))
      Array([0., 0., 2.], dtype=float32)
    """
    return _relu(x)


def relu_fwd(x):
    """`(out, residuals)` of `relu`."""
    _check.floating("relu", x=x)
    dead = x <= 0  # false for a NaN, which so stays alive
    return jnp.where(dead, 0, x), dead


def relu_bwd(dead, g):
    """Cotangent `(dx,)` of `relu`."""
    # dx = g ∘ [x > 0]
    return (jnp.where(dead, 0, g),)


_relu = rule(relu_fwd, relu_bwd)


def sigmoid(x: jax.Array) -> jax.Array:
    r"""The logistic function: :math:`y = 1 / (1 + e^{-x})`, without overflow for any `x`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

    Source: derived in docs/derivations.md#sigmoid.

    Example:
      >>> sigmoid(jnp.array([0., 1e30]))
      Array([0.5, 1. ], dtype=float32)
    """
    return _sigmoid(x)


def sigmoid_fwd(x):
    """`(out, residuals)` of `sigmoid`."""
    _check.floating("sigmoid", x=x)
    out = jax.lax.logistic(wide(x)).astype(x.dtype)
    return out, out


def sigmoid_bwd(out, g):
    """Cotangent `(dx,)` of `sigmoid`."""
    y = wide(out)
    # dx = g ∘ y ∘ (1 − y)
    return ((wide(g) * y * (1 - y)).astype(g.dtype),)


_sigmoid = rule(sigmoid_fwd, sigmoid_bwd)


def tanh(x: jax.Array) -> jax.Array:
    r"""The hyperbolic tangent: :math:`y = \tanh x`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

    Source: derived in docs/derivations.md#tanh.

    Example:
      >>> tanh(jnp.array([0., 1e30]))
      Array([0., 1.], dtype=float32)
    """
    return _tanh(x)


def tanh_fwd(x):
    """`(out, residuals)` of `tanh`."""
    _check.floating("tanh", x=x)
    out = jnp.tanh(wide(x)).astype(x.dtype)
    return out, out


def tanh_bwd(out, g):
    """Cotangent `(dx,)` of `tanh`."""
    y = wide(out)
    # dx = g ∘ (1 − y²), as a product: 1 − y is exact where y is near 1, 1 − y² is not
    return ((wide(g) * (1 - y) * (1 + y)).astype(g.dtype),)


_tanh = rule(tanh_fwd, tanh_bwd)


def softmax(x: jax.Array, *, axis: int = -1) -> jax.Array:
    r"""Softmax: :math:`p_i = e^{x_i} / \sum_k e^{x_k}`, computed from `x - max(x)`.

    The Jacobian is full, :math:`∂p_i/∂x_j = p_i (δ_{ij} - p_j)`: its diagonal `p (1 - p)` alone is not the gradient.
    An element of -inf has probability 0; a slice of nothing but -inf, or with +inf or NaN in it, is NaN.

    Args:
      x: logits, any shape of at least one axis.
      axis: the axis that sums to 1.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype.
      ValueError: `x` has no axis of that number.

    Source: derived in docs/derivations.md#softmax.

    Example:
      >>> softmax(jnp.array([1e8, 1e8]))
      Array([0.5, 0.5], dtype=float32)
    """
    return _softmax(x, axis=axis)


def softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `softmax`."""
    _check.floating("softmax", x=x)
    _check.axis("softmax", axis, x=x)
    e = jnp.exp(_shifted(x, axis))
    out = (e / jnp.sum(e, axis=axis, keepdims=True)).astype(x.dtype)
    return out, out


def softmax_bwd(out, g, *, axis=-1):
    """Cotangent `(dx,)` of `softmax`."""
    p, wide_g = wide(out), wide(g)
    # dx_j = Σ_i g_i p_i (δ_ij − p_j), that is, dx = p ∘ (g − Σ p g)
    return ((p * (wide_g - jnp.sum(p * wide_g, axis=axis, keepdims=True))).astype(g.dtype),)


_softmax = rule(softmax_fwd, softmax_bwd)


def log_softmax(x: jax.Array, *, axis: int = -1) -> jax.Array:
    r"""The logarithm of softmax: :math:`\log p_i = x_i - \log \sum_k e^{x_k}`, computed from `x - max(x)`.

    Args:
      x: logits, any shape of at least one axis.
      axis: the axis over which the probabilities sum to 1.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype.
      ValueError: `x` has no axis of that number.

    Source: derived in docs/derivations.md#log-softmax.

    Example:
      >>> log_softmax(jnp.array([0., 0.]))
      Array([-0.6931472, -0.6931472], dtype=float32)
    """
    return _log_softmax(x, axis=axis)


def log_softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `log_softmax`."""
    _check.floating("log_softmax", x=x)
    _check.axis("log_softmax", axis, x=x)
    shifted = _shifted(x, axis)
    out = (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True))).astype(x.dtype)
    return out, out


def log_softmax_bwd(out, g, *, axis=-1):
    """Cotangent `(dx,)` of `log_softmax`."""
    p, wide_g = jnp.exp(wide(out)), wide(g)
    # dx_j = Σ_i g_i (δ_ij − p_j), that is, dx = g − p Σ g
    return ((wide_g - p * jnp.sum(wide_g, axis=axis, keepdims=True)).astype(g.dtype),)


_log_softmax = rule(log_softmax_fwd, log_softmax_bwd)


def _shifted(x, axis):
    """`x - max(x)`: the largest exponential is 1. The shift cancels, so its derivative is stopped, not computed."""
    x = wide(x)
    return x - jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))
