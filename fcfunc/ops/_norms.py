"""Normalization over features or over the batch.

`scale` and `offset` share one dtype, which may differ from that of `x`: float32 parameters with bfloat16 activations
are common. Statistics are computed in at least float32. If a variance overflows, the output is NaN; dividing by inf
would give 0 instead.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout
from fcfunc._rule import rule, upcast


def layer_norm(x: jax.Array, scale: jax.Array, offset: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    r"""Layer normalization: :math:`y = s ∘ \hat x + o`, :math:`\hat x = (x - μ) / \sqrt{σ^2 + ε}` over the last axis.

    `μ` and `σ²` are the mean and the biased variance of each row.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      offset: `o`, `[features]`, in the dtype of `scale`.
      eps: number above 0 added to the variance, in squared units of `x`.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: `x`, `scale` and three numbers per row.

    Raises:
      TypeError: an argument does not have a floating-point dtype; `scale` and `offset` differ in dtype.
      ValueError: `scale` or `offset` is not `[features]`; `eps` is not above 0.

    Source: Ba et al. 2016, Layer Normalization; derived in docs/background/derivations.md#layer-norm.

    Example:
      >>> layer_norm(jnp.array([[1., 3.]]), jnp.ones(2), jnp.zeros(2)).round(3)
      Array([[-1.,  1.]], dtype=float32)
    """
    x, eps, scale, offset = _norm_arguments("layer_norm", x, eps, scale=scale, offset=offset)
    return _layer_norm(x, scale, offset, eps=eps)


def layer_norm_fwd(x, scale, offset, *, eps=1e-5):
    """`(out, residuals)` of `layer_norm`."""
    # y = s ∘ (x − μ) / √(σ² + ε) + o
    z = upcast(x)
    mean, mean_error = _mean(z, -1)
    centered = (z - mean) - mean_error
    inv_std = _inverse_root(jnp.mean(centered**2, axis=-1, keepdims=True), eps)
    out = _times(centered * inv_std, scale) + _broadcast(offset, z)
    return out.astype(x.dtype), (x, scale, mean, mean_error, inv_std)


def layer_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale, doffset)` of `layer_norm`."""
    x, scale, mean, mean_error, inv_std = residuals
    g_ = upcast(g)
    x_hat, row_axes = ((upcast(x) - mean) - mean_error) * inv_std, tuple(range(x.ndim - 1))
    # dx = (ĝ − mean ĝ − x̂ mean(ĝ ∘ x̂)) / √(σ² + ε), ĝ = g ∘ s
    g_hat = _times(g_, scale)
    mean_g_hat = jnp.mean(g_hat, axis=-1, keepdims=True)
    dx = (g_hat - mean_g_hat - x_hat * jnp.mean(g_hat * x_hat, axis=-1, keepdims=True)) * inv_std
    # ds = Σ g ∘ x̂, do = Σ g, over the rows
    dscale, doffset = jnp.sum(g_ * x_hat, axis=row_axes), jnp.sum(g_, axis=row_axes)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), doffset.astype(scale.dtype)


_layer_norm = rule(layer_norm_fwd, layer_norm_bwd)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    r"""Root-mean-square normalization: :math:`y = s ∘ x / \sqrt{\text{mean}(x^2) + ε}` over the last axis.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      eps: number above 0 added to the mean square, in squared units of `x`.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: `x`, `scale` and one number per row.

    Raises:
      TypeError: an argument does not have a floating-point dtype.
      ValueError: `scale` is not `[features]`; `eps` is not above 0.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization; derived in
    docs/background/derivations.md#rms-norm.

    Example:
      >>> rms_norm(jnp.array([[5., -5.]]), jnp.ones(2)).round(3)
      Array([[ 1., -1.]], dtype=float32)
    """
    x, eps, scale = _norm_arguments("rms_norm", x, eps, scale=scale)
    return _rms_norm(x, scale, eps=eps)


def rms_norm_fwd(x, scale, *, eps=1e-5):
    """`(out, residuals)` of `rms_norm`."""
    # y = s ∘ x / √(mean x² + ε)
    z = upcast(x)
    inv_std = _inverse_root(jnp.mean(z**2, axis=-1, keepdims=True), eps)
    return _times(z * inv_std, scale).astype(x.dtype), (x, scale, inv_std)


