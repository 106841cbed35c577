"""Keys for functions: two calls share a compiled program only if the function still computes the same.

A compiled program holds the values that a function captures as constants, so a program found by the function alone
would silently go on with the values of its first call.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class FunctionKey:
    """Equal to another key of the same object, if what was traced of it is the same; it keeps the object alive.

    By identity: a callable object, or a method, may be equal to one that computes another loss, or have no hash.
    """

    def __init__(self, function: Any, traced: list | None = None):
        self.function, self.traced = function, traced

    def __hash__(self):
        return id(self.function)

    def __eq__(self, other):
        return isinstance(other, FunctionKey) and self.function is other.function and self.traced == other.traced


def traced(function: Callable, *args) -> tuple[list, Any]:
    """What `function(*args)` computes, as things to compare, and the shapes of its outputs.

    That is its jaxpr as text, which shows the numbers that it captures, and its constants: NumPy arrays by value, since
    they can change in place, and JAX's by identity. A function that the caller compiled, with `jax.jit` say, shows the
    values of its own first call, which JAX goes on to use.
    """
    # A new function each time: JAX remembers the jaxpr of one that it has seen.
    jaxpr, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    return [str(jaxpr), *map(_comparable, _constants(jaxpr))], shapes


def _constants(jaxpr) -> Iterator[Any]:
    """The constants of a jaxpr and of those inside it."""
    from fcfunc._jax_releases import is_jaxpr, jaxpr_and_consts  # here: jax.extend takes as long to import as fcfunc

    inner, consts = jaxpr_and_consts(jaxpr)
    yield from consts
    for eqn in inner.eqns:
        for param in eqn.params.values():
            for part in param if isinstance(param, tuple | list) else (param,):
                if is_jaxpr(part):
                    yield from _constants(part)


def _comparable(constant: Any) -> Any:
    if isinstance(constant, jax.Array):
        return FunctionKey(constant)
    array = np.ascontiguousarray(constant)
    return array.shape, array.dtype, hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
