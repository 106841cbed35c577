"""The precision in which a rule computes: at least float32, whatever it was given."""

import jax
import jax.numpy as jnp


def accumulator(dtype) -> jnp.dtype:
    """The dtype of sums and products over arrays of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """`x` in its accumulator's dtype."""
    return x.astype(accumulator(x.dtype))
