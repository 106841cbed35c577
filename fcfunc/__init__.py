"""Fully-connected networks as pure functions in JAX, with hand-written backward rules that are tested."""

import importlib
from typing import TYPE_CHECKING

from fcfunc import losses, ops, reference, sharding, train
from fcfunc import network as mlp
from fcfunc.network import apply, apply_batch_norm, init, init_batch_norm_state

if TYPE_CHECKING:
    from fcfunc import checkpoint, data, params_file, testing

__version__ = "0.1.0"

__all__ = [
    "apply",
    "apply_batch_norm",
    "checkpoint",
    "data",
    "init",
    "init_batch_norm_state",
    "losses",
    "mlp",
    "ops",
    "params_file",
    "reference",
    "sharding",
    "testing",
    "train",
]


def __getattr__(name: str):
    """Imports the modules that a network and its training do not need when they are first used."""
    if name in ("checkpoint", "data", "params_file", "testing"):
        return importlib.import_module(f"fcfunc.{name}")
    raise AttributeError(f"module 'fcfunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
