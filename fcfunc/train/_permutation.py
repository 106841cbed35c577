"""A random order of n things without a sort: each place's element is computed by itself."""

import math

import jax
import jax.numpy as jnp

ROUNDS = {256: 12, 2**31: 4}
"""Rounds for fewer than this many things. Small digits need more: after 4, orders of six are not equally likely."""


def permutation(key: jax.Array, n: int, places: jax.Array | None = None) -> jax.Array:
    """A pseudo-random permutation of 0 to n − 1, int32, with as much work per element as there are rounds.

    `places`: which of its elements, by default all of them in order.

    A number is written as two digits, of bases a and b with a·b just above n. Each round adds to one digit a keyed hash
    of the other, and then the other way round: a Feistel network, which can be undone and so is a bijection, whatever
    the hash. What falls above n is sent through again until it does not, which it does not for ever: its orbit returns
    to where it started, below n.

    Sources: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, for the digits and the walk; the constants
    of the hash are those of "lowbias32" by Wellons 2018.
    """
    # An even base, or every round would be an even permutation, and so their composition.
    a = 2 * math.ceil(math.sqrt(max(n, 1)) / 2)
    b = -(-max(n, 1) // a)
    count = next(count for below, count in ROUNDS.items() if n < below)
    keys = jax.random.bits(key, (count, 2), jnp.uint32)

    def rounds(x):
        high, low = x // b, x % b
        for i in range(count):
            high = _added(high, _hash(low, keys[i, 0]), a)
            low = _added(low, _hash(high, keys[i, 1]), b)
        return high * b + low

    x = rounds(jnp.arange(n, dtype=jnp.uint32) if places is None else places.astype(jnp.uint32))
    if a * b > n:
        x = jax.lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, rounds(x), x), x)
    return x.astype(jnp.int32)


def _added(digit, hashed, base):
    """`digit` plus a number below `base`, which the upper 16 bits of the hash give, modulo `base`."""
    total = digit + (((hashed >> 16) * base) >> 16)
    return jnp.where(total >= base, total - base, total)


def _hash(x, key):
    x = (x ^ key) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
