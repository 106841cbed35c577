"""The sharding of arrays: inside a rule, around a compiled step, and on the host."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: jax.Array, *beside: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `x` where its mesh has Explicit axes, else None.

    Where `x` itself is on no mesh but an array beside it is, `x` counts as replicated there.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    others = (s for s in map(explicit_sharding, beside) if s is not None)
    return next((NamedSharding(s.mesh, PartitionSpec()) for s in others), None)


def laid_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` in the layout that the type of `like` has on an Explicit mesh; unchanged elsewhere."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def laid_along(a: Any, like: jax.Array, axes: tuple[int, ...]) -> Any:
    """`a`, whose axes are some axes of `like`, in their layout on an Explicit mesh; None and elsewhere unchanged.

    Done before a rule, not in it: the transpose of a move is the move of the cotangent back to where its primal lies.
    """
    sharding = explicit_sharding(like)
    if a is None or sharding is None:
        return a
    whole = PartitionSpec(*sharding.spec, *[None] * (like.ndim - len(sharding.spec)))
    return laid(a, NamedSharding(sharding.mesh, whole), axes)


def laid(a: jax.Array, sharding: NamedSharding, axes: tuple[int, ...]) -> jax.Array:
    """`a` in the layout that some axes of a sharding have."""
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[i] for i in axes))))


def product_sharding(x: jax.Array, w: jax.Array, row_axes: int) -> NamedSharding | None:
    """Where `x w` lies on an Explicit mesh: its rows as those of `x`, its columns as those of `w` where they can."""
    sharding = explicit_sharding(x) or explicit_sharding(w)
    if sharding is None:
        return None
    rows = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:row_axes]
    columns = (*jax.typeof(w).sharding.spec, None, None)[1]
    if set(mesh_axes(columns)) & {axis for entry in rows for axis in mesh_axes(entry)}:
        columns = None
    return NamedSharding(sharding.mesh, PartitionSpec(*rows, columns))


def mesh_axes(entry) -> tuple:
    """The axes of a mesh that one entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def traced(a: Any) -> bool:
    """Whether `a` stands for an array while a function is traced."""
    return isinstance(a, Tracer)


