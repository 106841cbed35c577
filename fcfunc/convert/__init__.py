"""Networks of other libraries with their weights, in both directions: PyTorch, Flax, Equinox, Keras and scikit-learn.

Each `from_*` returns `(net, params, state)`, with the same outputs and gradients to the rounding of the dtype; each
`to_*` takes these three. A library is imported only by its own functions. What `fcfunc.mlp` cannot represent, such as a
convolution, is rejected by its name.
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
