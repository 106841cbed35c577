"""Elementwise activations. NaN gives NaN, and -inf gives the limit."""

import math

import jax
import jax.numpy as jnp

from fcfunc import _arguments
from fcfunc._rule import rule, upcast


def relu(x: jax.Array) -> jax.Array:
    r"""Rectified linear unit: :math:`y = \max(x, 0)`.

    The derivative is 1 for `x > 0` and 0 for `x < 0`; at the kink it is 0, by convention. A NaN gives NaN and lets
    the cotangent through, so that it does not go unnoticed.

    Args:
      x: array of any shape.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: one boolean per element.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: derived in docs/background/derivations.md#relu.

    Example:
      >>> relu(jnp.array([-1., 0., 2.]))
      Array([0., 0., 2.], dtype=float32)
    """
    _arguments.floating("relu", x=x)
    return _relu(x)


def relu_fwd(x):
    """`(out, residuals)` of `relu`."""
    # y = max(x, 0)
    out = jnp.where(x <= 0, 0, x)
    # Computing the mask from the output means that the input need not be kept. The mask is False for a NaN.
    return out, out <= 0


def relu_bwd(dead, g):
    """Cotangent `(dx,)` of `relu`."""
    # dx = g ∘ [x > 0]
    return (jnp.where(dead, 0, g),)


_relu = rule(relu_fwd, relu_bwd)


def sigmoid(x: jax.Array) -> jax.Array:
    r"""Logistic sigmoid: :math:`y = 1 / (1 + e^{-x})`, without overflow for any `x`.

    Args:
      x: array of any shape.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: derived in docs/background/derivations.md#sigmoid.

    Example:
      >>> sigmoid(jnp.array([0., 1e30]))
      Array([0.5, 1. ], dtype=float32)
    """
    _arguments.floating("sigmoid", x=x)
    return _sigmoid(x)


def sigmoid_fwd(x):
    """`(out, residuals)` of `sigmoid`."""
    # y = 1 / (1 + e^{−x})
    y = jax.lax.logistic(upcast(x))
    return y.astype(x.dtype), y


def sigmoid_bwd(y, g):
    """Cotangent `(dx,)` of `sigmoid`."""
    y = upcast(y)
    # dx = g ∘ y ∘ (1 − y)
    return ((upcast(g) * y * (1 - y)).astype(g.dtype),)


_sigmoid = rule(sigmoid_fwd, sigmoid_bwd)


def tanh(x: jax.Array) -> jax.Array:
    r"""Hyperbolic tangent: :math:`y = \tanh x`.

    Args:
      x: array of any shape.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: derived in docs/background/derivations.md#tanh.

    Example:
      >>> tanh(jnp.array([0., 1e30]))
      Array([0., 1.], dtype=float32)
    """
    _arguments.floating("tanh", x=x)
    return _tanh(x)


def tanh_fwd(x):
    """`(out, residuals)` of `tanh`."""
    # y = tanh x
    y = jnp.tanh(upcast(x))
    return y.astype(x.dtype), y


def tanh_bwd(y, g):
    """Cotangent `(dx,)` of `tanh`."""
    y = upcast(y)
    # dx = g ∘ (1 − y²), as a product, because 1 − y is exact for y near 1 and 1 − y² is not
    return ((upcast(g) * (1 - y) * (1 + y)).astype(g.dtype),)


_tanh = rule(tanh_fwd, tanh_bwd)


def softplus(x: jax.Array) -> jax.Array:
    r"""Softplus, a smooth version of ReLU: :math:`y = \log(1 + e^x)`, without overflow for any `x`.

    Args:
      x: array of any shape.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: derived in docs/background/derivations.md#softplus.

    Example:
      >>> softplus(jnp.array([0., 1e30]))
      Array([6.931472e-01, 1.000000e+30], dtype=float32)
    """
    _arguments.floating("softplus", x=x)
    return _softplus(x)


def softplus_fwd(x):
    """`(out, residuals)` of `softplus`."""
    # y = log(1 + e^x)
    y = jax.nn.softplus(upcast(x))
    return y.astype(x.dtype), y


def softplus_bwd(y, g):
    """Cotangent `(dx,)` of `softplus`."""
    # dx = g σ(x), and σ(x) = 1 − e^{−y}, by expm1 because 1 − exp(−y) is inexact for small y
    return ((upcast(g) * -jnp.expm1(-upcast(y))).astype(g.dtype),)


