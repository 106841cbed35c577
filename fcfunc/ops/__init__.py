"""Differentiable operations with hand-written backward rules.

Every rule has the same parts: the public function; `<name>_fwd(*args) -> (out, residuals)`;
`<name>_bwd(residuals, g) -> cotangents`, with the derived formula above the line that computes it; and the line that
joins them. The derivations are in docs/background/derivations.md, and `fcfunc.reference` has a plain JAX
implementation of each operation.

All operations accept float16, bfloat16, float32 and float64, compute in at least float32 and return the dtype they
were given. They are differentiable in reverse mode to any order and in forward-over-reverse mode. For `jax.jvp` alone,
use the reference implementation.
"""

# ruff: noqa: I001, RUF022  (one rule per line)
from fcfunc.ops._activations import (
    elu, elu_fwd, elu_bwd,
    gelu, gelu_fwd, gelu_bwd,
    leaky_relu, leaky_relu_fwd, leaky_relu_bwd,
    relu, relu_fwd, relu_bwd,
    sigmoid, sigmoid_fwd, sigmoid_bwd,
    silu, silu_fwd, silu_bwd,
    softplus, softplus_fwd, softplus_bwd,
    tanh, tanh_fwd, tanh_bwd,
)  # fmt: skip
from fcfunc.ops._affine import affine, affine_fwd, affine_bwd
from fcfunc.ops._dropout import dropout, dropout_fwd, dropout_bwd
from fcfunc.ops._layer import layer, layer_fwd, layer_bwd
from fcfunc.ops._norms import (
    batch_norm, batch_norm_fwd, batch_norm_bwd,
    layer_norm, layer_norm_fwd, layer_norm_bwd,
    rms_norm, rms_norm_fwd, rms_norm_bwd,
)  # fmt: skip
from fcfunc.ops._softmax import (
    log_softmax, log_softmax_fwd, log_softmax_bwd,
    softmax, softmax_fwd, softmax_bwd,
)  # fmt: skip

__all__ = [
    "affine", "affine_fwd", "affine_bwd",
    "batch_norm", "batch_norm_fwd", "batch_norm_bwd",
    "dropout", "dropout_fwd", "dropout_bwd",
    "elu", "elu_fwd", "elu_bwd",
    "gelu", "gelu_fwd", "gelu_bwd",
    "layer", "layer_fwd", "layer_bwd",
    "layer_norm", "layer_norm_fwd", "layer_norm_bwd",
    "leaky_relu", "leaky_relu_fwd", "leaky_relu_bwd",
    "log_softmax", "log_softmax_fwd", "log_softmax_bwd",
    "relu", "relu_fwd", "relu_bwd",
    "rms_norm", "rms_norm_fwd", "rms_norm_bwd",
    "sigmoid", "sigmoid_fwd", "sigmoid_bwd",
    "silu", "silu_fwd", "silu_bwd",
    "softmax", "softmax_fwd", "softmax_bwd",
    "softplus", "softplus_fwd", "softplus_bwd",
    "tanh", "tanh_fwd", "tanh_bwd",
]  # fmt: skip
