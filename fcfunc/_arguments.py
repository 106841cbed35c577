"""Checks and conversions of arguments. Each message says where, what was expected, and what was given."""

import importlib
import os
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


ARRAYS = jax.Array | np.ndarray | np.generic | int | float | complex


def describe(x) -> str:
    """`float32[3,4]` for an array, the type's name for anything else."""
    if not isinstance(x, ARRAYS):
        return type(x).__name__
    return f"{jnp.result_type(x)}[{','.join(map(str, np.shape(x)))}]"


def first_line(error: BaseException) -> str:
    """The class and the first line of an exception, and the next line if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return f"{type(error).__name__}: {' '.join(lines[:count])[:400]}"


def library(where: str, package: str, *modules: str) -> Any:
    """Imports modules of an optional package and returns the top-level one; ImportError says what to install."""
    top = modules[0].partition(".")[0]
    try:
        for name in (top, *modules):
            importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{where}: {package} is not installed; pip install {package}") from None
    return sys.modules[top]


def array(where: str, /, **arrays) -> None:
    """Raises TypeError if an argument is neither an array nor a number."""
    for name, x in arrays.items():
        if not isinstance(x, ARRAYS):
            raise TypeError(f"{where}: {name} must be an array, got {describe(x)}")


def floating(where: str, /, **arrays) -> None:
    """Raises TypeError if an array does not have one of the floating-point dtypes that the rules are tested for."""
    array(where, **arrays)
    for name, x in arrays.items():
        if jnp.result_type(x).name not in FLOATS:
            raise TypeError(f"{where}: {name} must be of dtype {', '.join(FLOATS)}, got {describe(x)}")


def one_dtype(where: str, /, *, hint: str = "", **arrays) -> None:
    """Raises TypeError if floating-point arrays differ in dtype: nothing is promoted silently."""
    floating(where, **arrays)
    if len({jnp.result_type(x) for x in arrays.values()}) > 1:
        came = ", ".join(f"{name} {describe(x)}" for name, x in arrays.items())
        raise TypeError(f"{where}: {', '.join(arrays)} must have the same dtype, got {came}; cast one side{hint}")


def operands(where: str, compute_dtype, /, **arrays) -> np.dtype:
    """The dtype of the operands of a matmul: `compute_dtype`, or that of the arrays if it is None.

    Raises TypeError if `compute_dtype` is not supported, or if it is None and the arrays differ in dtype.
    """
    if compute_dtype is None:
        one_dtype(where, hint=" or give compute_dtype", **arrays)
        return jnp.result_type(next(iter(arrays.values())))
    floating(where, **arrays)
    one_dtype(where, **dict(list(arrays.items())[1:]))
    return compute_dtype_of(where, compute_dtype)


def compute_dtype_of(where: str, compute_dtype) -> np.dtype:
    """A dtype for the operands of a matmul; raises TypeError if it is not supported."""
    try:
        dtype = jnp.dtype(compute_dtype)
    except TypeError:
        raise TypeError(f"{where}: compute_dtype must be bfloat16 or float32, got {compute_dtype!r:.80}") from None
    if dtype == jnp.float16:
        raise TypeError(
            f"{where}: compute_dtype float16 is not supported (gradients underflow without loss scaling); use bfloat16"
        )
    if dtype.name not in FLOATS or dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise TypeError(
            f"{where}: compute_dtype must be bfloat16, float32 or, with jax_enable_x64, float64, got {dtype.name}"
        )
    return dtype


def one_shape(where: str, /, **arrays) -> None:
    """Raises ValueError if arrays that are combined elementwise differ in shape: nothing is broadcast."""
    array(where, **arrays)
    if len({np.shape(x) for x in arrays.values()}) > 1:
        came = ", ".join(f"{name} {list(np.shape(x))}" for name, x in arrays.items())
        raise ValueError(f"{where}: {' and '.join(arrays)} must have the same shape, got {came}")


def labels(where: str, labels, *, scores) -> None:
    """Raises TypeError if labels are not integers, ValueError if there is not one per row of `scores`."""
    array(where, labels=labels)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{where}: labels must be integers, got {describe(labels)}")
    if jnp.ndim(scores) < 1 or np.shape(labels) != np.shape(scores)[:-1]:
        raise ValueError(
            f"{where}: labels must have the shape of the scores without their last axis (the classes), "
            f"got labels {list(np.shape(labels))} for scores {list(np.shape(scores))}"
        )


def real_labels(where: str, labels, *, dtype, name: str = "labels"):
    """Labels that are used as real numbers; integers and booleans are cast to `dtype`.

    Raises TypeError if they are not real numbers.
    """
    array(where, **{name: labels})
    kind = jnp.result_type(labels)
    if jnp.issubdtype(kind, jnp.integer) or kind == jnp.bool_:
        # Cast on the host if possible: JAX would first truncate an int64 to its lower 32 bits.
        numbers = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        return jnp.asarray(numbers.astype(dtype))
    floating(where, **{name: labels})
    return jnp.asarray(labels)


def loss_options(where: str, shape: tuple, mask, weights, smoothing, *, logits: tuple | None = None) -> float:
    """Checks the options of a loss of this shape and returns the label smoothing as a float.

    The mask may also have the shape of the logits, if that is given.
    """
    if mask is not None:
        array(where, where=mask)
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"{where}: where must be booleans, got {describe(mask)}")
    if weights is not None:
        floating(where, weights=weights)
    for name, a, other in (("where", mask, logits), ("weights", weights, None)):
        if a is not None and np.shape(a) not in (tuple(shape), other):
            expected = f"the loss, {list(shape)}" + (f", or of the logits, {list(other)}" if other else "")
            raise ValueError(f"{where}: {name} must have the shape of {expected}, got {list(np.shape(a))}")
    smoothing = number(where, label_smoothing=smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing must be in [0, 1], got {smoothing}")
    return smoothing


def class_weights(where: str, weights, classes: int, *, name: str = "class_weights") -> None:
    """Raises TypeError or ValueError if class weights are given but are not one number per class."""
    if weights is None:
        return
    floating(where, **{name: weights})
    if np.shape(weights) != (classes,):
        raise ValueError(f"{where}: {name} must be [{classes}], one per class, got {list(np.shape(weights))}")


def axis(where: str, axis, **arrays) -> None:
    """Raises TypeError if `axis` is not an integer, ValueError if an array has no such axis."""
    integer(where, axis=axis)
    for name, x in arrays.items():
        if not -jnp.ndim(x) <= axis < jnp.ndim(x):
            raise ValueError(f"{where}: {name} has no axis {axis}, its shape is {list(np.shape(x))}")


def axes(where: str, wanted, **arrays) -> tuple[int, ...]:
    """The nonnegative axes given by an integer, a tuple, a list, or None for all axes.

    Raises TypeError or ValueError if the array has no such axis, or if one is repeated.
    """
    ((_, x),) = arrays.items()
    named = range(jnp.ndim(x)) if wanted is None else wanted if isinstance(wanted, tuple | list) else (wanted,)
    for i in named:
        axis(where, i, **arrays)
    counted = tuple(int(i) % jnp.ndim(x) for i in named)
    if len(set(counted)) < len(counted):
        raise ValueError(f"{where}: axis must not repeat an axis, got {wanted}")
    return counted


def key(where: str, key) -> None:
    """Raises TypeError if `key` is not a single random key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,)
    if not ((typed and key.shape == ()) or raw):
        came = f"got {key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else f"got {key!r}"
        raise TypeError(f"{where}: key must be one random key, as from jax.random.key(0), {came}")


