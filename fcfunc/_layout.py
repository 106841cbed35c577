"""The sharding of arrays inside a rule, and the placement of arrays on a mesh."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: jax.Array, *others: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `x` if its mesh has Explicit axes, None otherwise.

    If `x` is not on such a mesh but one of the others is, `x` counts as replicated on it.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    found = (s for s in map(explicit_sharding, others) if s is not None)
    return next((NamedSharding(s.mesh, PartitionSpec()) for s in found), None)


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` sharded like `like` if that is on an Explicit mesh; unchanged otherwise."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def reshard_like_axes(a: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`a` sharded like the given axes of `like` if that is on an Explicit mesh; unchanged otherwise.

    This is done before a rule, not inside it: the transpose of `reshard` gives the cotangent the sharding of its
    primal.
    """
    sharding = explicit_sharding(like)
    if sharding is None:
        return a
    full = PartitionSpec(*sharding.spec, *[None] * (like.ndim - len(sharding.spec)))
    return reshard_axes(a, NamedSharding(sharding.mesh, full), axes)


def reshard_axes(a: jax.Array, sharding: NamedSharding, axes: tuple[int, ...]) -> jax.Array:
    """`a` resharded like the given axes of a sharding."""
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[i] for i in axes))))


def dot_sharding(x: jax.Array, w: jax.Array, row_axes: int) -> NamedSharding | None:
    """The sharding of `x w` on an Explicit mesh: rows like those of `x`, columns like those of `w` if possible."""
    sharding = explicit_sharding(x) or explicit_sharding(w)
    if sharding is None:
        return None
    rows = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:row_axes]
    columns = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)[w.ndim - 1]
    if set(mesh_axes(columns)) & {axis for entry in rows for axis in mesh_axes(entry)}:
        columns = None
    return NamedSharding(sharding.mesh, PartitionSpec(*rows, columns))


def transposed(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array whose last two axes are swapped."""
    *before, rows, columns = sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(*before, columns, rows))


def mesh_axes(entry) -> tuple:
    """The mesh axes named by one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def is_tracer(a: Any) -> bool:
    """Whether `a` is a tracer, which represents an array while a function is traced."""
    return isinstance(a, Tracer)


def put(a: Any, sharding: NamedSharding) -> jax.Array:
    """Places `a`, which is the same on every process, with a sharding."""
    if sharding.is_fully_addressable or (isinstance(a, jax.Array) and not a.is_fully_addressable):
        return jax.device_put(a, sharding)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(a), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
    host = np.asarray(a)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def match_varying(args):
    """Casts every array of a pytree to vary over the mesh axes that any of them varies over.

    Outside `shard_map`, nothing varies and the arrays are unchanged. Inside, if a replicated weight meets a sharded
    batch, the gradient of the weight must be summed over the batch's mesh axes. The transpose of the cast is that sum.
    """
    leaves, treedef = jax.tree.flatten(args)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    axes = frozenset().union(*varying)
    missing = [tuple(sorted(axes - of_leaf)) for of_leaf in varying]
    lifted = [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(leaves, missing, strict=True)]
    return jax.tree.unflatten(treedef, lifted)


def zeros(like: Any) -> jax.Array:
    """Zeros with the shape, dtype and, on an Explicit mesh, sharding of a `jax.ShapeDtypeStruct`."""
    sharding = getattr(like, "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    a = jnp.zeros(like.shape, like.dtype)
    return jax.sharding.reshard(a, sharding) if explicit else a


class ExampleAxes(NamedTuple):
    """The mesh axes over which examples are sharded, and the number of devices along them."""

    mesh: Any
    axes: tuple[str, ...]
    devices: int


def shardings(tree: Any) -> tuple[NamedSharding | None, ...]:
    """The mesh sharding of each array of a pytree, or None.

    On an Auto mesh, only a concrete array knows its sharding. A traced array shows it only on an Explicit mesh.
    """

    def of(a):
        if is_tracer(a):
            return explicit_sharding(a)
        sharding = getattr(a, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None

    return tuple(map(of, jax.tree.leaves(tree)))


def constrain(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Constrains the sharding of `x` inside a compiled function; None leaves it unchanged."""
    if sharding is None:
        return x
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def example_axes(shardings: tuple) -> ExampleAxes | None:
    """How the first array with a sharded leading axis is sharded along it; None if there is none."""
    for sharding in shardings:
        if sharding is not None and sharding.spec and (axes := mesh_axes(sharding.spec[0])):
            return ExampleAxes(sharding.mesh, axes, math.prod(sharding.mesh.shape[axis] for axis in axes))
    return None


def gather_rows(a: Any, sharding: NamedSharding | None, *, indices: jax.Array) -> jax.Array:
    """Gathers rows of `a`, sharded like `a`, or replicated if the devices do not divide the number of rows."""
    over = example_axes((sharding,))
    if over is not None and len(indices) % over.devices:
        sharding = without_axes(sharding, over)
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        return jnp.asarray(a).at[indices].get(mode="promise_in_bounds", out_sharding=sharding)
    return constrain(jnp.asarray(a).at[indices].get(mode="promise_in_bounds"), sharding)


def without_axes(sharding: NamedSharding | None, over: ExampleAxes | None) -> NamedSharding | None:
    """A sharding without the mesh axes that shard the examples."""
    if sharding is None or over is None:
        return sharding
    kept = (tuple(axis for axis in mesh_axes(entry) if axis not in over.axes) for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in kept)))
