"""Squared error, negative log-likelihood, the multiclass hinge loss and the L2 penalty."""

# ruff: noqa: I001  (a filled list of names)
import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import rule, sum_dtype, upcast
from fcfunc.losses._labels import (
    across, at_label, classes_last, counted_rows, is_label, nan_if_impossible, per_row, zero_uncounted,
)  # fmt: skip


def mean(loss: jax.Array, *, over: jax.Array) -> jax.Array:
    r"""Mean of per-example losses over the examples that count: :math:`\sum \ell / \sum o`, or 0 if none count.

    Pass the same mask or weights to the loss function: this function does not apply them to the losses.

    Args:
      loss: array of any shape.
      over: `o`, booleans or weights in the shape of `loss`.

    Returns:
      A scalar, in at least float32.

    Raises:
      TypeError: `loss` does not have a floating-point dtype.
      ValueError: the shapes differ.

    Example:
      >>> mean(jnp.array([2., 0., 4.]), over=jnp.array([True, False, True]))
      Array(3., dtype=float32)
    """
    _arguments.floating("mean", loss=loss)
    _arguments.one_shape("mean", loss=loss, over=over)
    total = jnp.sum(upcast(jnp.asarray(loss)))
    count = jnp.sum(jnp.asarray(over).astype(total.dtype))
    return jnp.where(count == 0, 0, total / jnp.where(count == 0, 1, count))


def squared_error(predictions: jax.Array, targets: jax.Array | None = None) -> jax.Array:
    r"""Elementwise squared error: :math:`\ell = (y - t)^2`, without a factor of one half.

    Args:
      predictions: array of any shape.
      targets: array of the shape of `predictions`. Differentiable, unless they are integers or booleans. None: zeros.

    Returns:
      An array of the shape of `predictions`, in squared units. Saved for the backward pass: the arguments.

    Raises:
      TypeError: `predictions` are not floating-point, or `targets` are not numbers.
      ValueError: the shapes differ. `[N]` against `[N, 1]` is not broadcast to `[N, N]`.

    Source: derived in docs/background/derivations.md#squared-error.

    Example:
      >>> squared_error(jnp.array([1., 3.]), jnp.array([1., 1.]))
      Array([0., 4.], dtype=float32)
    """
    name = "squared_error"
    _arguments.floating(name, predictions=predictions)
    predictions = as_array(predictions)
    if targets is None:
        targets = jnp.zeros_like(predictions)
    targets = _arguments.real_labels(name, targets, dtype=sum_dtype(predictions.dtype), name="targets")
    _arguments.one_shape(name, predictions=predictions, targets=targets)
    return _squared_error(predictions, _layout.reshard_like(targets, predictions))


def squared_error_fwd(predictions, targets):
    """`(loss, residuals)` of `squared_error`."""
    # ℓ = (y − t)²
    return (upcast(predictions) - upcast(targets)) ** 2, (predictions, targets)


def squared_error_bwd(residuals, g):
    """Cotangents `(dpredictions, dtargets)` of `squared_error`."""
    predictions, targets = residuals
    # dy = 2 g (y − t) = −dt
    dpredictions = 2 * g * (upcast(predictions) - upcast(targets))
    return dpredictions.astype(predictions.dtype), (-dpredictions).astype(targets.dtype)


_squared_error = rule(squared_error_fwd, squared_error_bwd)


def negative_log_likelihood(
    probs: jax.Array, labels: jax.Array, axis: int | tuple[int, ...] = -1, *, ignore_index: int | None = None
) -> jax.Array:
    r"""Negative log-likelihood for a network that ends in softmax: :math:`\ell = -\log p_y`.

    If the network can output logits instead, prefer `softmax_cross_entropy_with_integer_labels`: it is exact even for
    probabilities that round to 0, which give a loss of inf here.

    Args:
      probs: probabilities, `[..., classes]`, or with the classes along `axis`.
      labels: integers in `[0, classes)`, in the shape of `probs` without `axis`.
      axis: the axis of the classes. For a tuple of axes, a label is the flat index into them, in the order given.
      ignore_index: the label of rows to mask; None (the default) means that every label is a class.

    Returns:
      One loss per row, in nats. Saved for the backward pass: the arguments.

    Raises:
      TypeError: `labels` are not integers, or `probs` are not floating-point.
      ValueError: `labels` does not have the shape of `probs` without `axis`.

    Source: derived in docs/background/derivations.md#negative-log-likelihood.

    Example:
      >>> negative_log_likelihood(jnp.array([[0.25, 0.75]]), jnp.array([1]))
      Array([0.2876821], dtype=float32)
    """
    name = "negative_log_likelihood"
    _arguments.ignored_label(name, ignore_index)
    (probs,) = classes_last(name, axis, probs=probs)
    _arguments.floating(name, probs=probs)
    _arguments.labels(name, labels, scores=probs)
    probs = as_array(probs)
    labels = per_row(labels, probs)
    counted = counted_rows(labels, None, ignore_index)
    probs, labels = zero_uncounted(probs, counted), zero_uncounted(labels, counted)
    return zero_uncounted(_negative_log_likelihood(probs, labels), counted)


def negative_log_likelihood_fwd(probs, labels):
    """`(loss, residuals)` of `negative_log_likelihood`."""
    # ℓ = −log p_y
    return nan_if_impossible(-jnp.log(at_label(probs, labels)), labels, probs.shape[-1]), (probs, labels)


