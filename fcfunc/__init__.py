"""Fully-connected networks as pure functions in JAX, with hand-written backward rules that are tested.

A network is `net = fcfunc.mlp([784, 128, 10])`, with `params = net.init(key)` and `net.apply(params, x)`. The plain one
needs only `fcfunc.init(key, dims)` and `fcfunc.apply(params, x)`.

`fcfunc.ops` holds the operations and `fcfunc.losses` the losses, `fcfunc.train` the training loops and `fcfunc.testing`
the checker of backward rules, `check_vjp`. `fcfunc.reference` has a plain JAX implementation of each rule, and
`fcfunc.per_example` what can be computed from the gradients of single examples; `fcfunc.curvature`, `fcfunc.laplace`
and `fcfunc.privacy` build on it.
`fcfunc.sharding` places arrays on several devices; `fcfunc.data`, `params_file` and `checkpoint` read and write files;
`fcfunc.sklearn` has estimators for scikit-learn, `fcfunc.convert` exchanges networks with other libraries, and
`fcfunc.export` writes them for programs without fcfunc.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from fcfunc import losses, ops, per_example, reference, sharding, train
from fcfunc.network import Network, apply, init, mlp, stack, unstack

if TYPE_CHECKING:
    from fcfunc import checkpoint, convert, curvature, data, export, laplace, params_file, privacy, sklearn, testing

__all__ = [
    "Network", "apply", "checkpoint", "convert", "curvature", "data", "export", "init", "laplace", "losses", "mlp",
    "ops", "params_file", "per_example", "privacy", "reference", "sharding", "sklearn", "stack", "testing", "train",
    "unstack",
]  # fmt: skip

LAZY = (
    "checkpoint", "convert", "curvature", "data", "export", "laplace", "params_file", "privacy", "sklearn", "testing",
)  # fmt: skip
"""Modules that a network and its training do not need."""


def __getattr__(name: str):
    """Imports a module when it is first used."""
    if name in LAZY:
        return importlib.import_module(f"fcfunc.{name}")
    if name == "__version__":
        return importlib.metadata.version("fcfunc")
    raise AttributeError(f"module 'fcfunc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
