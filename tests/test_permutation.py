"""The order of an epoch: each example appears once, and all orders are equally likely."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcfunc.train._permutation import permutation
from tests.rules import slow


def draws(n, count, seed=0):
    return np.asarray(jax.vmap(lambda key: permutation(key, n))(jax.random.split(jax.random.key(seed), count)))


def deviation(observed, expected):
    """Returns how many standard deviations Pearson's chi-square is from its mean under uniform draws."""
    free = observed.size - 1
    return abs(np.sum((observed - expected) ** 2 / expected) - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("n", [1, slow(2), 3, *map(slow, (7, 9, 16, 100)), 1437, *map(slow, (4099, 65_537)), 1_000_000])
def test_every_index_comes_once(n):
    np.testing.assert_array_equal(np.sort(permutation(jax.random.key(n), n)), np.arange(n))


@pytest.mark.parametrize("n", [2, 3, *map(slow, (4, 5, 6, 7))])
def test_each_of_the_orders_of_a_few_is_as_likely_as_the_others(n):
    count = 50 * math.factorial(n)
    index = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    observed = np.bincount([index[tuple(order)] for order in draws(n, count).tolist()], minlength=len(index))
    assert deviation(observed, 50) < 4.5


@pytest.mark.parametrize("n", [9, slow(97), slow(1437)])
def test_each_index_is_as_likely_at_each_place_and_after_each_other(n):
    orders = draws(n, 200_000 // n)
    pairs = lambda a, b, m: np.bincount((a * m // n) * m + b * m // n, minlength=m * m)
    m = min(n, 32)
    bins = np.bincount(np.arange(n) * m // n)
    places = pairs(np.tile(np.arange(n), len(orders)), orders.reshape(-1), m)
    assert deviation(places, len(orders) * np.outer(bins, bins).reshape(-1) / n) < 4.5
    steps = np.bincount(np.diff(orders).reshape(-1) % n, minlength=n)[1:]
    assert deviation(steps, steps.sum() / (n - 1)) < 4.5


def test_both_parities_of_an_order_come_as_often():
    def odd(order):
        return sum(a > b for a, b in itertools.combinations(order, 2)) % 2

    odds = sum(odd(order) for order in draws(9, 2000).tolist())
    assert abs(odds - 1000) < 4.5 * math.sqrt(500)


def test_orders_of_different_keys_overlap_no_more_than_chance():
    one, two = draws(4096, 2)
    assert abs(np.sum(one == two) - 1) < 6
    shared = [len(np.intersect1d(one[i : i + 64], two[i : i + 64])) for i in range(0, 4096, 64)]
    assert abs(np.mean(shared) - 1) < 0.6


def test_orders_of_consecutive_epochs_are_unrelated():
    key, epochs, n = jax.random.key(5), np.arange(2000), 100
    orders = np.asarray(jax.vmap(lambda epoch: permutation(key, n, salts=(epoch,)))(epochs))
    m, of = 10, lambda order: order * 10 // n
    pairs = np.bincount((of(orders[:-1]) * m + of(orders[1:])).reshape(-1), minlength=m * m)
    assert deviation(pairs, (len(epochs) - 1) * n / m**2) < 4.5
    assert abs(np.mean(orders[:-1] == orders[1:]) * n - 1) < 4.5 / math.sqrt(len(epochs) - 1)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_word_of_the_key_counts(impl):
    words = jax.random.key_data(jax.random.key(0, impl=impl))
    of = lambda words: np.asarray(permutation(jax.random.wrap_key_data(words, impl=impl), 1437))
    for i in range(len(words)):
        assert np.mean(of(words) == of(words.at[i].add(1))) < 0.01


def test_the_order_is_the_same_compiled_and_under_vmap():
    key = jax.random.key(3)
    eager = permutation(key, 1437)
    np.testing.assert_array_equal(jax.jit(permutation, static_argnums=1)(key, 1437), eager)
    np.testing.assert_array_equal(jax.vmap(lambda k: permutation(k, 1437))(jnp.stack([key, key]))[1], eager)