def number(where: str, **numbers) -> float:
    """The number as a Python float, because any other kind of scalar could change the dtype of a result.

    Raises TypeError if it is not a real number that is known at trace time.
    """
    ((name, value),) = numbers.items()
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, jax.errors.ConcretizationTypeError):
        raise TypeError(f"{where}: {name} must be a number that is known at trace time, got {value!r:.80}") from None


def ignored_label(where: str, ignore_index) -> None:
    """Raises TypeError or ValueError if `ignore_index` is neither None nor a possible integer label."""
    if ignore_index is None:
        return
    if not isinstance(ignore_index, int | np.integer) or isinstance(ignore_index, bool):
        raise TypeError(f"{where}: ignore_index must be an integer or None, got {ignore_index!r:.80}")
    if not -(2**31) < ignore_index < 2**31 - 1:  # larger labels are clipped to the largest one
        raise ValueError(f"{where}: ignore_index must fit in 32 bits, got {ignore_index}")


def dtype(where: str, /, **dtypes) -> None:
    """Raises TypeError if a dtype is neither None nor one of the floating-point dtypes."""
    for name, value in dtypes.items():
        try:
            known = value is None or jnp.dtype(value).name in FLOATS
        except TypeError:
            known = False
        if not known:
            raise TypeError(f"{where}: {name} must be of {', '.join(FLOATS)}, got {value!r:.80}")


