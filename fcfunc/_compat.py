"""What differs between JAX releases: the type of a value on a mesh, the evaluation of an equation;
and what differs between its backends.

Everything else in the package asks here, so that an upgrade of JAX is a change to one file.
"""

from typing import Any

import jax
import jax.numpy as jnp
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


def product(x: jax.Array, y: jax.Array, dims, *, accumulate, out_sharding=None) -> jax.Array:
    """`lax.dot_general` of operands of one dtype, accumulated and returned in another.

    Where XLA's CPU backend lacks a product of two bfloat16 operands into float32 is one form: a matrix, by its first
    axis, with a stack of matrices, which an ensemble under `vmap` makes. Given a batch of one the product is simplified
    into a form that every backend has.
    """
    ((x_by, y_by), _) = dims
    if x.dtype == accumulate or not x_by or x_by[0] != 0:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=accumulate, out_sharding=out_sharding)
    if out_sharding is not None:
        out_sharding = NamedSharding(out_sharding.mesh, PartitionSpec(None, *out_sharding.spec))
    dims = ((tuple(i + 1 for i in x_by), tuple(i + 1 for i in y_by)), ((0,), (0,)))
    x, y = jnp.expand_dims(x, 0), jnp.expand_dims(y, 0)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=accumulate, out_sharding=out_sharding)[0]


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
    if set(_mesh_axes(columns)) & {axis for entry in rows for axis in _mesh_axes(entry)}:
        columns = None
    return NamedSharding(sharding.mesh, PartitionSpec(*rows, columns))


def _mesh_axes(entry) -> tuple:
    """The axes of a mesh that one entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


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


def bind(primitive, values: list, params: dict) -> list:
    """The results of one equation of a jaxpr; releases differ in what `get_bind_params` returns."""
    bound = primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outs = primitive.bind(*functions, *values, **params)
    return outs if primitive.multiple_results else [outs]
