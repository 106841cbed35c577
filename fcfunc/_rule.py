"""Turns hand-written rules into differentiable functions, in the same way for every rule in the package."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fcfunc import _layout
from fcfunc._arguments import as_array


def rule(fwd: Callable, bwd: Callable) -> Callable:
    """Joins `fwd(*args, **options) -> (out, residuals)` and `bwd(residuals, g, **options) -> cotangents`.

    The result computes `fwd(*args, **options)[0]` and is differentiated in reverse mode by `bwd`. Positional arguments
    are pytrees of arrays. Keyword options are static and hashable; `bwd` receives those that it names, or all of them
    if it has `**options`. This function exists because `jax.custom_vjp` does not support keyword-only options.

    `fwd` is plain JAX and never calls the joined function. The rule itself can therefore be differentiated
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

    primal.__name__ = fwd.__name__.removesuffix("_fwd")  # the name in a jaxpr and in a profile
    joined = jax.custom_vjp(primal, nondiff_argnums=(0,))
    joined.defvjp(joined_fwd, joined_bwd)

    def call(*args, **options):
        return joined(tuple(sorted(options.items())), *_layout.match_varying(jax.tree.map(as_array, args)))

    return call


def sum_dtype(dtype) -> jnp.dtype:
    """The dtype in which arrays of `dtype` are summed and multiplied: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def upcast(x: jax.Array) -> jax.Array:
    """`x` cast to at least float32."""
    return x.astype(sum_dtype(x.dtype))