def integer(where: str, /, **numbers) -> None:
    """Raises TypeError if a number is not a Python or NumPy integer."""
    for name, n in numbers.items():
        if not isinstance(n, int | np.integer) or isinstance(n, bool):
            raise TypeError(f"{where}: {name} must be an integer, got {n!r:.80}")


def boolean(where: str, /, **flags) -> None:
    """Raises TypeError if a flag is not True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{where}: {name} must be True or False, got {flag!r:.80}")


def function(where: str, /, **functions) -> None:
    """Raises TypeError if an argument is not callable."""
    for name, f in functions.items():
        if not callable(f):
            raise TypeError(f"{where}: {name} must be a function, got {type(f).__name__}")


def optimizer(where: str, optimizer) -> None:
    """Raises TypeError if `optimizer` does not have the `init` and `update` of an optax optimizer."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(f"{where}: optimizer must be an optax optimizer, got {type(optimizer).__name__}")


def path(where: str, /, **paths) -> None:
    """Raises TypeError if an argument is not a path."""
    for name, p in paths.items():
        if not isinstance(p, str | os.PathLike):
            raise TypeError(f"{where}: {name} must be a path, got {type(p).__name__}")


def positive(where: str, **numbers) -> None:
    """Raises ValueError if a count is not an integer of at least 1."""
    for name, n in numbers.items():
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{where}: {name} must be an integer of at least 1, got {n!r}")


def as_array(leaf):
    """`jnp.asarray`, except that NumPy integers too large for JAX become the largest one, not a different number."""
    return jnp.asarray(clipped(leaf))


def clipped(leaf):
    """Clips a NumPy array of integers to the range of JAX's integers; returns anything else unchanged.

    Without x64, JAX keeps only the lower 32 bits, so the label 2**32 would silently become class 0.
    """
    if type(leaf) is int and not -(2**31) <= leaf < 2**31:
        leaf = np.int64(max(-(2**63), min(leaf, 2**63 - 1)))
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "iu":
        kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if kept != leaf.dtype:
            return np.clip(leaf, jnp.iinfo(kept).min, jnp.iinfo(kept).max)
    return leaf


def examples(where: str, data, name: str = "data"):
    """`data`, ready for JAX: NumPy integers too large for JAX become the largest one, not a different number.

    Raises TypeError with advice if a leaf is not an array of numbers.
    """
    numbers = numeric_arrays(where, data, name)
    return (
        numbers
        if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(numbers))
        else jax.tree.map(clipped, numbers)
    )


def numeric_arrays(where: str, data, name: str = "data"):
    """`data` with tensors and tables of other libraries converted to NumPy arrays of the same numbers.

    Raises TypeError with advice if a leaf is not an array of numbers.
    """
    if all(map(_is_numeric, jax.tree.leaves(data))):  # fast path: runs in each training step
        return data
    return jax.tree.map_with_path(
        lambda path, leaf: _numeric_array(where, f"{name}{jax.tree_util.keystr(path)!s:.80}", leaf), data
    )


