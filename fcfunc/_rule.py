"""How a hand-written rule becomes a differentiable function: one way for every rule in the package."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fcfunc import _layout
from fcfunc._arguments import as_array


def rule(fwd: Callable, bwd: Callable) -> Callable:
    """Joins `fwd(*args, **options) -> (out, residuals)` and `bwd(residuals, g, **options) -> cotangents`.

    The result computes `fwd(*args, **options)[0]` and is differentiated in reverse mode by `bwd`. Positional arguments
    are arrays or trees of them; keyword options are static and hashable, and `bwd` is given those that it names, or all
    where it takes `**options`.
    `jax.custom_vjp` alone takes no keyword-only options, which is why this function exists.

    `fwd` is plain JAX and never calls the joined function: so the rule can itself be differentiated
    (`jax.hessian`, `jvp` of `grad`), and `jax.grad` of the undecorated function is an oracle for `bwd`.
    """
    bwd_options = inspect.signature(bwd).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in bwd_options.values())

    def primal(options, *args):
        return fwd(*args, **dict(options))[0]

    def joined_fwd(options, *args):
        return fwd(*args, **dict(options))

    def joined_bwd(options, residuals, g):
        return bwd(residuals, g, **{name: value for name, value in options if takes_all or name in bwd_options})

    primal.__name__ = fwd.__name__.removesuffix("_fwd")  # the name seen in a jaxpr and in a profile
    joined = jax.custom_vjp(primal, nondiff_argnums=(0,))
    joined.defvjp(joined_fwd, joined_bwd)

    names = list(inspect.signature(fwd).parameters)

    def call(*args, **options):
        for name, a in zip(names, args, strict=False):
            if isinstance(a, str):  # JAX itself would not say which
                raise TypeError(f"{primal.__name__}: {name} must be an array, got {a!r:.80}")
        return joined(tuple(sorted(options.items())), *_layout.vary_alike(jax.tree.map(as_array, args)))

    return call


def accumulator(dtype) -> jnp.dtype:
    """The dtype of sums and products over arrays of `dtype`: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """`x` in its accumulator's dtype."""
    return x.astype(accumulator(x.dtype))
