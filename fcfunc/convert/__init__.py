"""Converts networks with their weights from and to PyTorch, Flax, Equinox, Keras and scikit-learn.

Each `from_*` function returns `(net, params, state)`, whose outputs and gradients equal the original's up to rounding;
each `to_*` function takes these three. A library is imported only when one of its functions is called. A layer that
`fcfunc.mlp` cannot represent, such as a convolution, raises a `ValueError` that names it.
"""

from fcfunc.convert._equinox import from_equinox, to_equinox
from fcfunc.convert._flax import from_flax, to_flax, to_nnx
from fcfunc.convert._keras import from_keras, to_keras
from fcfunc.convert._sklearn import from_sklearn, to_sklearn
from fcfunc.convert._torch import from_torch, to_torch

__all__ = [
    "from_equinox", "from_flax", "from_keras", "from_sklearn", "from_torch",
    "to_equinox", "to_flax", "to_keras", "to_nnx", "to_sklearn", "to_torch",
]  # fmt: skip
