"""The plain-JAX twin of every operation and loss: same name, same signature, no hand-written rule.

The twins are the oracle that the rules are compared with, and they have what a `custom_vjp` function lacks:
forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`). `fcfunc.apply(..., ops=fcfunc.reference)` runs a whole
network on them. They are written for comparison, not for memory or speed, and do not check their arguments.
"""

import math

import jax
import jax.numpy as jnp

from fcfunc._precision import accumulator, wide


def affine(x, w, b, *, flatten=False):
    """Twin of `fcfunc.ops.affine`."""
    if flatten:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    out = jnp.matmul(x, w, preferred_element_type=accumulator(x.dtype))
    return (out + jnp.broadcast_to(wide(b), out.shape)).astype(x.dtype)


def relu(x):
    """Twin of `fcfunc.ops.relu`; `jax.grad` of this form is 0 at 0 and lets a NaN through."""
    return jnp.where(x <= 0, 0, x)


def sigmoid(x):
    """Twin of `fcfunc.ops.sigmoid`."""
    return _widened(jax.nn.sigmoid, x)


def tanh(x):
    """Twin of `fcfunc.ops.tanh`."""
    return _widened(jnp.tanh, x)


def softmax(x, *, axis=-1):
    """Twin of `fcfunc.ops.softmax`."""
    return _widened(lambda x: jnp.exp(_log_softmax(x, axis)), x)


def log_softmax(x, *, axis=-1):
    """Twin of `fcfunc.ops.log_softmax`."""
    return _widened(lambda x: _log_softmax(x, axis), x)


def softmax_cross_entropy_with_integer_labels(logits, labels, *, ignore_index=None):
    """Twin of `fcfunc.losses.softmax_cross_entropy_with_integer_labels`."""
    logits, hit, ignored, poison = _labelled(logits, labels, ignore_index)
    picked = jnp.sum(jnp.where(hit, _log_softmax(logits, -1), 0), axis=-1)
    return jnp.where(ignored, 0, -picked * poison)


def softmax_cross_entropy(logits, targets):
    """Twin of `fcfunc.losses.softmax_cross_entropy`."""
    log_probs, targets = _log_softmax(wide(logits), -1), wide(targets)
    nothing = (targets == 0) & (log_probs == -jnp.inf)
    return -jnp.sum(targets * jnp.where(nothing, 0, log_probs), axis=-1)


def sigmoid_binary_cross_entropy(logits, targets):
    """Twin of `fcfunc.losses.sigmoid_binary_cross_entropy`."""
    logits, targets = wide(logits), wide(targets)
    return targets * jax.nn.softplus(-logits) + (1 - targets) * jax.nn.softplus(logits)


def squared_error(predictions, targets):
    """Twin of `fcfunc.losses.squared_error`."""
    return (wide(predictions) - wide(targets)) ** 2


def negative_log_likelihood(probs, labels, *, ignore_index=None):
    """Twin of `fcfunc.losses.negative_log_likelihood`."""
    probs, hit, ignored, poison = _labelled(probs, labels, ignore_index)
    # The sum before the logarithm: the logarithm of a probability of 0 that is not the label's stays out.
    picked = jnp.sum(jnp.where(hit, probs, 0), axis=-1)
    poison = jnp.where(picked < 0, jnp.nan, poison)
    return jnp.where(ignored, 0, -jnp.log(jnp.where(ignored, 1, picked * poison)))


def multiclass_svm(scores, labels, *, margin=1.0):
    """Twin of `fcfunc.losses.multiclass_svm`."""
    scores, hit, _, poison = _labelled(scores, labels, None)

    def excess(scores):
        own = jnp.sum(jnp.where(hit, scores, 0), axis=-1, keepdims=True)
        return jnp.where(hit, 0, scores - jnp.broadcast_to(own, scores.shape) + margin)

    poison = jnp.where(jnp.any(jnp.isnan(excess(scores)), axis=-1), jnp.nan, poison)
    return jnp.sum(relu(excess(scores * jnp.expand_dims(poison, -1))), axis=-1) * poison


def l2_penalty(params):
    """Twin of `fcfunc.losses.l2_penalty`."""
    weights = [leaf for path, leaf in jax.tree.leaves_with_path(params) if getattr(path[-1], "key", None) == "w"]
    return 0.5 * sum(jnp.sum(wide(w) ** 2) for w in weights)


def _widened(fun, x):
    return fun(wide(x)).astype(x.dtype)


def _log_softmax(x, axis):
    shifted = x - jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True))


def _labelled(scores, labels, ignore_index):
    """Scores with ignored rows set to 0, the label's mask, the ignored rows, and NaN for impossible labels, else 1.

    Impossible labels make their scores NaN as well: setting the scores, and not only the loss, is what keeps a NaN out
    of the gradient of an ignored row, and in that of an impossible one.
    """
    scores, classes = wide(scores), scores.shape[-1]
    labels = labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)
    hit = jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    ignored = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    poison = jnp.where(ignored | ((labels >= 0) & (labels < classes)), 1, jnp.nan)
    scores = jnp.where(jnp.expand_dims(ignored, -1), 0, scores * jnp.expand_dims(poison, -1))
    return scores, hit, ignored, poison
