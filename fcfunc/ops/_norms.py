"""Normalisation over features or over the batch, with hand-written backward rules.

Every rule reads as those in `fcfunc.ops`, where all of these are to be found as well. `scale` and `offset` share one
dtype, which need not be that of `x`: float32 masters beside bfloat16 activations are usual. Statistics are computed in
at least float32. Where a variance overflows the output is NaN, not the 0 that a division by inf would give.
"""

import math

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import rule, wide


def layer_norm(x: jax.Array, scale: jax.Array, offset: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    r"""Layer normalisation: :math:`y = s ∘ \hat x + o`, :math:`\hat x = (x - μ) / \sqrt{σ^2 + ε}` over the last axis.

    `μ` and `σ²` are the mean and the variance (divided by the number of features) of each row.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      offset: `o`, `[features]`, in the dtype of `scale`.
      eps: added to the variance, in the square of the unit of `x`, above 0.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: `x`, `scale` and three numbers per row.

    Raises:
      TypeError: an argument is not of a floating-point dtype; `scale` and `offset` differ in dtype.
      ValueError: `scale` or `offset` is not `[features]`; `eps` is not above 0.

    Source: Ba et al. 2016, Layer Normalization; derived in docs/derivations.md#layer-norm.

    Example:
      >>> layer_norm(jnp.array([[1., 3.]]), jnp.ones(2), jnp.zeros(2)).round(3)
      Array([[-1.,  1.]], dtype=float32)
    """
    _arguments.array("layer_norm", x=x, scale=scale, offset=offset)
    scale, offset = (_layout.laid_along(as_array(a), as_array(x), (-1,)) for a in (scale, offset))
    return _layer_norm(x, scale, offset, eps=_arguments.number("layer_norm", eps=eps))


def layer_norm_fwd(x, scale, offset, *, eps=1e-5):
    """`(out, residuals)` of `layer_norm`."""
    _check_norm("layer_norm", x, eps, scale=scale, offset=offset)
    z = wide(x)
    mean, rest = _mean(z, -1)
    centred = (z - mean) - rest
    inverse = _inverse_root(jnp.mean(centred**2, axis=-1, keepdims=True), eps)
    out = _along(centred * inverse, scale) + _broadcast(offset, z)
    return out.astype(x.dtype), (x, scale, mean, rest, inverse)


def layer_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale, doffset)` of `layer_norm`."""
    x, scale, mean, rest, inverse = residuals
    wide_g = wide(g)
    normal, rows = ((wide(x) - mean) - rest) * inverse, tuple(range(x.ndim - 1))
    # dx = (ĝ − mean ĝ − x̂ mean(ĝ ∘ x̂)) / √(σ² + ε), ĝ = g ∘ s
    hat = _along(wide_g, scale)
    mean_hat = jnp.mean(hat, axis=-1, keepdims=True)
    dx = (hat - mean_hat - normal * jnp.mean(hat * normal, axis=-1, keepdims=True)) * inverse
    # ds = Σ g ∘ x̂, do = Σ g, over the rows
    dscale, doffset = jnp.sum(wide_g * normal, axis=rows), jnp.sum(wide_g, axis=rows)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), doffset.astype(scale.dtype)


_layer_norm = rule(layer_norm_fwd, layer_norm_bwd)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    r"""Root-mean-square normalisation: :math:`y = s ∘ x / \sqrt{\text{mean}(x^2) + ε}` over the last axis.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      eps: added to the mean square, in the square of the unit of `x`, above 0.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: `x`, `scale` and one number per row.

    Raises:
      TypeError: an argument is not of a floating-point dtype.
      ValueError: `scale` is not `[features]`; `eps` is not above 0.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization; derived in docs/derivations.md#rms-norm.

    Example:
      >>> rms_norm(jnp.array([[5., -5.]]), jnp.ones(2)).round(3)
      Array([[ 1., -1.]], dtype=float32)
    """
    _arguments.array("rms_norm", x=x, scale=scale)
    scale = _layout.laid_along(as_array(scale), as_array(x), (-1,))
    return _rms_norm(x, scale, eps=_arguments.number("rms_norm", eps=eps))


def rms_norm_fwd(x, scale, *, eps=1e-5):
    """`(out, residuals)` of `rms_norm`."""
    _check_norm("rms_norm", x, eps, scale=scale)
    z = wide(x)
    inverse = _inverse_root(jnp.mean(z**2, axis=-1, keepdims=True), eps)
    return _along(z * inverse, scale).astype(x.dtype), (x, scale, inverse)


def rms_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale)` of `rms_norm`."""
    x, scale, inverse = residuals
    wide_g = wide(g)
    normal = wide(x) * inverse
    # dx = (ĝ − x̂ mean(ĝ ∘ x̂)) / √(mean x² + ε), ĝ = g ∘ s
    hat = _along(wide_g, scale)
    dx = (hat - normal * jnp.mean(hat * normal, axis=-1, keepdims=True)) * inverse
    # ds = Σ g ∘ x̂, over the rows
    dscale = jnp.sum(wide_g * normal, axis=tuple(range(x.ndim - 1)))
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
) -> tuple[jax.Array, dict[str, jax.Array]]:
    r"""Batch normalisation: :math:`y = s ∘ \hat x + o`, :math:`\hat x = (x - μ) / \sqrt{σ^2 + ε}`, per feature.

    In training `μ` and `σ²` are the mean and the variance (divided by the number of rows) of the batch, over all axes
    but the last, and the running statistics move towards them: `state ← decay state + (1 - decay) batch`, with the
    variance divided by the number of rows less one, which is the unbiased estimate. Otherwise they are the state, which
    comes back as it was. On a mesh the batch is the whole batch; inside `shard_map` it is the shard's.

    Args:
      x: `[..., features]`.
      scale: `s`, `[features]`.
      offset: `o`, `[features]`, in the dtype of `scale`.
      state: `{"mean": [features], "var": [features]}`, in at least float32, as from `init_batch_norm_state`.
      training: whether the batch is normalised by its own statistics.
      decay: how much of the running statistics stays in a step, in [0, 1]; 1 minus what PyTorch calls momentum.
      eps: added to the variance, in the square of the unit of `x`, above 0.

    Returns:
      `(y, state)`: the shape and dtype of `x`, and the new state. Saved for the backward pass: `x`, `scale` and three
      numbers per feature. The state has gradients as well, through the batch's statistics.

    Raises:
      TypeError: an argument is not of a floating-point dtype; `scale` and `offset` differ in dtype.
      ValueError: `scale`, `offset` or the state is not `[features]`; a training batch of fewer than two rows, which has
        no variance; `eps` is not above 0; `decay` is outside [0, 1].

    Source: Ioffe and Szegedy 2015, Batch Normalization; derived in docs/derivations.md#batch-norm.

    Example:
      >>> state = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> y, state = batch_norm(jnp.array([[1.], [3.]]), jnp.ones(1), jnp.zeros(1), state, training=True)
      >>> state
      {'mean': Array([0.2], dtype=float32), 'var': Array([1.1], dtype=float32)}
    """
    decay, eps = _arguments.number("batch_norm", decay=decay), _arguments.number("batch_norm", eps=eps)
    if not 0 <= decay <= 1:
        raise ValueError(f"batch_norm: decay must be in [0, 1], got {decay}")
    if not isinstance(state, dict) or state.keys() != {"mean", "var"}:
        raise TypeError(f"batch_norm: state must be a dict of mean and var, got {state!r:.80}")
    _check_norm("batch_norm", x, eps, scale=scale, offset=offset)
    _check_norm("batch_norm", x, eps, mean=state["mean"], var=state["var"])
    if any(jnp.result_type(a) in (jnp.bfloat16, jnp.float16) for a in state.values()):
        raise TypeError(f"batch_norm: the state must be in at least float32, got {_arguments.describe(state['mean'])}")
    x = as_array(x)
    scale, offset, mean, var = (
        _layout.laid_along(as_array(a), x, (-1,)) for a in (scale, offset, state["mean"], state["var"])
    )
    if not training:
        z = wide(x)
        normal = _along(z - _broadcast(mean, z), _inverse_root(wide(var), eps))
        return (_along(normal, scale) + _broadcast(offset, z)).astype(x.dtype), state
    out, batch_mean, batch_var = _batch_norm(x, scale, offset, eps=eps)
    rows = math.prod(x.shape[:-1])
    moved = {"mean": (mean, batch_mean), "var": (var, batch_var * (rows / (rows - 1)))}
    return out, {name: decay * old + (1 - decay) * new.astype(old.dtype) for name, (old, new) in moved.items()}


def batch_norm_fwd(x, scale, offset, *, eps=1e-5):
    """`((out, mean, var), residuals)` of `batch_norm` in training: the batch's own statistics, biased variance."""
    _check_norm("batch_norm", x, eps, scale=scale, offset=offset)
    rows = tuple(range(x.ndim - 1))
    if math.prod(x.shape[:-1]) < 2:
        raise ValueError(
            f"batch_norm: a training batch needs at least two rows to have a variance, got {list(x.shape)}"
        )
    z = wide(x)
    mean, rest = (m.reshape(z.shape[-1:]) for m in _mean(z, rows))
    centred = (z - _broadcast(mean, z)) - _broadcast(rest, z)
    var = jnp.mean(centred**2, axis=rows)
    inverse = _inverse_root(var, eps)
    out = _along(_along(centred, inverse), scale) + _broadcast(offset, z)
    return (out.astype(x.dtype), mean + rest, var), (x, scale, mean, rest, inverse)


