"""The table of rules: a new rule is one new row here, and is then tested everywhere."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import losses, ops, reference


class Row(NamedTuple):
    """A rule, its plain twin, and how to draw `(seed, n rows, d columns, dtype)` arguments of order 1."""

    name: str
    fun: Callable
    reference: Callable
    draw: Callable


def _normal(seed, *shapes, dtype):
    # NumPy draws: jax.random would compile once for every shape.
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes)


def _x(seed, n, d, dtype):
    return _normal(seed, (n, d), dtype=dtype)


def _affine(seed, n, d, dtype):
    return _normal(seed, (n, d), (d, d + 2), (d + 2,), dtype=dtype)


def _images(seed, n, d, dtype):
    return _normal(seed, (n, 2, d), (2 * d, d + 2), (d + 2,), dtype=dtype)


def _labelled(seed, n, d, dtype):
    labels = np.random.default_rng(seed + 1).integers(0, max(d, 1), n, dtype=np.int32)
    return *_x(seed, n, d, dtype), jnp.asarray(labels)


def _probs(seed, n, d, dtype):
    e = np.exp(np.random.default_rng(seed).standard_normal((n, d)))
    return jnp.asarray((e / e.sum(axis=1, keepdims=True)).astype(dtype)), _labelled(seed, n, d, dtype)[1]


def _pair(seed, n, d, dtype):
    return *_x(seed, n, d, dtype), jnp.asarray(np.random.default_rng(seed + 1).uniform(size=(n, d)).astype(dtype))


def _params(seed, n, d, dtype):
    first, b, second = _normal(seed, (n, d), (d,), (d, 2), dtype=dtype)
    return ([{"w": first, "b": b}, {"w": second}],)


def _row(module, name, draw, **options):
    fun, twin = getattr(module, name), getattr(reference, name)
    if not options:
        return Row(name, fun, twin, draw)
    label = f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}"
    return Row(label, lambda *args: fun(*args, **options), lambda *args: twin(*args, **options), draw)


RULES = [
    _row(ops, "affine", _affine),
    _row(ops, "affine", _images, flatten=True),
    _row(ops, "relu", _x),
    _row(ops, "sigmoid", _x),
    _row(ops, "tanh", _x),
    _row(ops, "softmax", _x),
    _row(ops, "softmax", _x, axis=0),
    _row(ops, "log_softmax", _x),
    _row(ops, "log_softmax", _x, axis=0),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labelled),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labelled, ignore_index=1),
    _row(losses, "softmax_cross_entropy", _pair),
    _row(losses, "sigmoid_binary_cross_entropy", _pair),
    _row(losses, "squared_error", _pair),
    _row(losses, "negative_log_likelihood", _probs),
    _row(losses, "negative_log_likelihood", _probs, ignore_index=1),
    _row(losses, "multiclass_svm", _labelled),
    _row(losses, "multiclass_svm", _labelled, margin=0.25),
    _row(losses, "l2_penalty", _params),
]


def split_real(args):
    """Which arguments are real, and a way to put new ones in their place."""
    real = [i for i, a in enumerate(args) if jnp.issubdtype(jax.tree.leaves(a)[0].dtype, jnp.floating)]

    def fill(reals):
        filled = list(args)
        for i, a in zip(real, reals, strict=True):
            filled[i] = a
        return filled

    return tuple(args[i] for i in real), fill


def cotangent(fun, args):
    """A random cotangent for the output of `fun`, of order 1."""
    out = jax.eval_shape(fun, *args)
    return jnp.asarray(np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype))


@functools.partial(jax.jit, static_argnums=0)
def gradients(fun, args, g):
    """The output of `fun` and the gradients of its real arguments, compiled."""
    reals, fill = split_real(args)
    out, pull = jax.vjp(lambda *reals: fun(*fill(reals)), *reals)
    return out, pull(g)
