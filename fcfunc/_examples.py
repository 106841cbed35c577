"""Checks of the examples that are trained on: their kind, their number and their values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _check
from fcfunc._rule import clipped


def examples(where: str, data, name: str = "data"):
    """`data`, ready for JAX: a NumPy integer too large for JAX's own becomes the largest one, not another number.

    TypeError where a leaf is no array of numbers, with what to do about it.
    """
    leaves, treedef = jax.tree.flatten(data)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return data
    if not all(map(_is_examples, leaves)):
        raise _wrong_kind(where, data, name)
    return jax.tree.unflatten(treedef, map(clipped, leaves))


def _is_examples(leaf) -> bool:
    if isinstance(leaf, np.ndarray):
        known = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == np.bool_
        return known and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _wrong_kind(where: str, data, name: str) -> TypeError:
    """The error of the first leaf that is no array of numbers."""
    path, leaf = next((path, leaf) for path, leaf in jax.tree.leaves_with_path(data) if not _is_examples(leaf))
    here, kind = f"{name}{jax.tree_util.keystr(path)!s:.80}", type(leaf)
    if isinstance(leaf, np.ma.MaskedArray):
        return TypeError(f"{where}: {here} must be an array, got a masked array; {here}.filled(...) makes one")
    if isinstance(leaf, np.ndarray):
        hint = "; np.unique(names, return_inverse=True)[1] makes labels of names" if leaf.dtype.kind in "OSU" else ""
        return TypeError(f"{where}: {here} must hold numbers, got dtype {leaf.dtype!s:.40}{hint}")
    hint = f"use {here}.toarray()" if hasattr(leaf, "toarray") else "np.asarray converts lists and tensors"
    found = f"{kind.__module__.split('.')[0]} {kind.__name__}".removeprefix("builtins ")
    return TypeError(f"{where}: {here} must be an array, got {found}; {hint}")


def count(where: str, data, batch_size: int, name: str = "data") -> int:
    """The number of examples, at least a batch of them."""
    leaves = jax.tree.leaves_with_path(data)
    sizes = {f"{name}{jax.tree_util.keystr(path)}": jnp.shape(leaf) for path, leaf in leaves}
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
    if n < max(batch_size, 1):
        raise ValueError(f"{where}: at least {max(batch_size, 1)} examples (one batch) expected, got {n}")
    return n


def check_values(data: Any, *, num_classes: int | None = None, name: str = "data") -> None:
    """Raises where a value cannot be trained on; runs on the host.

    Args:
      data: a tree of arrays with one first axis.
      num_classes: where given, every integer array of one axis holds labels, which must lie in `[0, num_classes)`.
      name: what the data is called in the message.

    Raises:
      ValueError: a NaN, an infinity or a label out of range, with the array's path and the index of the first.
    """
    if num_classes is not None:
        _check.positive("check_values", num_classes=num_classes)
    parts = [(path, start, part) for path, leaf in jax.tree.leaves_with_path(data) for start, part in _here(leaf)]
    for path, start, a in parts:
        where = f"{name}{jax.tree_util.keystr(path)}"
        if jnp.issubdtype(a.dtype, jnp.inexact):  # NumPy's own test does not know bfloat16
            bad, expected = ~np.isfinite(a), "finite numbers"
        elif num_classes is not None and a.ndim == 1 and np.issubdtype(a.dtype, np.integer):
            bad, expected = (a < 0) | (a >= num_classes), f"labels in [0, {num_classes})"
        else:
            continue
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            shown = ", ".join(str(i + first) for i, first in zip(at, start, strict=True))
            raise ValueError(f"{where}[{shown}]: {expected} expected, got {a[at]}")


def _here(leaf) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """The parts of an array that this process has, each with the index of its first element."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return [((0,) * np.ndim(leaf), np.asarray(leaf))]
    parts = {tuple(i.start or 0 for i in shard.index): shard.data for shard in leaf.addressable_shards}
    return [(start, np.asarray(part)) for start, part in parts.items()]
