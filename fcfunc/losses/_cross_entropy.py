"""Cross-entropy losses. Each rule covers the core formula; weights, masks and smoothing are plain JAX around it."""

# ruff: noqa: I001  (a filled list of names)
import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import rule, sum_dtype, upcast
from fcfunc.losses._labels import (
    across, as_index, at_label, classes_last, combined, counted_rows, is_label, log_sum_exp, mul_zero_inf,
    nan_if_impossible, neg_log_prob, per_class, per_row, weighted_rows, zero_uncounted,
)  # fmt: skip


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
    r"""Softmax cross-entropy with integer labels: :math:`\ell = \log \sum_k e^{z_k} - z_y`, from `z - max(z)`.

    With all options, :math:`\ell = r \sum_k u_k t_k (-\log p_k)` where :math:`t_k = (1 - ε) [k = y] + ε / C`. Adding
    a constant to all logits, even 1e8, affects the result only through the rounding of the logits.

    Differences from `optax.softmax_cross_entropy_with_integer_labels`: a label outside `[0, classes)`, including -1, or
    of a masked class gives NaN; the loss is returned in at least float32.

    Args:
      logits: `[..., classes]`, or with the classes along `axis`.
      labels: integers in `[0, classes)`, in the shape of `logits` without `axis`.
      axis: the axis of the classes. For a tuple of axes, a label is the flat index into them, in the order given.
      where: boolean mask, False for what to exclude. In the shape of `labels`, it masks rows: masked rows have zero
        loss and zero gradient, even if they contain NaN. In the shape of `logits`, it masks single logits: the softmax
        is taken over the others.
      weights: `r`, one per row, in the shape of `labels`. Differentiable.
      class_weights: `u`, one per class, `[classes]`. Differentiable.
      label_smoothing: `ε`, in [0, 1]: fraction of each label spread evenly over the classes that are not masked.
      ignore_index: the label of rows to mask; None (the default) means that every label is a class.

    Returns:
      One loss per row, in nats. Saved for the backward pass: the arguments, with masked logits instead of `logits`, and
      two numbers per row, the maximum and the logarithm of the shifted sum. They are saved separately because their
      sum, the log-sum-exp, would be rounded at the scale of the logits, and the probabilities would lose digits. With
      `label_smoothing`, also an array of the shape of `logits`, which the compiler does not have to keep.

    Raises:
      TypeError: `labels` are not integers; `logits` or weights are not floating-point; `where` is not boolean.
      ValueError: `labels` or `weights` does not have the shape of `logits` without `axis`; `where` has neither that
        shape nor that of `logits`; `class_weights` is not `[classes]`; `label_smoothing` is outside [0, 1].

    Source: derived in docs/background/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy_with_integer_labels(jnp.array([[0., 0.], [0., 0.]]), jnp.array([1, 2]))
      Array([0.6931472,       nan], dtype=float32)
    """
    name = "softmax_cross_entropy_with_integer_labels"
    _arguments.ignored_label(name, ignore_index)
    logits, where = classes_last(name, axis, logits=logits, where=where)
    _arguments.floating(name, logits=logits)
    _arguments.labels(name, labels, scores=logits)
    shape = np.shape(logits)
    smoothing = _arguments.loss_options(name, shape[:-1], where, weights, label_smoothing, logits=shape)
    _arguments.class_weights(name, class_weights, shape[-1])
    logits = as_array(logits)
    labels, weights, class_weights = per_row(labels, logits), per_row(weights, logits), per_class(class_weights, logits)
    logits, allowed, where = _without_masked_classes(logits, where)
    counted, labels = counted_rows(labels, where, ignore_index), as_index(labels)
    if allowed is not None:
        labels = jnp.where(at_label(allowed.astype(logits.dtype), labels) > 0, labels, -1)
    logits, labels = zero_uncounted(logits, counted), zero_uncounted(labels, counted)
    if smoothing:  # so that the gradients of two rules are added before they are rounded
        logits = upcast(logits)
    loss = _softmax_cross_entropy_with_integer_labels(logits, labels)
    rest = None
    if smoothing:
        spread = _smoothed(jnp.zeros_like(logits), smoothing, allowed)
        rest = _softmax_cross_entropy(logits, spread, class_weights)
    return combined(loss, rest, smoothing, labels, class_weights, weights, counted)


