"""A test case: a function of arrays, its oracle, the arguments, and the gradients at them."""

import contextlib
import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._arguments import first_line
from fcfunc._compiler_options import quick_options
from fcfunc.testing import _oracle

INSIDE = re.compile(r"[/\\](jax[/\\]_src|fcfunc[/\\](testing|_rule)|contextlib\.py|functools\.py)")
"""Matches the files of JAX and of this package in a traceback."""


class NotApplicable(Exception):
    """Raised by a check that does not apply to a case; the message is the reason shown in the report."""


class Inconclusive(Exception):
    """Raised by a check that applies but cannot decide; the message is the reason shown in the report."""


class RuleRaised(Exception):
    """Raised if computing the gradient by the rule raises for a case."""

    def __init__(self, case: "Case", error: BaseException, way: str = ""):
        super().__init__(first_line(error))
        self.case, self.error, self.way = case, error, way

    @property
    def place(self) -> str:
        """The last traceback line outside of JAX and this package; empty if there is none."""
        frames = [f for f in traceback.extract_tb(self.error.__traceback__) if not INSIDE.search(f.filename)]
        return f" ({'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno})" if frames else ""


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, its oracle, and one set of arguments.

    Attributes:
      fun: maps the array leaves of the arguments to a list of real or complex arrays.
      oracle: the same function without its rules.
      leaves: the array leaves of the arguments, as NumPy arrays and random keys.
      where: the positions in `leaves` that are differentiated.
      paths: the path of each differentiated leaf, such as `args[0]['w']`.
      ranges: the open range of each differentiated leaf, `(-inf, inf)` if none was declared.
      seed: the seed of every draw.
      sizes: the value of each named size.
      required: the groups of checks that the caller required.
      at_kink: the declared derivative at each kink.
      has_reference: whether the caller passed the oracle with `reference=`.
      forward_rule: whether the rule is a `custom_jvp`.
      dtypes: the dtypes that the rule supports, besides float64.
      float64: whether the rule supports float64.
      rtol: an allowed error besides rounding, relative to the largest element of a gradient.
      atol: an allowed absolute error.
      redraw: makes the case at other sizes; None if the arguments were given as arrays.
      letters: the names of the sizes that are swept.
      draws_ranks: whether a size may stand for several axes.
    """

    fun: Callable
    oracle: Callable
    leaves: tuple
    where: tuple[int, ...]
    paths: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    seed: int
    sizes: dict[str, Any]
    required: frozenset = frozenset()
    at_kink: dict[float, float] = dataclasses.field(default_factory=dict)
    has_reference: bool = False
    forward_rule: bool = False
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    float64: bool = True
    rtol: float = 0.0
    atol: float = 0.0
    redraw: Callable[..., "Case"] | None = None
    letters: tuple[str, ...] = ()
    draws_ranks: bool = False

    @functools.cached_property
    def reals(self) -> list[np.ndarray]:
        """The leaves that are differentiated."""
        return [self.leaves[i] for i in self.where]

    @property
    def dtype(self) -> np.dtype:
        """The least precise dtype of the differentiated leaves, which limits the precision of the gradient."""
        return max((real_dtype(a.dtype) for a in self.reals), key=lambda d: jnp.finfo(d).eps)

    @property
    def eps(self) -> float:
        """The machine epsilon of `computes_in`."""
        return float(jnp.finfo(self.computes_in).eps)

    @property
    def computes_in(self) -> np.dtype:
        """The least precise dtype in the oracle's computation, or `dtype` if that is less precise."""
        with x64_for(self.dtype):
            found = _oracle.narrowest(self.oracle, tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.leaves))
        dtypes = [self.dtype, *([] if found is None else [real_dtype(found)])]
        return max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)

    @property
    def is_complex(self) -> bool:
        """Whether a differentiated leaf is complex."""
        return any(is_complex(a) for a in self.reals)

    def with_reals(self, reals: Sequence) -> "Case":
        """The same case with other values for the differentiated leaves."""
        return dataclasses.replace(self, leaves=tuple(replaced(self.leaves, self.where, reals)))

    def with_real(self, leaf: int, value: np.ndarray) -> "Case":
        """The same case with another value for one differentiated leaf."""
        return self.with_reals([*self.reals[:leaf], value, *self.reals[leaf + 1 :]])

    def cast(self, dtype) -> "Case":
        """The same case with every real or complex leaf, including the fixed ones, cast to another precision."""
        dtype = jnp.dtype(dtype)
        if self.is_complex and dtype.itemsize < 4:
            raise NotApplicable(f"there is no complex counterpart of {dtype.name}")
        complexes = {4: np.complex64, 8: np.complex128}

        def to(a):
            return a.astype(complexes[dtype.itemsize] if is_complex(a) else dtype) if is_inexact(a) else a

        return dataclasses.replace(self, leaves=tuple(map(to, self.leaves)))

    def at(self, sizes: dict, salt: int = 0) -> "Case":
        """The case at other sizes, in the same dtype."""
        assert self.redraw is not None
        return self.redraw(sizes, salt).cast(self.dtype)

    def redraw_numbers(self, salt: int) -> "Case":
        """The case with newly drawn numbers, if they are drawn at all; salt 0 is the case itself."""
        return self.at(self.sizes, salt) if self.redraw is not None and salt else self

    def rng(self, salt: int) -> np.random.Generator:
        """A reproducible generator that depends only on the seed and the salt of a check."""
        return np.random.default_rng([self.seed, salt])

    @functools.cached_property
    def outs(self) -> list:
        """The shapes and dtypes of the outputs."""
        try:
            with x64_for(self.dtype):
                return jax.eval_shape(self.fun, *self.leaves)
        except Exception as e:
            raise NotApplicable(f"the function itself raises: {first_line(e)}") from None

    def cotangent(self, salt: int) -> list[np.ndarray]:
        """A random normal cotangent with the shapes and dtypes of the outputs."""
        rng = self.rng(salt)
        return [normal(rng, out.shape, out.dtype) for out in self.outs]

    def by_rule(self, g: list) -> list[np.ndarray]:
        """The gradients by the rule. Raises `RuleRaised` if it raises."""
        self.outs  # noqa: B018  (NotApplicable if the function itself raises)
        try:
            with x64_for(self.dtype):
                return to_numpy(compiled_pull(self.fun, self.where, self.leaves, g)[1])
        except Exception as e:
            raise RuleRaised(self, e) from e

    @functools.cached_property
    def eager(self) -> "Eager":
        """The one eager run: two forward passes, and only then the backward pass, twice."""
        g = self.cotangent(150)
        with x64_for(self.dtype):
            leaves, cotangent = to_jax(self.leaves), to_jax(g)
            reals = [leaves[i] for i in self.where]

            def of(*reals):
                return self.fun(*replaced(leaves, self.where, reals))

            outs, back = jax.vjp(of, *reals)
            jax.vjp(of, *to_jax(self.nearby.reals))
            first = to_numpy(back(cotangent))
            given = {"an argument": leaves, "an output": outs, "a cotangent": cotangent}
            freed = [name for name, arrays in given.items() if any(a.is_deleted() for a in arrays)]
            second = [] if freed else to_numpy(back(cotangent))
        return Eager(g, first, second, tuple(freed))

    @functools.cached_property
    def nearby(self) -> "Case":
        """The case at numbers a few percent away, which stay inside a declared range."""
        rng = self.rng(141)
        steps = [normal(rng, a.shape, a.dtype) * np.asarray(0.02, a.dtype) for a in self.reals]
        return self.with_reals([(a + s * np.abs(a)).astype(a.dtype) for a, s in zip(self.reals, steps, strict=True)])

    @functools.cached_property
    def watched(self) -> tuple[list, list, BaseException | None]:
        """The result of `watch`."""
        return self.watch()

    def watch(self, *, remat: bool = False) -> tuple[list, list, BaseException | None]:
        """The calls of rules during tracing, the types of the gradients, and the exception that was raised, if any."""
        g, types = self.cotangent(0), []

        def gradients(leaves, g):
            fun = jax.checkpoint(lambda *args: self.fun(*args)) if remat else self.fun
            types[:] = [jax.typeof(a) for a in pull(fun, self.where, leaves, g)[1]]

        with x64_for(self.dtype):
            part = "gradients under jax.checkpoint" if remat else "gradients"
            calls, raised = _oracle.watch(self.fun, part, gradients, self.leaves, g)
        return calls, types, raised

    def by_oracle(self, g: list) -> list[np.ndarray]:
        """The gradients by the oracle. Raises `Inconclusive` if it has none."""
        try:
            with x64_for(self.dtype):
                return to_numpy(compiled_pull(self.oracle, self.where, self.leaves, g)[1])
        except Exception as e:
            by_jvp = self._by_forward_mode(g)
            if by_jvp is None:
                raise Inconclusive(f"the oracle itself raises: {first_line(e)}") from None
            return by_jvp

    def _by_forward_mode(self, g: list) -> list[np.ndarray] | None:
        """The gradients by forward mode, one element at a time; None if that fails too."""
        if self.is_complex or sum(a.size for a in self.reals) > MOST_TANGENTS:
            return None
        try:
            with x64_for(self.dtype):
                return to_numpy(compiled_forward(self.oracle, self.where, self.leaves, g))
        except Exception:  # the caller reports the error of reverse mode
            return None

    def outputs(self, fun: Callable | None = None) -> list[np.ndarray]:
        """The outputs of `fun`, by default the function of the case."""
        with x64_for(self.dtype):
            return to_numpy(compiled_outputs(fun or self.fun, to_jax(self.leaves)))

    @functools.cached_property
    def in_float64(self) -> "Case":
        """The same case in float64. Raises `NotApplicable`, with the reason, if the function does not support it."""
        if not self.float64:
            raise NotApplicable("float64=False")
        wide = self.cast(np.float64)
        try:
            outs = wide.outs
        except NotApplicable as e:
            raise NotApplicable(f"the function does not accept float64: {e}") from None
        if any(real_dtype(out.dtype) != np.float64 for out in outs):
            raise NotApplicable(f"the function returns {', '.join(str(o.dtype) for o in outs)} for float64 arguments")
        if wide.computes_in != np.float64:
            raise NotApplicable(f"the function computes in {wide.computes_in} internally, also for float64 arguments")
        return wide

    @functools.cached_property
    def same_function_in_float64(self) -> bool:
        """Whether the outputs in float64 and in the case's dtype agree up to rounding."""
        narrow, wide = ([widened(a) for a in case.outputs()] for case in (self, self.in_float64))
        scale = 100 * self.eps
        return all(
            np.allclose(a, b, rtol=scale, atol=scale * (1 + np.abs(b).max(initial=0)))
            for a, b in zip(narrow, wide, strict=True)
        )


