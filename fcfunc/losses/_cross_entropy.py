"""Cross-entropies, with hand-written backward rules; `fcfunc.losses` has them as well.

The softmax cross-entropies and the binary one take optax's arguments in optax's order, and share further options.
`where` masks rows, or single logits: a masked row has zero loss and zero gradient, even if it contains NaN. `weights`
multiply the losses of rows, `class_weights` those of classes, and `label_smoothing` spreads a part of each label evenly
over the classes. `losses.mean` takes the mean over the rows that are not masked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import accumulator, rule, wide
from fcfunc.losses._labels import (
    classes_last,
    counts,
    each_score,
    hit,
    label_targets,
    log_sum_exp,
    masked,
    minus_targets,
    pick,
    settle,
    surprise,
    times_class,
    weighted,
)


def softmax_cross_entropy_with_integer_labels(
    logits: jax.Array,
    labels: jax.Array,
    axis: int | tuple[int, ...] = -1,
    where: jax.Array | None = None,
    *,
    weights: jax.Array | None = None,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> jax.Array:
    r"""Softmax followed by cross-entropy: :math:`\ell = \log \sum_k e^{z_k} - z_y`, from `z - max(z)`.

    In full, :math:`\ell = r \sum_k u_k t_k (-\log p_k)` with :math:`t_k = (1 - ε) [k = y] + ε / C`. A shift of all
    logits, by 1e8 even, changes nothing but their own rounding.

    Differences from `optax.softmax_cross_entropy_with_integer_labels`: a label outside `[0, classes)`, -1 included, or
    of a masked class gives NaN; the loss is at least float32.

    Args:
      logits: `[..., classes]`, or with the classes along `axis`.
      labels: integers in `[0, classes)`, in the shape of `logits` without `axis`.
      axis: the axis of the classes. For a tuple of axes a label is the flat index into them, in the order given.
      where: booleans. In the shape of `labels`, a mask of rows: masked rows have zero loss and zero gradient, even if
        they contain NaN. In the shape of `logits`, a mask of single logits: the softmax runs over the others.
      weights: `r`, one per row, in the shape of `labels`. Differentiated as well.
      class_weights: `u`, one per class, `[classes]`. Differentiated as well.
      label_smoothing: `ε`, in [0, 1]: how much of each label is spread evenly over the classes that are not masked.
      ignore_index: the label of rows to mask; None (the default) if every label is a class.

    Returns:
      One loss per row, in nats. Saved for the backward pass: the arguments, which the caller holds anyway, and four
      numbers per row, of which two are the maximum and the logarithm of the shifted sum. Their sum, the log-sum-exp,
      would be rounded to the size of the logits; apart they keep the probabilities exact.

    Raises:
      TypeError: float labels, or logits or weights that are not floating-point; `where` that is not boolean.
      ValueError: `labels` or `weights` does not have the shape of `logits` without `axis`; `where` has neither that
        shape nor that of `logits`; `class_weights` is not `[classes]`; `label_smoothing` is outside [0, 1].

    Source: derived in docs/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy_with_integer_labels(jnp.array([[0., 0.], [0., 0.]]), jnp.array([1, 2]))
      Array([0.6931472,       nan], dtype=float32)
    """
    name = "softmax_cross_entropy_with_integer_labels"
    label_smoothing = _arguments.number(name, label_smoothing=label_smoothing)
    _arguments.ignored_label(name, ignore_index)
    logits, where = classes_last(name, axis, logits=logits, where=where)
    _check_labelled(name, logits, labels, where, weights, class_weights, label_smoothing)
    logits, (labels, weights), class_weights = _laid(logits, (labels, weights), class_weights)
    options = {"label_smoothing": label_smoothing}
    if where is not None and jnp.ndim(where) == logits.ndim:
        return _of_unmasked_classes(logits, labels, where, weights, class_weights, ignore_index, **options)
    _, (where,), _ = _laid(logits, (where,), None)
    logits = masked(logits, labels, ignore_index=ignore_index, where=where)
    return _softmax_cross_entropy_with_integer_labels(
        logits, labels, where, weights, class_weights, ignore_index=ignore_index, **options
    )


def softmax_cross_entropy_with_integer_labels_fwd(
    logits, labels, where=None, weights=None, class_weights=None, *, label_smoothing=0.0, ignore_index=None
):
    """`(loss, residuals)` of `softmax_cross_entropy_with_integer_labels`."""
    name = "softmax_cross_entropy_with_integer_labels"
    _check_labelled(name, logits, labels, where, weights, class_weights, label_smoothing)
    classes = logits.shape[-1]
    shifted, row_max, log_sum = log_sum_exp(logits)
    own_weight = jnp.ones_like(log_sum) if class_weights is None else pick(class_weights, labels)
    # ℓ = r ((1 − ε) u_y (−log p_y) + ε/C Σ u (−log p))
    surprise_of_row = weighted(own_weight, log_sum - pick(shifted, labels))
    if label_smoothing:
        of_all = weighted(times_class(jnp.ones_like(shifted), class_weights), jnp.expand_dims(log_sum, -1) - shifted)
        spread = label_smoothing / max(classes, 1)
        surprise_of_row = (1 - label_smoothing) * surprise_of_row + spread * jnp.sum(of_all, axis=-1)
    # Settled before the weights as well as after: neither a NaN of the row nor one of its weight leaves a masked row.
    settled = functools.partial(settle, labels=labels, classes=classes, ignore_index=ignore_index, where=where)
    surprise_of_row = settled(surprise_of_row)
    loss = settled(_scaled(surprise_of_row, weights))
    return loss, (logits, labels, where, weights, class_weights, row_max, log_sum, own_weight, surprise_of_row)


def softmax_cross_entropy_with_integer_labels_bwd(residuals, g, *, label_smoothing=0.0, ignore_index=None):
    """Cotangents `(dlogits, None, None, dweights, dclass_weights)`; labels and booleans have no gradient."""
    logits, labels, where, weights, class_weights, row_max, log_sum, own_weight, surprise_of_row = residuals
    hits, classes = hit(logits, labels), logits.shape[-1]
    settled = functools.partial(settle, labels=labels, classes=classes, ignore_index=ignore_index, where=where)
    gr = _scaled(g, weights)
    # dz = g r (p Σ u t − u t), p = exp(z − max z − log Σ exp(z − max z)); plainly it is g (p − onehot(y))
    surprises = surprise(logits, row_max, log_sum)
    p = jnp.exp(-surprises)
    dlogits = each_score(gr, p) * minus_targets(p, hits, own_weight, class_weights, label_smoothing, classes)
    # dr = g Σ u t (−log p), du = Σ g r t (−log p) over the rows
    dweights = dclass_weights = None
    if weights is not None:
        dweights = settled(g * surprise_of_row).astype(weights.dtype)
    if class_weights is not None:
        by_class = weighted(label_targets(hits, label_smoothing, classes, p.dtype), surprises)
        dclass_weights = _over_rows(settled(each_score(gr, p) * by_class)).astype(class_weights.dtype)
    return settled(dlogits).astype(logits.dtype), None, None, dweights, dclass_weights


_softmax_cross_entropy_with_integer_labels = rule(
    softmax_cross_entropy_with_integer_labels_fwd, softmax_cross_entropy_with_integer_labels_bwd
)


def softmax_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    axis: int | tuple[int, ...] | None = -1,
    where: jax.Array | None = None,
    *,
    weights: jax.Array | None = None,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    r"""Softmax followed by cross-entropy with a distribution: :math:`\ell = -\sum_k t_k \log p_k`, `p = softmax(z)`.

    In full, :math:`\ell = r \sum_k u_k t'_k (-\log p_k)` with :math:`t' = (1 - ε) t + ε / C`.

    Differences from `optax.softmax_cross_entropy`: a label of 0 contributes 0, even if its logit is -inf, as in
    `optax.safe_softmax_cross_entropy`; `logits` and `labels` must have one shape; the loss is at least float32.

    Args:
      logits: `[..., classes]`, or with the classes along `axis`.
      labels: `t`, weights of the classes, usually a distribution, in the shape of `logits`. Differentiated as well,
        unless they are integers or booleans, such as one-hot labels.
      axis: the axis of the classes, or several; None for all.
      where: booleans. In the shape of the loss, a mask of rows: masked rows have zero loss and zero gradient, even if
        they contain NaN. In the shape of `logits`, a mask of single logits: softmax and sum run over the others.
      weights: `r`, one per row, in the shape of the loss. Differentiated as well.
      class_weights: `u`, one per class, `[classes]`. Differentiated as well.
      label_smoothing: `ε`, in [0, 1]: how much of each label is spread evenly over the classes that are not masked.

    Returns:
      One loss per row, in nats. Saved for the backward pass: the arguments and two numbers per row.

    Raises:
      TypeError: `logits` or weights are not floating-point, or `labels` not numbers; `where` that is not boolean.
      ValueError: `logits` and `labels` differ in shape; `weights` does not have that shape without `axis`; `where` has
        neither shape; `class_weights` is not `[classes]`; `label_smoothing` is outside [0, 1].

    Source: derived in docs/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy(jnp.array([[0., 0.]]), jnp.array([[0.5, 0.5]]))
      Array([0.6931472], dtype=float32)
    """
    name = "softmax_cross_entropy"
    label_smoothing = _arguments.number(name, label_smoothing=label_smoothing)
    _arguments.floating(name, logits=logits)
    labels = _arguments.real_labels(name, labels, dtype=accumulator(jnp.result_type(logits)))
    _arguments.one_shape(name, logits=logits, labels=labels)
    logits, labels, where = classes_last(name, axis, logits=logits, labels=labels, where=where)
    _check_distribution(logits, labels, where, weights, class_weights, label_smoothing)
    logits, (weights,), class_weights = _laid(logits, (weights,), class_weights)
    labels = _layout.laid_like(labels, logits)
    if where is not None and jnp.ndim(where) == logits.ndim:
        logits, labels, where = _unmasked_classes(logits, labels, where, label_smoothing)
        label_smoothing = 0.0
    _, (where,), _ = _laid(logits, (where,), None)
    logits, labels = masked(logits, where=where), masked(labels, where=where)
    return _softmax_cross_entropy(logits, labels, where, weights, class_weights, label_smoothing=label_smoothing)


def softmax_cross_entropy_fwd(logits, labels, where=None, weights=None, class_weights=None, *, label_smoothing=0.0):
    """`(loss, residuals)` of `softmax_cross_entropy`."""
    _check_distribution(logits, labels, where, weights, class_weights, label_smoothing)
    shifted, row_max, log_sum = log_sum_exp(logits)
    smoothed = times_class(_smoothed(wide(labels), label_smoothing, logits.shape[-1]), class_weights)
    loss = _scaled(jnp.sum(weighted(smoothed, jnp.expand_dims(log_sum, -1) - shifted), axis=-1), weights)
    return masked(loss, where=where), (logits, labels, where, weights, class_weights, row_max, log_sum)


def softmax_cross_entropy_bwd(residuals, g, *, label_smoothing=0.0):
    """Cotangents `(dlogits, dlabels, None, dweights, dclass_weights)` of `softmax_cross_entropy`."""
    logits, labels, where, weights, class_weights, row_max, log_sum = residuals
    wide_labels = wide(labels)
    unweighted = _smoothed(wide_labels, label_smoothing, logits.shape[-1])
    weighted_labels = times_class(unweighted, class_weights)
    surprises, gr = surprise(logits, row_max, log_sum), _scaled(g, weights)
    # dz = g r (p Σ u t − u t), p = exp(z − max z − log Σ exp(z − max z))
    total = jnp.sum(weighted_labels, axis=-1, keepdims=True)
    dlogits = each_score(gr, logits) * (jnp.exp(-surprises) * total - weighted_labels)
    # dt = g r (1 − ε) u (−log p)
    u = times_class(each_score(gr, surprises), class_weights)
    dlabels = (1 - label_smoothing) * weighted(u, surprises)
    # dr = g Σ u t (−log p), du = Σ g r t (−log p) over the rows
    dweights = dclass_weights = None
    if weights is not None:
        dweights = masked(g * jnp.sum(weighted(weighted_labels, surprises), axis=-1), where=where).astype(weights.dtype)
    if class_weights is not None:
        by_class = each_score(gr, logits) * weighted(unweighted, surprises)
        dclass_weights = _over_rows(masked(by_class, where=where)).astype(class_weights.dtype)
    dlogits, dlabels = masked(dlogits, where=where), masked(dlabels, where=where)
    return dlogits.astype(logits.dtype), dlabels.astype(labels.dtype), None, dweights, dclass_weights


_softmax_cross_entropy = rule(softmax_cross_entropy_fwd, softmax_cross_entropy_bwd)


def sigmoid_binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    positive_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    r"""Sigmoid followed by cross-entropy: :math:`\ell = -t \log σ(z) - (1 - t) \log σ(-z)`, element by element.

    In full, :math:`\ell = r (-q t' \log σ(z) - (1 - t') \log σ(-z))` with :math:`t' = (1 - ε) t + ε / 2`. Each
    logarithm is a softplus, so that nothing overflows; a term whose weight is 0 contributes 0.

    Differences from `optax.sigmoid_binary_cross_entropy`: `logits` and `labels` must have one shape; the loss is at
    least float32; it is finite at infinite logits where its limit is.

    Args:
      logits: any shape.
      labels: `t`, the probability of the class, usually in [0, 1], in the shape of `logits`. Differentiated as well,
        unless they are integers or booleans.
      where: booleans in the shape of `logits`. Masked elements have zero loss and zero gradient, even if they are NaN.
      weights: `r`, in the shape of `logits`. Differentiated as well.
      positive_weights: `q`, of the positive side of each class, `[classes]`, the last axis of `logits`: more than 1
        where positives are rare. Differentiated as well.
      label_smoothing: `ε`, in [0, 1]: how much of each label is spread evenly over both sides.

    Returns:
      The shape of `logits`, in nats: sum over the last axis where an example has several. Saved for the backward
      pass: the arguments.

    Raises:
      TypeError: `logits` or weights are not floating-point, or `labels` not numbers; `where` that is not boolean.
      ValueError: the shapes differ; `positive_weights` is not `[classes]`; `label_smoothing` is outside [0, 1].

    Source: derived in docs/derivations.md#sigmoid-with-cross-entropy.

    Example:
      >>> sigmoid_binary_cross_entropy(jnp.array([0., 1e30]), jnp.array([1., 1.]))
      Array([0.6931472, 0.       ], dtype=float32)
    """
    name = "sigmoid_binary_cross_entropy"
    label_smoothing = _arguments.number(name, label_smoothing=label_smoothing)
    _arguments.floating(name, logits=logits)
    labels = _arguments.real_labels(name, labels, dtype=accumulator(jnp.result_type(logits)))
    _check_binary(logits, labels, where, weights, positive_weights, label_smoothing)
    logits, _, positive_weights = _laid(logits, (), positive_weights)
    _, (labels, where, weights), _ = _laid(logits, (labels, where, weights), None, axes=logits.ndim)
    logits, labels = masked(logits, where=where), masked(labels, where=where)
    return _sigmoid_binary_cross_entropy(
        logits, labels, where, weights, positive_weights, label_smoothing=label_smoothing
    )


def sigmoid_binary_cross_entropy_fwd(
    logits, labels, where=None, weights=None, positive_weights=None, *, label_smoothing=0.0
):
    """`(loss, residuals)` of `sigmoid_binary_cross_entropy`."""
    _check_binary(logits, labels, where, weights, positive_weights, label_smoothing)
    loss = _binary(wide(logits), wide(labels), positive_weights, label_smoothing)
    return masked(_scaled(loss, weights), where=where), (logits, labels, where, weights, positive_weights)


def sigmoid_binary_cross_entropy_bwd(residuals, g, *, label_smoothing=0.0):
    """Cotangents `(dlogits, dlabels, None, dweights, dpositive_weights)` of `sigmoid_binary_cross_entropy`."""
    logits, labels, where, weights, positive_weights = residuals
    z, t = wide(logits), _smoothed(wide(labels), label_smoothing, 2)
    gr = _scaled(g, weights)
    # dz = g r ((1 − t) σ(z) − q t σ(−z)), which for q = 1 is g r (σ(z) − t), but loses no digits where σ(z) is near t
    dlogits = gr * ((1 - t) * jax.lax.logistic(z) - times_class(t * jax.lax.logistic(-z), positive_weights))
    # dt = g r (1 − ε) (q softplus(−z) − softplus(z)), for q = 1 it is −g r (1 − ε) z
    both = -z if positive_weights is None else times_class(jax.nn.softplus(-z), positive_weights) - jax.nn.softplus(z)
    dlabels = (1 - label_smoothing) * gr * both
    dweights = dpositive = None
    if weights is not None:
        loss = _binary(z, wide(labels), positive_weights, label_smoothing)
        dweights = masked(g * loss, where=where).astype(weights.dtype)
    if positive_weights is not None:
        dpositive = _over_rows(masked(gr * weighted(t, jax.nn.softplus(-z)), where=where)).astype(
            positive_weights.dtype
        )
    dlogits, dlabels = masked(dlogits, where=where), masked(dlabels, where=where)
    return dlogits.astype(logits.dtype), dlabels.astype(labels.dtype), None, dweights, dpositive


_sigmoid_binary_cross_entropy = rule(sigmoid_binary_cross_entropy_fwd, sigmoid_binary_cross_entropy_bwd)


def _check_labelled(name, logits, labels, where, weights, class_weights, label_smoothing):
    _arguments.floating(name, logits=logits)
    _arguments.labels(name, labels, scores=logits)
    _arguments.counting(name, jnp.shape(labels), where, weights, label_smoothing, logits=jnp.shape(logits))
    _arguments.class_weights(name, class_weights, jnp.shape(logits)[-1])


def _check_distribution(logits, labels, where, weights, class_weights, label_smoothing):
    name = "softmax_cross_entropy"
    _arguments.floating(name, logits=logits, labels=labels)
    _arguments.one_shape(name, logits=logits, labels=labels)
    _arguments.axis(name, -1, logits=logits)
    shape = jnp.shape(logits)
    _arguments.counting(name, shape[:-1], where, weights, label_smoothing, logits=shape)
    _arguments.class_weights(name, class_weights, shape[-1])


def _check_binary(logits, labels, where, weights, positive_weights, label_smoothing):
    name = "sigmoid_binary_cross_entropy"
    _arguments.floating(name, logits=logits, labels=labels)
    _arguments.one_shape(name, logits=logits, labels=labels)
    _arguments.counting(name, jnp.shape(logits), where, weights, label_smoothing)
    if positive_weights is not None:
        _arguments.axis(name, -1, logits=logits)
        _arguments.class_weights(name, positive_weights, jnp.shape(logits)[-1], name="positive_weights")


def _unmasked_classes(logits, labels, where, label_smoothing):
    """`(logits, labels, rows)` that give masked logits no part in the loss, and the rows that have any other.

    Smoothing is done here: it spreads over as many classes as the row has.
    """
    where = _layout.laid_like(as_array(where), logits)
    rows = jnp.any(where, axis=-1)
    classes = jnp.maximum(jnp.sum(where, axis=-1, dtype=jnp.float32), 1)
    smoothed = _smoothed(wide(labels), label_smoothing, each_score(classes, logits).astype(wide(labels).dtype))
    labels = jnp.where(where, smoothed if label_smoothing else labels, 0)
    # So far below the row's largest that its exponential is 0. With -inf a second derivative would meet 0 · inf.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf, where=where))
    far_below = each_score(jnp.where(rows, largest - (jnp.abs(largest) + 1e4), 0), logits)
    return jnp.where(where, logits, far_below), labels, rows


def _of_unmasked_classes(logits, labels, where, weights, class_weights, ignore_index, *, label_smoothing):
    """The loss of integer labels where single logits are masked: that of one-hot labels, NaN for impossible ones."""
    hits = hit(logits, labels)
    counted = counts(labels, ignore_index=ignore_index, where=jnp.any(where, axis=-1))
    possible = jnp.any(hits & where, axis=-1) | ~counted
    one_hot = jnp.where(each_score(possible, logits), hits.astype(wide(logits).dtype), jnp.nan)
    where = where & each_score(counted, logits)
    return softmax_cross_entropy(
        logits, one_hot, where=where, weights=weights, class_weights=class_weights, label_smoothing=label_smoothing
    )


def _laid(logits, of_rows, of_classes, axes=None) -> Any:
    """Arrays, those with a number per row (the first `axes`) laid as rows, those with one per class as classes."""
    logits = as_array(logits)
    rows = tuple(range(logits.ndim - 1 if axes is None else axes))
    of_rows = tuple(None if a is None else _layout.laid_along(as_array(a), logits, rows) for a in of_rows)
    return logits, of_rows, None if of_classes is None else _layout.laid_along(as_array(of_classes), logits, (-1,))


def _smoothed(labels, smoothing, classes):
    """`(1 − ε) t + ε / C`; `classes` may be an array, of rows with different numbers of classes."""
    if not smoothing:
        return labels
    return (1 - smoothing) * labels + smoothing / (classes if isinstance(classes, jax.Array) else max(classes, 1))


def _binary(z, labels, positive_weights, smoothing):
    t = _smoothed(labels, smoothing, 2)
    positive = weighted(times_class(t, positive_weights), jax.nn.softplus(-z))
    return positive + weighted(1 - t, jax.nn.softplus(z))


def _scaled(value, weights):
    return value if weights is None else weighted(weights.astype(value.dtype), value)


def _over_rows(value):
    return jnp.sum(value, axis=tuple(range(value.ndim - 1)))
