"""The precision in which a rule computes: at least float32, whatever it was given."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def accumulator(dtype) -> jnp.dtype:
    """The dtype of sums and products over arrays of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """`x` in its accumulator's dtype."""
    return x.astype(accumulator(x.dtype))


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
