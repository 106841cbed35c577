"""Differentiable operations with hand-written backward rules.

Every rule reads the same way: the public function; `<name>_fwd(*args) -> (out, residuals)`;
`<name>_bwd(residuals, g) -> cotangents`, the derived formula over the line that computes it; and the line that
joins them. The formulas are derived in docs/derivations.md. `fcfunc.reference` holds the plain twin of each.

All take float16, bfloat16, float32 or float64, compute in at least float32 and return the dtype they were given.
All are differentiable in reverse mode to any order and in forward-over-reverse; `jax.jvp` alone needs the twin.

Here are the layers and what acts on a row; `fcfunc.activations` and `fcfunc.norms` hold the rest, and all of it is
found here by name as well, so that this module is the one namespace of operations.
"""

import inspect
import math

import jax
import jax.numpy as jnp

from fcfunc import _check, _layout, activations, norms
from fcfunc._precision import accumulator, product, wide
from fcfunc._rule import rule
from fcfunc.activations import *  # noqa: F403
from fcfunc.norms import *  # noqa: F403

__all__ = [
    "affine",
    "affine_bwd",
    "affine_fwd",
    "dropout",
    "dropout_bwd",
    "dropout_fwd",
    "layer",
    "layer_bwd",
    "layer_fwd",
    "log_softmax",
    "log_softmax_bwd",
    "log_softmax_fwd",
    "softmax",
    "softmax_bwd",
    "softmax_fwd",
]
__all__ += activations.__all__
__all__ += norms.__all__


def affine(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    flatten: bool = False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent: bool = True,
) -> jax.Array:
    r"""An affine layer: :math:`y_{nj} = \sum_i x_{ni} w_{ij} + b_j`.

    The bias reaches every row as if through an invisible input of ones, `y = x w + 1 b`; so its gradient is
    `1ᵀ g`, the sum over the batch. The products accumulate in at least float32.

    Args:
      x: inputs, `[..., fan_in]`; with `flatten=True` `[batch, d1, ..., dk]` with `d1 * ... * dk == fan_in`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`.
      flatten: every axis of `x` after the first is features, as for images.
      compute_dtype: of the operands of all three products, the two of the backward pass included: "bfloat16" beside
        float32 weights is mixed precision. `x` may then differ from `w` and `b` in dtype. None: the one dtype of the
        arguments. The sums are in float32 in any case, and the gradient of `w` goes from there to the dtype of `w`
        without being rounded to the operands' dtype.
      out_dtype: of the output; None: the operands' dtype.
      round_cotangent: round the output's cotangent to the operands' dtype before its two products. False leaves it as
        it is, and both products then run in float32, as automatic differentiation would have them: slower, and free of
        this one rounding.

    Returns:
      `[..., fan_out]` (with `flatten=True` `[batch, fan_out]`). The gradient of `x` has the shape of `x` in both cases.
      Saved for the backward pass: `x` and `w`.

    Raises:
      ValueError: the shapes do not fit together.
      TypeError: the arguments are not of one floating-point dtype and no `compute_dtype` is given, or one is given that
        is not bfloat16, float32 or float64.

    Source: derived in docs/derivations.md#affine.

    Example:
      >>> affine(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., 3.]]), jnp.array([0.5, 0.5]))
      Array([[1.5, 6.5]], dtype=float32)
    """
    _check.dtype("affine", out_dtype=out_dtype)
    b = _bias_along(x, w, b, flatten)
    return _affine(
        x, w, b, flatten=flatten, compute_dtype=compute_dtype, out_dtype=out_dtype, round_cotangent=round_cotangent
    )


