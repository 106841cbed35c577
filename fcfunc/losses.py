"""Per-example losses and a penalty, with hand-written backward rules.

A loss is one number per example; the mean is taken where the loss is used: `jnp.mean(loss(...))`. Losses are
computed and returned in at least float32, whatever the dtype of the network's output; gradients come back in that
output's dtype. Names and order of arguments are optax's where optax has the loss. Nothing is broadcast: `[N]`
against `[N, 1]` raises. Labels are integers, targets are reals.

**Impossible labels.** A label outside `[0, classes)` makes the loss AND the gradient of its row NaN: never another
class, never a finite number. Only the label given as `ignore_index` stands for "no loss": its row has loss 0 and
gradient 0, whatever its scores are. The mean over the other rows is then `sum(loss) / sum(labels != ignore_index)`.
"""

import jax
import jax.numpy as jnp

from fcfunc import _check, _compat
from fcfunc._precision import wide
from fcfunc._rule import rule

__all__ = [
    "l2_penalty",
    "l2_penalty_bwd",
    "l2_penalty_fwd",
    "multiclass_svm",
    "multiclass_svm_bwd",
    "multiclass_svm_fwd",
    "negative_log_likelihood",
    "negative_log_likelihood_bwd",
    "negative_log_likelihood_fwd",
    "sigmoid_binary_cross_entropy",
    "sigmoid_binary_cross_entropy_bwd",
    "sigmoid_binary_cross_entropy_fwd",
    "softmax_cross_entropy",
    "softmax_cross_entropy_bwd",
    "softmax_cross_entropy_fwd",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_cross_entropy_with_integer_labels_bwd",
    "softmax_cross_entropy_with_integer_labels_fwd",
    "squared_error",
    "squared_error_bwd",
    "squared_error_fwd",
]


def softmax_cross_entropy_with_integer_labels(
    logits: jax.Array, labels: jax.Array, *, ignore_index: int | None = None
) -> jax.Array:
    r"""Softmax followed by cross-entropy: :math:`\ell = \log \sum_k e^{z_k} - z_y`, from `z - max(z)`.

    A shift of all logits, by 1e8 even, changes nothing but their own rounding.

    Args:
      logits: `[..., classes]`.
      labels: integers in `[0, classes)`, `[...]`.
      ignore_index: the label of rows that have no loss; None (the default) where every row has one.

    Returns:
      `[...]`, in nats. Saved for the backward pass: the logits and the labels, which the caller holds anyway, and two
      numbers per row, the maximum and the logarithm of the shifted sum. Their sum, the log-sum-exp, would be rounded
      to the size of the logits; apart they keep the probabilities exact.

    Raises:
      TypeError: float labels, or logits of another than a floating-point dtype.
      ValueError: `labels` does not have the shape of `logits` without its last axis.

    Source: derived in docs/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy_with_integer_labels(jnp.array([[0., 0.], [0., 0.]]), jnp.array([1, 2]))
      Array([0.6931472,       nan], dtype=float32)
    """
    return _softmax_cross_entropy_with_integer_labels(logits, labels, ignore_index=ignore_index)


def softmax_cross_entropy_with_integer_labels_fwd(logits, labels, *, ignore_index=None):
    """`(loss, residuals)` of `softmax_cross_entropy_with_integer_labels`."""
    _check.floating("softmax_cross_entropy_with_integer_labels", logits=logits)
    _check.labels("softmax_cross_entropy_with_integer_labels", labels, scores=logits)
    shifted, row_max, log_sum = _log_sum_exp(logits)
    picked = jnp.sum(jnp.where(_hit(logits, labels), shifted, 0), axis=-1)
    loss = _rows(labels, logits.shape[-1], ignore_index, log_sum - picked)
    return loss, (logits, labels, row_max, log_sum)


def softmax_cross_entropy_with_integer_labels_bwd(residuals, g, *, ignore_index=None):
    """Cotangents `(dlogits, None)` of `softmax_cross_entropy_with_integer_labels`: labels have no gradient."""
    logits, labels, row_max, log_sum = residuals
    # dz = g (p − onehot(y)), p = exp(z − max z − log Σ exp(z − max z))
    p = _probs(logits, row_max, log_sum)
    dlogits = _each_row(g, p) * jnp.where(_hit(logits, labels), p - 1, p)
    return _rows(labels, logits.shape[-1], ignore_index, dlogits).astype(logits.dtype), None


