"""Fully-connected networks as pure JAX functions, with hand-written and tested backward rules.

`net = fcfunc.mlp([784, 128, 10])` describes a network, `params = net.init(key)` initializes its parameters and
`net.apply(params, x)` computes its outputs. For a plain network, `fcfunc.init(key, dims)` and
`fcfunc.apply(params, x)` are enough.

- `fcfunc.ops` and `fcfunc.losses` contain the operations and the losses, and `fcfunc.reference` a plain JAX
  implementation of each.
- `fcfunc.train` contains the training loops.
- `fcfunc.testing` contains `check_vjp`, the checker of backward rules.
- `fcfunc.per_example` works with per-example gradients; `fcfunc.curvature`, `fcfunc.laplace` and `fcfunc.privacy`
  build on it.
- `fcfunc.sharding` places arrays on several devices.
- `fcfunc.data`, `fcfunc.params_file` and `fcfunc.checkpoint` read and write files; `fcfunc.stream` reads data that is
  larger than memory.
- `fcfunc.sklearn` has scikit-learn estimators, `fcfunc.convert` exchanges networks with other libraries, and
  `fcfunc.export` writes them for programs without fcfunc.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from fcfunc import losses, ops, per_example, reference, sharding, train
from fcfunc.network import Network, apply, init, mlp, stack, unstack

if TYPE_CHECKING:
    from fcfunc import (
        checkpoint,
        convert,
        curvature,
        data,
        export,
        laplace,
        params_file,
        privacy,
        sklearn,
        stream,
        testing,
    )

__all__ = [
    "Network", "apply", "checkpoint", "convert", "curvature", "data", "export", "init", "laplace", "losses", "mlp",
    "ops", "params_file", "per_example", "privacy", "reference", "sharding", "sklearn", "stack", "stream", "testing",
    "train", "unstack",
]  # fmt: skip

LAZY = (
    "checkpoint", "convert", "curvature", "data", "export", "laplace", "params_file", "privacy", "sklearn",
    "stream", "testing",
)  # fmt: skip
"""Modules imported on first use, because building and training a network does not need them."""


def __getattr__(name: str):
    """Imports a lazy module on first use."""
    if name in LAZY:
        return importlib.import_module(f"fcfunc.{name}")
    if name == "__version__":
        return importlib.metadata.version("fcfunc")
    raise AttributeError(f"module 'fcfunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