def _is_numeric(leaf) -> bool:
    if isinstance(leaf, np.ndarray):
        known = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == np.bool_
        return known and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _numeric_array(where: str, here: str, leaf):
    if _is_numeric(leaf):
        return leaf
    kind = type(leaf)
    found = f"{kind.__module__.split('.')[0]} {kind.__name__}".removeprefix("builtins ")
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}: {here} must be an array, got a masked array; use {here}.filled(...)")
    if isinstance(leaf, np.generic) or not hasattr(leaf, "__array__"):
        hint = f"use {here}.toarray()" if hasattr(leaf, "toarray") else "np.asarray converts lists"
        raise TypeError(f"{where}: {here} must be an array, got {found}; {hint}")
    columns = dict(zip(leaf.columns, leaf.dtypes, strict=True)) if hasattr(leaf, "columns") else {}
    others = [str(name) for name, of in columns.items() if getattr(of, "kind", "O") not in "biuf"]
    try:
        a = np.asarray(leaf)
        if a.dtype == object and columns and not others:  # columns of several dtypes, or with a mask
            a = leaf.to_numpy(np.result_type(*(np.dtype(f"{of.kind}{of.itemsize}") for of in columns.values())))
    except Exception as e:  # a tensor on a GPU, or one that records gradients
        raise TypeError(
            f"{where}: {here} must be an array, got {found} that NumPy cannot convert ({e!s:.120})"
        ) from None
    if not _is_numeric(a):
        hint = "; np.unique(names, return_inverse=True)[1] turns names into labels" if a.dtype.kind in "OSU" else ""
        hint = f" in the columns {', '.join(others)!s:.80}" if others else hint
        raise TypeError(f"{where}: {here} must hold numbers, got dtype {a.dtype!s:.40}{hint}")
    return a


def count(where: str, data, name: str = "data") -> int:
    """The number of examples; raises ValueError if there are none or if the arrays disagree."""
    leaves = jax.tree.leaves_with_path(data)
    sizes = {f"{name}{jax.tree_util.keystr(path)}": np.shape(leaf) for path, leaf in leaves}
    if not sizes:
        raise ValueError(f"{where}: {name} must hold at least one array of examples, got none")
    for path, shape in sizes.items():
        if not shape:
            raise ValueError(f"{where}: {path} must have a leading axis, the examples, got a scalar")
    first, (n, *_) = next(iter(sizes.items()))
    for path, shape in sizes.items():
        if shape[0] != n:
            raise ValueError(
                f"{where}: all arrays in {name} must have the same leading axis, got {n} in {first} "
                f"and {shape[0]} in {path}"
            )
    if n < 1:
        raise ValueError(f"{where}: {name} must hold at least one example, got none")
    return n


def fitting_batch_size(where: str, batch_size: int, n: int) -> int:
    """The batch size, reduced with a warning if it exceeds the number of examples."""
    if batch_size <= n:
        return int(batch_size)
    warnings.warn(
        f"{where}: batch_size {batch_size} exceeds the number of examples, so all {n} form one batch", stacklevel=3
    )
    return n


def check_values(data: Any, *, num_classes: int | None = None, name: str = "data") -> None:
    """Raises if the data contains a value that cannot be trained on; runs on the host.

    Args:
      data: a pytree of arrays with a common leading axis.
      num_classes: if given, one-dimensional integer arrays hold labels, which must be in `[0, num_classes)`.
      name: what the data is called in the message.

    Raises:
      ValueError: a value is NaN or infinite, or a label is out of range. The message names the array and the index of
        the first such value.

    Example:
      >>> check_values({"x": np.array([1.0, np.nan])})
      Traceback (most recent call last):
      ValueError: ...
    """
    if num_classes is not None:
        positive("check_values", num_classes=num_classes)
    parts = [
        (path, start, part) for path, leaf in jax.tree.leaves_with_path(data) for start, part in _local_parts(leaf)
    ]
    for path, start, a in parts:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(a.dtype, jnp.inexact):  # np.issubdtype does not know bfloat16
            bad, expected = ~np.isfinite(a), "finite"
        elif num_classes is not None and a.ndim == 1 and np.issubdtype(a.dtype, np.integer):
            bad, expected = (a < 0) | (a >= num_classes), f"a label in [0, {num_classes})"
        else:
            continue
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            shown = ", ".join(str(i + first) for i, first in zip(at, start, strict=True))
            raise ValueError(f"{where}[{shown}] must be {expected}, got {a[at]}")


def _local_parts(leaf) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """The parts of an array that this process holds, each with the index of its first element."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return [((0,) * np.ndim(leaf), np.asarray(leaf))]
    parts = {tuple(i.start or 0 for i in shard.index): shard.data for shard in leaf.addressable_shards}
    return [(start, np.asarray(part)) for start, part in parts.items()]