_softmax_cross_entropy_with_integer_labels = rule(
    softmax_cross_entropy_with_integer_labels_fwd, softmax_cross_entropy_with_integer_labels_bwd
)


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Softmax followed by cross-entropy with a distribution: :math:`\ell = -\sum_k t_k \log p_k`, `p = softmax(z)`.

    A target of 0 contributes 0, also where its logit is -inf.

    Args:
      logits: `[..., classes]`.
      targets: weights of the classes, as a rule a distribution, `[..., classes]`. Differentiated as well.

    Returns:
      `[...]`, in nats. Saved for the backward pass: the logits, the targets and two numbers per row.

    Raises:
      TypeError: an argument is not of a floating-point dtype.
      ValueError: the shapes differ.

    Source: derived in docs/derivations.md#softmax-with-cross-entropy.

    Example:
      >>> softmax_cross_entropy(jnp.array([[0., 0.]]), jnp.array([[0.5, 0.5]]))
      Array([0.6931472], dtype=float32)
    """
    return _softmax_cross_entropy(logits, targets)


def softmax_cross_entropy_fwd(logits, targets):
    """`(loss, residuals)` of `softmax_cross_entropy`."""
    _check.floating("softmax_cross_entropy", logits=logits, targets=targets)
    _check.one_shape("softmax_cross_entropy", logits=logits, targets=targets)
    _check.axis("softmax_cross_entropy", -1, logits=logits)
    shifted, row_max, log_sum = _log_sum_exp(logits)
    wide_targets = wide(targets)
    log_probs = shifted - jnp.expand_dims(log_sum, -1)
    loss = jnp.sum(_weighted(wide_targets, -log_probs), axis=-1)
    return loss, (logits, targets, row_max, log_sum)


def softmax_cross_entropy_bwd(residuals, g):
    """Cotangents `(dlogits, dtargets)` of `softmax_cross_entropy`."""
    logits, targets, row_max, log_sum = residuals
    wide_targets = wide(targets)
    # dz = g (p Σ t − t)
    p = _probs(logits, row_max, log_sum)
    total = jnp.sum(wide_targets, axis=-1, keepdims=True)
    dlogits = _each_row(g, p) * (p * total - wide_targets)
    # dt = −g log p
    log_probs = (wide(logits) - jnp.expand_dims(row_max, -1)) - jnp.expand_dims(log_sum, -1)
    dtargets = -_each_row(g, p) * log_probs
    return dlogits.astype(logits.dtype), dtargets.astype(targets.dtype)


_softmax_cross_entropy = rule(softmax_cross_entropy_fwd, softmax_cross_entropy_bwd)


def sigmoid_binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Sigmoid followed by cross-entropy: :math:`\ell = -t \log σ(z) - (1 - t) \log σ(-z)`, element by element.

    Each logarithm is a softplus, so that nothing overflows; a term whose weight is 0 contributes 0.

    Args:
      logits: any shape.
      targets: the probability of the class, as a rule in [0, 1], in the shape of `logits`. Differentiated as well.

    Returns:
      The shape of `logits`, in nats: sum over the last axis where an example has several. Saved for the backward
      pass: the arguments.

    Raises:
      TypeError: an argument is not of a floating-point dtype.
      ValueError: the shapes differ.

    Source: derived in docs/derivations.md#sigmoid-with-cross-entropy.

    Example:
      >>> sigmoid_binary_cross_entropy(jnp.array([0., 1e30]), jnp.array([1., 1.]))
      Array([0.6931472, 0.       ], dtype=float32)
    """
    return _sigmoid_binary_cross_entropy(logits, targets)


def sigmoid_binary_cross_entropy_fwd(logits, targets):
    """`(loss, residuals)` of `sigmoid_binary_cross_entropy`."""
    _check.floating("sigmoid_binary_cross_entropy", logits=logits, targets=targets)
    _check.one_shape("sigmoid_binary_cross_entropy", logits=logits, targets=targets)
    z, t = wide(logits), wide(targets)
    return _weighted(t, jax.nn.softplus(-z)) + _weighted(1 - t, jax.nn.softplus(z)), (logits, targets)


def sigmoid_binary_cross_entropy_bwd(residuals, g):
    """Cotangents `(dlogits, dtargets)` of `sigmoid_binary_cross_entropy`."""
    logits, targets = residuals
    z, t = wide(logits), wide(targets)
    # dz = g (σ(z) − t), as (1 − t) σ(z) − t σ(−z), which loses no digits where σ(z) is near t = 1
    dlogits = g * ((1 - t) * jax.lax.logistic(z) - t * jax.lax.logistic(-z))
    # dt = −g z
    dtargets = -g * z
    return dlogits.astype(logits.dtype), dtargets.astype(targets.dtype)