def softmax_cross_entropy_with_integer_labels_fwd(logits, labels):
    """`(loss, residuals)` of `softmax_cross_entropy_with_integer_labels` without options."""
    # ℓ = −log p_y = log Σ exp(z − max z) − (z_y − max z)
    shifted, row_max, log_sum = log_sum_exp(logits)
    loss = nan_if_impossible(log_sum - at_label(shifted, labels), labels, logits.shape[-1])
    return loss, (logits, labels, row_max, log_sum)


def softmax_cross_entropy_with_integer_labels_bwd(residuals, g):
    """Cotangents `(dlogits, None)` of `softmax_cross_entropy_with_integer_labels`: labels have no gradient."""
    logits, labels, row_max, log_sum = residuals
    # dz = g (p − onehot(y))
    p = jnp.exp(-neg_log_prob(logits, row_max, log_sum))
    dlogits = across(g, p) * jnp.where(is_label(p, labels), p - 1, p)
    return nan_if_impossible(dlogits, labels, p.shape[-1]).astype(logits.dtype), None


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
    r"""Softmax cross-entropy with label distributions: :math:`\ell = -\sum_k t_k \log p_k`, `p = softmax(z)`.

    With all options, :math:`\ell = r \sum_k u_k t'_k (-\log p_k)` where :math:`t' = (1 - ε) t + ε / C`.

    Differences from `optax.softmax_cross_entropy`: a label of 0 contributes 0, even if its logit is -inf, as in
    `optax.safe_softmax_cross_entropy`; `logits` and `labels` must have the same shape; the loss is returned in at
    least float32.

    Args:
      logits: `[..., classes]`, or with the classes along `axis`.
      labels: `t`, one weight per class, usually a distribution, in the shape of `logits`. Differentiable, unless they
        are integers or booleans, such as one-hot labels.
      axis: the axis of the classes, or a tuple of axes; None for all.
      where: boolean mask, False for what to exclude. In the shape of the loss, it masks rows: masked rows have zero
        loss and zero gradient, even if they contain NaN. In the shape of `logits`, it masks single logits: the softmax
        and the sum are taken over the others.
      weights: `r`, one per row, in the shape of the loss. Differentiable.
      class_weights: `u`, one per class, `[classes]`. Differentiable.
      label_smoothing: `ε`, in [0, 1]: fraction of each label spread evenly over the classes that are not masked.

    Returns:
      One loss per row, in nats. Saved for the backward pass: the arguments, with smoothed labels instead of `labels`,
      and two numbers per row.

    Raises:
      TypeError: `logits` or weights are not floating-point; `labels` are not numbers; `where` is not boolean.
      ValueError: `logits` and `labels` differ in shape; `weights` does not have that shape without `axis`; `where` has
        neither that shape nor that of `logits`; `class_weights` is not `[classes]`; `label_smoothing` is outside
        [0, 1].

    Source: derived in docs/background/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy(jnp.array([[0., 0.]]), jnp.array([[0.5, 0.5]]))
      Array([0.6931472], dtype=float32)
    """
    name = "softmax_cross_entropy"
    _arguments.floating(name, logits=logits)
    labels = _arguments.real_labels(name, labels, dtype=sum_dtype(jnp.result_type(logits)))
    _arguments.one_shape(name, logits=logits, labels=labels)
    logits, labels, where = classes_last(name, axis, logits=logits, labels=labels, where=where)
    shape = np.shape(logits)
    smoothing = _arguments.loss_options(name, shape[:-1], where, weights, label_smoothing, logits=shape)
    _arguments.class_weights(name, class_weights, shape[-1])
    logits = as_array(logits)
    labels = _layout.reshard_like(labels, logits)
    weights, class_weights = per_row(weights, logits), per_class(class_weights, logits)
    logits, allowed, where = _without_masked_classes(logits, where)
    if allowed is not None:
        labels = jnp.where(allowed, labels, 0)
    logits, labels = zero_uncounted(logits, where), zero_uncounted(labels, where)
    labels = _smoothed(upcast(labels), smoothing, allowed) if smoothing else labels
    return weighted_rows(_softmax_cross_entropy(logits, labels, class_weights), weights, where)


