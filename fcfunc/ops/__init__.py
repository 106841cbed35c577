"""Differentiable operations with hand-written backward rules.

Every rule reads the same way: the public function; `<name>_fwd(*args) -> (out, residuals)`;
`<name>_bwd(residuals, g) -> cotangents`, with the derived formula above the line that computes it; and the line that
joins them. docs/derivations.md has the derivations, `fcfunc.reference` a plain JAX implementation of each.

All take float16, bfloat16, float32 or float64, compute in at least float32 and return the dtype they were given.
All are differentiable in reverse mode to any order and in forward-over-reverse; for `jax.jvp` alone use the reference
implementation.
"""

from fcfunc.ops._activations import (
    elu,
    elu_bwd,
    elu_fwd,
    gelu,
    gelu_bwd,
    gelu_fwd,
    leaky_relu,
    leaky_relu_bwd,
    leaky_relu_fwd,
    relu,
    relu_bwd,
    relu_fwd,
    sigmoid,
    sigmoid_bwd,
    sigmoid_fwd,
    silu,
    silu_bwd,
    silu_fwd,
    softplus,
    softplus_bwd,
    softplus_fwd,
    tanh,
    tanh_bwd,
    tanh_fwd,
)
from fcfunc.ops._affine import affine, affine_bwd, affine_fwd
from fcfunc.ops._dropout import dropout, dropout_bwd, dropout_fwd
from fcfunc.ops._layer import layer, layer_bwd, layer_fwd
from fcfunc.ops._norms import (
    batch_norm,
    batch_norm_bwd,
    batch_norm_fwd,
    layer_norm,
    layer_norm_bwd,
    layer_norm_fwd,
    rms_norm,
    rms_norm_bwd,
    rms_norm_fwd,
)
from fcfunc.ops._softmax import (
    log_softmax,
    log_softmax_bwd,
    log_softmax_fwd,
    softmax,
    softmax_bwd,
    softmax_fwd,
)

__all__ = [
    "affine",
    "affine_bwd",
    "affine_fwd",
    "batch_norm",
    "batch_norm_bwd",
    "batch_norm_fwd",
    "dropout",
    "dropout_bwd",
    "dropout_fwd",
    "elu",
    "elu_bwd",
    "elu_fwd",
    "gelu",
    "gelu_bwd",
    "gelu_fwd",
    "layer",
    "layer_bwd",
    "layer_fwd",
    "layer_norm",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "leaky_relu",
    "leaky_relu_bwd",
    "leaky_relu_fwd",
    "log_softmax",
    "log_softmax_bwd",
    "log_softmax_fwd",
    "relu",
    "relu_bwd",
    "relu_fwd",
    "rms_norm",
    "rms_norm_bwd",
    "rms_norm_fwd",
    "sigmoid",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "silu",
    "silu_bwd",
    "silu_fwd",
    "softmax",
    "softmax_bwd",
    "softmax_fwd",
    "softplus",
    "softplus_bwd",
    "softplus_fwd",
    "tanh",
    "tanh_bwd",
    "tanh_fwd",
]