_softplus = rule(softplus_fwd, softplus_bwd)


def leaky_relu(x: jax.Array, *, negative_slope: float = 0.01) -> jax.Array:
    r"""Leaky rectified linear unit: :math:`y = x` for `x > 0`, :math:`s x` otherwise.

    At the kink the derivative is `negative_slope`, by convention. A slope of 0 gives `relu`.

    Args:
      x: array of any shape.
      negative_slope: `s`, the slope for `x < 0`.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: one boolean per element.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: derived in docs/background/derivations.md#leaky-relu.

    Example:
      >>> leaky_relu(jnp.array([-1., 0., 2.]))
      Array([-0.01,  0.  ,  2.  ], dtype=float32)
    """
    _arguments.floating("leaky_relu", x=x)
    return _leaky_relu(x, **checked_options("leaky_relu", {"negative_slope": negative_slope}))


def leaky_relu_fwd(x, *, negative_slope=0.01):
    """`(out, residuals)` of `leaky_relu`."""
    # y = x for x > 0, s x elsewhere
    dead, z = x <= 0, upcast(x)
    below = negative_slope * z if negative_slope else 0  # 0 · -inf would be NaN
    return jnp.where(dead, below, z).astype(x.dtype), dead


def leaky_relu_bwd(dead, g, *, negative_slope=0.01):
    """Cotangent `(dx,)` of `leaky_relu`."""
    # dx = g where x > 0, s g elsewhere
    return (jnp.where(dead, negative_slope * upcast(g), upcast(g)).astype(g.dtype),)


_leaky_relu = rule(leaky_relu_fwd, leaky_relu_bwd)


def elu(x: jax.Array, *, alpha: float = 1.0) -> jax.Array:
    r"""Exponential linear unit: :math:`y = x` for `x > 0`, :math:`α (e^x - 1)` otherwise.

    Unless `alpha` is 1, there is a kink at 0, where the derivative is `alpha` by convention.

    Args:
      x: array of any shape.
      alpha: `α`, at least 0. The limit at -inf is `-α`.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` does not have a floating-point dtype.
      ValueError: `alpha` is below 0.

    Source: Clevert et al. 2015, Fast and Accurate Deep Network Learning by ELUs; derived in
    docs/background/derivations.md#elu.

    Example:
      >>> elu(jnp.array([-jnp.inf, 0., 2.]))
      Array([-1.,  0.,  2.], dtype=float32)
    """
    _arguments.floating("elu", x=x)
    return _elu(x, **checked_options("elu", {"alpha": alpha}))


def elu_fwd(x, *, alpha=1.0):
    """`(out, residuals)` of `elu`."""
    # y = x for x > 0, α (e^x − 1) elsewhere
    z = upcast(x)
    positive = z > 0
    return jnp.where(positive, z, alpha * jnp.expm1(jnp.where(positive, 0, z))).astype(x.dtype), x


def elu_bwd(x, g, *, alpha=1.0):
    """Cotangent `(dx,)` of `elu`."""
    z = upcast(x)
    positive = z > 0
    # dx = g where x > 0, g α e^x elsewhere. The equivalent y + α would lose its digits where x is far below 0.
    # The branch that is not taken computes e^0, because an infinity there makes the derivative of this gradient NaN.
    slope = alpha * jnp.exp(jnp.where(positive, 0, z))
    return (jnp.where(positive, g, (upcast(g) * slope).astype(g.dtype)),)


_elu = rule(elu_fwd, elu_bwd)


def silu(x: jax.Array) -> jax.Array:
    r"""Sigmoid linear unit, also called swish: :math:`y = x σ(x)`.

    Args:
      x: array of any shape.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: Elfwing et al. 2017, Sigmoid-Weighted Linear Units; derived in docs/background/derivations.md#silu.

    Example:
      >>> silu(jnp.array([-jnp.inf, 0., 100.]))
      Array([ -0.,   0., 100.], dtype=float32)
    """
    _arguments.floating("silu", x=x)
    return _silu(x)


def silu_fwd(x):
    """`(out, residuals)` of `silu`."""
    # y = x σ(x)
    z = _at_least_lowest(upcast(x))
    return (z * jax.lax.logistic(z)).astype(x.dtype), x


