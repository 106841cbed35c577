"""The proof of a hand-written rule."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["worst_relative_error"]


def worst_relative_error(fun: Callable, reference: Callable, args: tuple, *, key: jax.Array) -> float:
    """How far the gradients of a rule are from those of its plain twin.

    Both are pulled back from one random cotangent of order 1.

    Args:
      fun: the function with a hand-written rule.
      reference: the same function without one, which JAX differentiates by itself.
      args: arguments for both; those that are not real have no gradient and are held fixed.
      key: a random key, for the cotangent.

    Returns:
      The largest difference between elements of two gradients, over the largest element of the reference's, the
      worst of all arguments; 0 where both gradients are 0.
    """
    real = [i for i, a in enumerate(args) if jnp.issubdtype(jnp.result_type(*jax.tree.leaves(a)), jnp.floating)]

    def gradients(f):
        def of_reals(*reals):
            filled = list(args)
            for i, a in zip(real, reals, strict=True):
                filled[i] = a
            return f(*filled)

        out, pull = jax.vjp(of_reals, *(args[i] for i in real))
        return jax.tree.leaves(pull(jax.random.normal(key, out.shape, out.dtype)))

    errors = [
        jnp.max(jnp.abs(got - expected)) / jnp.maximum(jnp.max(jnp.abs(expected)), jnp.finfo(expected.dtype).tiny)
        for got, expected in zip(gradients(fun), gradients(reference), strict=True)
    ]
    return float(jnp.max(jnp.stack(errors)))
