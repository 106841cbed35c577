"""An affine layer and its activation as one rule."""

import inspect

import jax
import jax.numpy as jnp

from fcfunc import _layout
from fcfunc._rule import rule, sum_dtype
from fcfunc.ops import _activations, _softmax
from fcfunc.ops._affine import affine_bwd, affine_fwd, check_affine, operand_dtype, place_affine


def layer(
    x: jax.Array, w: jax.Array, b: jax.Array | None, *, activation: str, compute_dtype=None, out_dtype=None, **options
) -> jax.Array:
    r"""Affine layer and activation as a single rule: :math:`y = f(x w + b)`.

    This form takes the least memory: two consecutive rules each save what they need, but a single rule for both does
    not need to save the pre-activation `x w + b`. The pre-activation is computed in at least float32, and only the
    output of the activation is rounded.

    Args:
      x: inputs, `[..., fan_in]`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`, or None.
      activation: one of "elu", "gelu", "leaky_relu", "log_softmax", "relu", "sigmoid", "silu", "softmax", "softplus",
        "tanh".
      compute_dtype: see `affine`.
      out_dtype: see `affine`.
      **options: options of the activation, such as `negative_slope` or `approximate`.

    Returns:
      `[..., fan_out]`. Saved for the backward pass: `x` and `w`, and in addition, for "relu" and "leaky_relu", one bit
      per output; for "elu", "gelu" and "silu", only `b`, because the pre-activation is recomputed at the cost of one
      more matmul; for the other activations, the output, or only `b` if the output is in half precision and its
      rounding would cost digits.

    Raises:
      ValueError: the shapes do not match; an activation or option is unknown.
      TypeError: see `affine`.

    Source: derived in docs/background/derivations.md#layer.

    Example:
      >>> layer(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., -3.]]), jnp.zeros(2), activation="relu")
      Array([[1., 0.]], dtype=float32)
    """
    if activation not in _LAYERS:
        raise ValueError(f"layer: unknown activation {activation!r}; known are {', '.join(_LAYERS)}")
    for name in options.keys() - inspect.signature(_LAYERS[activation][0]).parameters.keys():
        raise ValueError(f"layer: {activation} has no option {name!r}")
    options = _activations.checked_options("layer", options)
    check_affine("layer", x, w, b, compute_dtype, out_dtype)
    return packed_layer(
        x, w, b, activation=activation, compute_dtype=compute_dtype, out_dtype=out_dtype, pack=True, **options
    )


def packed_layer(x, w, b, **options):
    """`layer` without the checks. `pack=False` saves booleans: faster if the program keeps the output anyway."""
    return _layer(*place_affine(x, w, b), **options)


def layer_fwd(x, w, b, *, activation, compute_dtype=None, out_dtype=None, **options):
    """`(out, residuals)` of `layer`."""
    options |= {"activation": activation, "compute_dtype": compute_dtype, "out_dtype": out_dtype}
    return _packed_fwd(x, w, b, pack=True, **options)


def _packed_fwd(x, w, b, *, activation, pack, compute_dtype=None, out_dtype=None, **options):
    # y = f(z), z = x w + 1 b
    operands = operand_dtype(x, compute_dtype)
    z, affine_residuals = affine_fwd(x, w, b, compute_dtype=compute_dtype, out_dtype=sum_dtype(operands))
    activation_fwd, _, saves = _LAYERS[activation]
    y, residuals = activation_fwd(z, **options)
    out = y.astype(operands if out_dtype is None else out_dtype)
    saves_output = saves == "output" and out.dtype == z.dtype
    saved = _pack(residuals, pack) if saves == "mask" else out if saves_output else b
    return out, (*affine_residuals, saved)


def layer_bwd(residuals, g, *, activation, compute_dtype=None, **options):
    """Cotangents `(dx, dw, db)` of `layer`."""
    x, w, has_bias, saved = residuals
    activation_fwd, activation_bwd, saves = _LAYERS[activation]
    sums = sum_dtype(operand_dtype(x, compute_dtype))
    if saves == "mask":
        saved = _unpack(saved, g.shape[-1])
    elif saves == "input" or g.dtype != sums:
        z, _ = affine_fwd(x, w, saved, compute_dtype=compute_dtype, out_dtype=sums)
        _, saved = activation_fwd(z, **options)
    # dz = g ∘ f′(z), then (dx, dw, db) as for affine
    (dz,) = activation_bwd(saved, g.astype(sums), **options)
    return affine_bwd((x, w, has_bias), dz, compute_dtype=compute_dtype)


def _packed_bwd(residuals, g, *, pack, out_dtype=None, **options):
    del pack, out_dtype  # the residuals and the cotangent reflect them
    return layer_bwd(residuals, g, **options)


_packed_fwd.__name__ = "layer_fwd"  # the name of the rule in a jaxpr and in a profile
_layer = rule(_packed_fwd, _packed_bwd)


def _pack(mask, pack):
    """Packs booleans into bits along the last axis, eight to a byte; leaves them unchanged if that axis is sharded."""
    sharding = _layout.explicit_sharding(mask)
    sharded = sharding is not None and any(axis is not None for axis in sharding.spec[mask.ndim - 1 :])
    return jnp.packbits(mask, axis=-1) if pack and mask.size and not sharded else mask


def _unpack(bits, count):
    return bits if bits.dtype == bool else jnp.unpackbits(bits, axis=-1, count=count).astype(bool)


# The forward and backward function of each activation, and what `layer` saves for the latter besides x and w: "mask",
# one bit per output; "output"; or "input", which is not saved but recomputed, as it is for half-precision outputs.
_LAYERS = {
    "elu": (_activations.elu_fwd, _activations.elu_bwd, "input"),
    "gelu": (_activations.gelu_fwd, _activations.gelu_bwd, "input"),
    "leaky_relu": (_activations.leaky_relu_fwd, _activations.leaky_relu_bwd, "mask"),
    "log_softmax": (_softmax.log_softmax_fwd, _softmax.log_softmax_bwd, "output"),
    "relu": (_activations.relu_fwd, _activations.relu_bwd, "mask"),
    "sigmoid": (_activations.sigmoid_fwd, _activations.sigmoid_bwd, "output"),
    "silu": (_activations.silu_fwd, _activations.silu_bwd, "input"),
    "softmax": (_softmax.softmax_fwd, _softmax.softmax_bwd, "output"),
    "softplus": (_activations.softplus_fwd, _activations.softplus_bwd, "output"),
    "tanh": (_activations.tanh_fwd, _activations.tanh_bwd, "output"),
}