class Eager(NamedTuple):
    """The results of an eager run.

    Attributes:
      g: the cotangent.
      gradients: the gradients by the backward pass.
      again: the gradients by a second run of the same backward pass.
      freed: which arrays were deleted by the backward pass: "an argument", "an output", "a cotangent".
    """

    g: list
    gradients: list
    again: list
    freed: tuple[str, ...]


def in_float64_if_taken(case: Case) -> Case:
    """The case in float64 if the function supports it, since a difference there is not mere rounding."""
    try:
        return case.in_float64
    except NotApplicable:
        return case


def compiled(*static_argnums: int) -> Callable:
    """`jax.jit` with options for fast compilation, since the programs of the checks run only a few times."""

    def of(fun):
        @functools.cache
        def jitted():  # deferred to the first call, when the backend has been chosen
            return jax.jit(fun, static_argnums=static_argnums, compiler_options=quick_options())

        return functools.wraps(fun)(lambda *args: jitted()(*args))

    return of


def pull(fun: Callable, where: tuple, leaves: Sequence, g: list) -> tuple[list, list]:
    """The outputs of `fun` and the gradients with respect to the leaves at `where`."""
    leaves = to_jax(leaves)
    outs, back = jax.vjp(lambda *wrt: fun(*replaced(leaves, where, wrt)), *(leaves[i] for i in where))
    return outs, list(back([jnp.asarray(a, out.dtype) for a, out in zip(g, outs, strict=True)]))