def softmax_cross_entropy_fwd(logits, labels, class_weights=None):
    """`(loss, residuals)` of `softmax_cross_entropy` with no options but `class_weights`."""
    # ℓ = Σ u t (−log p)
    shifted, row_max, log_sum = log_sum_exp(logits)
    targets = _scale_classes(upcast(labels), class_weights)
    loss = jnp.sum(mul_zero_inf(targets, jnp.expand_dims(log_sum, -1) - shifted), axis=-1)
    return loss, (logits, labels, class_weights, row_max, log_sum)


def softmax_cross_entropy_bwd(residuals, g):
    """Cotangents `(dlogits, dlabels, dclass_weights)` of `softmax_cross_entropy`."""
    logits, labels, class_weights, row_max, log_sum = residuals
    targets, neg_log_p = _scale_classes(upcast(labels), class_weights), neg_log_prob(logits, row_max, log_sum)
    g_ = across(g, neg_log_p)
    # dz = g (p Σ u t − u t)
    dlogits = g_ * (jnp.exp(-neg_log_p) * jnp.sum(targets, axis=-1, keepdims=True) - targets)
    # dt = g u (−log p)
    dlabels = mul_zero_inf(_scale_classes(g_, class_weights), neg_log_p)
    # du = Σ g t (−log p) over the rows
    du = None
    if class_weights is not None:
        du = _sum_rows(g_ * mul_zero_inf(upcast(labels), neg_log_p)).astype(class_weights.dtype)
    return dlogits.astype(logits.dtype), dlabels.astype(labels.dtype), du


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
    r"""Elementwise sigmoid cross-entropy: :math:`\ell = -t \log σ(z) - (1 - t) \log σ(-z)`.

    With all options, :math:`\ell = r (-q t' \log σ(z) - (1 - t') \log σ(-z))` where :math:`t' = (1 - ε) t + ε / 2`.
    Each logarithm is computed as a softplus, so nothing overflows. A term with weight 0 contributes 0.

    Differences from `optax.sigmoid_binary_cross_entropy`: `logits` and `labels` must have the same shape; the loss is
    returned in at least float32; at infinite logits it is finite wherever its limit is.

    Args:
      logits: array of any shape.
      labels: `t`, the probability of the class, usually in [0, 1], in the shape of `logits`. Differentiable, unless
        they are integers or booleans.
      where: booleans in the shape of `logits`. Elements where it is False have zero loss and zero gradient, even if
        they are NaN.
      weights: `r`, in the shape of `logits`. Differentiable.
      positive_weights: `q`, the weight of positive labels of each class, `[classes]`, for the last axis of `logits`.
        Use values above 1 for classes with few positives. Differentiable.
      label_smoothing: `ε`, in [0, 1]: fraction of each label spread evenly over the two outcomes.

    Returns:
      An array of the shape of `logits`, in nats. If an example has several losses, sum over the last axis.
      Saved for the backward pass: the arguments.

    Raises:
      TypeError: `logits` or weights are not floating-point; `labels` are not numbers; `where` is not boolean.
      ValueError: the shapes differ; `positive_weights` is not `[classes]`; `label_smoothing` is outside [0, 1].

    Source: derived in docs/background/derivations.md#sigmoid-with-cross-entropy.

    Example:
      >>> sigmoid_binary_cross_entropy(jnp.array([0., 1e30]), jnp.array([1., 1.]))
      Array([0.6931472, 0.       ], dtype=float32)
    """
    name = "sigmoid_binary_cross_entropy"
    _arguments.floating(name, logits=logits)
    labels = _arguments.real_labels(name, labels, dtype=sum_dtype(jnp.result_type(logits)))
    _arguments.one_shape(name, logits=logits, labels=labels)
    smoothing = _arguments.loss_options(name, np.shape(logits), where, weights, label_smoothing)
    if positive_weights is not None:
        _arguments.axis(name, -1, logits=logits)
        _arguments.class_weights(name, positive_weights, np.shape(logits)[-1], name="positive_weights")
    logits = as_array(logits)
    labels = _layout.reshard_like(labels, logits)
    where, weights = (None if a is None else _layout.reshard_like(as_array(a), logits) for a in (where, weights))
    logits, labels = zero_uncounted(logits, where), zero_uncounted(labels, where)
    if smoothing:
        labels = (1 - smoothing) * upcast(labels) + smoothing / 2
    loss = _sigmoid_binary_cross_entropy(logits, labels, per_class(positive_weights, logits))
    return weighted_rows(loss, weights, where)