def silu_bwd(x, g):
    """Cotangent `(dx,)` of `silu`."""
    z = _clip_finite(upcast(x))
    # dx = g σ(x) (1 + x (1 − σ(x))), and 1 − σ(x) = σ(−x)
    return ((upcast(g) * (jax.lax.logistic(z) * (1 + z * jax.lax.logistic(-z)))).astype(g.dtype),)


_silu = rule(silu_fwd, silu_bwd)


def gelu(x: jax.Array, *, approximate: bool = True) -> jax.Array:
    r"""Gaussian error linear unit: :math:`y = x Φ(x)`, where `Φ` is the standard normal CDF.

    With `approximate=True`, as in `jax.nn.gelu`, :math:`Φ(x) ≈ σ(2u)` with :math:`u = \sqrt{2/π} (x + 0.044715 x^3)`.
    This equals :math:`\tfrac12 (1 + \tanh u)` but keeps the digits of its left tail.

    Args:
      x: array of any shape.
      approximate: True for the tanh approximation; False for the exact form, which is PyTorch's default.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` does not have a floating-point dtype.

    Source: Hendrycks and Gimpel 2016, Gaussian Error Linear Units; derived in docs/background/derivations.md#gelu.

    Example:
      >>> gelu(jnp.array([-jnp.inf, 0., 100.]))
      Array([ -0.,   0., 100.], dtype=float32)
    """
    _arguments.floating("gelu", x=x)
    return _gelu(x, **checked_options("gelu", {"approximate": approximate}))


def gelu_fwd(x, *, approximate=True):
    """`(out, residuals)` of `gelu`."""
    # y = x Φ(x), or x σ(2u)
    z = _at_least_lowest(upcast(x))
    cdf = jax.lax.logistic(2 * _gelu_u(z)[0]) if approximate else _normal_cdf(z)
    return (z * cdf).astype(x.dtype), x


def gelu_bwd(x, g, *, approximate=True):
    """Cotangent `(dx,)` of `gelu`."""
    # Beyond ±40, Φ(z) and σ(2u) are 0 or 1 even in float64, and the cube of z could overflow.
    z = jnp.clip(upcast(x), -40, 40)
    if approximate:
        # dx = g (σ(2u) + x σ(2u) σ(−2u) 2u′), u′ = √(2/π) (1 + 3 · 0.044715 x²)
        u, slope = _gelu_u(z)
        cdf = jax.lax.logistic(2 * u)
        return ((upcast(g) * (cdf + z * (cdf * jax.lax.logistic(-2 * u) * 2 * slope))).astype(g.dtype),)
    # dx = g (Φ(x) + x φ(x)), φ(x) = e^{−x²/2} / √(2π)
    density = jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return ((upcast(g) * (_normal_cdf(z) + z * density)).astype(g.dtype),)


_gelu = rule(gelu_fwd, gelu_bwd)


def _gelu_u(z):
    """`u` and its derivative."""
    root = math.sqrt(2 / math.pi)
    return root * (z + 0.044715 * z**3), root * (1 + 3 * 0.044715 * z**2)


def _normal_cdf(z):
    """`Φ(z)`, computed with erfc because 1 + erf(z) would lose the left tail."""
    return 0.5 * jax.lax.erfc(-z / math.sqrt(2))


def _at_least_lowest(z):
    """`z` with -inf replaced by the lowest finite number, which times a probability of 0 is the limit 0, not NaN."""
    return jnp.maximum(z, jnp.finfo(z.dtype).min)


def _clip_finite(z):
    """`z` with ±inf replaced by the largest finite numbers, which a slope can multiply by 0."""
    return jnp.clip(z, jnp.finfo(z.dtype).min, jnp.finfo(z.dtype).max)


def checked_options(where: str, options: dict) -> dict:
    """Checks the options of an activation and returns them as static values."""
    checked = dict(options)
    if "approximate" in options:
        _arguments.boolean(where, approximate=options["approximate"])
    for name in options.keys() & {"alpha", "negative_slope"}:
        checked[name] = _arguments.number(where, **{name: options[name]})
    if not checked.get("alpha", 0) >= 0:
        raise ValueError(f"{where}: alpha must be at least 0, got {checked['alpha']}")
    return checked
