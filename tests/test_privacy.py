"""Private training steps: the influence of one example, batch sampling, and ε against a closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import losses, per_example, privacy, train
from tests.test_per_example import cross_entropy, made

NET = fcfunc.mlp([3, 5, 4])


def loss_fn(params, batch, key):
    x, labels = batch.examples
    return NET.example_gradients(
        params, x, lambda outputs: losses.softmax_cross_entropy_with_integer_labels(outputs, labels)
    )


def aggregated(params, batch, *, sigma=0.0, seed=0, max_norm=0.5):
    aggregate = privacy.private_mean(max_norm=max_norm, noise_multiplier=sigma, expected_batch_size=4)
    loss, gradient, metrics = aggregate(*loss_fn(params, batch, None), batch, jax.random.key(seed))
    return loss, ravel_pytree(gradient)[0], metrics


def batch_of(x, labels, included):
    return privacy.PoissonBatch((x, labels), jnp.asarray(included))


def test_without_noise_it_is_the_clipped_sum_of_the_included_examples_over_the_expected_size(x64):
    params, x, labels = made(NET)
    included = np.arange(7) < 5
    _, gradients = NET.example_gradients(params, x[:5], cross_entropy(labels[:5]))
    expected = ravel_pytree(per_example.clipped_sum(gradients, 0.5))[0] / 4
    loss, gradient, metrics = aggregated(params, batch_of(x, labels, included))
    np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    np.testing.assert_allclose(loss, jnp.mean(cross_entropy(labels)(NET.apply(params, x))[:5]), rtol=1e-12)
    norms = jnp.sqrt(per_example.squared_norms(gradients))
    assert int(metrics["included"]) == 5
    np.testing.assert_allclose(metrics["clipped"], np.mean(norms > 0.5))


@pytest.mark.parametrize("row", [[1.0, -2.0, 0.5], [1e20] * 3, [3e38] * 3, [np.nan] * 3, [np.inf, 0, 0]])
def test_an_example_moves_the_sum_by_at_most_the_norm_whatever_it_is(row):
    params = NET.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((7, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 7))
    x = x.at[2].set(jnp.asarray(row, jnp.float32))
    included = np.ones(7, bool)
    with_it = aggregated(params, batch_of(x, labels, included))[1]
    included[2] = False
    without = aggregated(params, batch_of(x, labels, included))[1]
    assert np.isfinite(with_it).all()
    assert float(jnp.linalg.norm(with_it - without)) <= 0.5 / 4 * (1 + 1e-5)


def test_in_bfloat16_an_example_moves_the_sum_by_no_more_than_the_norm():
    net = fcfunc.mlp([30, 200, 4], compute_dtype="bfloat16", activation="tanh")
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((64, 30)), jnp.float32), jnp.asarray(rng.integers(0, 4, 64))
    _, gradients = net.example_gradients(net.init(jax.random.key(0)), x, cross_entropy(labels))

    @jax.vmap
    def norm_of_one(i):
        one = jax.tree.map(lambda a: jnp.where(jnp.arange(64)[:, None] == i, a, 0), gradients)
        return jnp.linalg.norm(ravel_pytree(per_example.clipped_sum(one, 0.25))[0])

    norms = norm_of_one(jnp.arange(64))
    assert (norms > 0.24).all()  # every gradient is clipped
    assert (norms <= 0.25).all()


def test_the_noise_has_the_standard_deviation_of_the_norm_times_the_multiplier():
    params = NET.init(jax.random.key(0))
    batch = batch_of(jnp.zeros((7, 3)), jnp.zeros(7, jnp.int32), np.zeros(7, bool))
    noise = jax.jit(lambda seed: aggregated(params, batch, sigma=3.0, seed=seed)[1])
    drawn = jnp.stack([noise(seed) for seed in range(200)])
    np.testing.assert_allclose(jnp.std(drawn), 0.5 * 3 / 4, rtol=0.03)
    assert abs(float(jnp.mean(drawn))) < 0.01
    correlation = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])  # no two parameters share noise
    assert np.abs(correlation).max() < 0.4


def test_the_tails_of_the_noise_reach_beyond_those_of_one_normal_number(monkeypatch):
    largest = lambda key, shape, dtype: jnp.full(shape, 5.22, dtype)
    monkeypatch.setattr(jax.random, "normal", largest)
    batch = batch_of(jnp.zeros((7, 3)), jnp.zeros(7, jnp.int32), np.zeros(7, bool))
    noise = aggregated(NET.init(jax.random.key(0)), batch, sigma=3.0)[1]
    np.testing.assert_allclose(noise, 0.5 * 3 / 4 * 10.44, rtol=1e-5)


def test_without_a_noise_multiplier_for_what_was_asked_the_error_repeats_it():
    with pytest.raises(ValueError, match="found no noise multiplier for epsilon=0.001, rate=1.0, steps=1000"):
        privacy.noise_multiplier(epsilon=0.001, rate=1.0, steps=1000, delta=1e-8)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("columns", [None, "model"], ids=["replicated params", "params over model"])
def test_on_a_mesh_a_private_step_is_that_of_one_device(kind, columns):
    net, optimizer = fcfunc.mlp([6, 8, 8, 4], norm="layer_norm"), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((200, 6), dtype=np.float32), rng.integers(0, 4, 200)
    aggregate = privacy.private_mean(max_norm=0.5, noise_multiplier=1.0, expected_batch_size=20)

    def loss_fn(params, batch, key):
        x, labels = batch.examples
        return net.example_gradients(params, x, cross_entropy(labels))

    step = train.make_train_step(loss_fn, optimizer, aggregate=aggregate)

    def after_a_step(params, data):
        state = train.init_state(params, optimizer, jax.random.key(1))
        return step(state, privacy.poisson_batch(jax.random.key(2), data, rate=0.1))[0].params

    params = net.init(jax.random.key(0))
    expected = after_a_step(jax.tree.map(jnp.copy, params), data)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda a: PartitionSpec(*[None] * (a.ndim - 1), columns), params)
        params = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), params, specs)
        data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
        batch = privacy.poisson_batch(jax.random.key(2), data, rate=0.1)
        assert batch.examples[0].sharding.spec[0] == "data"  # each device has its own examples
        got = after_a_step(params, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_examples_are_included_independently_with_the_rate():
    draw = jax.jit(jax.vmap(lambda key: privacy.poisson_batch(key, jnp.arange(40), rate=0.3)))
    batches = draw(jax.random.split(jax.random.key(0), 5000))
    counts = np.zeros((5000, 40))
    rows, columns = np.nonzero(batches.included)
    np.add.at(counts, (rows, np.asarray(batches.examples)[rows, columns]), 1)
    assert counts.max() == 1  # no example appears twice
    np.testing.assert_allclose(counts.mean(0), 0.3, atol=0.03)  # four standard errors
    assert np.abs(np.corrcoef(counts.T) - np.eye(40)).max() < 0.07
    np.testing.assert_allclose(counts.sum(1).var(), 40 * 0.3 * 0.7, rtol=0.1)  # binomial variance


@pytest.mark.parametrize(("count", "rate"), [(60_000, 256 / 60_000), (1000, 0.05), (40, 0.3), (10, 1.0), (1, 0.5)])
def test_the_capacity_of_a_batch_is_exceeded_with_a_probability_below_1e_12(count, rate):
    capacity = privacy.batch_capacity(count, rate)
    beyond = (math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(capacity + 1, count + 1))
    assert count > 1000 or sum(beyond) <= 1e-12
    assert math.ceil(rate * count) <= capacity <= count


@pytest.mark.parametrize(("steps", "sigma"), [(1, 1.0), (10, 4.0), (100, 20.0)])
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism_in_closed_form(steps, sigma):
    # Balle and Wang (2018): k steps with noise σ are equivalent to one step with noise σ / √k.
    s = sigma / math.sqrt(steps)
    phi = lambda z: math.erfc(-z / math.sqrt(2)) / 2
    delta_at = lambda eps: phi(1 / (2 * s) - eps * s) - math.exp(eps) * phi(-1 / (2 * s) - eps * s)
    found = privacy.epsilon(rate=1.0, noise_multiplier=sigma, steps=steps, delta=1e-5)
    assert delta_at(found) <= 1e-5 * (1 + 1e-6)
    assert delta_at(found * 0.99) > 1e-5


def test_the_noise_multiplier_is_the_smallest_of_its_epsilon():
    options = {"rate": 0.02, "steps": 300, "delta": 1e-5}
    sigma = privacy.noise_multiplier(epsilon=0.5, **options)
    assert privacy.epsilon(noise_multiplier=sigma, **options) <= 0.5
    assert privacy.epsilon(noise_multiplier=0.995 * sigma, **options) > 0.5


def test_a_train_step_takes_it_and_draws_other_noise_each_time():
    optimizer = optax.sgd(0.1)
    aggregate = privacy.private_mean(max_norm=0.5, noise_multiplier=1.0, expected_batch_size=4)
    step = train.make_train_step(loss_fn, optimizer, aggregate=aggregate, donate=False)
    start = train.init_state(NET.init(jax.random.key(0)), optimizer, jax.random.key(1))
    data = jnp.zeros((40, 3)), jnp.zeros(40, jnp.int32)
    batch = privacy.poisson_batch(jax.random.key(2), data, rate=0.1)
    first, metrics = step(start, batch)
    second, _ = step(first, batch)
    changes = [
        ravel_pytree(jax.tree.map(jnp.subtract, b.params, a.params))[0] for a, b in ((start, first), (first, second))
    ]
    assert abs(float(jnp.corrcoef(jnp.stack(changes))[0, 1])) < 0.6
    assert sorted(metrics) == ["clipped", "included", "loss"]


def test_an_ordinary_batch_is_refused():
    aggregate = privacy.private_mean(max_norm=0.5, noise_multiplier=1.0, expected_batch_size=4)
    with pytest.raises(TypeError, match="the batch must come from privacy.poisson_batch, which the guarantee requires"):
        aggregate(jnp.zeros(3), [], (jnp.zeros(3),), jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: privacy.epsilon(rate=0, noise_multiplier=1.0, steps=1, delta=1e-5), "rate must be above 0"),
        (
            lambda: privacy.epsilon(rate=0.1, noise_multiplier=0, steps=1, delta=1e-5),
            "noise_multiplier must be at least 0.2",
        ),
        (lambda: privacy.epsilon(rate=0.1, noise_multiplier=1.0, steps=1, delta=1), "delta must be above 0 and below"),
        (lambda: privacy.epsilon(rate=0.1, noise_multiplier=1.0, steps=100, delta=1e-11), "delta must be above 2e-10"),
        (lambda: privacy.noise_multiplier(epsilon=0, rate=0.1, steps=1, delta=1e-5), "epsilon must be above 0"),
        (
            lambda: privacy.private_mean(max_norm=0, noise_multiplier=1.0, expected_batch_size=4),
            "private_mean: expected max_norm > 0, noise_multiplier >= 0, expected_batch_size > 0, got max_norm=0",
        ),
        (lambda: privacy.poisson_batch(jax.random.key(0), jnp.zeros(5), rate=1.5), "rate must be above 0 and at most"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_example_is_clipped_where_the_square_of_a_factor_underflows():
    # |h|² underflows to 0 in float32, but |h| |g| is 37.8.
    outer = per_example.Outer(jnp.full((1, 784), 9e-20), jnp.full((1, 1), 1.5e19))
    total = per_example.clipped_sum([{"w": outer}], 1.0)
    np.testing.assert_allclose(jnp.linalg.norm(total[0]["w"]), 1, rtol=1e-5)


def test_an_optimizer_does_not_see_the_loss_of_private_examples():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    aggregate = privacy.private_mean(max_norm=0.5, noise_multiplier=1.0, expected_batch_size=4)
    step = train.make_train_step(loss_fn, optimizer, aggregate=aggregate)
    state = train.init_state(NET.init(jax.random.key(0)), optimizer, jax.random.key(1))
    data = jnp.zeros((40, 3)), jnp.zeros(40, jnp.int32)
    with pytest.raises(TypeError, match="value"):
        step(state, privacy.poisson_batch(jax.random.key(2), data, rate=0.1))


@pytest.mark.parametrize(("epsilon", "rate", "steps", "delta"), [(0.01, 0.01, 10, 1e-5), (1.0, 0.1, 10, 0.5)])
def test_a_noise_multiplier_is_found_far_from_what_renyi_privacy_gives(epsilon, rate, steps, delta):
    options = {"rate": rate, "steps": steps, "delta": delta}
    sigma = privacy.noise_multiplier(epsilon=epsilon, **options)
    assert privacy.epsilon(noise_multiplier=sigma, **options) <= epsilon


def test_losses_gradients_and_batch_must_have_as_many_examples(x64):
    params, x, labels = made(NET, batch=2)
    aggregate = privacy.private_mean(max_norm=0.5, noise_multiplier=1.0, expected_batch_size=4)
    _, gradients = NET.example_gradients(params, x[:1], cross_entropy(labels[:1]))
    with pytest.raises(ValueError, match=r"must have equal numbers of examples, got \[2\], \[1\] and \[2\]"):
        aggregate(jnp.zeros(2), gradients, batch_of(x, labels, np.ones(2, bool)), jax.random.key(0))