def affine_fwd(x, w, b, *, flatten=False, compute_dtype=None, out_dtype=None, round_cotangent=True):
    """`(out, residuals)` of `affine`."""
    del round_cotangent  # the backward pass alone rounds it
    operands = _check.operands("affine", compute_dtype, x=x, w=w, b=b)
    features = x.shape[1:] if flatten else x.shape[-1:]
    if x.ndim < 1 or w.ndim != 2 or b.shape != w.shape[1:] or math.prod(features) != w.shape[0]:
        raise ValueError(
            "affine: x [..., fan_in], w [fan_in, fan_out] and b [fan_out] expected, "
            f"got x {list(x.shape)}, w {list(w.shape)}, b {list(b.shape)}{' with flatten=True' if flatten else ''}"
        )
    rows = x.reshape(x.shape[0], w.shape[0]) if flatten else x
    by_w, wide_in = (((rows.ndim - 1,), (0,)), ((), ())), accumulator(operands)
    rows, w_, sharding = rows.astype(operands), w.astype(operands), _layout.product_sharding(rows, w, rows.ndim - 1)
    out = product(rows, w_, by_w, accumulate=wide_in, out_sharding=sharding)
    out = out + jnp.broadcast_to(b.astype(wide_in), out.shape)
    return out.astype(operands if out_dtype is None else out_dtype), (x, w)


def affine_bwd(residuals, g, *, compute_dtype=None, round_cotangent=True):
    """Cotangents `(dx, dw, db)` of `affine`, `dx` in the shape of `x`, flattened or not."""
    x, w = residuals
    operands = x.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    wide_in = accumulator(operands)
    rows = x.reshape(*g.shape[:-1], w.shape[0])  # the same array, unless the forward pass flattened it
    batch = tuple(range(g.ndim - 1))
    narrow = operands if round_cotangent or g.dtype == operands else wide_in
    rows_, w_, g_ = rows.astype(operands).astype(narrow), w.astype(operands).astype(narrow), g.astype(narrow)
    # dx = g wᵀ
    by_w = (((g.ndim - 1,), (1,)), ((), ()))
    dx = product(g_, w_, by_w, accumulate=wide_in, out_sharding=_layout.explicit_sharding(rows, w))
    # dw = xᵀ g
    by_rows = ((batch, batch), ((), ()))
    dw = product(rows_, g_, by_rows, accumulate=wide_in, out_sharding=_layout.explicit_sharding(w, rows))
    # db = 1ᵀ g, the sum over the batch: b is broadcast, that is, multiplied by an invisible input of ones
    db = jnp.sum(g, axis=batch, dtype=wide_in)
    return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype), db.astype(w.dtype)


_affine = rule(affine_fwd, affine_bwd)


def layer(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    activation: str,
    flatten: bool = False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent: bool = True,
    pack: bool = True,
    **options,
) -> jax.Array:
    r"""A layer, affine and activation in one rule: :math:`y = f(x w + b)`, saving the least.

    Two rules in a row save what each needs; one rule for both can do with less than the pre-activation `x w + b`. It is
    computed in at least float32 and rounded once, after the activation.

    Args:
      x: inputs, as for `affine`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`.
      activation: one of "elu", "gelu", "leaky_relu", "log_softmax", "relu", "sigmoid", "silu", "softmax", "softplus",
        "tanh".
      flatten: as for `affine`.
      compute_dtype: as for `affine`.
      out_dtype: as for `affine`.
      round_cotangent: as for `affine`, of the pre-activation's cotangent.
      pack: for "relu" and "leaky_relu", save a bit per output. False: save booleans, which the compiler reads off the
        output where that is kept anyway, as the next layer's input is in one compiled program; then it is the faster.
      **options: of the activation, such as `negative_slope` or `approximate`.

    Returns:
      As `affine`. Saved for the backward pass: `x` and `w`; and for "relu" and "leaky_relu" one BIT per output, with
      `pack`; for "gelu" and "silu" nothing, `b` apart: the pre-activation is computed again, one more product; for the
      others the output.

    Raises:
      ValueError: the shapes do not fit together; an unknown activation.
      TypeError: as for `affine`.

    Source: derived in docs/derivations.md#layer.

    Example:
      >>> layer(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., -3.]]), jnp.zeros(2), activation="relu")
      Array([[1., 0.]], dtype=float32)
    """
    if activation not in _LAYERS:
        raise ValueError(f"layer: unknown activation {activation!r}; known are {', '.join(_LAYERS)}")
    for name in options.keys() - inspect.signature(_LAYERS[activation][0]).parameters.keys():
        raise ValueError(f"layer: {activation} has no option {name!r}")
    _check.dtype("layer", out_dtype=out_dtype)
    b = _bias_along(x, w, b, flatten)
    return _layer(
        x,
        w,
        b,
        activation=activation,
        flatten=flatten,
        compute_dtype=compute_dtype,
        out_dtype=out_dtype,
        round_cotangent=round_cotangent,
        pack=pack,
        **options,
    )


