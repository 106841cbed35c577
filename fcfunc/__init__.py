"""Fully-connected networks as pure functions in JAX, with hand-written backward rules that are proven."""

from fcfunc import (
    activations,
    checkpoint,
    cross_entropy,
    data,
    large_output,
    losses,
    mlp,
    norms,
    ops,
    params_file,
    reference,
    sharding,
    testing,
    train,
)
from fcfunc.mlp import apply, apply_batch_norm, init, init_batch_norm_state

__version__ = "0.1.0"

__all__ = [
    "activations",
    "apply",
    "apply_batch_norm",
    "checkpoint",
    "cross_entropy",
    "data",
    "init",
    "init_batch_norm_state",
    "large_output",
    "losses",
    "mlp",
    "norms",
    "ops",
    "params_file",
    "reference",
    "sharding",
    "testing",
    "train",
]
