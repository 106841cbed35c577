"""The gradient of a batch from its parts, one after the other, on one device or on many."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _layout
from fcfunc._rule import accumulator


def accumulated(gradient: Callable, parts: int, layouts: Any, params: Any, batch: Any, key, model_state: Any):
    """`gradient(params, batch, key, model_state) -> ((loss, (metrics, model_state)), grads)`, a part at a time.

    On a mesh the devices that divide the examples are a mapped first axis of every sum: each adds up its own, and the
    sum over that axis, the only one that is communicated, is taken once, at the end. `layouts` are those of a state
    that begins with the params, and of the data; parts times devices divides the number of examples.
    """
    count = len(jax.tree.leaves(params))
    of_params = layouts.state[:count] if layouts else (None,) * count
    rows = _layout.rows(layouts.data) if layouts else None
    devices = 1 if rows is None else rows.devices
    # Params that lie over the same devices are gathered here, once, and not in each part.
    whole = _layout.each(lambda a, s: _layout.constrained(a, _layout.whole_along(s, rows)), params, of_params)

    def shares(a):
        """`[n, ...]` as `[parts, devices, n / parts / devices, ...]`, where each device keeps what it has."""
        a = _layout.split_rows(a, (devices, parts, a.shape[0] // (devices * parts)), rows)
        return jnp.moveaxis(a, 1, 0)

    def one(part, i, model_state):
        return gradient(whole, part, jax.random.fold_in(key, i[0]), model_state)

    each: Any = jax.vmap(one)
    xs = jax.tree.map(shares, (batch, jnp.arange(devices * parts, dtype=jnp.uint32)))
    model_state = jax.tree.map(lambda a: _layout.split_rows(jnp.stack([a] * devices), (devices,), rows), model_state)
    kinds: Any = jax.eval_shape(each, *jax.tree.map(_layout.kind_of_part, xs), model_state)

    def add(carry, x):
        sums, before = carry
        (loss, (metrics, model_state)), grads = each(*x, before)
        model_state = jax.tree.map(_layout.laid_like, model_state, before)
        sums = jax.tree.map(lambda total, a: total + a.astype(total.dtype), sums, (loss, metrics, grads))
        return (sums, model_state), None

    (loss, (metrics, _)), grads = kinds
    for name, metric in metrics.items():
        if metric.ndim > 1:
            raise ValueError(
                f"accumulate: each metric must be one number, a mean, got {name!r} {list(metric.shape[1:])}"
            )
    zeros = jax.tree.map(lambda a: _layout.zeros_along(a, mean_dtype(a.dtype), rows), (loss, metrics, grads))
    (sums, model_state), _ = jax.lax.scan(add, (zeros, model_state), xs)
    loss, metrics, grads = jax.tree.map(lambda a: jnp.sum(a, axis=0) / (devices * parts), sums)
    model_state = jax.tree.map(_of_devices, model_state)
    grads = _layout.each(_layout.constrained, grads, of_params)
    grads = jax.tree.map(lambda a, p: a.astype(p.dtype), grads, params)
    return (loss, (metrics, model_state)), grads


def _of_devices(a):
    """The devices' model states as one: the mean of real numbers; of counts and keys, which are alike, the first."""
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jnp.mean(a, axis=0, dtype=mean_dtype(a.dtype)).astype(a.dtype)
    return _layout.first(a)


def mean_dtype(dtype):
    """At least float32: the mean of counts is no count, and a mean in bfloat16 is a poor one."""
    return accumulator(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)