def layer_fwd(
    x,
    w,
    b,
    *,
    activation,
    flatten=False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent=True,
    pack=True,
    **options,
):
    """`(out, residuals)` of `layer`."""
    del round_cotangent
    operands = _check.operands("layer", compute_dtype, x=x, w=w, b=b)
    z, _ = affine_fwd(x, w, b, flatten=flatten, compute_dtype=compute_dtype, out_dtype=accumulator(operands))
    forward, _, saves = _LAYERS[activation]
    wide_out, residuals = forward(z, **options)
    out = wide_out.astype(operands if out_dtype is None else out_dtype)
    if activation == "elu" and out.dtype == jnp.float16:  # its rule reads the sign of the input from the output
        out = jnp.where((wide_out > 0) & (out == 0), jnp.finfo(out.dtype).smallest_subnormal, out)
    return out, (x, w, _packed(residuals, pack) if saves == "mask" else out if saves == "output" else b)


def layer_bwd(
    residuals,
    g,
    *,
    activation,
    flatten=False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent=True,
    pack=True,
    **options,
):
    """Cotangents `(dx, dw, db)` of `layer`."""
    del out_dtype, pack  # `g` has the one, the saved mask the other
    x, w, saved = residuals
    _, backward, saves = _LAYERS[activation]
    if saves == "mask":
        saved = _unpacked(saved, g.shape[-1])
    elif saves == "input":
        wide_in = accumulator(x.dtype if compute_dtype is None else jnp.dtype(compute_dtype))
        saved, _ = affine_fwd(x, w, saved, flatten=flatten, compute_dtype=compute_dtype, out_dtype=wide_in)
    # dz = g ∘ f′(z), then (dx, dw, db) as for affine
    (dz,) = backward(saved, wide(g), **options)
    return affine_bwd((x, w), dz, compute_dtype=compute_dtype, round_cotangent=round_cotangent)


_layer = rule(layer_fwd, layer_bwd)


def _bias_along(x, w, b, flatten):
    """The biases, laid as the columns of the output; what does not fit together is left for the rule to name."""
    if any(not isinstance(a, jax.Array) for a in (x, w, b)) or x.ndim < 1 or w.ndim != 2 or b.ndim != 1:
        return b
    sharding = _layout.product_sharding(x, w, 1 if flatten else x.ndim - 1)
    return b if sharding is None else _layout.laid(b, sharding, (-1,))


def _packed(mask, pack):
    """Booleans as bits, eight to a byte, along the last axis; as they are where that axis lies on several devices."""
    sharding = _layout.explicit_sharding(mask)
    if (
        not pack
        or not mask.size
        or (sharding is not None and any(axis is not None for axis in sharding.spec[mask.ndim - 1 :]))
    ):
        return mask
    return jnp.packbits(mask, axis=-1)


def _unpacked(bits, count):
    return bits if bits.dtype == bool else jnp.unpackbits(bits, axis=-1, count=count).astype(bool)