compiled_pull = compiled(0, 1)(pull)


@compiled(0, 1)
def compiled_integers(with_integers: Callable, where: tuple, leaves: Sequence) -> tuple[list, list]:
    """The integer outputs of a function, without and with differentiation."""
    leaves = to_jax(leaves)
    of = lambda *wrt: with_integers(*replaced(leaves, where, wrt))  # noqa: E731
    return with_integers(*leaves)[1], jax.vjp(of, *(leaves[i] for i in where), has_aux=True)[2]


def push(fun: Callable, where: tuple, leaves: Sequence, tangents: list) -> list:
    """The tangents of the outputs of `fun`, given the tangents of the leaves at `where`."""
    primals = [leaves[i] for i in where]
    return jax.jvp(lambda *wrt: fun(*replaced(leaves, where, wrt)), primals, tangents)[1]


compiled_push = compiled(0, 1)(push)

MOST_TANGENTS = 2000
"""The most elements for which forward mode replaces a missing reverse mode."""


@compiled(0, 1)
def compiled_forward(fun: Callable, where: tuple, leaves: Sequence, g: list) -> list:
    """The gradients of `sum(g * outputs)` by forward mode."""

    def total(*wrt):
        outs = fun(*replaced(leaves, where, wrt))
        return sum(jnp.sum(a.astype(out.dtype) * out) for a, out in zip(g, outs, strict=True))

    return list(jax.jacfwd(total, argnums=tuple(range(len(where))))(*(leaves[i] for i in where)))


