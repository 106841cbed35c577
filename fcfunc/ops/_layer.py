"""A layer, affine and activation, as one rule."""

import inspect

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._rule import accumulator, rule, wide
from fcfunc.ops import _activations as activations
from fcfunc.ops._affine import _bias_along, affine_bwd, affine_fwd
from fcfunc.ops._softmax import log_softmax_bwd, log_softmax_fwd, softmax_bwd, softmax_fwd


def layer(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    activation: str,
    flatten: bool = False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent: bool = True,
    pack: bool = True,
    **options,
) -> jax.Array:
    r"""A layer, affine and activation in one rule: :math:`y = f(x w + b)`, saving the least.

    Two rules in a row save what each needs; one rule for both can do with less than the pre-activation `x w + b`. It is
    computed in at least float32 and rounded once, after the activation.

    Args:
      x: inputs, as for `affine`.
      w: weights, `[fan_in, fan_out]`.
      b: biases, `[fan_out]`.
      activation: one of "elu", "gelu", "leaky_relu", "log_softmax", "relu", "sigmoid", "silu", "softmax", "softplus",
        "tanh".
      flatten: as for `affine`.
      compute_dtype: as for `affine`.
      out_dtype: as for `affine`.
      round_cotangent: as for `affine`, of the pre-activation's cotangent.
      pack: for "relu" and "leaky_relu", save a bit per output. False: save booleans, which the compiler reads off the
        output where that is kept anyway, as the next layer's input is in one compiled program; then it is the faster.
      **options: of the activation, such as `negative_slope` or `approximate`.

    Returns:
      As `affine`. Saved for the backward pass: `x` and `w`; and for "relu" and "leaky_relu" one BIT per output, with
      `pack`; for "gelu" and "silu" nothing, `b` apart: the pre-activation is computed again, one more product; for the
      others the output.

    Raises:
      ValueError: the shapes do not fit together; an unknown activation.
      TypeError: as for `affine`.

    Source: derived in docs/derivations.md#layer.

    Example:
      >>> layer(jnp.array([[1., 2.]]), jnp.array([[1., 0.], [0., -3.]]), jnp.zeros(2), activation="relu")
      Array([[1., 0.]], dtype=float32)
    """
    if activation not in _LAYERS:
        raise ValueError(f"layer: unknown activation {activation!r}; known are {', '.join(_LAYERS)}")
    for name in options.keys() - inspect.signature(_LAYERS[activation][0]).parameters.keys():
        raise ValueError(f"layer: {activation} has no option {name!r}")
    _arguments.dtype("layer", out_dtype=out_dtype)
    b = _bias_along(x, w, b, flatten)
    return _layer(
        x,
        w,
        b,
        activation=activation,
        flatten=flatten,
        compute_dtype=compute_dtype,
        out_dtype=out_dtype,
        round_cotangent=round_cotangent,
        pack=pack,
        **options,
    )


def layer_fwd(
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
    """`(out, residuals)` of `layer`."""
    del round_cotangent
    operands = _arguments.operands("layer", compute_dtype, x=x, w=w, b=b)
    z, _ = affine_fwd(x, w, b, flatten=flatten, compute_dtype=compute_dtype, out_dtype=accumulator(operands))
    forward, _, saves = _LAYERS[activation]
    wide_out, residuals = forward(z, **options)
    out = wide_out.astype(operands if out_dtype is None else out_dtype)
    if activation == "elu" and out.dtype == jnp.float16:  # its rule reads the sign of the input from the output
        out = jnp.where((wide_out > 0) & (out == 0), jnp.finfo(out.dtype).smallest_subnormal, out)
    return out, (x, w, _packed(residuals, pack) if saves == "mask" else out if saves == "output" else b)


def layer_bwd(
    residuals,
    g,
    *,
    activation,
    flatten=False,
    compute_dtype=None,
    out_dtype=None,
    round_cotangent=True,
    pack=True,
    **options,
):
    """Cotangents `(dx, dw, db)` of `layer`."""
    del out_dtype, pack  # `g` has the one, the saved mask the other
    x, w, saved = residuals
    _, backward, saves = _LAYERS[activation]
    if saves == "mask":
        saved = _unpacked(saved, g.shape[-1])
    elif saves == "input":
        wide_in = accumulator(x.dtype if compute_dtype is None else jnp.dtype(compute_dtype))
        saved, _ = affine_fwd(x, w, saved, flatten=flatten, compute_dtype=compute_dtype, out_dtype=wide_in)
    # dz = g ∘ f′(z), then (dx, dw, db) as for affine
    (dz,) = backward(saved, wide(g), **options)
    return affine_bwd((x, w), dz, compute_dtype=compute_dtype, round_cotangent=round_cotangent)


_layer = rule(layer_fwd, layer_bwd)


def _packed(mask, pack):
    """Booleans as bits, eight to a byte, along the last axis; as they are where that axis lies on several devices."""
    sharding = _layout.explicit_sharding(mask)
    if (
        not pack
        or not mask.size
        or (sharding is not None and any(axis is not None for axis in sharding.spec[mask.ndim - 1 :]))
    ):
        return mask
    return jnp.packbits(mask, axis=-1)


def _unpacked(bits, count):
    return bits if bits.dtype == bool else jnp.unpackbits(bits, axis=-1, count=count).astype(bool)


# The two halves of each activation, and what the rule of a layer saves for the second one beside x and w: one bit per
# output, the output, or the input, which is computed again.
_LAYERS = {
    "elu": (activations.elu_fwd, activations.elu_bwd, "output"),
    "gelu": (activations.gelu_fwd, activations.gelu_bwd, "input"),
    "leaky_relu": (activations.leaky_relu_fwd, activations.leaky_relu_bwd, "mask"),
    "log_softmax": (log_softmax_fwd, log_softmax_bwd, "output"),
    "relu": (activations.relu_fwd, activations.relu_bwd, "mask"),
    "sigmoid": (activations.sigmoid_fwd, activations.sigmoid_bwd, "output"),
    "silu": (activations.silu_fwd, activations.silu_bwd, "input"),
    "softmax": (softmax_fwd, softmax_bwd, "output"),
    "softplus": (activations.softplus_fwd, activations.softplus_bwd, "output"),
    "tanh": (activations.tanh_fwd, activations.tanh_bwd, "output"),
}