def layouts(tree: Any) -> tuple[NamedSharding | None, ...]:
    """Where each array of a tree lies: its sharding on a mesh, or None.

    Only an array itself knows its layout on an Auto mesh; while tracing, the types tell that on Explicit meshes alone.
    """

    def layout(a):
        if traced(a):
            return explicit_sharding(a)
        sharding = getattr(a, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None

    return tuple(map(layout, jax.tree.leaves(tree)))


def placed(a: Any, sharding: NamedSharding) -> jax.Array:
    """`a`, the same on every process where there are several, put where a sharding says."""
    if sharding.is_fully_addressable or (isinstance(a, jax.Array) and not a.is_fully_addressable):
        return jax.device_put(a, sharding)
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        data = placed(jax.random.key_data(a), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(a))
    host = np.asarray(a)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole(a: Any) -> np.ndarray:
    """All of `a` on the host, also where other processes have parts of it; then every process calls this."""
    if isinstance(a, jax.Array) and not a.is_fully_addressable and not a.is_fully_replicated:
        return multihost_utils.process_allgather(a, tiled=True)
    return np.asarray(a)


def mesh_of(tree: Any) -> Any:
    """The mesh that the arrays of a tree lie on, None where they lie on none."""
    return next((s.mesh for s in layouts(tree) if s is not None), None)


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
    """A context in which new arrays may meet those of the tree, as optimisers make some."""
    mesh = mesh_of(tree)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrained(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x`, laid as a sharding says inside a compiled function; None leaves it."""
    if sharding is None:
        return x
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def each(fun: Callable, tree: Any, given: tuple) -> Any:
    """`fun(leaf, layout)` of each leaf of a tree, with what `layouts` gave for it."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, map(fun, leaves, given))


def taken(a: Any, sharding: NamedSharding | None, *, indices: jax.Array) -> jax.Array:
    """Some rows of `a`, each of them once and within bounds, divided as those of `a`; whole where they are too few."""
    over = rows((sharding,))
    if over is not None and len(indices) % over.devices:
        sharding = whole_along(sharding, over)
    options = {"mode": "promise_in_bounds", "unique_indices": True}
    if sharding is not None and AxisType.Explicit in sharding.mesh.axis_types:
        return jnp.asarray(a).at[indices].get(**options, out_sharding=sharding)
    return constrained(jnp.asarray(a).at[indices].get(**options), sharding)


class Rows(NamedTuple):
    """The axes of a mesh over which examples are divided, and over how many devices that is."""

    mesh: Any
    axes: tuple[str, ...]
    devices: int


def rows(layouts: tuple[NamedSharding | None, ...]) -> Rows | None:
    """How arrays of these layouts divide their first axis, the examples; None where they do not."""
    for sharding in layouts:
        if sharding is not None and sharding.spec and (axes := mesh_axes(sharding.spec[0])):
            return Rows(sharding.mesh, axes, math.prod(sharding.mesh.shape[axis] for axis in axes))
    return None


def along_rows(a: jax.Array, over: Rows | None) -> jax.Array:
    """`a` with its first axis divided as the examples are; its other axes stay as they lie."""
    if over is None:
        return a
    explicit = explicit_sharding(a)
    if AxisType.Explicit in over.mesh.axis_types:
        rest = (None,) * (a.ndim - 1) if explicit is None else explicit.spec[1:]
    else:
        rest = (PartitionSpec.UNCONSTRAINED,) * (a.ndim - 1)
    return constrained(a, NamedSharding(over.mesh, PartitionSpec(over.axes, *rest)))


def split_rows(a: jax.Array, shape: tuple[int, ...], over: Rows | None) -> jax.Array:
    """`a` with its first axis as several, the first of them divided as the examples are: nothing moves."""
    a, shape = along_rows(a, over), (*shape, *a.shape[1:])
    sharding = explicit_sharding(a)
    if sharding is None:
        return along_rows(a.reshape(shape), over)
    spec = PartitionSpec(sharding.spec[0], *[None] * (len(shape) - a.ndim), *sharding.spec[1:])
    return jax.lax.reshape(a, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def first(a: jax.Array) -> jax.Array:
    """`a[0]`, also where the first axis lies on several devices."""
    sharding = explicit_sharding(a)
    if sharding is not None:
        a = jax.sharding.reshard(a, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))
    return a[0]


def kind_of_part(a: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of `a[i]`.

    `a[0]` itself would not tell: where the axes that remain have size 1, JAX 0.12 drops their sharding.
    """
    sharding = explicit_sharding(a)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=sharding)


def zeros_along(kind: jax.ShapeDtypeStruct, dtype, over: Rows | None) -> jax.Array:
    """Zeros to add arrays of a kind to, whose first axis is divided as the examples are."""
    zeros = jnp.zeros(kind.shape, dtype)
    if over is not None and AxisType.Explicit in over.mesh.axis_types:
        # Without a sharding it does not depend on what lies on the mesh: a constant.
        return zeros if kind.sharding is None else jax.sharding.reshard(zeros, kind.sharding)
    return along_rows(zeros, over)


def whole_along(sharding: NamedSharding | None, over: Rows | None) -> NamedSharding | None:
    """A sharding without the axes that divide the examples."""
    if sharding is None or over is None:
        return sharding
    kept = (tuple(axis for axis in mesh_axes(entry) if axis not in over.axes) for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in kept)))


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of an enclosing `shard_map` over which `x` differs from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def vary_alike(args):
    """Lifts every array of a tree to vary over the axes that any of them varies over.

    Outside `shard_map` nothing varies and nothing is done. Inside, a replicated weight that meets a sharded
    batch owes its gradient a sum over the batch's axes; the transpose of the lift is that sum.
    """
    leaves, treedef = jax.tree.flatten(args)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves))
    if not axes:
        return args
    lifted = []
    for leaf in leaves:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        lifted.append(jax.lax.pcast(leaf, missing, to="varying") if missing else leaf)
    return jax.tree.unflatten(treedef, lifted)
