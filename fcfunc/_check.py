"""Checks of arguments, made while tracing: the message says what was expected, what came, and where."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._precision import accumulator

FLOATS = ("float16", "bfloat16", "float32", "float64")


ARRAYS = jax.Array | np.ndarray | np.generic | int | float | complex


def describe(x) -> str:
    """`float32[3,4]` for an array, the type's name for anything else."""
    if not isinstance(x, ARRAYS):
        return type(x).__name__
    return f"{jnp.result_type(x)}[{','.join(map(str, jnp.shape(x)))}]"


def array(where: str, /, **arrays) -> None:
    """TypeError where an argument is neither an array nor a number."""
    for name, x in arrays.items():
        if not isinstance(x, ARRAYS):
            raise TypeError(f"{where}: {name} must be an array, got {describe(x)}")


def floating(where: str, /, **arrays) -> None:
    """TypeError where an array is not of one of the real floating-point dtypes that the rules are proven for."""
    array(where, **arrays)
    for name, x in arrays.items():
        if jnp.result_type(x).name not in FLOATS:
            raise TypeError(f"{where}: {name} must be of dtype {', '.join(FLOATS)}, got {describe(x)}")


def one_dtype(where: str, /, *, hint: str = "", **arrays) -> None:
    """TypeError where floating-point arrays that enter one formula differ in dtype: nothing is promoted silently."""
    floating(where, **arrays)
    if len({jnp.result_type(x) for x in arrays.values()}) > 1:
        came = ", ".join(f"{name} {describe(x)}" for name, x in arrays.items())
        raise TypeError(f"{where}: one dtype expected for all of {', '.join(arrays)}, got {came}; cast one side{hint}")


def operands(where: str, compute_dtype, /, **arrays) -> np.dtype:
    """The dtype that the operands of a product take: `compute_dtype`, or, where that is None, the arrays' own.

    TypeError where it is none of those offered, or where without it the arrays differ in dtype.
    """
    if compute_dtype is None:
        one_dtype(where, hint=" or give compute_dtype", **arrays)
        return jnp.result_type(next(iter(arrays.values())))
    floating(where, **arrays)
    one_dtype(where, **dict(list(arrays.items())[1:]))
    try:
        dtype = jnp.dtype(compute_dtype)
    except TypeError:
        raise TypeError(f"{where}: compute_dtype must be bfloat16 or float32, got {compute_dtype!r}") from None
    if dtype == jnp.float16:
        raise TypeError(
            f"{where}: compute_dtype float16 is not offered, its gradients underflow without loss scaling; use bfloat16"
        )
    if dtype.name not in FLOATS or dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise TypeError(
            f"{where}: compute_dtype must be bfloat16, float32 or, with jax_enable_x64, float64, got {dtype.name}"
        )
    return dtype


def one_shape(where: str, /, **arrays) -> None:
    """ValueError where arrays that are combined element by element differ in shape: nothing is broadcast."""
    array(where, **arrays)
    if len({jnp.shape(x) for x in arrays.values()}) > 1:
        came = ", ".join(f"{name} {list(jnp.shape(x))}" for name, x in arrays.items())
        raise ValueError(f"{where}: one shape expected for all of {', '.join(arrays)}, got {came}")


def labels(where: str, labels, *, scores) -> None:
    """TypeError for labels that are no integers, ValueError where they are not one per row of `scores`."""
    array(where, labels=labels)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"{where}: labels must be integers, got {describe(labels)}")
    if jnp.ndim(scores) < 1 or jnp.shape(labels) != jnp.shape(scores)[:-1]:
        raise ValueError(
            f"{where}: labels must have the shape of the scores without their last axis (the classes), "
            f"got labels {list(jnp.shape(labels))} for scores {list(jnp.shape(scores))}"
        )


def real_labels(where: str, labels, *, like, name: str = "labels"):
    """Labels that enter a formula as numbers; integers and booleans are cast to that of `like`, or float32.

    TypeError where they are not real numbers.
    """
    array(where, **{name: labels})
    dtype = jnp.result_type(labels)
    if jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_:
        # Cast on the host where possible: JAX would first keep the lower 32 bits of an int64.
        numbers = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        return jnp.asarray(numbers.astype(accumulator(jnp.result_type(like))))
    floating(where, **{name: labels})
    return jnp.asarray(labels)


