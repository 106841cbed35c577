"""The plain-JAX twin of every operation and loss: same name, same signature, no hand-written rule.

The twins are the oracle that the rules are compared with, and they have what a `custom_vjp` function lacks:
forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`, `jax.experimental.jet`).
`fcfunc.apply(..., ops=fcfunc.reference)` runs a whole network on them. They are written for comparison,
not for memory or speed, and do not check their arguments.
"""

import math

import jax
import jax.numpy as jnp

from fcfunc._precision import accumulator, wide


def affine(x, w, b, *, flatten=False, compute_dtype=None, out_dtype=None, round_cotangent=True):
    """Twin of `fcfunc.ops.affine`; automatic differentiation rounds no cotangent, whatever `round_cotangent` says."""
    del round_cotangent
    operands = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    x, w = x.astype(operands), w.astype(operands)
    if flatten:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    out = jnp.matmul(x, w, preferred_element_type=accumulator(operands))
    return (out + jnp.broadcast_to(b.astype(out.dtype), out.shape)).astype(out_dtype or operands)


def layer(
    x,
    w,
    b,
    *,
    activation,
    flatten=False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent=True,
    pack=True,
    **options,
):
    """Twin of `fcfunc.ops.layer`."""
    del round_cotangent, pack
    operands = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    z = affine(x, w, b, flatten=flatten, compute_dtype=operands, out_dtype=accumulator(operands))
    return globals()[activation](z, **options).astype(out_dtype or operands)


def relu(x):
    """Twin of `fcfunc.ops.relu`; `jax.grad` of this form is 0 at 0 and lets a NaN through."""
    return jnp.where(x <= 0, 0, x)


def leaky_relu(x, *, negative_slope=0.01):
    """Twin of `fcfunc.ops.leaky_relu`."""
    return jnp.where(x <= 0, negative_slope * x, x)


def elu(x, *, alpha=1.0):
    """Twin of `fcfunc.ops.elu`."""
    return _widened(lambda x: jnp.where(x > 0, x, alpha * (jnp.exp(jnp.where(x > 0, 0, x)) - 1)), x)


def sigmoid(x):
    """Twin of `fcfunc.ops.sigmoid`."""
    return _widened(jax.nn.sigmoid, x)


def silu(x):
    """Twin of `fcfunc.ops.silu`."""
    return _widened(lambda x: _times_probability(x, jax.nn.sigmoid), x)


def softplus(x):
    """Twin of `fcfunc.ops.softplus`."""
    return _widened(_softplus, x)


def gelu(x, *, approximate=True):
    """Twin of `fcfunc.ops.gelu`."""

    def exact(x):
        return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))

    def with_tanh(x):
        # Beyond ±40 tanh is ±1 to the last digit, and its argument would overflow.
        c = jnp.where(x > 40, 40, jnp.where(x < -40, -40, x))
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (c + 0.044715 * c**3)))

    return _widened(lambda x: _times_probability(x, with_tanh if approximate else exact), x)


def tanh(x):
    """Twin of `fcfunc.ops.tanh`."""
    return _widened(jnp.tanh, x)


def dropout(x, *, rate, key):
    """Twin of `fcfunc.ops.dropout`."""
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def layer_norm(x, scale, offset, *, eps=1e-5):
    """Twin of `fcfunc.ops.layer_norm`."""
    return _normalised(x, *_moments(x, -1), scale, offset, eps)


def rms_norm(x, scale, *, eps=1e-5):
    """Twin of `fcfunc.ops.rms_norm`."""
    z = wide(x)
    square = jnp.mean(z**2, axis=-1, keepdims=True)
    normal = z / jnp.sqrt(jnp.where(square == jnp.inf, jnp.nan, square) + eps)
    return (normal * jnp.broadcast_to(scale.astype(z.dtype), z.shape)).astype(x.dtype)


def batch_norm(x, scale, offset, state, *, training, decay=0.9, eps=1e-5):
    """Twin of `fcfunc.ops.batch_norm`."""
    if not training:
        return _normalised(x, state["mean"], jnp.zeros_like(state["mean"]), state["var"], scale, offset, eps), state
    mean, rest, var = _moments(x, tuple(range(x.ndim - 1)))
    rows = math.prod(x.shape[:-1])
    batch = {"mean": (mean + rest).reshape(-1), "var": var.reshape(-1) * rows / (rows - 1)}
    moved = {name: decay * state[name] + (1 - decay) * batch[name].astype(state[name].dtype) for name in batch}
    return _normalised(x, mean, rest, var, scale, offset, eps), moved


def softmax(x, *, axis=-1):
    """Twin of `fcfunc.ops.softmax`."""
    return _widened(lambda x: jnp.exp(_log_softmax(x, axis)), x)


def log_softmax(x, *, axis=-1):
    """Twin of `fcfunc.ops.log_softmax`."""
    return _widened(lambda x: _log_softmax(x, axis), x)


def softmax_cross_entropy_with_integer_labels(
    logits, labels, *, where=None, weights=None, class_weights=None, label_smoothing=0.0, ignore_index=None
):
    """Twin of `fcfunc.losses.softmax_cross_entropy_with_integer_labels`."""
    logits, hit, ignored, poison = _labelled(logits, labels, ignore_index, where)
    return jnp.where(
        ignored, 0, _cross_entropy(logits, hit.astype(logits.dtype), weights, class_weights, label_smoothing) * poison
    )


