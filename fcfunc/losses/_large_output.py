"""The output layer of a network with many classes and its cross-entropy, as one rule.

With many classes, the logits, `[batch, classes]`, take too much memory. This rule computes them one chunk of classes at
a time, in the forward pass and again in the backward pass. That takes four matmuls instead of three.
"""

# ruff: noqa: I001  (a filled list of names)
import math
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._rule import rule, sum_dtype, upcast
from fcfunc.losses._cross_entropy import softmax_cross_entropy_with_integer_labels
from fcfunc.losses._labels import (
    across, as_index, at_label, combined, counted_rows, is_label, mul_zero_inf, nan_if_impossible, neg_log_prob,
    per_class, per_row, zero_uncounted,
)  # fmt: skip
from fcfunc.ops._affine import affine, check_affine, dot, operand_dtype, place_affine

DENSE_MAX_LOGITS = 2**24
"""Up to this many logits, the dense loss is faster (measured by benchmarks/large_output.py)."""

CHUNK_LOGITS = 2**21
"""Approximate number of logits in memory at a time if no chunk size is given."""


def linear_softmax_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array | None = None,
    labels: Any = None,
    *,
    chunk_size: int | None = None,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    compute_dtype=None,
) -> jax.Array:
    r"""Affine layer and softmax cross-entropy as one rule: :math:`\ell = \log \sum_k e^{z_k} - z_y`, `z = x w + b`.

    For every chunk size, the result equals `softmax_cross_entropy_with_integer_labels(affine(x, w, b), labels)` up to
    rounding. The logits are accumulated and used in at least float32.

    Args:
      x: outputs of the last hidden layer, `[..., fan_in]`.
      w: weights, `[fan_in, classes]`.
      b: biases, `[classes]`, or None.
      labels: integers in `[0, classes)`, `[...]`.
      chunk_size: number of classes to hold at a time, at least 1; the last chunk may be shorter. None: chosen from the
        number of rows; the dense loss is used instead if there are few logits, or if the classes are sharded on an
        Explicit mesh, where each device holds the logits of its own classes.
      where, weights, class_weights, label_smoothing, ignore_index: see `softmax_cross_entropy_with_integer_labels`;
        `where` can mask only rows here.
      compute_dtype: dtype of the operands of the matmuls, see `affine`.

    Returns:
      `[...]`, in nats. Saved for the backward pass: the arguments and two numbers per row.

    Raises:
      TypeError: see `affine` and `softmax_cross_entropy_with_integer_labels`.
      ValueError: see these; also, `chunk_size` is below 1, or is given although the classes are sharded on an Explicit
        mesh.

    Source: derived in docs/background/derivations.md#linear-layer-with-softmax-and-cross-entropy.

    Example:
      >>> x, w, b = jnp.array([[1., 2.]]), jnp.zeros((2, 5)), jnp.zeros(5)
      >>> linear_softmax_cross_entropy(x, w, b, jnp.array([4]), chunk_size=2)
      Array([1.609438], dtype=float32)
    """
    name = "linear_softmax_cross_entropy"
    _arguments.ignored_label(name, ignore_index)
    check_affine(name, x, w, b, compute_dtype, None, columns="classes")
    x, w, b = place_affine(x, w, b)
    rows, classes = x.shape[:-1], w.shape[1]
    _arguments.labels(name, labels, scores=jax.ShapeDtypeStruct((*rows, classes), x.dtype))
    smoothing = _arguments.loss_options(name, rows, where, weights, label_smoothing)
    _arguments.class_weights(name, class_weights, classes)
    labels, where, weights = (per_row(a, x) for a in (labels, where, weights))
    class_weights = per_class(class_weights, w)
    counted = counted_rows(labels, where, ignore_index)
    x = zero_uncounted(x, counted)
    sharding = _layout.explicit_sharding(w)
    classes_sharded = sharding is not None and any(axis is not None for axis in sharding.spec[1:])
    if chunk_size is not None and classes_sharded:
        raise ValueError(
            f"{name}: sharded classes cannot be processed in chunks; leave chunk_size at None, "
            "and each device holds the logits of its own classes"
        )
    if chunk_size is None:
        chunk_size = max(CHUNK_LOGITS // max(math.prod(rows), 1), 256)
        if math.prod(rows) * classes <= DENSE_MAX_LOGITS or classes_sharded:
            out_dtype = sum_dtype(operand_dtype(x, compute_dtype))
            logits = affine(x, w, b, compute_dtype=compute_dtype, out_dtype=out_dtype)
            options: Any = {"class_weights": class_weights, "label_smoothing": smoothing, "ignore_index": ignore_index}
            return softmax_cross_entropy_with_integer_labels(logits, labels, where=where, weights=weights, **options)
    _arguments.positive(name, chunk_size=chunk_size)
    labels = zero_uncounted(as_index(labels), counted)
    spread = None
    if smoothing:
        spread = jnp.full((classes,), smoothing / max(classes, 1), sum_dtype(x.dtype))
        spread = per_class(spread if class_weights is None else spread * upcast(class_weights), w)
    options = {"chunk_size": int(chunk_size), "compute_dtype": compute_dtype}
    loss, spread_loss = _linear_softmax_cross_entropy(x, w, b, labels, counted, spread, **options)
    return combined(loss, spread_loss, smoothing, labels, class_weights, weights, counted)


def linear_softmax_cross_entropy_fwd(x, w, b, labels, counted=None, spread=None, *, chunk_size, compute_dtype=None):
    """`((loss, spread_loss), residuals)`: `-log p_y` of each row, and `Σ s (-log p)` for `spread` `s`, `[classes]`."""
    sums, row_axes = sum_dtype(operand_dtype(x, compute_dtype)), tuple(range(x.ndim - 1))

    def step(carry, start, size):
        row_max, total, at_y, s_below, s_total = carry
        z, _ = _chunk(x, w, b, start, size, compute_dtype)
        # The new and the previous maximum. If one is -inf it is replaced, because -inf − (-inf) is NaN.
        new_max = jnp.maximum(row_max, jax.lax.stop_gradient(jnp.max(z, axis=-1)))
        new = jnp.where(new_max == -jnp.inf, 0, new_max)
        old = jnp.where(row_max == -jnp.inf, new, row_max)
        shifted = z - jnp.expand_dims(new, -1)
        total = total * jnp.exp(old - new) + jnp.sum(jnp.exp(shifted), axis=-1)
        at_y = at_y + at_label(z, labels, start)
        if spread is not None:  # Σ s (max − z), which changes with the maximum
            s = jnp.broadcast_to(_slice(spread, start, size).astype(z.dtype), z.shape)
            s_below = s_below + s_total * (new - old) + jnp.sum(mul_zero_inf(s, -shifted), axis=-1)
            s_total = s_total + jnp.sum(s, axis=-1)
        return new_max, total, at_y, s_below, s_total

    zeros = _layout.reshard_like_axes(jnp.zeros(labels.shape, sums), x, row_axes)
    carry, _ = _layout.match_varying(((zeros - jnp.inf, zeros, zeros, zeros, zeros), x))
    row_max, total, at_y, s_below, s_total = _over_chunks(step, carry, w.shape[1], chunk_size)
    log_sum = jnp.log(total)
    # −log p_y = log Σ − (z_y − max), Σ s (−log p) = Σ s log Σ + Σ s (max − z)
    loss = zero_uncounted(nan_if_impossible(log_sum - (at_y - row_max), labels, w.shape[1]), counted)
    spread_loss = None if spread is None else zero_uncounted(s_total * log_sum + s_below, counted)
    return (loss, spread_loss), (x, w, b, labels, counted, spread, row_max, log_sum)


def linear_softmax_cross_entropy_bwd(residuals, g, *, chunk_size, compute_dtype=None):
    """Cotangents `(dx, dw, db, None, None, dspread)` of `linear_softmax_cross_entropy`; `g` is a pair."""
    x, w, b, labels, counted, spread, row_max, log_sum = residuals
    g_y, g_s = g
    operands, row_axes = operand_dtype(x, compute_dtype), tuple(range(x.ndim - 1))
    sums, x_in = sum_dtype(operands), x.astype(operands)
    contract_columns, contract_rows = (((x.ndim - 1,), (1,)), ((), ())), ((row_axes, row_axes), ((), ()))
    g_sum = g_y if spread is None else g_y + g_s * jnp.sum(spread.astype(sums))

    def step(grads, start, size):
        dx, dw, db, ds = grads
        z, w_in = _chunk(x, w, b, start, size, compute_dtype)
        neg_log_p = neg_log_prob(z, row_max, log_sum)
        # dz = (g_y + g_s Σ s) p − g_y onehot(y) − g_s s, p = exp(z − max z − log Σ exp(z − max z))
        p, onehot = jnp.exp(-neg_log_p), is_label(z, labels, start)
        if spread is None:
            dz = across(g_y, z) * jnp.where(onehot, p - 1, p)
        else:
            s = jnp.broadcast_to(_slice(spread, start, size).astype(z.dtype), z.shape)
            dz = across(g_sum, z) * p - jnp.where(onehot, across(g_y, z), 0) - across(g_s, z) * s
            # ds = Σ g_s (−log p), over the rows
            of_row = zero_uncounted(mul_zero_inf(across(g_s, z), neg_log_p), counted)
            ds = _put(ds, jnp.sum(of_row, axis=row_axes), start)
        dz = zero_uncounted(nan_if_impossible(dz, labels, w.shape[1]), counted)
        # dx = dz wᵀ, summed over the chunks; dw = xᵀ dz and db = 1ᵀ dz, for the classes of this chunk
        dz_in, sharding = dz.astype(operands), _layout.explicit_sharding
        dx = dx + dot(dz_in, w_in, contract_columns, sums, out_sharding=sharding(x, w))
        dw = _put(dw, dot(x_in, dz_in, contract_rows, sums, out_sharding=sharding(w_in, x)), start)
        db = None if b is None else _put(db, jnp.sum(dz, axis=row_axes), start)
        return dx, dw, db, ds

    of_w, of_b, of_s = (
        None if a is None else _layout.reshard_like(jnp.zeros(a.shape, a.dtype), a) for a in (w, b, spread)
    )
    grads = (_layout.reshard_like(jnp.zeros(x.shape, sums), x), of_w, of_b, of_s)
    grads, _ = _layout.match_varying((grads, x))
    dx, dw, db, ds = _over_chunks(step, grads, w.shape[1], chunk_size)
    return dx.astype(x.dtype), dw, db, None, None, ds


_linear_softmax_cross_entropy = rule(linear_softmax_cross_entropy_fwd, linear_softmax_cross_entropy_bwd)


def _over_chunks(step, carry, classes, size):
    """Runs `step(carry, start, size)` for each chunk: full ones in a loop, then a shorter one. Nothing is padded."""
    full, rest = divmod(classes, size)
    if full == 1:
        carry = step(carry, 0, size)
    elif full:
        starts = size * jnp.arange(full)
        carry = jax.lax.scan(lambda carry, start: (step(carry, start, size), None), carry, starts)[0]
    return step(carry, full * size, rest) if rest else carry


def _chunk(x, w, b, start, size, compute_dtype):
    """The logits of one chunk of classes, and the weights of these classes in the operands' dtype."""
    operands = operand_dtype(x, compute_dtype)
    w_in = _slice(w, start, size).astype(operands)
    contract, sharding = (((x.ndim - 1,), (0,)), ((), ())), _layout.dot_sharding(x, w, x.ndim - 1)
    z = dot(x.astype(operands), w_in, contract, sum_dtype(operands), out_sharding=sharding)
    return z if b is None else z + jnp.broadcast_to(_slice(b, start, size).astype(z.dtype), z.shape), w_in


def _slice(a, start, size):
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=-1)


def _put(whole, part, start):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=-1)
