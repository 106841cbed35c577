"""Activations: elementwise functions. A NaN stays a NaN; -inf gives the limit."""

import math

import jax
import jax.numpy as jnp

from fcfunc import _arguments
from fcfunc._rule import rule, upcast


def relu(x: jax.Array) -> jax.Array:
    r"""The rectifier: :math:`y = \max(x, 0)`.

    The derivative is 1 for `x > 0` and 0 for `x < 0`. At the kink it is 0, by convention. A NaN stays a NaN
    and passes the cotangent on, so that it is noticed.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: one boolean per element.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    # The mask is computed from the output, so that the input need not be kept. It is False for a NaN.
    return out, out <= 0


def relu_bwd(dead, g):
    """Cotangent `(dx,)` of `relu`."""
    # dx = g ∘ [x > 0]
    return (jnp.where(dead, 0, g),)


_relu = rule(relu_fwd, relu_bwd)


def sigmoid(x: jax.Array) -> jax.Array:
    r"""The logistic function: :math:`y = 1 / (1 + e^{-x})`, without overflow for any `x`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    r"""The hyperbolic tangent: :math:`y = \tanh x`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    # dx = g ∘ (1 − y²), as a product: 1 − y is exact where y is near 1, 1 − y² is not
    return ((upcast(g) * (1 - y) * (1 + y)).astype(g.dtype),)


_tanh = rule(tanh_fwd, tanh_bwd)


def softplus(x: jax.Array) -> jax.Array:
    r"""Softplus, the smooth rectifier: :math:`y = \log(1 + e^x)`, without overflow for any `x`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the output, in at least float32.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    # dx = g σ(x), and σ(x) = 1 − e^{−y}: exact where y is small, which 1 − exp(−y) is not
    return ((upcast(g) * -jnp.expm1(-upcast(y))).astype(g.dtype),)


_softplus = rule(softplus_fwd, softplus_bwd)


def leaky_relu(x: jax.Array, *, negative_slope: float = 0.01) -> jax.Array:
    r"""The leaky rectifier: :math:`y = x` for `x > 0`, :math:`s x` otherwise.

    The derivative at the kink is `negative_slope`, by convention: with a slope of 0 this is `relu`.

    Args:
      x: any shape.
      negative_slope: `s`.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: one boolean per element.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    r"""The exponential linear unit: :math:`y = x` for `x > 0`, :math:`α (e^x - 1)` otherwise.

    With an `alpha` other than 1 there is a kink at 0; the derivative there is `alpha`, by convention.

    Args:
      x: any shape.
      alpha: the negative of the limit at -inf, at least 0.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` is not of a floating-point dtype.
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
    # dx = g where x > 0, g α e^x elsewhere; y + α is the same number without its digits, where x is far below 0.
    # e^0 in the branch that is not taken: an infinite one makes the derivative of this gradient NaN.
    slope = alpha * jnp.exp(jnp.where(positive, 0, z))
    return (jnp.where(positive, g, (upcast(g) * slope).astype(g.dtype)),)


_elu = rule(elu_fwd, elu_bwd)


def silu(x: jax.Array) -> jax.Array:
    r"""The sigmoid linear unit, also called swish: :math:`y = x σ(x)`.

    Args:
      x: any shape.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    r"""The Gaussian error linear unit: :math:`y = x Φ(x)`, `Φ` the standard normal distribution function.

    With `approximate=True`, as in `jax.nn.gelu`, :math:`Φ(x) ≈ σ(2u)` with :math:`u = \sqrt{2/π} (x + 0.044715 x^3)`,
    which is the same as :math:`\tfrac12 (1 + \tanh u)` but keeps the digits of its left tail.

    Args:
      x: any shape.
      approximate: the form with tanh; False for the exact one, which is PyTorch's default.

    Returns:
      The shape and dtype of `x`. Saved for the backward pass: the input.

    Raises:
      TypeError: `x` is not of a floating-point dtype.

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
    # Beyond ±40, Φ and the sigmoid of 2u are 0 or 1 in float64 too, and a cube of z would overflow.
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
    """`Φ(z)` from erfc: 1 + erf(z) would lose the left tail."""
    return 0.5 * jax.lax.erfc(-z / math.sqrt(2))


def _at_least_lowest(z):
    """`z` with -inf as the lowest number: its product with a probability of 0 is then 0, the limit, and not NaN."""
    return jnp.maximum(z, jnp.finfo(z.dtype).min)


def _clip_finite(z):
    """`z` with ±inf as the largest numbers, for a slope that multiplies them by 0."""
    return jnp.clip(z, jnp.finfo(z.dtype).min, jnp.finfo(z.dtype).max)


def checked_options(where: str, options: dict) -> dict:
    """Options of an activation, as static values."""
    checked = dict(options)
    if "approximate" in options:
        _arguments.boolean(where, approximate=options["approximate"])
    for name in options.keys() & {"alpha", "negative_slope"}:
        checked[name] = _arguments.number(where, **{name: options[name]})
    if not checked.get("alpha", 0) >= 0:
        raise ValueError(f"{where}: alpha must be at least 0, got {checked['alpha']}")
    return checked