def softmax_cross_entropy(logits, targets, *, where=None, weights=None, class_weights=None, label_smoothing=0.0):
    """Twin of `fcfunc.losses.softmax_cross_entropy`."""
    if where is None:
        return _cross_entropy(wide(logits), wide(targets), weights, class_weights, label_smoothing)
    logits, targets = (jnp.where(jnp.expand_dims(where, -1), wide(a), 0) for a in (logits, targets))
    return jnp.where(where, _cross_entropy(logits, targets, weights, class_weights, label_smoothing), 0)


def linear_softmax_cross_entropy(
    x, w, b, labels, *, chunk_size=None, compute_dtype=None, round_cotangent=True, **options
):
    """Twin of `fcfunc.losses.linear_softmax_cross_entropy`: dense, whatever `chunk_size` says."""
    del chunk_size, round_cotangent
    counted = jnp.ones(labels.shape, bool) if options.get("where") is None else options["where"]
    if options.get("ignore_index") is not None:
        counted = counted & (labels != options["ignore_index"])
    x = jnp.where(jnp.expand_dims(counted, -1), x, 0)
    logits = affine(x, w, b, compute_dtype=compute_dtype, out_dtype=accumulator(compute_dtype or x.dtype))
    return softmax_cross_entropy_with_integer_labels(logits, labels, **options)


def sigmoid_binary_cross_entropy(
    logits, targets, *, where=None, weights=None, positive_weights=None, label_smoothing=0.0
):
    """Twin of `fcfunc.losses.sigmoid_binary_cross_entropy`."""
    z, t = wide(logits), wide(targets) * (1 - label_smoothing) + label_smoothing / 2
    if where is not None:
        z, t = jnp.where(where, z, 0), jnp.where(where, t, 0)
    positive = t if positive_weights is None else t * jnp.broadcast_to(positive_weights.astype(t.dtype), t.shape)
    loss = positive * _softplus(-z) + (1 - t) * _softplus(z)
    loss = loss if weights is None else loss * weights.astype(loss.dtype)
    return loss if where is None else jnp.where(where, loss, 0)


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

    poison = jnp.where(jnp.max(jnp.isnan(excess(scores)).astype(scores.dtype), axis=-1, initial=0) > 0, jnp.nan, poison)
    return jnp.sum(relu(excess(scores * jnp.expand_dims(poison, -1))), axis=-1) * poison


def l2_penalty(params):
    """Twin of `fcfunc.losses.l2_penalty`."""
    weights = [leaf for path, leaf in jax.tree.leaves_with_path(params) if getattr(path[-1], "key", None) == "w"]
    return 0.5 * sum(jnp.sum(wide(w) ** 2) for w in weights)


def _widened(fun, x):
    return fun(wide(x)).astype(x.dtype)


def _softplus(x):
    """`log(1 + e^x)` by the exponential that does not overflow, in operations that `jax.experimental.jet` knows."""
    above, below = jnp.where(x > 0, x, 0), jnp.where(x > 0, 0, x)
    return jnp.where(x > 0, above + jnp.log1p(jnp.exp(-above)), jnp.log1p(jnp.exp(below)))


def _times_probability(x, cdf):
    """`x cdf(x)`, and its limits at ±inf."""
    finite = jnp.where(jnp.abs(x) == jnp.inf, 0, x)
    return jnp.where(x == jnp.inf, x, jnp.where(x == -jnp.inf, 0, finite * cdf(finite)))


def _moments(x, axes):
    """The mean, in two numbers as its rounding would count as variance, and the variance."""
    mean = jnp.mean(wide(x), axis=axes, keepdims=True)
    rest = jnp.mean(wide(x) - mean, axis=axes, keepdims=True)
    return mean, rest, jnp.mean((wide(x) - mean - rest) ** 2, axis=axes, keepdims=True)


def _normalised(x, mean, rest, var, scale, offset, eps):
    """`scale (x − mean − rest) / √(var + eps) + offset`; a variance that overflowed counts as NaN."""
    var = jnp.where(var == jnp.inf, jnp.nan, var)
    arrays = (mean, rest, var, scale, offset)
    mean, rest, var, scale, offset = (jnp.broadcast_to(a.astype(wide(x).dtype), x.shape) for a in arrays)
    return ((wide(x) - mean - rest) / jnp.sqrt(var + eps) * scale + offset).astype(x.dtype)


def _log_softmax(x, axis):
    shifted = x - jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True))


def _cross_entropy(logits, targets, weights, class_weights, smoothing):
    targets = (1 - smoothing) * targets + smoothing / max(targets.shape[-1], 1)
    if class_weights is not None:
        targets = targets * jnp.broadcast_to(class_weights.astype(targets.dtype), targets.shape)
    log_probs = _log_softmax(logits, -1)
    nothing = (targets == 0) & (log_probs == -jnp.inf)
    loss = -jnp.sum(targets * jnp.where(nothing, 0, log_probs), axis=-1)
    return loss if weights is None else loss * weights.astype(loss.dtype)


def _labelled(scores, labels, ignore_index, where=None):
    """Scores with ignored rows set to 0, the label's mask, the ignored rows, and NaN for impossible labels, else 1.

    Impossible labels make their scores NaN as well: setting the scores, and not only the loss, is what keeps a NaN out
    of the gradient of an ignored row, and in that of an impossible one.
    """
    scores, classes = wide(scores), scores.shape[-1]
    labels = labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)
    hit = jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    ignored = jnp.zeros(labels.shape, bool) if where is None else ~where
    if ignore_index is not None:
        ignored = ignored | (labels == ignore_index)
    poison = jnp.where(ignored | ((labels >= 0) & (labels < classes)), 1, jnp.nan)
    scores = jnp.where(jnp.expand_dims(ignored, -1), 0, scores * jnp.expand_dims(poison, -1))
    return scores, hit, ignored, poison
