"""Keys for cached programs: two calls share a compiled program only if the function still computes the same.

The values that a function captures are constants of its compiled program. A cache keyed by the function alone would
silently reuse the values of the first call.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class FunctionId:
    """Equal to another id if both are of the same object and their traces are equal; keeps the object alive.

    Objects are compared by identity: a callable object may equal one that computes a different loss, or be unhashable.
    """

    def __init__(self, function: Any, traced: list | None = None):
        self.function, self.traced = function, traced

    def __hash__(self):
        return id(self.function)

    def __eq__(self, other):
        return isinstance(other, FunctionId) and self.function is other.function and self.traced == other.traced


def cached_by_id(make: Callable) -> Callable:
    """Caches the programs that `make` returns, by its functions and numbers; the last 32 are kept.

    JAX's own cache lives only as long as a compiled function, so a new function would be compiled again.
    Functions are passed as `FunctionId`.
    """

    @functools.lru_cache(maxsize=32)
    @functools.wraps(make)
    def cached(*args):
        return make(*(a.function if isinstance(a, FunctionId) else a for a in args))

    return cached


def traced(function: Callable, *args) -> tuple[list, Any]:
    """The computation of `function(*args)` in a form that can be compared, and the shapes of its outputs.

    The comparable form is the text of the jaxpr, which includes captured numbers, and its constants: NumPy arrays by
    value, since they can change in place, and JAX arrays by identity. A function that the caller compiled, for example
    with `jax.jit`, shows the values of its own first call, which JAX continues to use.
    """
    # A new function each time, because JAX caches the jaxpr of a function that it has seen.
    jaxpr, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    return [str(jaxpr), *map(_comparable, _constants(jaxpr))], shapes


def _constants(jaxpr) -> Iterator[Any]:
    """The constants of a jaxpr and of the jaxprs inside it."""
    # Imported here because jax.extend takes as long to import as fcfunc.
    from fcfunc._jax_releases import is_jaxpr, jaxpr_and_consts

    inner, consts = jaxpr_and_consts(jaxpr)
    yield from consts
    for eqn in inner.eqns:
        for param in eqn.params.values():
            for part in param if isinstance(param, tuple | list) else (param,):
                if is_jaxpr(part):
                    yield from _constants(part)


def _comparable(constant: Any) -> Any:
    if isinstance(constant, jax.Array):
        return FunctionId(constant)
    array = np.ascontiguousarray(constant)
    return array.shape, array.dtype, hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