def negative_log_likelihood_bwd(residuals, g):
    """Cotangents `(dprobs, None)` of `negative_log_likelihood`: labels have no gradient."""
    probs, labels = residuals
    # dp_k = −g / p_y for k = y, 0 otherwise. Where p_y < 0 the logarithm is NaN, and so is its derivative.
    own, p = is_label(probs, labels), upcast(probs)
    dprobs = jnp.where(own, -across(g, p) / jnp.where(own, jnp.where(p < 0, jnp.nan, jnp.abs(p)), 1), 0)
    return nan_if_impossible(dprobs, labels, probs.shape[-1]).astype(probs.dtype), None


_negative_log_likelihood = rule(negative_log_likelihood_fwd, negative_log_likelihood_bwd)


def multiclass_svm(
    scores: jax.Array, labels: jax.Array, axis: int | tuple[int, ...] = -1, *, margin: float = 1.0
) -> jax.Array:
    r"""Multiclass hinge loss: :math:`\ell = \sum_{k ≠ y} \max(0, s_k - s_y + \text{margin})`.

    The sum is over the wrong classes, as in the CS231n course notes. At the kink, the derivative is 0.

    Args:
      scores: `[..., classes]`, or with the classes along `axis`.
      labels: integers in `[0, classes)`, in the shape of `scores` without `axis`.
      axis: the axis of the classes. For a tuple of axes, a label is the flat index into them, in the order given.
      margin: how far the correct score should exceed every other score, in units of the scores.

    Returns:
      One loss per row. Saved for the backward pass: one boolean per score, one per row, and the labels.

    Raises:
      TypeError: `labels` are not integers, or `scores` are not floating-point.
      ValueError: `labels` does not have the shape of `scores` without `axis`.

    Source: derived in docs/background/derivations.md#multiclass-svm.

    Example:
      >>> multiclass_svm(jnp.array([[3., 2.5, 0.]]), jnp.array([0]))
      Array([0.5], dtype=float32)
    """
    name = "multiclass_svm"
    (scores,) = classes_last(name, axis, scores=scores)
    _arguments.floating(name, scores=scores)
    _arguments.labels(name, labels, scores=scores)
    scores = as_array(scores)
    return _multiclass_svm(scores, per_row(labels, scores), margin=_arguments.number(name, margin=margin))


def multiclass_svm_fwd(scores, labels, *, margin=1.0):
    """`(loss, residuals)` of `multiclass_svm`."""
    own, s = is_label(scores, labels), upcast(scores)
    s_y = jnp.sum(jnp.where(own, s, 0), axis=-1, keepdims=True)
    # ℓ = Σ max(0, s_k − s_y + margin) over k ≠ y
    excess = jnp.where(own, 0, s - s_y + margin)
    dead = excess <= 0
    loss = nan_if_impossible(jnp.sum(jnp.where(dead, 0, excess), axis=-1), labels, s.shape[-1])  # NaN is not dead
    # An empty array carries the dtype of the scores, because a residual must be an array.
    return loss, (dead, jnp.isnan(loss), labels, jnp.empty(0, scores.dtype))


def multiclass_svm_bwd(residuals, g):
    """Cotangents `(dscores, None)` of `multiclass_svm`: labels have no gradient."""
    dead, undefined, labels, like = residuals
    alive = 1 - dead.astype(g.dtype)
    # ds_k = g [s_k − s_y + margin > 0] for k ≠ y, ds_y = −Σ of these
    count = jnp.sum(alive, axis=-1, keepdims=True)
    dscores = across(g, alive) * jnp.where(is_label(alive, labels), -count, alive)
    return jnp.where(across(undefined, alive), jnp.nan, dscores).astype(like.dtype), None


_multiclass_svm = rule(multiclass_svm_fwd, multiclass_svm_bwd)


def l2_penalty(params) -> jax.Array:
    r"""L2 penalty on the weights: :math:`\tfrac12 \sum_l \lVert W_l \rVert^2`.

    Weights are the leaves named `"w"`; biases, scales and offsets are excluded. The gradient with respect to a weight
    is the weight itself.

    Args:
      params: parameters from `fcfunc.init`, or any pytree with leaves under a key `"w"`.

    Returns:
      A scalar, in at least float32. Saved for the backward pass: the weights.

    Raises:
      TypeError: a weight does not have a floating-point dtype.
      ValueError: the pytree has no leaf named `"w"`.

    Source: derived in docs/background/derivations.md#l2-penalty.

    Example:
      >>> l2_penalty([{"w": jnp.array([[3., 4.]]), "b": jnp.array([9., 9.])}])
      Array(12.5, dtype=float32)
    """
    leaves = jax.tree.leaves_with_path(params)
    weights = [leaf for path, leaf in leaves if path and getattr(path[-1], "key", None) == "w"]
    if not weights:
        raise ValueError('l2_penalty: params have no leaf named "w"; expected a list of {"w", "b"} dicts')
    for i, w in enumerate(weights):
        _arguments.floating(f"l2_penalty, weight {i}", w=w)
    return _l2_penalty(weights)


def l2_penalty_fwd(weights):
    """`(penalty, residuals)` of `l2_penalty`, for the list of weights."""
    # ℓ = ½ Σ ‖W‖²
    return 0.5 * sum(jnp.sum(upcast(w) ** 2) for w in weights), weights


def l2_penalty_bwd(weights, g):
    """Cotangent `(dweights,)` of `l2_penalty`."""
    # dW = g W
    return ([(g * upcast(w)).astype(w.dtype) for w in weights],)


_l2_penalty = rule(l2_penalty_fwd, l2_penalty_bwd)
