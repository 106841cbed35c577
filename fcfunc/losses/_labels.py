"""Helpers for scores and labels: one-hot labels, masked rows, and logarithms that do not overflow."""

from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import rule, upcast


def classes_last(name: str, axis, /, **arrays) -> Any:
    """Moves the class axis to the end, in the first array and in the others of the same rank."""
    (scores, first), *_ = arrays.items()
    _arguments.array(name, **{other: a for other, a in arrays.items() if a is not None or other == scores})
    ndim = jnp.ndim(first)
    if isinstance(axis, int) and axis in (-1, ndim - 1):
        return tuple(arrays.values())
    axes = _arguments.axes(name, axis, **{scores: first})
    rows = [i for i in range(ndim) if i not in axes]

    def moved(a):
        if a is None or jnp.ndim(a) != ndim:
            return a
        a = jnp.transpose(as_array(a), (*rows, *axes))
        return a if len(axes) == 1 else a.reshape(*a.shape[: len(rows)], -1)

    return tuple(map(moved, arrays.values()))


def per_row(a, scores) -> Any:
    """`a`, one number per row of the scores, sharded like the rows; None stays None."""
    return None if a is None else _layout.reshard_like_axes(as_array(a), scores, tuple(range(scores.ndim - 1)))


def per_class(a, scores) -> Any:
    """`a`, one number per class, sharded like the classes; None stays None."""
    return None if a is None else _layout.reshard_like_axes(as_array(a), scores, (-1,))


def as_index(labels):
    """Labels in a signed dtype of at least 32 bits: `arange(200)` in int8 would wrap and match a wrong class."""
    if labels.dtype == jnp.uint32:
        labels = jnp.minimum(labels, jnp.iinfo(jnp.int32).max)
    return labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)


def is_label(scores, labels, start=0):
    """One-hot labels: whether each score is that of its row's label. `start` is the class of the first score.

    The comparison with an iota also works on scores that are sharded by class, where a gather would not.
    """
    labels, sharding = as_index(labels), _layout.explicit_sharding(scores)
    classes = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1, out_sharding=sharding)
    label_of_row = jax.lax.broadcast_in_dim(labels, scores.shape, range(labels.ndim), out_sharding=sharding)
    return label_of_row == classes + jnp.asarray(start, labels.dtype)


def at_label(values, labels, start=0):
    """The value at each row's label, from values per score or per class; 0 if the label is not among them.

    The value is gathered, except on an Explicit mesh, where JAX has no such gather. There, the other values are masked
    and each row is summed, which takes XLA's CPU backend two passes over memory.
    """
    index, size = as_index(labels), values.shape[-1]
    index = index - jnp.asarray(start, index.dtype)
    if not size or _layout.explicit_sharding(values) is not None or _layout.explicit_sharding(labels) is not None:
        values = jnp.broadcast_to(upcast(values), (*labels.shape, size))
        return jnp.sum(jnp.where(is_label(values, labels, start), values, 0), axis=-1)
    inside, index = (index >= 0) & (index < size), jnp.clip(index, 0, size - 1)
    if values.ndim == 1:
        value = values.at[index].get(mode="promise_in_bounds")
    else:
        value = jnp.take_along_axis(values, jnp.expand_dims(index, -1), axis=-1, mode="promise_in_bounds")[..., 0]
    return jnp.where(inside, upcast(value), 0)


def nan_if_impossible(value, labels, classes):
    """`value`, with one number per row or per score, set to NaN in rows whose label is not a class."""
    labels = as_index(labels)
    possible = (labels >= 0) & (labels < classes)
    return jnp.where(possible if value.ndim == labels.ndim else across(possible, value), value, jnp.nan)


def counted_rows(labels, where, ignore_index):
    """The mask of rows that count, or None if all of them do."""
    if ignore_index is None:
        return where
    counted = as_index(labels) != ignore_index
    return counted if where is None else counted & where


def zero_uncounted(a, counted) -> Any:
    """`a`, with one number per row or per score, set to 0 in rows that do not count.

    This is applied before a rule as well as after it. The zero cotangent that masked rows receive is not enough where
    it is multiplied by a NaN, as in second derivatives and in `dw = xᵀ dz`.
    """
    if a is None or counted is None:
        return a
    return jnp.where(counted if counted.ndim == a.ndim else jnp.expand_dims(counted, -1), a, 0)


def combined(loss, rest, smoothing, labels, class_weights, weights, counted):
    """`r ((1 − ε) u_y ℓ + rest)` in the rows that count; `rest` is the part from label smoothing, or None."""
    if class_weights is not None:
        loss = weigh(label_weight(class_weights, labels), loss)
    return weighted_rows(loss if rest is None else mul_zero_inf(1 - smoothing, loss) + rest, weights, counted)


def weighted_rows(losses, weights, counted):
    """`r ℓ` in the rows that count, 0 in the others."""
    weights = zero_uncounted(weights, counted)
    return zero_uncounted(losses if weights is None else weigh(weights, losses), counted)


def _weigh_fwd(weights, losses):
    # r ℓ, with 0 · inf = 0
    return mul_zero_inf(weights.astype(losses.dtype), losses), (weights, losses)


def _weigh_bwd(residuals, g):
    weights, losses = residuals
    # dr = g ℓ, dℓ = g r
    return mul_zero_inf(g, losses).astype(weights.dtype), g * weights.astype(g.dtype)


weigh = rule(_weigh_fwd, _weigh_bwd)


def _label_weight_fwd(class_weights, labels):
    # u_y
    return nan_if_impossible(at_label(class_weights, labels), labels, class_weights.size), (class_weights, labels)


def _label_weight_bwd(residuals, g):
    class_weights, labels = residuals
    # du_k = Σ g [y = k] over the rows, and NaN for an impossible label
    of_row = jnp.broadcast_to(class_weights, (*labels.shape, class_weights.size))
    du = nan_if_impossible(jnp.where(is_label(of_row, labels), across(g, of_row), 0), labels, class_weights.size)
    return jnp.sum(du, axis=tuple(range(labels.ndim))).astype(class_weights.dtype), None


label_weight = rule(_label_weight_fwd, _label_weight_bwd)


def across(row, like):
    """Repeats one number per row for each of the row's scores."""
    return jnp.broadcast_to(jnp.expand_dims(row, -1), like.shape)


def mul_zero_inf(weight, neg_log_p):
    """`weight * neg_log_p`, with 0 · inf = 0: an impossible class with weight 0 costs nothing. NaN stays NaN."""
    return weight * jnp.where((weight == 0) & (neg_log_p == jnp.inf), 0, neg_log_p)


def log_sum_exp(logits):
    """`z - max(z)`, `max(z)` and `log Σ exp(z - max(z))`; the shift cancels, so its derivative is stopped."""
    logits = upcast(logits)
    row_max = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    shifted = logits - jnp.expand_dims(row_max, -1)
    return shifted, row_max, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def neg_log_prob(logits, row_max, log_sum):
    """`-log p = log Σ exp(z - max z) - (z - max z)` of each score."""
    return jnp.expand_dims(log_sum, -1) - (upcast(logits) - jnp.expand_dims(row_max, -1))
