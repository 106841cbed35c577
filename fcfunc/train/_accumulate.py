"""Gradient accumulation over microbatches, on one or several devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _layout
from fcfunc._rule import sum_dtype
from fcfunc.train import _mesh
from fcfunc.train._mesh import Layouts


def accumulated(gradient: Callable, parts: int, layouts: Layouts) -> Callable:
    """`gradient(params, batch, key, model_state) -> ((loss, (metrics, model_state)), grads)`, run over microbatches.

    On a mesh every sum has a leading device axis. Each device adds up its own gradients, and the sum over that axis,
    which is the only communication, is taken once at the end; `optax.microbatch` would communicate in each microbatch.
    `layouts` describe a state whose first arrays are the params. The batch size must be a multiple of parts × devices.
    """

    def of_batch(params: Any, batch: Any, key: jax.Array, model_state: Any):
        over = layouts.examples
        devices = 1 if over is None else over.devices
        # Params that are sharded over the same devices are gathered once here, not in each microbatch.
        gathered = layouts.gather_params(params)

        def split(a):
            """`[n, ...]` to `[parts, devices, n / parts / devices, ...]`; each device keeps its own examples."""
            a = _mesh.split_examples(a, (devices, parts, a.shape[0] // (devices * parts)), over)
            return jnp.moveaxis(a, 1, 0)

        def of_microbatch(microbatch, i, model_state):
            return gradient(gathered, microbatch, jax.random.fold_in(key, i[0]), model_state)

        of_devices: Any = jax.vmap(of_microbatch)
        xs = jax.tree.map(split, (batch, jnp.arange(devices * parts, dtype=jnp.uint32)))
        model_state = jax.tree.map(
            lambda a: _mesh.split_examples(jnp.stack([a] * devices), (devices,), over), model_state
        )
        shapes: Any = jax.eval_shape(of_devices, *jax.tree.map(_mesh.type_of_part, xs), model_state)

        def add(carry, x):
            sums, before = carry
            (loss, (metrics, model_state)), grads = of_devices(*x, before)
            model_state = jax.tree.map(_layout.reshard_like, model_state, before)
            sums = jax.tree.map(lambda total, a: total + a.astype(total.dtype), sums, (loss, metrics, grads))
            return (sums, model_state), None

        (loss, (metrics, _)), grads = shapes
        for name, metric in metrics.items():
            if metric.ndim > 1:
                raise ValueError(
                    f"accumulate: each metric must be a scalar, a mean, got {name!r} {list(metric.shape[1:])}"
                )
        zeros = jax.tree.map(lambda a: _mesh.zeros_like_sharded(a, mean_dtype(a.dtype), over), (loss, metrics, grads))
        (sums, model_state), _ = jax.lax.scan(add, (zeros, model_state), xs)
        loss, metrics, grads = jax.tree.map(lambda a: jnp.sum(a, axis=0) / (devices * parts), sums)
        grads = layouts.constrain_state(grads)
        grads = jax.tree.map(lambda a, p: a.astype(p.dtype), grads, params)
        return (loss, (metrics, jax.tree.map(_mean_of_devices, model_state))), grads

    return of_batch


def _mean_of_devices(a):
    """Merges the devices' model states: the mean of real arrays; the first of counts and keys, which are all equal."""
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.mean(a, axis=0, dtype=mean_dtype(a.dtype)).astype(a.dtype)
    return _mesh.first_device(a)


def mean_dtype(dtype):
    """At least float32: the mean of integers is not an integer, and a mean in bfloat16 is inaccurate."""
    return sum_dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)
