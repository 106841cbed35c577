"""Identities of functions: two calls share a compiled program only if the function still computes the same.

A compiled program holds the values that a function captures as constants, so a program found by the function alone
would silently use the values of its first call.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


class FunctionId:
    """Equal to another id of the same object if its traces are equal; it keeps the object alive.

    Objects are compared by identity: a callable object may be equal to one that computes another loss, or have no hash.
    """

    def __init__(self, function: Any, traced: list | None = None):
        self.function, self.traced = function, traced

    def __hash__(self):
        return id(self.function)

    def __eq__(self, other):
        return isinstance(other, FunctionId) and self.function is other.function and self.traced == other.traced


def cached_by_id(make: Callable) -> Callable:
    """`make`, which returns the same program for the same functions and numbers; the last 32 are kept.

    JAX's own cache lives as long as a compiled function, so a new function would be compiled again.
    Functions are given as `FunctionId`.
    """

    @functools.lru_cache(maxsize=32)
    @functools.wraps(make)
    def cached(*args):
        return make(*(a.function if isinstance(a, FunctionId) else a for a in args))

    return cached


def traced(function: Callable, *args) -> tuple[list, Any]:
    """What `function(*args)` computes, in a form that can be compared, and the shapes of its outputs.

    That is its jaxpr as text, which includes the numbers that it captures, and its constants: NumPy arrays by value,
    since they can change in place, and JAX arrays by identity. A function that the caller compiled, with `jax.jit` for
    example, shows the values of its own first call, which JAX continues to use.
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
        return FunctionId(constant)
    array = np.ascontiguousarray(constant)
    return array.shape, array.dtype, hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
