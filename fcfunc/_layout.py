"""The sharding of arrays inside a rule, and putting arrays on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `x` if its mesh has Explicit axes, None otherwise.

    If `x` is on no such mesh but one of the others is, `x` counts as replicated there.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    found = (s for s in map(explicit_sharding, others) if s is not None)
    return next((NamedSharding(s.mesh, PartitionSpec()) for s in found), None)


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` with the sharding that the type of `like` has on an Explicit mesh; unchanged elsewhere."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def reshard_like_axes(a: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`a`, whose axes are the given axes of `like`, sharded like these on an Explicit mesh; unchanged elsewhere.

    Done before a rule, not in it: the transpose of resharding returns the cotangent to the sharding of its primal.
    """
    sharding = explicit_sharding(like)
    if sharding is None:
        return a
    full = PartitionSpec(*sharding.spec, *[None] * (like.ndim - len(sharding.spec)))
    return reshard_axes(a, NamedSharding(sharding.mesh, full), axes)


def reshard_axes(a: jax.Array, sharding: NamedSharding, axes: tuple[int, ...]) -> jax.Array:
    """`a` with the sharding that the given axes of a sharding have."""
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[i] for i in axes))))


def dot_sharding(x: jax.Array, w: jax.Array, row_axes: int) -> NamedSharding | None:
    """The sharding of `x w` on an Explicit mesh: rows like those of `x`, columns like those of `w` if they can be."""
    sharding = explicit_sharding(x) or explicit_sharding(w)
    if sharding is None:
        return None
    rows = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:row_axes]
    columns = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)[w.ndim - 1]
    if set(mesh_axes(columns)) & {axis for entry in rows for axis in mesh_axes(entry)}:
        columns = None
    return NamedSharding(sharding.mesh, PartitionSpec(*rows, columns))


def mesh_axes(entry) -> tuple:
    """The axes of a mesh that one entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def is_tracer(a: Any) -> bool:
    """Whether `a` stands for an array while a function is traced."""
    return isinstance(a, Tracer)


def put(a: Any, sharding: NamedSharding) -> jax.Array:
    """`a`, the same array on every process, placed with a sharding."""
    if sharding.is_fully_addressable or (isinstance(a, jax.Array) and not a.is_fully_addressable):
        return jax.device_put(a, sharding)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(a), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
    host = np.asarray(a)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def match_varying(args):
    """Lifts every array of a pytree to vary over the axes that any of them varies over.

    Outside `shard_map` nothing varies and nothing is done. Inside, a replicated weight that meets a sharded batch owes
    its gradient a sum over the batch's axes; the transpose of the lift is that sum.
    """
    leaves, treedef = jax.tree.flatten(args)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    axes = frozenset().union(*varying)
    missing = [tuple(sorted(axes - of_leaf)) for of_leaf in varying]
    lifted = [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(leaves, missing, strict=True)]
    return jax.tree.unflatten(treedef, lifted)


def zeros(like: Any) -> jax.Array:
    """Zeros of the shape, dtype and, on an Explicit mesh, the sharding of a `jax.ShapeDtypeStruct`."""
    sharding = getattr(like, "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    a = jnp.zeros(like.shape, like.dtype)
    return jax.sharding.reshard(a, sharding) if explicit else a