def rms_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale)` of `rms_norm`."""
    x, scale, inv_std = residuals
    g_ = upcast(g)
    x_hat = upcast(x) * inv_std
    # dx = (ĝ − x̂ mean(ĝ ∘ x̂)) / √(mean x² + ε), ĝ = g ∘ s
    g_hat = _times(g_, scale)
    dx = (g_hat - x_hat * jnp.mean(g_hat * x_hat, axis=-1, keepdims=True)) * inv_std
    # ds = Σ g ∘ x̂, over the rows
    dscale = jnp.sum(g_ * x_hat, axis=tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


_rms_norm = rule(rms_norm_fwd, rms_norm_bwd)


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    offset: jax.Array,
    state: dict[str, jax.Array],
    *,
    training: bool,
    decay: float = 0.9,
    eps: float = 1e-5,
    unbiased_variance: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Batch normalization: :math:`y = s ∘ \hat x + o`, :math:`\hat x = (x - μ) / \sqrt{σ^2 + ε}`, per feature.

    In training, `μ` and `σ²` are the mean and the biased variance of the batch over all axes but the last, and the
    running statistics move toward them: `state ← decay * state + (1 - decay) * batch`. In evaluation, `μ` and `σ²` are
    the running statistics, which are returned unchanged. On a mesh, the batch is the global batch; inside `shard_map`,
    it is the local shard.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      offset: `o`, `[features]`, in the dtype of `scale`.
      state: `{"mean": [features], "var": [features]}`, in at least float32, such as an entry of the list
        that `Network.init_batch_norm_state` returns.
      training: True to normalize the batch by its own statistics, False to use the running ones.
      decay: fraction of the running statistics that each step keeps, in [0, 1]; 1 minus PyTorch's momentum.
      eps: number above 0 added to the variance, in squared units of `x`.
      unbiased_variance: True if the running variance tracks the unbiased estimate, which divides by the number of
        rows minus one, as in PyTorch; False for the biased one, as in Flax and Keras.

    Returns:
      `(y, state)`: `y` with the shape and dtype of `x`, and the new state. Saved for the backward pass: `x`, `scale`
      and three numbers per feature. The new state is differentiable too, through the batch statistics.

    Raises:
      TypeError: an argument does not have a floating-point dtype; `scale` and `offset` differ in dtype.
      ValueError: `scale`, `offset` or the state is not `[features]`; a training batch has fewer than two rows, and so
        no variance; `eps` is not above 0; `decay` is outside [0, 1].

    Source: Ioffe and Szegedy 2015, Batch Normalization; derived in docs/background/derivations.md#batch-norm.

    Example:
      >>> state = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> y, state = batch_norm(jnp.array([[1.], [3.]]), jnp.ones(1), jnp.zeros(1), state, training=True)
      >>> state
      {'mean': Array([0.2], dtype=float32), 'var': Array([1.1], dtype=float32)}
    """
    _arguments.boolean("batch_norm", training=training, unbiased_variance=unbiased_variance)
    decay = _arguments.number("batch_norm", decay=decay)
    if not 0 <= decay <= 1:
        raise ValueError(f"batch_norm: decay must be in [0, 1], got {decay}")
    if not isinstance(state, dict) or state.keys() != {"mean", "var"}:
        raise TypeError(f"batch_norm: state must be a dict of mean and var, got {state!r:.80}")
    x, eps, mean, var = _norm_arguments("batch_norm", x, eps, mean=state["mean"], var=state["var"])
    x, eps, scale, offset = _norm_arguments("batch_norm", x, eps, scale=scale, offset=offset)
    if mean.dtype in (jnp.bfloat16, jnp.float16):
        raise TypeError(f"batch_norm: the state must be in at least float32, got {_arguments.describe(mean)}")
    count = math.prod(x.shape[:-1])
    if not training:
        z = upcast(x)
        x_hat = _times(z - _broadcast(mean, z), _inverse_root(upcast(var), eps))
        return (_times(x_hat, scale) + _broadcast(offset, z)).astype(x.dtype), state
    if count < 2:
        raise ValueError(
            f"batch_norm: a training batch needs at least two rows to have a variance, got {list(x.shape)}"
        )
    out, batch_mean, batch_var = _batch_norm(x, scale, offset, eps=eps)
    batch_var = batch_var * (count / (count - 1)) if unbiased_variance else batch_var
    moved = {"mean": (mean, batch_mean), "var": (var, batch_var)}
    return out, {name: decay * old + (1 - decay) * new.astype(old.dtype) for name, (old, new) in moved.items()}


def batch_norm_fwd(x, scale, offset, *, eps=1e-5):
    """`((out, mean, var), residuals)` of `batch_norm` in training, with the batch mean and biased variance."""
    # y = s ∘ (x − μ) / √(σ² + ε) + o, per feature
    row_axes = tuple(range(x.ndim - 1))
    z = upcast(x)
    mean, mean_error = (m.reshape(z.shape[-1:]) for m in _mean(z, row_axes))
    centered = (z - _broadcast(mean, z)) - _broadcast(mean_error, z)
    var = jnp.mean(centered**2, axis=row_axes)
    inv_std = _inverse_root(var, eps)
    out = _times(_times(centered, inv_std), scale) + _broadcast(offset, z)
    return (out.astype(x.dtype), mean + mean_error, var), (x, scale, mean, mean_error, inv_std)


def batch_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale, doffset)` of `batch_norm` in training; `g` is the cotangent of `(out, mean, var)`."""
    x, scale, mean, mean_error, inv_std = residuals
    g_out, g_mean, g_var = g
    row_axes, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
    g_ = upcast(g_out)
    centered = (upcast(x) - _broadcast(mean, g_)) - _broadcast(mean_error, g_)
    x_hat = _times(centered, inv_std)
    # ds = Σ g ∘ x̂, do = Σ g, over the rows
    dscale, doffset = jnp.sum(g_ * x_hat, axis=row_axes), jnp.sum(g_, axis=row_axes)
    # dx = (s / √(σ² + ε)) ∘ (g − do/N − x̂ ds/N), plus (g_μ + 2 g_σ² (x − μ)) / N through the statistics
    by_out = g_ - _broadcast(doffset / count, g_) - _times(x_hat, dscale / count)
    by_statistics = _broadcast(g_mean / count, g_) + _times(centered, 2 * g_var / count)
    dx = _times(by_out, upcast(scale) * inv_std) + by_statistics
    return dx.astype(x.dtype), dscale.astype(scale.dtype), doffset.astype(scale.dtype)


_batch_norm = rule(batch_norm_fwd, batch_norm_bwd)


def _mean(z, axes):
    """The mean and its rounding error, which would otherwise count as variance."""
    mean = jnp.mean(z, axis=axes, keepdims=True)
    return mean, jnp.mean(z - mean, axis=axes, keepdims=True)


def _inverse_root(variance, eps):
    """`1/√(variance + eps)`, or NaN if the variance overflowed."""
    return jnp.where(variance == jnp.inf, jnp.nan, jax.lax.rsqrt(variance + eps))


def _times(x, features):
    """`x` times a vector with one element per feature."""
    return x * _broadcast(features, x)


def _broadcast(features, like):
    return jnp.broadcast_to(features.astype(like.dtype), like.shape)


def _norm_arguments(where: str, x, eps, **features):
    """Checks and returns `(x, eps, *features)`; the vectors in `features` are sharded like the last axis of `x`."""
    _arguments.floating(where, x=x)
    _arguments.one_dtype(where, **features)
    eps = _arguments.number(where, eps=eps)
    if not eps > 0:
        raise ValueError(f"{where}: eps must be above 0, got {eps}")
    for name, f in features.items():
        if jnp.ndim(x) < 1 or np.shape(f) != np.shape(x)[-1:]:
            raise ValueError(
                f"{where}: expected x [..., features] and {name} [features], "
                f"got x {list(np.shape(x))} and {name} {list(np.shape(f))}"
            )
    x = jnp.asarray(x)
    return x, eps, *(_layout.reshard_like_axes(jnp.asarray(f), x, (-1,)) for f in features.values())
