"""A random permutation without a sort: each element is computed independently."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROUNDS = {256: 12, 2**31: 4}
"""The number of rounds for fewer than this many elements. Small digits need more: after 4 rounds, the permutations of
six elements are not equally likely."""


def permutation(key: jax.Array, n: int, places: jax.Array | None = None, salts: Sequence[Any] = ()) -> jax.Array:
    """A pseudo-random permutation of 0 to n − 1, int32; the work per element is proportional to the number of rounds.

    Each key, and each sequence of integers `salts` with it, has its own permutation. `places` selects which of its
    elements to compute, by default all of them in order.

    A number is written as two digits, in bases a and b with a·b at least n. Each round adds to one digit a keyed hash
    of the other, and then vice versa. This is a Feistel network: each round can be inverted for any hash, so the result
    is a bijection. Values of n or more are passed through again until they are below n (cycle walking). This
    terminates, because the cycle of a value contains its starting point, which is below n.

    Sources: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, for the digits and the cycle walking;
    Wellons 2018, "lowbias32", for the constants of the hash.
    """
    a, b = _bases(n)
    count = next(count for below, count in ROUNDS.items() if n < below)
    keys = _round_keys(key, salts, count)

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


def _bases(n):
    """Two bases near √n whose product is at least n, and as small as possible: each further pass takes as long again.

    The base a is even: otherwise every round, and so their composition, would be an even permutation.
    """
    n = max(n, 1)
    evens = range(2 * math.ceil(0.4 * math.sqrt(n)), 2 * math.ceil(0.6 * math.sqrt(n)) + 1, 2)
    a = min(evens, key=lambda a: a * -(-n // a))
    return a, -(-n // a)


def _round_keys(key, salts, count):
    """Two 32-bit keys for each round, hashed from the words of a random key and the salts.

    `jax.random.bits` could do the same, but XLA compiles JAX's generator as a loop on a CPU. Three such loops, to
    derive the epoch's key and these, took 9% of an epoch of the digits network.
    """
    # The increment of Weyl sequences, 2³² divided by the golden ratio, spreads the starting points.
    hashed = jnp.arange(1, 2 * count + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for word in (*jax.random.key_data(key).reshape(-1), *salts):
        hashed = _hash(hashed, jnp.asarray(word).astype(jnp.uint32))
    # The barrier keeps XLA from computing them again for each element.
    return jax.lax.optimization_barrier(hashed.reshape(count, 2))


def _added(digit, hashed, base):
    """`digit` plus a number below `base`, taken from the upper 16 bits of the hash, modulo `base`."""
    total = digit + (((hashed >> 16) * base) >> 16)
    return jnp.where(total >= base, total - base, total)


def _hash(x, key):
    x = (x ^ key) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
