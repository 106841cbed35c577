"""Dropout."""

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._rule import rule, upcast


def dropout(x: jax.Array, *, rate: float, key: jax.Array) -> jax.Array:
    r"""Dropout: :math:`y = x ∘ k / (1 - r)`, where `k` is 1 with probability `1 - r` and 0 otherwise.

    The expected value of `y` is `x`. Dropped elements are 0, even if they were NaN or infinite. The same key drops the
    same elements: use `jax.random.fold_in` to give each call its own key and, inside `shard_map`, each device as well.

    Args:
      x: array of any shape.
      rate: `r`, the probability of dropping an element, in [0, 1].
      key: a random key.

    Returns:
      An array with the shape and dtype of `x`. Saved for the backward pass: only the key, from which the mask is
      regenerated.

    Raises:
      TypeError: `x` does not have a floating-point dtype; `key` is not a random key.
      ValueError: `rate` is outside [0, 1].

    Source: Srivastava et al. 2014, Dropout; derived in docs/background/derivations.md#dropout.

    Example:
      >>> jnp.unique(dropout(jnp.ones(100), rate=0.5, key=jax.random.key(0)))
      Array([0., 2.], dtype=float32)
    """
    _arguments.floating("dropout", x=x)
    _arguments.key("dropout", key)
    if not 0 <= _arguments.number("dropout", rate=rate) <= 1:
        raise ValueError(f"dropout: rate, the probability of dropping, must be in [0, 1], got {rate}")
    return _dropout(x, key, rate=float(rate))


def dropout_fwd(x, key, *, rate):
    """`(out, residuals)` of `dropout`."""
    # y = x ∘ k / (1 − r)
    return _drop(x, key, rate), key


def dropout_bwd(key, g, *, rate):
    """Cotangents `(dx, None)` of `dropout`: a key has no gradient."""
    # dx = g ∘ k / (1 − r)
    return _drop(g, key, rate), None


_dropout = rule(dropout_fwd, dropout_bwd)


def _drop(x, key, rate):
    kept = _layout.reshard_like(jax.random.bernoulli(key, 1 - rate, x.shape), x)
    return jnp.where(kept, upcast(x) * (1 / (1 - rate) if rate < 1 else 0.0), 0).astype(x.dtype)
