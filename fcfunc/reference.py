"""Plain JAX implementations of every operation and loss, with the same names and signatures but no hand-written rules.

They are the oracle that the rules are tested against. Unlike `custom_vjp` functions, they also support forward mode
(`jax.jvp`, `jax.jacfwd`, `jax.linearize`, `jax.experimental.jet`); `fcfunc.mlp(..., ops=fcfunc.reference)` builds a
network on them. They are written for comparison, not for memory or speed. Like the rules, they do not broadcast.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments
from fcfunc._arguments import as_array
from fcfunc._rule import sum_dtype, upcast


def affine(x, w, b, *, flatten=False, compute_dtype=None, out_dtype=None):
    """Reference implementation of `fcfunc.ops.affine`."""
    operands = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    x, w = x.astype(operands), w.astype(operands)
    if flatten:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    out = jnp.matmul(x, w, preferred_element_type=sum_dtype(operands))
    if b is not None:
        out = out + jnp.broadcast_to(b.astype(out.dtype), out.shape)
    return out.astype(out_dtype or operands)


def layer(x, w, b, *, activation, compute_dtype=None, out_dtype=None, **options):
    """Reference implementation of `fcfunc.ops.layer`."""
    operands = jnp.dtype(x.dtype if compute_dtype is None else compute_dtype)
    z = affine(x, w, b, compute_dtype=operands, out_dtype=sum_dtype(operands))
    return globals()[activation](z, **options).astype(out_dtype or operands)


def relu(x):
    """Reference implementation of `fcfunc.ops.relu`, in a form whose gradient is 0 at 0 and which propagates NaN."""
    x = _floating("relu", x)
    return jnp.where(x <= 0, 0, x)


def leaky_relu(x, *, negative_slope=0.01):
    """Reference implementation of `fcfunc.ops.leaky_relu`."""
    x = _floating("leaky_relu", x)
    return jnp.where(x <= 0, negative_slope * x, x)


def elu(x, *, alpha=1.0):
    """Reference implementation of `fcfunc.ops.elu`."""
    return _in_float32("elu", lambda x: jnp.where(x > 0, x, alpha * (jnp.exp(jnp.where(x > 0, 0, x)) - 1)), x)


def sigmoid(x):
    """Reference implementation of `fcfunc.ops.sigmoid`."""
    return _in_float32("sigmoid", jax.nn.sigmoid, x)


def silu(x):
    """Reference implementation of `fcfunc.ops.silu`."""
    return _in_float32("silu", lambda x: _times_probability(x, jax.nn.sigmoid), x)


def softplus(x):
    """Reference implementation of `fcfunc.ops.softplus`."""
    return _in_float32("softplus", _softplus, x)


def gelu(x, *, approximate=True):
    """Reference implementation of `fcfunc.ops.gelu`."""

    def exact(x):
        return 0.5 * jax.lax.erfc(-x / math.sqrt(2))

    def with_tanh(x):
        # Beyond ±40 the sigmoid is 0 or 1 to the last digit, and its argument could overflow.
        c = jnp.where(x > 40, 40, jnp.where(x < -40, -40, x))
        return jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (c + 0.044715 * c**3))

    return _in_float32("gelu", lambda x: _times_probability(x, with_tanh if approximate else exact), x)


def tanh(x):
    """Reference implementation of `fcfunc.ops.tanh`."""
    return _in_float32("tanh", jnp.tanh, x)


def dropout(x, *, rate, key):
    """Reference implementation of `fcfunc.ops.dropout`."""
    x = _floating("dropout", x)
    if rate == 1:
        return jnp.zeros_like(x)
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def layer_norm(x, scale, offset, *, eps=1e-5):
    """Reference implementation of `fcfunc.ops.layer_norm`."""
    return _normalized(x, *_moments(x, -1), scale, offset, eps)


def rms_norm(x, scale, *, eps=1e-5):
    """Reference implementation of `fcfunc.ops.rms_norm`."""
    z = upcast(x)
    square = jnp.mean(z**2, axis=-1, keepdims=True)
    x_hat = z / jnp.sqrt(jnp.where(square == jnp.inf, jnp.nan, square) + eps)
    return (x_hat * jnp.broadcast_to(scale.astype(z.dtype), z.shape)).astype(x.dtype)


def batch_norm(x, scale, offset, state, *, training, decay=0.9, eps=1e-5, unbiased_variance=True):
    """Reference implementation of `fcfunc.ops.batch_norm`."""
    if not training:
        return _normalized(x, state["mean"], jnp.zeros_like(state["mean"]), state["var"], scale, offset, eps), state
    mean, mean_error, var = _moments(x, tuple(range(x.ndim - 1)))
    rows = math.prod(x.shape[:-1])
    scale_var = rows / (rows - 1) if unbiased_variance else 1
    batch = {"mean": (mean + mean_error).reshape(-1), "var": var.reshape(-1) * scale_var}
    moved = {name: decay * state[name] + (1 - decay) * batch[name].astype(state[name].dtype) for name in batch}
    return _normalized(x, mean, mean_error, var, scale, offset, eps), moved


def softmax(x, axis=-1, where=None):
    """Reference implementation of `fcfunc.ops.softmax`."""
    return _in_float32("softmax", lambda x: jnp.exp(_log_softmax(x, axis, where)), x)


def log_softmax(x, axis=-1, where=None):
    """Reference implementation of `fcfunc.ops.log_softmax`."""
    return _in_float32("log_softmax", lambda x: _log_softmax(x, axis, where), x)


def softmax_cross_entropy_with_integer_labels(
    logits, labels, axis=-1, where=None, *, weights=None, class_weights=None, label_smoothing=0.0, ignore_index=None
):
    """Reference implementation of `fcfunc.losses.softmax_cross_entropy_with_integer_labels`."""
    name = "softmax_cross_entropy_with_integer_labels"
    logits, where = _classes_last(_floating(name, logits), axis, where)
    _arguments.labels(name, labels, scores=logits)
    _arguments.loss_options(name, np.shape(labels), where, weights, label_smoothing, logits=logits.shape)
    classes = where if where is not None and jnp.ndim(where) == logits.ndim else None
    rows = where if classes is None else jnp.any(classes, axis=-1)
    logits, is_label, ignored, poison = _labeled(logits, as_array(labels), ignore_index, rows)
    if classes is not None:
        poison = jnp.where(ignored | jnp.any(is_label & classes, axis=-1), poison, jnp.nan)
    targets = is_label.astype(logits.dtype)
    loss = _cross_entropy(logits, targets, weights, class_weights, label_smoothing, classes) * poison
    return jnp.where(ignored, 0, loss)


def softmax_cross_entropy(
    logits, labels, axis=-1, where=None, *, weights=None, class_weights=None, label_smoothing=0.0
):
    """Reference implementation of `fcfunc.losses.softmax_cross_entropy`."""
    name = "softmax_cross_entropy"
    _arguments.one_shape(name, logits=logits, labels=labels)
    logits, where = _classes_last(upcast(_floating(name, logits)), axis, where)
    labels, _ = _classes_last(upcast(_arguments.real_labels(name, labels, dtype=logits.dtype)), axis, None)
    _arguments.loss_options(name, logits.shape[:-1], where, weights, label_smoothing, logits=logits.shape)
    classes = where if where is not None and jnp.ndim(where) == logits.ndim else None
    rows = where if classes is None else jnp.any(classes, axis=-1)
    if rows is None:
        return _cross_entropy(logits, labels, weights, class_weights, label_smoothing, classes)
    logits, labels = (jnp.where(jnp.expand_dims(rows, -1), a, 0) for a in (logits, labels))
    return jnp.where(rows, _cross_entropy(logits, labels, weights, class_weights, label_smoothing, classes), 0)


def linear_softmax_cross_entropy(x, w, b, labels, *, chunk_size=None, compute_dtype=None, **options):
    """Reference implementation of `fcfunc.losses.linear_softmax_cross_entropy`; dense, ignores `chunk_size`."""
    del chunk_size
    counted = jnp.ones(labels.shape, bool) if options.get("where") is None else options["where"]
    if options.get("ignore_index") is not None:
        counted = counted & (labels != options["ignore_index"])
    x = jnp.where(jnp.expand_dims(counted, -1), x, 0)
    logits = affine(x, w, b, compute_dtype=compute_dtype, out_dtype=sum_dtype(compute_dtype or x.dtype))
    return softmax_cross_entropy_with_integer_labels(logits, labels, **options)


def sigmoid_binary_cross_entropy(
    logits, labels, *, where=None, weights=None, positive_weights=None, label_smoothing=0.0
):
    """Reference implementation of `fcfunc.losses.sigmoid_binary_cross_entropy`."""
    name = "sigmoid_binary_cross_entropy"
    _arguments.one_shape(name, logits=logits, labels=labels)
    _arguments.loss_options(name, np.shape(logits), where, weights, label_smoothing)
    z = upcast(_floating(name, logits))
    t = (
        upcast(_arguments.real_labels(name, labels, dtype=sum_dtype(jnp.result_type(logits)))) * (1 - label_smoothing)
        + label_smoothing / 2
    )
    if where is not None:
        z, t = jnp.where(where, z, 0), jnp.where(where, t, 0)
    positive = t if positive_weights is None else t * jnp.broadcast_to(positive_weights.astype(t.dtype), t.shape)
    loss = _mul_zero_inf(positive, _softplus(-z)) + _mul_zero_inf(1 - t, _softplus(z))
    loss = loss if weights is None else _mul_zero_inf(weights.astype(loss.dtype), loss)
    return loss if where is None else jnp.where(where, loss, 0)


def squared_error(predictions, targets=None):
    """Reference implementation of `fcfunc.losses.squared_error`."""
    predictions = _floating("squared_error", predictions)
    y = upcast(predictions)
    if targets is None:
        return y**2
    _arguments.one_shape("squared_error", predictions=predictions, targets=targets)
    return (y - upcast(_arguments.real_labels("squared_error", targets, dtype=y.dtype))) ** 2


def negative_log_likelihood(probs, labels, axis=-1, *, ignore_index=None):
    """Reference implementation of `fcfunc.losses.negative_log_likelihood`."""
    probs, _ = _classes_last(_floating("negative_log_likelihood", probs), axis, None)
    _arguments.labels("negative_log_likelihood", labels, scores=probs)
    probs, is_label, ignored, poison = _labeled(probs, as_array(labels), ignore_index)
    # Sum before taking the logarithm, so that another class with probability 0 does not contribute log 0.
    picked = jnp.sum(jnp.where(is_label, probs, 0), axis=-1)
    poison = jnp.where(picked < 0, jnp.nan, poison)
    return jnp.where(ignored, 0, -jnp.log(jnp.where(ignored, 1, picked * poison)))


def multiclass_svm(scores, labels, axis=-1, *, margin=1.0):
    """Reference implementation of `fcfunc.losses.multiclass_svm`."""
    scores, _ = _classes_last(_floating("multiclass_svm", scores), axis, None)
    _arguments.labels("multiclass_svm", labels, scores=scores)
    scores, is_label, _, poison = _labeled(scores, as_array(labels), None)

    def excess(scores):
        own = jnp.sum(jnp.where(is_label, scores, 0), axis=-1, keepdims=True)
        return jnp.where(is_label, 0, scores - jnp.broadcast_to(own, scores.shape) + margin)

    poison = jnp.where(jnp.max(jnp.isnan(excess(scores)).astype(scores.dtype), axis=-1, initial=0) > 0, jnp.nan, poison)
    return jnp.sum(relu(excess(scores * jnp.expand_dims(poison, -1))), axis=-1) * poison


def l2_penalty(params):
    """Reference implementation of `fcfunc.losses.l2_penalty`."""
    weights = [leaf for path, leaf in jax.tree.leaves_with_path(params) if getattr(path[-1], "key", None) == "w"]
    return 0.5 * sum(jnp.sum(upcast(w) ** 2) for w in weights)


def _floating(where, x):
    """`x` as an array; raises TypeError if it does not have a floating-point dtype."""
    _arguments.floating(where, x=x)
    return jnp.asarray(x)


def _in_float32(where, fun, x):
    x = _floating(where, x)
    return fun(upcast(x)).astype(x.dtype)


def _classes_last(a, axis, where):
    """`a`, and a mask of the same shape, with `axis` last; several axes are merged into one."""
    axes = range(a.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = [i % a.ndim for i in axes]
    order = [*(i for i in range(a.ndim) if i not in axes), *axes]

    def moved(a):
        a = jnp.transpose(jnp.asarray(a), order)
        return a.reshape(*a.shape[: a.ndim - len(axes)], -1) if len(axes) > 1 else a

    return moved(a), where if where is None or jnp.ndim(where) != a.ndim else moved(where)


def _softplus(x):
    """`log(1 + e^x)` by the exponential that does not overflow, in operations that `jax.experimental.jet` supports."""
    above, below = jnp.where(x > 0, x, 0), jnp.where(x > 0, 0, x)
    return jnp.where(x > 0, above + jnp.log1p(jnp.exp(-above)), jnp.log1p(jnp.exp(below)))


def _times_probability(x, cdf):
    """`x cdf(x)`, with its limits at ±inf."""
    finite = jnp.where(jnp.abs(x) == jnp.inf, 0, x)
    return jnp.where(x == jnp.inf, x, jnp.where(x == -jnp.inf, 0, finite * cdf(finite)))


def _moments(x, axes):
    """The mean, its rounding error (which would otherwise count as variance), and the variance."""
    mean = jnp.mean(upcast(x), axis=axes, keepdims=True)
    mean_error = jnp.mean(upcast(x) - mean, axis=axes, keepdims=True)
    return mean, mean_error, jnp.mean((upcast(x) - mean - mean_error) ** 2, axis=axes, keepdims=True)


def _normalized(x, mean, mean_error, var, scale, offset, eps):
    """`scale (x − mean − mean_error) / √(var + eps) + offset`, or NaN if the variance overflowed."""
    var = jnp.where(var == jnp.inf, jnp.nan, var)
    arrays = (mean, mean_error, var, scale, offset)
    mean, mean_error, var, scale, offset = (jnp.broadcast_to(a.astype(upcast(x).dtype), x.shape) for a in arrays)
    return ((upcast(x) - mean - mean_error) / jnp.sqrt(var + eps) * scale + offset).astype(x.dtype)


def _log_softmax(x, axis, where=None):
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, -jnp.inf)
    row_max = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf))
    if where is not None:  # an entirely masked slice must not become one of -inf, which gives NaN
        row_max = jnp.where(jnp.any(where, axis=axis, keepdims=True), row_max, 0)
    shifted = x - row_max
    exps = jnp.exp(shifted) if where is None else jnp.where(where, jnp.exp(jnp.where(where, shifted, 0)), 0)
    total = jnp.sum(exps, axis=axis, keepdims=True)
    if where is None:
        return shifted - jnp.log(total)
    return jnp.where(where, shifted - jnp.log(jnp.where(total == 0, 1, total)), -jnp.inf)


def _cross_entropy(logits, labels, weights, class_weights, smoothing, classes=None):
    if classes is None:
        labels = (1 - smoothing) * labels + smoothing / max(labels.shape[-1], 1)
    else:
        count = jnp.maximum(jnp.sum(classes.astype(labels.dtype), axis=-1, keepdims=True), 1)
        labels = jnp.where(classes, (1 - smoothing) * labels + smoothing / jnp.broadcast_to(count, labels.shape), 0)
    if class_weights is not None:
        labels = labels * jnp.broadcast_to(class_weights.astype(labels.dtype), labels.shape)
    log_probs = _log_softmax(logits, -1, classes)
    loss = jnp.sum(_mul_zero_inf(labels, -log_probs), axis=-1)
    return loss if weights is None else _mul_zero_inf(weights.astype(loss.dtype), loss)


def _mul_zero_inf(weight, loss):
    """`weight * loss`, with 0 · inf = 0."""
    return weight * jnp.where((weight == 0) & (loss == jnp.inf), 0, loss)


def _labeled(scores, labels, ignore_index, where=None):
    """Scores with 0 in ignored rows, one-hot labels, ignored rows, and a factor per row: NaN for impossible labels.

    Scores of rows with impossible labels become NaN as well. Setting the scores, and not only the loss, keeps NaN out
    of the gradients of ignored rows and puts it into those of impossible labels.
    """
    scores, classes = upcast(scores), scores.shape[-1]
    if labels.dtype == jnp.uint32:  # int32 would wrap
        labels = jnp.minimum(labels, jnp.iinfo(jnp.int32).max)
    labels = labels.astype(jnp.int64 if labels.dtype.itemsize > 4 else jnp.int32)
    is_label = jnp.expand_dims(labels, -1) == jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    ignored = jnp.zeros(labels.shape, bool) if where is None else ~where
    if ignore_index is not None:
        ignored = ignored | (labels == ignore_index)
    poison = jnp.where(ignored | ((labels >= 0) & (labels < classes)), 1, jnp.nan)
    scores = jnp.where(jnp.expand_dims(ignored, -1), 0, scores * jnp.expand_dims(poison, -1))
    return scores, is_label, ignored, poison