def dropout(x: jax.Array, *, rate: float, key: jax.Array) -> jax.Array:
    r"""Dropout: :math:`y = x ∘ k / (1 - r)`, `k` 1 with probability `1 - r` and else 0, so that the mean of `y` is `x`.

    What is dropped is 0, also where it was NaN or infinite. The same key drops the same elements: give each call its
    own, by `jax.random.fold_in`, and inside `shard_map` each device.

    Args:
      x: any shape.
      rate: `r`, the probability to drop, in [0, 1].
      key: a random key.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the key alone, from which the mask is drawn again.

    Raises:
      TypeError: `x` is not of a floating-point dtype; no key.
      ValueError: `rate` is outside [0, 1].

    Source: Srivastava et al. 2014, Dropout; derived in docs/derivations.md#dropout.

    Example:
      >>> jnp.unique(dropout(jnp.ones(100), rate=0.5, key=jax.random.key(0)))
      Array([0., 2.], dtype=float32)
    """
    return _dropout(x, key, rate=_check.number("dropout", rate=rate))


def dropout_fwd(x, key, *, rate):
    """`(out, residuals)` of `dropout`."""
    _check.floating("dropout", x=x)
    _check.key("dropout", key)
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate, the probability to drop, must be in [0, 1], got {rate}")
    return _thinned(x, key, rate), key


def dropout_bwd(key, g, *, rate):
    """Cotangents `(dx, None)` of `dropout`: a key has no gradient."""
    # dx = g ∘ k / (1 − r)
    return _thinned(g, key, rate), None


_dropout = rule(dropout_fwd, dropout_bwd)


def _thinned(x, key, rate):
    kept = _layout.laid_like(jax.random.bernoulli(key, 1 - rate, x.shape), x)
    return jnp.where(kept, wide(x) * (1 / (1 - rate) if rate < 1 else 0.0), 0).astype(x.dtype)


def softmax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, where: jax.Array | None = None) -> jax.Array:
    r"""Softmax: :math:`p_i = e^{x_i} / \sum_k e^{x_k}`, computed from `x - max(x)`.

    The Jacobian is full, :math:`∂p_i/∂x_j = p_i (δ_{ij} - p_j)`: its diagonal `p (1 - p)` alone is not the gradient.
    An element of -inf has probability 0; a slice of nothing but -inf, or with +inf or NaN in it, is NaN.

    Args:
      x: logits, any shape of at least one axis.
      axis: the axis, or the axes together, along which the output sums to 1; None for all.
      where: booleans that can be broadcast to the shape of `x`. Masked elements take no part: their output and their
        gradient are 0, even if they are NaN.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype; `where` that is not boolean.
      ValueError: `x` has no axis of that number; `where` cannot be broadcast to `x`.

    Source: derived in docs/derivations.md#softmax.

    Example:
      >>> softmax(jnp.array([1e8, 1e8]))
      Array([0.5, 0.5], dtype=float32)
    """
    _check.floating("softmax", x=x)
    axes = _check.axes("softmax", axis, x=x)
    if where is None:
        return _softmax(x, axis=axes)
    x, where = _unmasked("softmax", x, axes, where)
    return jnp.where(where, _softmax(x, axis=axes), 0)


def softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `softmax`."""
    _check.floating("softmax", x=x)
    e = jnp.exp(_shifted(x, axis))
    out = (e / jnp.sum(e, axis=axis, keepdims=True)).astype(x.dtype)
    return out, out


def softmax_bwd(out, g, *, axis=-1):
    """Cotangent `(dx,)` of `softmax`."""
    p, wide_g = wide(out), wide(g)
    # dx_j = Σ_i g_i p_i (δ_ij − p_j), that is, dx = p ∘ (g − Σ p g)
    return ((p * (wide_g - jnp.sum(p * wide_g, axis=axis, keepdims=True))).astype(g.dtype),)


_softmax = rule(softmax_fwd, softmax_bwd)


def log_softmax(x: jax.Array, axis: int | tuple[int, ...] | None = -1, where: jax.Array | None = None) -> jax.Array:
    r"""The logarithm of softmax: :math:`\log p_i = x_i - \log \sum_k e^{x_k}`, computed from `x - max(x)`.

    Args:
      x: logits, any shape of at least one axis.
      axis: the axis, or the axes together, along which the probabilities sum to 1; None for all.
      where: booleans that can be broadcast to the shape of `x`. Masked elements take no part: their output is -inf and
        their gradient 0, even if they are NaN.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output.

    Raises:
      TypeError: `x` is not of a floating-point dtype; `where` that is not boolean.
      ValueError: `x` has no axis of that number; `where` cannot be broadcast to `x`.

    Source: derived in docs/derivations.md#log-softmax.

    Example:
      >>> log_softmax(jnp.array([0., 0.]))
      Array([-0.6931472, -0.6931472], dtype=float32)
    """
    _check.floating("log_softmax", x=x)
    axes = _check.axes("log_softmax", axis, x=x)
    if where is None:
        return _log_softmax(x, axis=axes)
    x, where = _unmasked("log_softmax", x, axes, where)
    return jnp.where(where, _log_softmax(x, axis=axes), -jnp.inf)


def log_softmax_fwd(x, *, axis=-1):
    """`(out, residuals)` of `log_softmax`."""
    _check.floating("log_softmax", x=x)
    shifted = _shifted(x, axis)
    out = (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True))).astype(x.dtype)
    return out, out


def log_softmax_bwd(out, g, *, axis=-1):
    """Cotangent `(dx,)` of `log_softmax`."""
    p, wide_g = jnp.exp(wide(out)), wide(g)
    # dx_j = Σ_i g_i (δ_ij − p_j), that is, dx = g − p Σ g
    return ((wide_g - p * jnp.sum(wide_g, axis=axis, keepdims=True)).astype(g.dtype),)


_log_softmax = rule(log_softmax_fwd, log_softmax_bwd)


def _unmasked(name, x, axes, where):
    """`x` with -inf where it is masked, which has probability 0; slices that are masked whole are set to 0."""
    _check.array(name, where=where)
    if jnp.result_type(where) != jnp.bool_:
        raise TypeError(f"{name}: where must be booleans, got {_check.describe(where)}")
    x = jnp.asarray(x)
    try:
        where = jnp.broadcast_to(where, x.shape)
    except ValueError:
        shapes = f"{list(x.shape)}, got {list(jnp.shape(where))}"
        raise ValueError(f"{name}: where must be broadcastable to the shape of x, {shapes}") from None
    where = _layout.laid_like(where, x)
    return jnp.where(where, x, jnp.where(jnp.any(where, axis=axes, keepdims=True), -jnp.inf, 0)), where


def _shifted(x, axis):
    """`x - max(x)`: the largest exponential is 1. The shift cancels, so its derivative is stopped, not computed."""
    x = wide(x)
    return x - jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))


# The two halves of each activation, and what the rule of a layer saves for the second one beside x and w: one bit per
# output, the output, or the input, which is computed again.
_LAYERS = {
    "elu": (activations.elu_fwd, activations.elu_bwd, "output"),
    "gelu": (activations.gelu_fwd, activations.gelu_bwd, "input"),
    "leaky_relu": (activations.leaky_relu_fwd, activations.leaky_relu_bwd, "mask"),
    "log_softmax": (log_softmax_fwd, log_softmax_bwd, "output"),
    "relu": (activations.relu_fwd, activations.relu_bwd, "mask"),
    "sigmoid": (activations.sigmoid_fwd, activations.sigmoid_bwd, "output"),
    "silu": (activations.silu_fwd, activations.silu_bwd, "input"),
    "softmax": (softmax_fwd, softmax_bwd, "output"),
    "softplus": (activations.softplus_fwd, activations.softplus_bwd, "output"),
    "tanh": (activations.tanh_fwd, activations.tanh_bwd, "output"),
}