def sigmoid_binary_cross_entropy_fwd(logits, labels, positive_weights=None):
    """`(loss, residuals)` of `sigmoid_binary_cross_entropy` with no options but `positive_weights`."""
    # ℓ = q t softplus(−z) + (1 − t) softplus(z)
    z, t = upcast(logits), upcast(labels)
    positive = mul_zero_inf(_scale_classes(t, positive_weights), jax.nn.softplus(-z))
    return positive + mul_zero_inf(1 - t, jax.nn.softplus(z)), (logits, labels, positive_weights)


def sigmoid_binary_cross_entropy_bwd(residuals, g):
    """Cotangents `(dlogits, dlabels, dpositive_weights)` of `sigmoid_binary_cross_entropy`."""
    logits, labels, positive_weights = residuals
    z, t = upcast(logits), upcast(labels)
    # dz = g ((1 − t) σ(z) − q t σ(−z)). For q = 1 it equals g (σ(z) − t), but keeps its digits where σ(z) is near t.
    dlogits = g * ((1 - t) * jax.lax.logistic(z) - _scale_classes(t * jax.lax.logistic(-z), positive_weights))
    if positive_weights is None:
        # dt = g (softplus(−z) − softplus(z)) = −g z
        return dlogits.astype(logits.dtype), (-g * z).astype(labels.dtype), None
    # dt = g (q softplus(−z) − softplus(z)), dq = Σ g t softplus(−z) over the rows
    of_positive = mul_zero_inf(_scale_classes(jnp.ones_like(z), positive_weights), jax.nn.softplus(-z))
    dlabels = g * (of_positive - jax.nn.softplus(z))
    dq = _sum_rows(g * mul_zero_inf(t, jax.nn.softplus(-z)))
    return dlogits.astype(logits.dtype), dlabels.astype(labels.dtype), dq.astype(positive_weights.dtype)


_sigmoid_binary_cross_entropy = rule(sigmoid_binary_cross_entropy_fwd, sigmoid_binary_cross_entropy_bwd)


def _without_masked_classes(logits, where):
    """`(logits, allowed, rows)`: logits made negligible where masked, the mask of logits or None, the mask of rows."""
    if where is None or jnp.ndim(where) < logits.ndim:
        return logits, None, per_row(where, logits)
    allowed = _layout.reshard_like(as_array(where), logits)
    rows = jnp.any(allowed, axis=-1)
    # Far enough below the row's largest that the exponential is 0. With -inf, second derivatives would meet 0 · inf.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf, where=allowed))
    far_below = jnp.where(rows, largest - (jnp.abs(largest) + 1e4), 0)
    return jnp.where(allowed, logits, _layout.reshard_like(across(far_below, logits), logits)), allowed, rows


def _smoothed(labels, smoothing, allowed):
    """`(1 − ε) t + ε / C`, where `C` is the number of classes that are not masked."""
    if allowed is None:
        return (1 - smoothing) * labels + smoothing / max(labels.shape[-1], 1)
    classes = jnp.maximum(jnp.sum(allowed, axis=-1, dtype=labels.dtype), 1)
    return jnp.where(allowed, (1 - smoothing) * labels + across(smoothing / classes, labels), 0)


def _scale_classes(values, class_weights):
    """Multiplies one value per score by the weight of its class."""
    return (
        values if class_weights is None else values * jnp.broadcast_to(class_weights.astype(values.dtype), values.shape)
    )


def _sum_rows(values):
    return jnp.sum(values, axis=tuple(range(values.ndim - 1)))