def batch_norm_bwd(residuals, g):
    """Cotangents `(dx, dscale, doffset)` of `batch_norm` in training; `g` is that of `(out, mean, var)`."""
    x, scale, mean, rest, inverse = residuals
    g_out, g_mean, g_var = g
    rows, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
    wide_g = wide(g_out)
    centred = (wide(x) - _broadcast(mean, wide_g)) - _broadcast(rest, wide_g)
    normal = _along(centred, inverse)
    # ds = Σ g ∘ x̂, do = Σ g, over the rows
    dscale, doffset = jnp.sum(wide_g * normal, axis=rows), jnp.sum(wide_g, axis=rows)
    # dx = (s / √(σ² + ε)) ∘ (g − do/N − x̂ ds/N), and (g_μ + 2 g_σ² (x − μ)) / N by way of the statistics
    by_out = wide_g - _broadcast(doffset / count, wide_g) - _along(normal, dscale / count)
    by_statistics = _broadcast(g_mean / count, wide_g) + _along(centred, 2 * g_var / count)
    dx = _along(by_out, wide(scale) * inverse) + by_statistics
    return dx.astype(x.dtype), dscale.astype(scale.dtype), doffset.astype(scale.dtype)


_batch_norm = rule(batch_norm_fwd, batch_norm_bwd)


def _mean(z, axes):
    """The mean as two numbers, the second what its rounding left over: that would count as variance."""
    mean = jnp.mean(z, axis=axes, keepdims=True)
    return mean, jnp.mean(z - mean, axis=axes, keepdims=True)


def _inverse_root(variance, eps):
    """`1/√(variance + eps)`, and NaN for a variance that overflowed."""
    return jnp.where(variance == jnp.inf, jnp.nan, jax.lax.rsqrt(variance + eps))


def _along(x, features):
    """`x` times one number per feature."""
    return x * _broadcast(features, x)


def _broadcast(features, like):
    return jnp.broadcast_to(features.astype(like.dtype), like.shape)


def _check_norm(where: str, x, eps, **features) -> None:
    _arguments.floating(where, x=x)
    _arguments.one_dtype(where, **features)
    if not eps > 0:
        raise ValueError(f"{where}: eps must be above 0, got {eps}")
    for name, f in features.items():
        if jnp.ndim(x) < 1 or jnp.shape(f) != jnp.shape(x)[-1:]:
            raise ValueError(
                f"{where}: x [..., features] and {name} [features] expected, "
                f"got x {list(jnp.shape(x))} and {name} {list(jnp.shape(f))}"
            )
