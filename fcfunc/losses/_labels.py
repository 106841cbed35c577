"""Rows of scores and their labels: which score is the label's, which rows count, and sums that do not overflow."""

from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import wide


def classes_last(name: str, axis, /, **arrays) -> Any:
    """The arrays with the classes as the last axis: the first, which has them, and the others of the same rank."""
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


def hit(scores, labels, start=0):
    """Where a score is its row's label, `start` being the class of the first score.

    An iota is compared, not gathered: it works on scores sharded by class.
    """
    labels, laid = _index(labels), _layout.explicit_sharding(scores)
    classes = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1, out_sharding=laid)
    each = jax.lax.broadcast_in_dim(labels, scores.shape, range(labels.ndim), out_sharding=laid)
    return each == classes + jnp.asarray(start, labels.dtype)


def settle(value, labels, classes, *, ignore_index=None, where=None):
    """`value`, a number per row or per score: NaN in rows of impossible labels, 0 in rows that do not count."""
    labels = _index(labels)
    possible = (labels >= 0) & (labels < classes)
    counted = counts(labels, ignore_index=ignore_index, where=where)
    if value.ndim > labels.ndim:
        possible, counted = each_score(possible, value), each_score(counted, value)
    return jnp.where(counted, jnp.where(possible, value, jnp.nan), 0)


def counts(labels, *, ignore_index=None, where=None):
    """The rows that count."""
    counted = jnp.ones(labels.shape, bool) if where is None else where
    return counted if ignore_index is None else counted & (_index(labels) != ignore_index)


def masked(x, labels=None, *, ignore_index=None, where=None):
    """`x`, numbers per row or per score, with 0 in the rows that do not count.

    Taken in a rule and also before it: the cotangent 0 that a rule gives those rows is not enough where it meets a NaN,
    in the second derivative and in `dw = xᵀ dz`.
    """
    counted: Any = where if labels is None else counts(labels, ignore_index=ignore_index, where=where)
    if where is None and ignore_index is None:
        return x
    return jnp.where(counted if counted.ndim == x.ndim else jnp.expand_dims(counted, -1), x, 0)


def each_score(row, like):
    """A number per row, for each of the row's scores."""
    return jnp.broadcast_to(jnp.expand_dims(row, -1), like.shape)


def pick(values, labels, start=0):
    """The label's own value of each row, from values per score or per class; 0 where the label is not among them.

    It is gathered, but on an Explicit mesh, where JAX has no such gather; there the others are masked and summed, which
    XLA's CPU backend would do in two passes over memory.
    """
    index, size = _index(labels), values.shape[-1]
    index = index - jnp.asarray(start, index.dtype)
    if not size or _layout.explicit_sharding(values) is not None or _layout.explicit_sharding(labels) is not None:
        values = jnp.broadcast_to(wide(values), (*labels.shape, size))
        return jnp.sum(jnp.where(hit(values, labels, start), values, 0), axis=-1)
    inside, index = (index >= 0) & (index < size), jnp.clip(index, 0, size - 1)
    if values.ndim == 1:
        own = values.at[index].get(mode="promise_in_bounds")
    else:
        own = jnp.take_along_axis(values, jnp.expand_dims(index, -1), axis=-1, mode="promise_in_bounds")[..., 0]
    return jnp.where(inside, wide(own), 0)


def times_class(value, class_weights):
    """Scores times the weights of their classes, where there are any."""
    return value if class_weights is None else value * jnp.broadcast_to(class_weights.astype(value.dtype), value.shape)


def label_targets(hits, smoothing, classes, dtype):
    """`t = (1 − ε) onehot(y) + ε/C`."""
    spread = smoothing / max(classes, 1)
    return jnp.where(hits, jnp.asarray(1 - smoothing + spread, dtype), jnp.asarray(spread, dtype))


def minus_targets(p, hits, own_weight, class_weights, smoothing, classes, part=None):
    """`p Σ u t − u t` for the targets of labels; of a part of the classes, where `part` is their weights."""
    if class_weights is None and not smoothing:
        return jnp.where(hits, p - 1, p)
    if not smoothing:  # as below, but a weight of a class that is not the row's plays no part, not even a NaN
        own: Any = class_weights if part is None else part
        return p * each_score(own_weight, p) - jnp.where(hits, jnp.broadcast_to(own.astype(p.dtype), p.shape), 0)
    spread = smoothing / max(classes, 1)
    all_weights = classes if class_weights is None else jnp.sum(class_weights.astype(p.dtype))
    total = each_score((1 - smoothing) * own_weight + spread * all_weights, p)
    return p * total - times_class(
        label_targets(hits, smoothing, classes, p.dtype), class_weights if part is None else part
    )


def weighted(weight, surprise):
    """`weight * surprise`, with 0 · inf = 0: what cannot happen and has no weight costs nothing. A NaN stays."""
    return weight * jnp.where((weight == 0) & (surprise == jnp.inf), 0, surprise)


def log_sum_exp(logits):
    """`z - max(z)`, `max(z)` and `log Σ exp(z - max(z))`; the shift cancels, so its derivative is stopped."""
    logits = wide(logits)
    row_max = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    shifted = logits - jnp.expand_dims(row_max, -1)
    return shifted, row_max, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def surprise(logits, row_max, log_sum):
    """`-log p = log Σ exp(z - max z) - (z - max z)`, of each score."""
    return jnp.expand_dims(log_sum, -1) - (wide(logits) - jnp.expand_dims(row_max, -1))


def _index(labels):
    """Labels in at least 32 bits with a sign: `arange(200)` in int8 would wrap and hit the wrong class."""
    if labels.dtype == jnp.uint32:
        labels = jnp.minimum(labels, jnp.iinfo(jnp.int32).max)
    return labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)