@compiled(0)
def compiled_outputs(fun: Callable, leaves: list) -> list:
    """The outputs of `fun`, compiled."""
    return fun(*leaves)


def replaced(leaves: Sequence, where: Sequence, new: Sequence) -> list:
    """A copy of the leaves with those at the given positions replaced."""
    leaves = list(leaves)
    for i, leaf in zip(where, new, strict=True):
        leaves[i] = leaf
    return leaves


def normal(rng: np.random.Generator, shape, dtype) -> np.ndarray:
    """Standard normal numbers in a real or complex dtype."""
    a = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        a = a + 1j * rng.standard_normal(shape)
    return np.asarray(a).astype(dtype)


def to_numpy(arrays: Sequence) -> list[np.ndarray]:
    """Converts arrays to NumPy arrays of the same dtype."""
    return [np.asarray(a) for a in arrays]


def to_jax(arrays: Sequence) -> list[jax.Array]:
    """Puts NumPy arrays on the device; JAX arrays and tracers are unchanged."""
    return [a if isinstance(a, jax.Array) else jax.device_put(a) for a in arrays]


def widened(a: np.ndarray) -> np.ndarray:
    """Casts an array to float64 or complex128."""
    return a.astype(np.complex128 if is_complex(a) else np.float64)


def real_dtype(dtype) -> np.dtype:
    """The dtype of the real part."""
    return jnp.finfo(dtype).dtype


def x64_for(dtype):
    """Enables float64 for the block if `dtype` is float64; otherwise keeps the caller's setting."""
    return jax.enable_x64(True) if np.dtype(dtype) == np.float64 else contextlib.nullcontext()


def is_inexact(a) -> bool:
    """Whether an array holds real or complex floating-point numbers."""
    return jnp.issubdtype(a.dtype, jnp.inexact)


def is_complex(a) -> bool:
    """Whether an array holds complex numbers."""
    return jnp.issubdtype(a.dtype, jnp.complexfloating)


def is_array(leaf) -> bool:
    """Whether a leaf is an array, rather than a number or an object that is held fixed."""
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufcV")


def is_key(leaf) -> bool:
    """Whether a leaf is an array of random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@functools.lru_cache(maxsize=256)
def of_leaves(fun: Callable, treedef, positions: tuple, statics: tuple, kwargs: tuple, rule: tuple = ()) -> Callable:
    """Turns `fun` into a function from the array leaves of its arguments to the real or complex leaves of its output.

    Args:
      fun: any function.
      treedef: the treedef of the tuple of arguments.
      positions: the positions of the array leaves.
      statics: the other leaves with their types, because 1, 1.0 and True are equal but are different arguments.
      kwargs: the keyword arguments with their types, likewise.
      rule: the forward and backward pass of `fun` if it is a rule, which may be redefined; part of the cache key.
    """

    def of_arrays(*arrays):
        leaves = [value for _, value in statics]
        for i, a in zip(positions, arrays, strict=True):
            leaves.insert(i, a)
        outs = fun(*jax.tree.unflatten(treedef, leaves), **{name: value for name, _, value in kwargs})
        return list(map(jnp.asarray, filter(is_array, jax.tree.leaves(outs))))

    def inexact(*arrays):
        return [out for out in of_arrays(*arrays) if is_inexact(out)]

    def with_integers(*arrays):
        outs = of_arrays(*arrays)
        return [out for out in outs if is_inexact(out)], [out for out in outs if not is_inexact(out)]

    inexact.__name__ = getattr(fun, "__name__", type(fun).__name__)
    vars(inexact)["with_integers"] = with_integers
    return inexact