_sigmoid_binary_cross_entropy = rule(sigmoid_binary_cross_entropy_fwd, sigmoid_binary_cross_entropy_bwd)


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Squared error: :math:`\ell = (y - t)^2`, element by element, without a factor of one half.

    Args:
      predictions: any shape.
      targets: the shape of `predictions`. Differentiated as well.

    Returns:
      The shape of `predictions`, in the square of its unit. Saved for the backward pass: the arguments.

    Raises:
      TypeError: an argument is not of a floating-point dtype.
      ValueError: the shapes differ: `[N]` against `[N, 1]` is not broadcast to `[N, N]`.

    Source: derived in docs/derivations.md#squared-error.

    Example:
      >>> squared_error(jnp.array([1., 3.]), jnp.array([1., 1.]))
      Array([0., 4.], dtype=float32)
    """
    return _squared_error(predictions, targets)


def squared_error_fwd(predictions, targets):
    """`(loss, residuals)` of `squared_error`."""
    _check.floating("squared_error", predictions=predictions, targets=targets)
    _check.one_shape("squared_error", predictions=predictions, targets=targets)
    return (wide(predictions) - wide(targets)) ** 2, (predictions, targets)


def squared_error_bwd(residuals, g):
    """Cotangents `(dpredictions, dtargets)` of `squared_error`."""
    predictions, targets = residuals
    # dy = 2 g (y − t) = −dt
    dpredictions = 2 * g * (wide(predictions) - wide(targets))
    return dpredictions.astype(predictions.dtype), (-dpredictions).astype(targets.dtype)


_squared_error = rule(squared_error_fwd, squared_error_bwd)


def negative_log_likelihood(probs: jax.Array, labels: jax.Array, *, ignore_index: int | None = None) -> jax.Array:
    r"""Negative log-likelihood of a network that ends in softmax: :math:`\ell = -\log p_y`.

    Where the network can end in logits instead, `softmax_cross_entropy_with_integer_labels` is exact for
    probabilities that round to 0, which here give a loss of inf.

    Args:
      probs: probabilities, `[..., classes]`.
      labels: integers in `[0, classes)`, `[...]`.
      ignore_index: the label of rows that have no loss; None (the default) where every row has one.

    Returns:
      `[...]`, in nats. Saved for the backward pass: the arguments.

    Raises:
      TypeError: float labels, or probabilities of another than a floating-point dtype.
      ValueError: `labels` does not have the shape of `probs` without its last axis.

    Source: derived in docs/derivations.md#negative-log-likelihood.

    Example:
      >>> negative_log_likelihood(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([0.2876821], dtype=float32)
    """
    return _negative_log_likelihood(probs, labels, ignore_index=ignore_index)


def negative_log_likelihood_fwd(probs, labels, *, ignore_index=None):
    """`(loss, residuals)` of `negative_log_likelihood`."""
    _check.floating("negative_log_likelihood", probs=probs)
    _check.labels("negative_log_likelihood", labels, scores=probs)
    picked = jnp.sum(jnp.where(_hit(probs, labels), wide(probs), 0), axis=-1)
    return _rows(labels, probs.shape[-1], ignore_index, -jnp.log(picked)), (probs, labels)


def negative_log_likelihood_bwd(residuals, g, *, ignore_index=None):
    """Cotangents `(dprobs, None)` of `negative_log_likelihood`: labels have no gradient."""
    probs, labels = residuals
    # dp_k = −g / p_y where k = y, else 0; below 0 the logarithm is NaN, and so is its derivative
    hit, p = _hit(probs, labels), wide(probs)
    dprobs = jnp.where(hit, -_each_row(g, p) / jnp.where(hit, jnp.where(p < 0, jnp.nan, jnp.abs(p)), 1), 0)
    return _rows(labels, probs.shape[-1], ignore_index, dprobs).astype(probs.dtype), None


_negative_log_likelihood = rule(negative_log_likelihood_fwd, negative_log_likelihood_bwd)


def multiclass_svm(scores: jax.Array, labels: jax.Array, *, margin: float = 1.0) -> jax.Array:
    r"""Multiclass hinge loss: :math:`\ell = \sum_{k ≠ y} \max(0, s_k - s_y + \text{margin})`.

    The sum is over the wrong classes, as in the course notes CS231n. At the kink the derivative is 0.

    Args:
      scores: `[..., classes]`.
      labels: integers in `[0, classes)`, `[...]`.
      margin: by how much the right score should exceed each other one, in the unit of the scores.

    Returns:
      `[...]`. Saved for the backward pass: one boolean per score, one per row, and the labels.

    Raises:
      TypeError: float labels, or scores of another than a floating-point dtype.
      ValueError: `labels` does not have the shape of `scores` without its last axis.

    Source: derived in docs/derivations.md#multiclass-svm.

    Example:
      >>> multiclass_svm(jnp.array([[3., 2.5, 0.]]), jnp.array([0]))
      Array([0.5], dtype=float32)
    """
    return _multiclass_svm(scores, labels, margin=margin)


def multiclass_svm_fwd(scores, labels, *, margin=1.0):
    """`(loss, residuals)` of `multiclass_svm`."""
    _check.floating("multiclass_svm", scores=scores)
    _check.labels("multiclass_svm", labels, scores=scores)
    hit, s = _hit(scores, labels), wide(scores)
    own = jnp.sum(jnp.where(hit, s, 0), axis=-1, keepdims=True)
    excess = jnp.where(hit, 0, s - own + margin)
    dead = excess <= 0
    loss = jnp.sum(jnp.where(dead, 0, excess), axis=-1)  # a NaN is not dead
    # The dtype of the scores is kept in an empty array: a residual is an array, a dtype is not.
    return _rows(labels, scores.shape[-1], None, loss), (dead, jnp.isnan(loss), labels, jnp.empty(0, scores.dtype))


def multiclass_svm_bwd(residuals, g):
    """Cotangents `(dscores, None)` of `multiclass_svm`: labels have no gradient."""
    dead, undefined, labels, like = residuals
    alive = 1 - dead.astype(g.dtype)
    # ds_k = g [s_k − s_y + margin > 0] for k ≠ y, ds_y = −Σ of these
    count = jnp.sum(alive, axis=-1, keepdims=True)
    dscores = _each_row(g, alive) * jnp.where(_hit(alive, labels), -count, alive)
    dscores = jnp.where(_each_row(undefined, alive), jnp.nan, dscores)
    return _rows(labels, alive.shape[-1], None, dscores).astype(like.dtype), None


_multiclass_svm = rule(multiclass_svm_fwd, multiclass_svm_bwd)


def l2_penalty(params) -> jax.Array:
    r"""L2 penalty: :math:`\tfrac12 \sum_l \lVert W_l \rVert^2`, over the weights alone.

    Weights are the leaves named `"w"`; biases, scales and offsets are left out. Its gradient is the weight itself.

    Args:
      params: params of `fcfunc.init`, or any tree with leaves under a key `"w"`.

    Returns:
      A scalar, in at least float32. Saved for the backward pass: the weights.

    Raises:
      TypeError: a weight is not of a floating-point dtype.
      ValueError: the tree has no leaf named `"w"`.

    Source: derived in docs/derivations.md#l2-penalty.

    Example:
      >>> l2_penalty([{"w": jnp.array([[3., 4.]]), "b": jnp.array([9., 9.])}])
      Array(12.5, dtype=float32)
    """
    leaves = jax.tree.leaves_with_path(params)
    weights = [leaf for path, leaf in leaves if path and getattr(path[-1], "key", None) == "w"]
    if not weights:
        raise ValueError('l2_penalty: params have no leaf named "w"; expected a list of {"w", "b"} dicts')
    return _l2_penalty(weights)


def l2_penalty_fwd(weights):
    """`(penalty, residuals)` of `l2_penalty`, for the list of weights."""
    for i, w in enumerate(weights):
        _check.floating(f"l2_penalty, weight {i}", w=w)
    return 0.5 * sum(jnp.sum(wide(w) ** 2) for w in weights), weights


def l2_penalty_bwd(weights, g):
    """Cotangent `(dweights,)` of `l2_penalty`."""
    # dW = g W
    return ([(g * wide(w)).astype(w.dtype) for w in weights],)


_l2_penalty = rule(l2_penalty_fwd, l2_penalty_bwd)


def _weighted(weight, surprise):
    """`weight * surprise`, with 0 · inf = 0: what cannot happen and has no weight costs nothing. A NaN stays."""
    return weight * jnp.where((weight == 0) & (surprise == jnp.inf), 0, surprise)


def _log_sum_exp(logits):
    """`z - max(z)`, `max(z)` and `log Σ exp(z - max(z))`; the shift cancels, so its derivative is stopped."""
    logits = wide(logits)
    row_max = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    shifted = logits - jnp.expand_dims(row_max, -1)
    return shifted, row_max, jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def _probs(logits, row_max, log_sum):
    return jnp.exp((wide(logits) - jnp.expand_dims(row_max, -1)) - jnp.expand_dims(log_sum, -1))


def _each_row(g, like):
    """The cotangent of a row, for each of its elements."""
    return jnp.broadcast_to(jnp.expand_dims(g, -1), like.shape)


def _hit(scores, labels):
    """Where a score is its row's label. An iota is compared, not gathered: it works on scores sharded by class."""
    labels = _index(labels)
    hit = jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    return _compat.laid_like(hit, scores)


def _index(labels):
    """Labels in at least 32 bits with a sign: `arange(200)` in int8 would wrap and hit the wrong class."""
    return labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)


def _rows(labels, classes, ignore_index, value):
    """`value`, a number per row or per score: 0 in ignored rows, NaN in rows of impossible labels."""
    labels = _index(labels)
    if value.ndim > labels.ndim:
        labels = jnp.broadcast_to(jnp.expand_dims(labels, -1), value.shape)
    value = jnp.where((labels >= 0) & (labels < classes), value, jnp.nan)
    return value if ignore_index is None else jnp.where(labels == ignore_index, 0, value)
