"""An interpreter of jaxprs that computes with mpmath numbers in NumPy object arrays.

Real numbers are mpmath's, with the precision of its context; integers and booleans are NumPy's. JAX itself evaluates
primitives that have no real arguments, such as the drawing of random bits, and those that only move elements, which it
runs on the positions. To support another primitive, add an entry to `RULES`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import mpmath
import numpy as np

from fcfunc._jax_releases import is_jaxpr, jaxpr_and_consts, scan_arguments

FAR = 1e7
"""The argument beyond which an exponential counts as 0 or infinite."""

LARGEST = float(np.finfo(np.float64).max)  # as the bound of a clip, it is not a rounded constant


class Unknown(Exception):
    """Raised for a primitive that is not supported."""


class Program:
    """A function as a jaxpr, which is called with arrays of mpmath numbers, and the rounded constants in it.

    Arrays that `fun` closes over are constants too, except for `data`.
    """

    def __init__(self, fun: Callable, *args, data: Sequence = ()):
        self._closed, self._shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        own = [const for const in self._closed.consts if not any(const is array for array in data)]
        self.constants = list(_constants(self._closed.jaxpr, own))

    def __call__(self, *args) -> Any:
        """The outputs, exact up to rounding in the last digit."""
        closed = self._closed
        return jax.tree.unflatten(
            jax.tree.structure(self._shape), _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        )


def _constants(jaxpr: Any, consts: Any = ()) -> Iterator[float]:
    """The numbers in a program that have more than 24 significant bits, and so were probably rounded to float64."""
    for array in consts:
        if hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating):
            yield from filter(_is_rounded, np.asarray(array, np.float64).ravel().tolist())
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if isinstance(atom, jex.Literal) and jnp.issubdtype(_dtype(atom), jnp.floating):
                yield from filter(_is_rounded, np.asarray(atom.val, np.float64).ravel().tolist())
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(param):
                yield from _constants(*jaxpr_and_consts(param))


def _is_rounded(number: float) -> bool:
    return 0 < abs(number) < LARGEST and len(f"{number.as_integer_ratio()[0]:b}".rstrip("0")) > 24


def exact(a) -> Any:
    """Converts real numbers to mpmath and other arrays to NumPy; keys are unchanged."""
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return a
    a = np.asarray(a)
    if a.dtype == object or not jnp.issubdtype(a.dtype, jnp.floating):
        return a
    return _each(mpmath.mpf)(a.astype(np.float64))


def _each(f: Callable) -> Callable:
    """Vectorizes a function of numbers; the result is an array even if it has no axes."""

    def of_arrays(*arrays):
        with np.errstate(invalid="ignore"):  # NaN is expected here
            out = np.frompyfunc(f, len(arrays), 1)(*arrays)
        return out if isinstance(out, np.ndarray) else _scalar(out)

    return of_arrays


def _scalar(number) -> np.ndarray:
    out = np.empty((), object)
    out[()] = number
    return out


def _dtype(atom: Any) -> Any:
    return atom.aval.dtype


def _is_exact(a) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == object


def _evaluate(jaxpr: Any, consts, args) -> list:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], map(exact, [*consts, *args]), strict=True))

    def read(atom):
        return exact(np.asarray(atom.val, _dtype(atom))) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, values: list) -> list:
    name, params = eqn.primitive.name, eqn.params
    if name in LOOPS:
        return LOOPS[name](params, values)
    if name == "call_hi_primitive":
        primitive = params["_prim"]
        expand = lambda *args: jax.tree.leaves(primitive.expand(*jax.tree.unflatten(primitive.in_tree, args)))  # noqa: E731
        closed = jax.make_jaxpr(expand)(*(jax.ShapeDtypeStruct(v.aval.shape, _dtype(v)) for v in eqn.invars))
        return _evaluate(closed.jaxpr, closed.consts, values)
    inner = [p for p in params.values() if is_jaxpr(p)]
    if name in CALLS and inner:
        jaxpr, consts = jaxpr_and_consts(inner[0])
        return _evaluate(jaxpr, consts, values)
    if any(jnp.issubdtype(_dtype(v), jnp.complexfloating) for v in (*eqn.invars, *eqn.outvars)):
        raise Unknown(f"{name} of complex numbers" if name in {*RULES, *BY_POSITION, *MOVES} else name)
    if name in BY_POSITION and all(isinstance(a, np.ndarray) for a in values):
        return [exact(BY_POSITION[name](*values, **params))]
    if not any(jnp.issubdtype(_dtype(v), jnp.floating) for v in eqn.invars):  # exact in JAX
        if name in OF_INTEGERS and all(isinstance(a, np.ndarray) for a in values):
            return [exact(OF_INTEGERS[name](*values, **params))]
        outs = eqn.primitive.bind(*values, **params)
        return list(map(exact, outs if eqn.primitive.multiple_results else [outs]))
    if name in MOVES:
        return _moved(eqn, values)
    if name in RULES:
        outs = RULES[name](*values, **params)
        return outs if eqn.primitive.multiple_results else [outs]
    raise Unknown(name)


def _moved(eqn, values: list) -> list:
    """Evaluates a primitive that only moves elements, by running it on their positions."""
    real, start, operands = [], 1, []
    for a, atom in zip(values, eqn.invars, strict=True):
        if jnp.issubdtype(_dtype(atom), jnp.floating):
            operands.append(np.arange(start, start + a.size).reshape(a.shape))
            real.extend(a.ravel())
            start += a.size
        else:
            operands.append(a)
    params = dict(eqn.params)
    fill = params.get("fill_value")
    params |= {"fill_value": -1} if "fill_value" in params else {}
    outs = eqn.primitive.bind(*operands, **params)
    missing = mpmath.nan if fill is None else mpmath.mpf(float(fill))
    table = np.array([missing, *real, missing], object)  # position 0 is a fill, -1 is out of bounds
    return [
        table[np.asarray(out)] if np.ndim(out) else _scalar(table[int(out)])
        for out in (outs if eqn.primitive.multiple_results else [outs])
    ]


MOVES = ("pad", "tile", "gather", "scatter", "split", "stack", "unstack")


def _broadcast(a, *, shape, broadcast_dimensions, **_):
    kept = dict(zip(broadcast_dimensions, a.shape, strict=True))
    return np.broadcast_to(a.reshape([kept.get(i, 1) for i in range(len(shape))]), shape)


def _iota(*, dtype, shape, dimension, **_):
    sizes = [shape[dimension] if i == dimension else 1 for i in range(len(shape))]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape)


def _window(operand, starts, sizes) -> tuple:
    """The window of a slice, with its start clamped to the bounds as in XLA."""
    lows = [int(np.clip(int(i), 0, n - k)) for i, n, k in zip(starts, operand.shape, sizes, strict=True)]
    return tuple(slice(low, low + k) for low, k in zip(lows, sizes, strict=True))


def _update_slice(operand, update, *starts, **_):
    out = operand.copy()
    out[_window(operand, starts, update.shape)] = update
    return out


def _select(which, *cases, **_):
    out = cases[0]
    for k, case in enumerate(cases[1:], 1):
        out = np.where(which == k, case, out)
    return out


BY_POSITION = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda a, *, new_sizes, **_: a.reshape(new_sizes),
    "transpose": lambda a, *, permutation: a.transpose(permutation),
    "squeeze": lambda a, *, dimensions: a.squeeze(axis=dimensions),
    "concatenate": lambda *arrays, dimension: np.concatenate(arrays, dimension),
    "slice": lambda a, *, start_indices, limit_indices, strides: a[
        tuple(map(slice, start_indices, limit_indices, strides or [None] * a.ndim))
    ],
    "dynamic_slice": lambda a, *starts, slice_sizes: a[_window(a, starts, slice_sizes)],
    "dynamic_update_slice": _update_slice,
    "rev": lambda a, *, dimensions: np.flip(a, dimensions),
    "select_n": _select,
    "copy": lambda a: a,
    "copy_p": lambda a: a,
}
"""Primitives that move elements of any kind."""

OF_INTEGERS = {
    "iota": _iota,
    "convert_element_type": lambda a, *, new_dtype, **_: a.astype(new_dtype),
    "not": np.invert,
    "reduce_or": lambda a, *, axes, **_: np.bitwise_or.reduce(a, axis=axes),
    "reduce_and": lambda a, *, axes, **_: np.bitwise_and.reduce(a, axis=axes),
    "reduce_sum": lambda a, *, axes, **_: a.sum(axis=axes, dtype=a.dtype),
    **{
        name: lambda a, b, f=f, **_: f(a, b)
        for name, f in {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "eq": np.equal, "ne": np.not_equal,
            "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        }.items()
    },
}  # fmt: skip
"""The arithmetic of integers and booleans, which wraps on overflow as in XLA."""

CALLS = (
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call",
)  # fmt: skip


def _scan(params, values) -> list:
    fixed, carry, xs = scan_arguments(params, values)
    carries = len(carry)
    jaxpr, inner = jaxpr_and_consts(params["jaxpr"])
    steps = range(params["length"])
    rows: list[Any] = [None] * params["length"]
    for k in reversed(steps) if params["reverse"] else steps:
        outs = _evaluate(jaxpr, inner, [*fixed, *carry, *(x[k : k + 1].reshape(x.shape[1:]) for x in xs)])
        carry, rows[k] = outs[:carries], outs[carries:]
    stacked = [np.stack([row[i] for row in rows]) for i in range(len(rows[0]))] if rows else _empty(jaxpr, carries)
    return [*carry, *stacked]


def _empty(jaxpr, carries: int) -> list:
    return [exact(np.zeros((0, *v.aval.shape), v.aval.dtype)) for v in jaxpr.outvars[carries:]]


def _while(params, values) -> list:
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = values[:of_cond], values[of_cond : of_cond + of_body], values[of_cond + of_body :]
    cond, body = (jaxpr_and_consts(params[f"{name}_jaxpr"]) for name in ("cond", "body"))
    while np.any(going := np.asarray(_evaluate(*cond, [*cond_consts, *carry])[0], bool)):
        moved = _evaluate(*body, [*body_consts, *carry])
        # Under vmap, each element has its own condition and stops changing once that is False.
        axes = [going.reshape(going.shape + (1,) * (np.ndim(a) - going.ndim)) for a in moved]
        carry = moved if going.all() else [np.where(g, a, b) for g, a, b in zip(axes, moved, carry, strict=True)]
    return carry


def _cond(params, values) -> list:
    branches = params["branches"]
    index = int(np.clip(int(values[0]), 0, len(branches) - 1))
    return _evaluate(*jaxpr_and_consts(branches[index]), values[1:])


LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _dot_general(a, b, *, dimension_numbers, **_):
    (a_sum, b_sum), (a_batch, b_batch) = dimension_numbers
    a, b = (x if _is_exact(x) else exact(x.astype(np.float64)) for x in (a, b))  # a mask
    a_free = [i for i in range(a.ndim) if i not in (*a_sum, *a_batch)]
    b_free = [i for i in range(b.ndim) if i not in (*b_sum, *b_batch)]
    batch = [a.shape[i] for i in a_batch]
    inner = math.prod(a.shape[i] for i in a_sum)
    shape = (*batch, *(a.shape[i] for i in a_free), *(b.shape[i] for i in b_free))
    rows, columns = math.prod(a.shape[i] for i in a_free), math.prod(b.shape[i] for i in b_free)
    a = a.transpose(*a_batch, *a_free, *a_sum).reshape(math.prod(batch), rows, inner)
    b = b.transpose(*b_batch, *b_sum, *b_free).reshape(math.prod(batch), inner, columns)
    out = np.empty((len(a), a.shape[1], b.shape[2]), object)
    for k, i, j in np.ndindex(out.shape):
        out[k, i, j] = mpmath.fdot(zip(a[k, i], b[k, :, j], strict=True)) if inner else mpmath.mpf(0)
    return out.reshape(shape)


def _scatter(f: Callable) -> Callable:
    def scatter(operand, indices, updates, *, dimension_numbers, mode, **_):
        """Writes each update to the position that a gather with the same dimension numbers reads."""
        of, windows = dimension_numbers, iter(dimension_numbers.update_window_dims)
        single = (*of.inserted_window_dims, *of.operand_batching_dims)
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=of.update_window_dims,
            collapsed_slice_dims=of.inserted_window_dims,
            start_index_map=of.scatter_dims_to_operand_dims,
            operand_batching_dims=of.operand_batching_dims,
            start_indices_batching_dims=of.scatter_indices_batching_dims,
        )
        sizes = [1 if i in single else updates.shape[next(windows)] for i in range(operand.ndim)]
        positions = np.arange(operand.size).reshape(operand.shape)
        target = jax.lax.gather(positions, indices, numbers, sizes, mode=mode, fill_value=-1)
        out = operand.flatten()
        for position, number in zip(np.asarray(target).ravel(), updates.ravel(), strict=True):
            if position >= 0:
                out[position] = f(out[position], number)
        return out.reshape(operand.shape)

    return scatter


def _reduction(f: Callable, empty) -> Callable:
    def reduce(a, *, axes, **_):
        kept = [i for i in range(a.ndim) if i not in axes]
        rows = a.transpose(*kept, *axes).reshape(*(a.shape[i] for i in kept), -1)
        out = np.empty(rows.shape[:-1], object)
        for index in np.ndindex(out.shape):
            out[index] = functools.reduce(f, rows[index], mpmath.mpf(empty))
        return out

    return reduce


def _cumulative(f: Callable) -> Callable:
    def accumulate(a, *, axis, reverse, **_):
        rows = np.moveaxis(a, axis, 0)[:: -1 if reverse else 1].copy()
        for k in range(1, len(rows)):
            rows[k] = _each(f)(rows[k - 1], rows[k])
        return np.moveaxis(rows[:: -1 if reverse else 1], 0, axis)

    return accumulate


def _arg(better: Callable) -> Callable:
    def find(a, *, axes, index_dtype, **_):
        rows = np.moveaxis(a, axes[0], -1)
        out = np.zeros(rows.shape[:-1], index_dtype)
        for index in np.ndindex(out.shape):
            row, best = rows[index], 0
            for k in range(1, len(row)):
                best = k if better(row[k], row[best]) else best
            out[index] = best
        return out

    return find


def _sort(*operands, dimension, num_keys, **_):
    if num_keys != 1:
        raise Unknown("sort by several keys")
    rows = [np.moveaxis(a, dimension, -1).copy() for a in operands]
    for index in np.ndindex(rows[0].shape[:-1]):
        keys = [(bool(mpmath.isnan(x)), x) if _is_exact(rows[0]) else (False, x) for x in rows[0][index]]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for row in rows:
            row[index] = row[index][order]
    return [np.moveaxis(row, -1, dimension) for row in rows]


def _convert(a, *, new_dtype, **_):
    if jnp.issubdtype(new_dtype, jnp.floating):
        return a if _is_exact(a) else exact(np.asarray(a, np.float64))
    if jnp.issubdtype(new_dtype, bool):
        return _each(bool)(a).astype(bool)
    return np.vectorize(lambda x: int(x) if mpmath.isfinite(x) else 0, otypes=[np.int64])(a).astype(new_dtype)


def _bits(a, *, new_dtype, **_):
    """The bits of the rounded numbers. Code uses them to split a number into two parts, which still sum to it."""
    if jnp.dtype(new_dtype).itemsize < 2:
        raise Unknown(f"bitcast_convert_type to {new_dtype}")
    return np.asarray(a, f"float{8 * jnp.dtype(new_dtype).itemsize}").view(new_dtype)


def _compare(f: Callable) -> Callable:
    def of_arrays(a, b, **_):
        return _each(lambda x, y: bool(f(x, y)))(a, b).astype(bool)

    return of_arrays


def _unary(f: Callable) -> Callable:
    return lambda a, **_: _each(f)(a)


def _binary(f: Callable) -> Callable:
    return lambda a, b, **_: _each(f)(a, b)


def _divide(x, y):
    if y:
        return x / y
    return mpmath.nan if not x or mpmath.isnan(x) or mpmath.isnan(y) else mpmath.inf * mpmath.sign(x)


def _polynomial(x, *coefficients):
    return functools.reduce(lambda total, c: total * x + c, reversed(coefficients))


def _power(x, y):
    if mpmath.isnan(x) or mpmath.isnan(y):
        return mpmath.nan
    if not x:
        return mpmath.mpf(1) if not y else mpmath.mpf(0) if y > 0 else mpmath.inf
    if x < 0 and (not mpmath.isfinite(y) or y != int(y)):
        return mpmath.nan
    return mpmath.power(x, y)


def _real(f: Callable, low=None, high=None) -> Callable:
    """Wraps a function so that it returns NaN for NaN and outside of its domain."""

    def safe(x):
        if mpmath.isnan(x) or (low is not None and x < low) or (high is not None and x > high):
            return mpmath.nan
        return f(x)

    return safe


def _bounded(f: Callable, below, above) -> Callable:
    """Wraps a function that mpmath computes very slowly far from 0, with its limits there."""

    def near(x):
        return f(x) if mpmath.isnan(x) or abs(x) <= FAR else mpmath.mpf(above if x > 0 else below)

    return near


def _log(x):
    return -mpmath.inf if not x else mpmath.log(x)


def _logistic(x):
    return 1 / (1 + mpmath.exp(-x))


def _is_pole(x) -> bool:
    return x <= 0 and x == mpmath.floor(x)


def _log1p(x):
    return -mpmath.inf if x == -1 else mpmath.log1p(x)


def _clamp(low, x, high):
    return min(max(x, low), high)


def _maximum(x, y):
    return mpmath.nan if mpmath.isnan(x) or mpmath.isnan(y) else max(x, y)


def _minimum(x, y):
    return mpmath.nan if mpmath.isnan(x) or mpmath.isnan(y) else min(x, y)


def _round(a, *, rounding_method, **_):
    def away(x):
        return mpmath.sign(x) * mpmath.floor(abs(x) + mpmath.mpf("0.5"))

    return _each(mpmath.nint if int(rounding_method) else away)(a)


def _rules() -> dict[str, Callable]:
    mp = mpmath
    infinite, nan = mp.inf, mp.nan
    unary = {
        "neg": lambda x: -x, "sign": mp.sign, "floor": mp.floor, "ceil": mp.ceil, "abs": abs,
        "exp": _bounded(mp.exp, 0, infinite), "exp2": _bounded(lambda x: mp.mpf(2) ** x, 0, infinite),
        "expm1": _bounded(mp.expm1, -1, infinite), "logistic": _bounded(_logistic, 0, 1),
        "log": _real(_log, 0), "log2": _real(lambda x: _log(x) / mp.log(2), 0), "log1p": _real(_log1p, -1),
        "tanh": _bounded(mp.tanh, -1, 1), "sinh": _bounded(mp.sinh, -infinite, infinite),
        "cosh": _bounded(mp.cosh, infinite, infinite),
        "sin": _bounded(mp.sin, nan, nan), "cos": _bounded(mp.cos, nan, nan), "tan": _bounded(mp.tan, nan, nan),
        "asin": _real(mp.asin, -1, 1), "acos": _real(mp.acos, -1, 1), "atan": mp.atan,
        "asinh": mp.asinh, "acosh": _real(mp.acosh, 1), "atanh": _real(mp.atanh, -1, 1),
        "erf": _bounded(mp.erf, -1, 1), "erfc": _bounded(mp.erfc, 2, 0), "erf_inv": _real(mp.erfinv, -1, 1),
        "lgamma": _bounded(lambda x: infinite if _is_pole(x) else mp.re(mp.loggamma(x)), nan, nan),
        "digamma": _bounded(lambda x: nan if _is_pole(x) else mp.digamma(x), nan, nan),
        "sqrt": _real(mp.sqrt, 0), "rsqrt": _real(lambda x: _divide(mp.mpf(1), mp.sqrt(x)), 0),
        "cbrt": lambda x: mp.sign(x) * mp.cbrt(abs(x)), "square": lambda x: x * x,
        "one_minus_square": lambda x: 1 - x * x,
    }  # fmt: skip
    binary = {
        "add": lambda x, y: x + y, "add_any": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "div": _divide, "max": _maximum, "min": _minimum, "pow": _power, "atan2": lambda y, x: mp.atan2(y, x),
        "rem": lambda x, y: mp.sign(x) * mp.fmod(abs(x), abs(y)) if y and mp.isfinite(x) else mp.nan,
    }  # fmt: skip
    comparisons = {
        "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "lt_to": lambda x, y: x < y, "le_to": lambda x, y: x <= y,
    }  # fmt: skip
    same = ("stop_gradient", "reduce_precision", "reshard", "sharding_constraint", "pvary", "pcast")
    return {
        **{name: _unary(f) for name, f in unary.items()},
        **{name: _binary(f) for name, f in binary.items()},
        **{name: _compare(f) for name, f in comparisons.items()},
        **{name: lambda a, **_: a for name in same},
        "optimization_barrier": lambda *arrays: list(arrays),
        "integer_pow": lambda a, *, y, **_: _each(lambda x: x**y if x or y >= 0 else mp.inf)(a),
        "is_finite": lambda a: _each(lambda x: bool(mp.isfinite(x)))(a).astype(bool),
        "polynomial": lambda x, *c, **_: _each(_polynomial)(x, *c),
        "convert_element_type": _convert,
        "bitcast_convert_type": _bits,
        "clamp": lambda low, x, high: _each(_clamp)(low, x, high),
        "round": _round,
        "reduce_sum": _reduction(lambda x, y: x + y, 0),
        "reduce_prod": _reduction(lambda x, y: x * y, 1),
        "reduce_max": _reduction(_maximum, "-inf"),
        "reduce_min": _reduction(_minimum, "inf"),
        "argmax": _arg(lambda x, y: x > y or (mp.isnan(x) and not mp.isnan(y))),
        "argmin": _arg(lambda x, y: x < y or (mp.isnan(x) and not mp.isnan(y))),
        "cumsum": _cumulative(lambda x, y: x + y),
        "cumprod": _cumulative(lambda x, y: x * y),
        "cummax": _cumulative(_maximum),
        "cummin": _cumulative(_minimum),
        "cumlogsumexp": _cumulative(lambda x, y: mp.log(mp.exp(x) + mp.exp(y))),
        "sort": _sort,
        "dot_general": _dot_general,
        **{name: _scatter(lambda x, y: x + y) for name in ("scatter-add", "scatter_add")},
        **{name: _scatter(lambda x, y: x * y) for name in ("scatter-mul", "scatter_mul")},
        **{name: _scatter(_maximum) for name in ("scatter-max", "scatter_max")},
        **{name: _scatter(_minimum) for name in ("scatter-min", "scatter_min")},
    }


RULES = _rules()
