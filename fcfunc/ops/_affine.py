"""The affine layer."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fcfunc import _arguments, _layout
from fcfunc._rule import accumulator, rule


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
    _arguments.dtype("affine", out_dtype=out_dtype)
    b = _bias_along(x, w, b, flatten)
    return _affine(
        x, w, b, flatten=flatten, compute_dtype=compute_dtype, out_dtype=out_dtype, round_cotangent=round_cotangent
    )


def affine_fwd(x, w, b, *, flatten=False, compute_dtype=None, out_dtype=None, round_cotangent=True):
    """`(out, residuals)` of `affine`."""
    del round_cotangent  # the backward pass alone rounds it
    operands = _arguments.operands("affine", compute_dtype, x=x, w=w, b=b)
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


def _bias_along(x, w, b, flatten):
    """The biases, laid as the columns of the output; what does not fit together is left for the rule to name."""
    if any(not isinstance(a, jax.Array) for a in (x, w, b)) or x.ndim < 1 or w.ndim != 2 or b.ndim != 1:
        return b
    sharding = _layout.product_sharding(x, w, 1 if flatten else x.ndim - 1)
    return b if sharding is None else _layout.laid(b, sharding, (-1,))


def product(x: jax.Array, y: jax.Array, dims, *, accumulate, out_sharding=None) -> jax.Array:
    """`lax.dot_general` of operands of one dtype, accumulated and returned in another.

    Where XLA's CPU backend lacks a product of two bfloat16 operands into float32 is one form: a matrix, by its first
    axis, with a stack of matrices, which an ensemble under `vmap` makes. Given a batch of one the product is simplified
    into a form that every backend has.
    """
    ((x_by, y_by), _) = dims
    if x.dtype == accumulate or not x_by or x_by[0] != 0:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=accumulate, out_sharding=out_sharding)
    if out_sharding is not None:
        out_sharding = NamedSharding(out_sharding.mesh, PartitionSpec(None, *out_sharding.spec))
    dims = ((tuple(i + 1 for i in x_by), tuple(i + 1 for i in y_by)), ((0,), (0,)))
    x, y = jnp.expand_dims(x, 0), jnp.expand_dims(y, 0)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=accumulate, out_sharding=out_sharding)[0]
