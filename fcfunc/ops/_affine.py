"""The affine layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fcfunc import _arguments, _layout
from fcfunc._rule import rule, sum_dtype


def affine(
    x: jax.Array, w: jax.Array, b: jax.Array | None, *, flatten: bool = False, compute_dtype=None, out_dtype=None
) -> jax.Array:
    r"""Affine layer: :math:`y_{nj} = \sum_i x_{ni} w_{ij} + b_j`.

    The bias acts like the weights of an implicit input of ones, `y = x w + 1 b`, so its gradient is `1ᵀ g`, the sum
    over the batch. The matmuls accumulate in at least float32.

    Args:
      x: inputs, `[..., fan_in]`; with `flatten=True`, `[batch, d1, ..., dk]` where `d1 * ... * dk == fan_in`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`, or None.
      flatten: treat all axes of `x` after the first as features, as for images.
      compute_dtype: dtype of the operands of all three matmuls, including the two in the backward pass. For mixed
        precision, use "bfloat16" with float32 weights; `x` may then differ in dtype from `w` and `b`. None: the common
        dtype of the arguments. Either way, matmuls accumulate in at least float32, and the gradient of `w` is cast
        from there directly to the dtype of `w`, without being rounded to the operands' dtype.
      out_dtype: dtype of the output; None: the operands' dtype.

    Returns:
      `[..., fan_out]`, or `[batch, fan_out]` with `flatten=True`. The gradient of `x` has the shape of `x` either way.
      Saved for the backward pass: `x` and `w`.

    Raises:
      ValueError: the shapes do not match.
      TypeError: the arguments do not share one floating-point dtype and `compute_dtype` is None, or `compute_dtype` is
        not bfloat16, float32 or float64.

    Source: derived in docs/background/derivations.md#affine.

    Example:
      >>> affine(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., 3.]]), jnp.array([0.5, 0.5]))
      Array([[1.5, 6.5]], dtype=float32)
    """
    check_affine("affine", x, w, b, compute_dtype, out_dtype, flatten=flatten)
    x, w, b = place_affine(x, w, b, row_axes=1 if flatten else None)
    return _affine(x, w, b, flatten=flatten, compute_dtype=compute_dtype, out_dtype=out_dtype)


def affine_fwd(x, w, b, *, flatten=False, compute_dtype=None, out_dtype=None):
    """`(out, residuals)` of `affine`."""
    # y = x w + 1 b
    x2d = x.reshape(x.shape[0], w.shape[0]) if flatten else x
    operands = operand_dtype(x, compute_dtype)
    contract, sharding = (((x2d.ndim - 1,), (0,)), ((), ())), _layout.dot_sharding(x2d, w, x2d.ndim - 1)
    out = dot(x2d.astype(operands), w.astype(operands), contract, sum_dtype(operands), out_sharding=sharding)
    if b is not None:
        out = out + jnp.broadcast_to(b.astype(out.dtype), out.shape)
    has_bias = None if b is None else ()  # a residual must be a pytree of arrays: () has none
    return out.astype(operands if out_dtype is None else out_dtype), (x, w, has_bias)


def affine_bwd(residuals, g, *, compute_dtype=None):
    """Cotangents `(dx, dw, db)` of `affine`, `dx` in the shape of `x`, flattened or not."""
    x, w, has_bias = residuals
    operands = operand_dtype(x, compute_dtype)
    sums, row_axes = sum_dtype(operands), tuple(range(g.ndim - 1))
    x2d = x.reshape(*g.shape[:-1], w.shape[0])  # unchanged, unless the forward pass flattened it
    x_in, w_in, g_in = x2d.astype(operands), w.astype(operands), g.astype(operands)
    # dx = g wᵀ
    contract_columns = (((g.ndim - 1,), (1,)), ((), ()))
    dx = dot(g_in, w_in, contract_columns, sums, out_sharding=_layout.explicit_sharding(x2d, w))
    # dw = xᵀ g
    contract_rows = ((row_axes, row_axes), ((), ()))
    dw = dot(x_in, g_in, contract_rows, sums, out_sharding=_layout.explicit_sharding(w, x2d))
    # db = 1ᵀ g, the sum over the batch: b is broadcast, that is, multiplied by an implicit input of ones
    db = None if has_bias is None else jnp.sum(g, axis=row_axes, dtype=sums).astype(w.dtype)
    return dx.reshape(x.shape).astype(x.dtype), dw.astype(w.dtype), db


_affine = rule(affine_fwd, affine_bwd)


def check_affine(where, x, w, b, compute_dtype, out_dtype, *, flatten=False, columns="fan_out") -> None:
    """Raises if the arguments do not fit an affine layer."""
    _arguments.operands(where, compute_dtype, x=x, w=w, **({} if b is None else {"b": b}))
    _arguments.dtype(where, out_dtype=out_dtype)
    shape, kernel = np.shape(x), np.shape(w)
    fan_in = math.prod(shape[1:]) if flatten else math.prod(shape[-1:])
    if not shape or len(kernel) != 2 or fan_in != kernel[0] or (b is not None and np.shape(b) != kernel[1:]):
        given = f"x {list(shape)}, w {list(kernel)}, b {None if b is None else list(np.shape(b))}"
        raise ValueError(
            f"{where}: expected x [..., fan_in], w [fan_in, {columns}] and b [{columns}], "
            f"got {given}{' with flatten=True' if flatten else ''}"
        )


def place_affine(x, w, b, row_axes: int | None = None):
    """`(x, w, b)` as arrays, with `b` sharded like the columns of the output."""
    x, w = jnp.asarray(x), jnp.asarray(w)
    if b is None:
        return x, w, None
    sharding = _layout.dot_sharding(x, w, x.ndim - 1 if row_axes is None else row_axes)
    return x, w, jnp.asarray(b) if sharding is None else _layout.reshard_axes(jnp.asarray(b), sharding, (-1,))


def operand_dtype(x, compute_dtype):
    """The dtype of the operands of a matmul."""
    return x.dtype if compute_dtype is None else jnp.dtype(compute_dtype)


def dot(x: jax.Array, y: jax.Array, dims, dtype, *, out_sharding=None) -> jax.Array:
    """`lax.dot_general` with operands of one dtype, accumulated and returned in another.

    XLA's CPU backend lacks one matmul of bfloat16 operands into float32: a matrix, contracted over its first axis,
    times a batch of matrices, as in an ensemble under `vmap`. If a batch axis of size 1 is added, XLA simplifies it to
    a form that every backend has.
    """
    ((x_axes, y_axes), _) = dims
    if x.dtype == dtype or not x_axes or x_axes[0] != 0:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype, out_sharding=out_sharding)
    if out_sharding is not None:
        out_sharding = NamedSharding(out_sharding.mesh, PartitionSpec(None, *out_sharding.spec))
    dims = ((tuple(i + 1 for i in x_axes), tuple(i + 1 for i in y_axes)), ((0,), (0,)))
    x, y = jnp.expand_dims(x, 0), jnp.expand_dims(y, 0)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=dtype, out_sharding=out_sharding)[0]
