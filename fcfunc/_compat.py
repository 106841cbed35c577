"""What differs between JAX releases: the type of a value on a mesh, the evaluation of an equation;
and what differs between its backends.

Everything else in the package asks here, so that an upgrade of JAX is a change to one file.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `x` where its mesh has Explicit axes, else None."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def product(x: jax.Array, y: jax.Array, dims, *, accumulate, out_sharding=None) -> jax.Array:
    """`lax.dot_general` of operands of one dtype, accumulated and returned in another.

    Where XLA's CPU backend lacks a product of two bfloat16 operands into float32 is one form: a matrix, by its first
    axis, with a stack of matrices, which an ensemble under `vmap` makes. Given a batch of one the product is simplified
    into a form that every backend has.
    """
    ((x_by, y_by), _) = dims
    if x.dtype == accumulate or x_by[0] != 0:
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
