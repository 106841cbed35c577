"""Keys for functions: two calls share a compiled program only if the values that the function captures are the same.

A compiled program holds the values that a function captures as constants, so a program found by the function alone
would silently go on with the values of its first call.
"""

import functools
import hashlib
import inspect
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), str(Path(__file__).parent))
"""Where installed code is. The global names that it uses are not followed: they do not change during a run."""

MOST = 10_000
"""The most values that are compared. A function that captures more is compiled anew each time."""

SEQUENCES = (list, tuple, set, frozenset)


class FunctionKey:
    """Equal to another key of the same object if the values that it captures are the same; keeps them alive.

    Objects are compared by identity, because a callable object may be equal to one that computes another loss, or have
    no hash. What is captured is followed through closures, defaults, global names, partials, methods, containers and
    the attributes of objects. NumPy arrays are compared by value, since they can change in place.
    """

    def __init__(self, function: Any):
        self.function = function
        self.captured = list(_values(function, {}, ()))
        if len(self.captured) >= MOST:
            self.captured.append(_Same(self))  # equal to no other

    def __hash__(self):
        return id(self.function)

    def __eq__(self, other):
        return isinstance(other, FunctionKey) and self.function is other.function and self.captured == other.captured


class _Same:
    """Equal to a wrapper of the same object, which it keeps alive."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value


def _values(value: Any, seen: dict[int, Any], names: tuple[str, ...]) -> Iterator[Any]:
    """What to compare of `value` and of all that it captures; `names` are used by the code that leads to it."""
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        yield type(value), repr(value)  # the repr tells 0.0 from -0.0, and a NaN is equal to itself
        return
    if id(value) in seen or len(seen) >= MOST:
        yield None
        return
    seen[id(value)] = value  # alive, so that no other value gets its id
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield (
            value.shape,
            value.dtype,
            hashlib.blake2b(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).digest(),
        )
        return
    if not isinstance(value, (*SEQUENCES, dict, types.CellType)):
        yield _Same(value)
    names = _names(value) or names
    for inner in _inner(value, names):
        yield from _values(inner, seen, names)


def _inner(value: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """The values that one value holds or captures."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, types.FunctionType):
        yield from (value.__closure__, value.__defaults__, value.__kwdefaults__)
        if not value.__code__.co_filename.startswith(LIBRARIES):
            yield [value.__globals__.get(name) for name in names]
    elif isinstance(value, types.ModuleType):
        yield [vars(value).get(name) for name in names]
    elif isinstance(value, type):
        yield [inspect.getattr_static(value, name, None) for name in names]
    elif isinstance(value, types.CellType):
        try:
            yield value.cell_contents
        except ValueError:  # not filled yet
            return
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, SEQUENCES):
        yield len(value)
        yield from value
    else:
        yield from (type(value), inspect.getattr_static(type(value), "__call__", None))
        yield getattr(value, "__wrapped__", None)  # of a function that is compiled or decorated
        yield getattr(value, "__dict__", None)
        slots = (slot for cls in type(value).__mro__ for slot in vars(cls).get("__slots__", ()))
        yield [getattr(value, slot, None) for slot in slots]


def _names(value: Any) -> tuple[str, ...]:
    """The global names and attributes that the code of a function uses, nested functions included."""
    codes = [value.__code__] if isinstance(value, types.FunctionType) else []
    names: dict[str, None] = {}
    for code in codes:  # grows while it is walked
        names |= dict.fromkeys(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(names)