def counting(where: str, shape: tuple, mask, weights, smoothing, *, logits: tuple | None = None) -> None:
    """TypeError or ValueError where the mask, weights or smoothing of a loss are not what its shape asks for.

    A mask may also have the shape of the logits, where that is given.
    """
    if mask is not None:
        array(where, where=mask)
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"{where}: where must be booleans, got {describe(mask)}")
    if weights is not None:
        floating(where, weights=weights)
    for name, a, other in (("where", mask, logits), ("weights", weights, None)):
        if a is not None and jnp.shape(a) not in (tuple(shape), other):
            expected = f"the loss, {list(shape)}" + (f", or of the logits, {list(other)}" if other else "")
            raise ValueError(f"{where}: {name} must have the shape of {expected}, got {list(jnp.shape(a))}")
    if not 0 <= number(where, label_smoothing=smoothing) <= 1:
        raise ValueError(f"{where}: label_smoothing must be in [0, 1], got {smoothing}")


def class_weights(where: str, weights, classes: int, *, name: str = "class_weights") -> None:
    """TypeError or ValueError where there are weights of classes, and they are not one number for each class."""
    if weights is None:
        return
    floating(where, **{name: weights})
    if jnp.shape(weights) != (classes,):
        raise ValueError(f"{where}: {name} must be [{classes}], one for each class, got {list(jnp.shape(weights))}")


def axis(where: str, axis, **arrays) -> None:
    """TypeError where `axis` is no integer, ValueError where an array has no axis of that number."""
    integer(where, axis=axis)
    for name, x in arrays.items():
        if not -jnp.ndim(x) <= axis < jnp.ndim(x):
            raise ValueError(f"{where}: {name} has no axis {axis}, its shape is {list(jnp.shape(x))}")


def axes(where: str, wanted, **arrays) -> tuple[int, ...]:
    """The axes that an integer, several or None (all of them) name, counted from the front.

    TypeError or ValueError where an array has no such axis, or where one is named twice.
    """
    ((_, x),) = arrays.items()
    named = range(jnp.ndim(x)) if wanted is None else wanted if isinstance(wanted, tuple | list) else (wanted,)
    for i in named:
        axis(where, i, **arrays)
    counted = tuple(int(i) % jnp.ndim(x) for i in named)
    if len(set(counted)) < len(counted):
        raise ValueError(f"{where}: axis names an axis twice, got {wanted}")
    return counted


def key(where: str, key) -> None:
    """TypeError where `key` is no random key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,)
    if not ((typed and key.shape == ()) or raw):
        came = f"got {key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else f"got {key!r}"
        raise TypeError(f"{where}: key must be one random key, as from jax.random.key(0), {came}")


def number(where: str, **numbers) -> float:
    """The one given as a Python float: any other kind of scalar would take part in the dtype of a result.

    TypeError where it is not a real number that is known while tracing.
    """
    ((name, value),) = numbers.items()
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(f"{where}: {name} must be a number that is known while tracing, got {value!r:.80}") from None


def ignored_label(where: str, ignore_index) -> None:
    """TypeError or ValueError where `ignore_index` is neither None nor an integer that a label can be."""
    if ignore_index is None:
        return
    if not isinstance(ignore_index, int | np.integer) or isinstance(ignore_index, bool):
        raise TypeError(f"{where}: ignore_index must be an integer or None, got {ignore_index!r:.80}")
    if not -(2**31) < ignore_index < 2**31 - 1:  # labels that are too large become the largest one
        raise ValueError(f"{where}: ignore_index must fit into 32 bits, got {ignore_index}")


def dtype(where: str, /, **dtypes) -> None:
    """TypeError where a dtype is neither None nor one of the floating-point dtypes."""
    for name, value in dtypes.items():
        try:
            known = value is None or jnp.dtype(value).name in FLOATS
        except TypeError:
            known = False
        if not known:
            raise TypeError(f"{where}: {name} must be of {', '.join(FLOATS)}, got {value!r:.80}")


def integer(where: str, /, **numbers) -> None:
    """TypeError where a number is no Python or NumPy integer."""
    for name, n in numbers.items():
        if not isinstance(n, int | np.integer) or isinstance(n, bool):
            raise TypeError(f"{where}: {name} must be an integer, got {n!r:.80}")


def function(where: str, /, **functions) -> None:
    """TypeError where a function is none."""
    for name, f in functions.items():
        if not callable(f):
            raise TypeError(f"{where}: {name} must be a function, got {type(f).__name__}")


def optimizer(where: str, optimizer) -> None:
    """TypeError where `optimizer` has no `init` and `update`, as those of optax have."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(f"{where}: optimizer must be an optax optimizer, got {type(optimizer).__name__}")


def path(where: str, /, **paths) -> None:
    """TypeError where a path is none."""
    for name, p in paths.items():
        if not isinstance(p, str | os.PathLike):
            raise TypeError(f"{where}: {name} must be a path, got {type(p).__name__}")


def positive(where: str, **numbers) -> None:
    """ValueError where a number that counts something is not an integer of at least 1."""
    for name, n in numbers.items():
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
            raise ValueError(f"{where}: {name} must be an integer of at least 1, got {n!r}")
