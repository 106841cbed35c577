"""Factored per-example gradients against `vmap(grad)` of the same network in float64."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import losses, per_example, train
from tests.rules import slow

BATCH = 7
NORMS = (None, "layer_norm", "rms_norm")
ACTIVATIONS = ("relu", "gelu", ("elu", 0.5), "tanh", "silu", jnp.sin)


def made(net, *, seed=0, batch=BATCH, stacked=False):
    """Returns parameters with no zeros, inputs, and labels."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.3 * rng.standard_normal(a.shape)),
        net.init(jax.random.key(seed), param_dtype="float64"),
    )
    x = jnp.asarray(rng.standard_normal((batch, net.dims[0])))
    labels = jnp.asarray(rng.integers(0, net.dims[-1], batch))
    return (fcfunc.stack(params) if stacked else params), x, labels


def cross_entropy(labels):
    return lambda outputs: losses.softmax_cross_entropy_with_integer_labels(outputs, labels)


def by_vmap(net, params, x, loss_fn, **options):
    """Returns the loss and the full gradient of every example, computed with `vmap`."""

    def loss_of(params, i):
        return loss_fn(net.apply(params, x, **options))[i]

    return jax.vmap(jax.value_and_grad(loss_of), in_axes=(None, 0))(params, jnp.arange(len(x)))


def flat(gradients):
    return jnp.concatenate([a.reshape(len(a), -1) for a in jax.tree.leaves(gradients)], axis=1)


def close(got, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0))


def check(net, *, stacked=False, key=None, loss_fn=cross_entropy):
    params, x, labels = made(net, stacked=stacked)
    options = {} if key is None else {"key": key}
    values, gradients = net.example_gradients(params, x, loss_fn(labels), **options)
    expected_values, expected = by_vmap(net, params, x, loss_fn(labels), **options)
    close(values, expected_values)
    jax.tree.map(close, per_example.materialized(gradients), expected)
    return params, gradients, expected


NETWORKS = [
    (norm, i % 2 == 0, i // 2 % 2 == 0, activation)
    for i, (norm, activation) in enumerate(itertools.product(NORMS, ACTIVATIONS))
]
networks = pytest.mark.parametrize(
    ("norm", "residual", "bias", "activation"),
    [slow(*case) if i % 3 else case for i, case in enumerate(NETWORKS)],
)
"""Every norm with every activation, with and without residual connections and biases."""


@pytest.mark.parametrize("stacked", [False, True], ids=["", "stacked"])
@networks
def test_the_factors_are_the_gradients_of_vmap_of_grad(x64, norm, residual, bias, activation, stacked):
    net = fcfunc.mlp([3, 5, 5, 5, 4], norm=norm, residual=residual, use_bias=bias, activation=activation)
    check(net, stacked=stacked)


@pytest.mark.parametrize("stacked", [False, True], ids=["", "stacked"])
def test_dropout_draws_the_masks_of_apply(x64, stacked):
    net = fcfunc.mlp([3, 5, 5, 5, 4], dropout_rate=0.4, residual=True, norm="layer_norm")
    check(net, stacked=stacked, key=jax.random.key(3))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda y: lambda z: losses.softmax_cross_entropy_with_integer_labels(z, y, label_smoothing=0.2, ignore_index=1),
        lambda y: lambda z: losses.softmax_cross_entropy(z, jax.nn.one_hot(y, 4, dtype=z.dtype)),
        lambda y: lambda z: jnp.sum(losses.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 4, dtype=z.dtype)), -1),
        lambda y: lambda z: jnp.sum(losses.squared_error(z), -1),
        lambda y: lambda z: losses.multiclass_svm(z, y),
    ],
    ids=["smoothed and ignored", "distributions", "binary", "squared error", "hinge"],
)
def test_the_losses_of_this_package_are_sums_over_examples(x64, loss_fn):
    check(fcfunc.mlp([3, 5, 4]), loss_fn=loss_fn)


@pytest.fixture
def example(x64):
    """Returns parameters, factored gradients, and the matrix of all gradients, for a network with every option."""
    net = fcfunc.mlp([3, 5, 5, 5, 4], norm="layer_norm", residual=True)
    params, gradients, expected = check(net, stacked=True)
    return params, gradients, flat(expected)


def test_squared_norms_are_those_of_the_whole_gradients(example):
    _, gradients, matrix = example
    close(per_example.squared_norms(gradients), jnp.sum(matrix**2, axis=1))


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e9])
def test_a_clipped_sum_is_that_of_the_clipped_gradients(example, max_norm):
    _, gradients, matrix = example
    factors = jnp.minimum(1, max_norm / jnp.sqrt(jnp.sum(matrix**2, axis=1, keepdims=True)))
    clipped = per_example.clipped_sum(gradients, max_norm)
    close(flat(jax.tree.map(lambda a: a[None], clipped))[0], jnp.sum(factors * matrix, axis=0))


def test_one_example_moves_a_clipped_sum_by_at_most_the_norm(x64):
    net = fcfunc.mlp([3, 5, 4])
    params, x, labels = made(net)
    x = x.at[0].multiply(1e6)
    sums = []
    for kept in (slice(None), slice(1, None)):
        _, gradients = net.example_gradients(params, x[kept], cross_entropy(labels[kept]))
        sums.append(flat(jax.tree.map(lambda a: a[None], per_example.clipped_sum(gradients, 0.5)))[0])
    assert float(jnp.linalg.norm(sums[0] - sums[1])) <= 0.5 * (1 + 1e-12)


def test_dot_products_are_those_of_the_whole_gradients(example):
    _, gradients, matrix = example
    close(per_example.dot_products(gradients, gradients), jnp.einsum("ip,jp->ij", matrix, matrix))


def test_along_a_direction_is_the_dot_product_with_it(example):
    params, gradients, matrix = example
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
    expected = jnp.einsum("ip,p->i", matrix, flat(jax.tree.map(lambda a: a[None], direction))[0])
    close(per_example.along(gradients, direction), expected)


def test_the_noise_scale_is_the_variance_over_the_squared_gradient(example):
    _, gradients, matrix = example
    variance = jnp.sum(jnp.var(matrix, axis=0, ddof=1))
    squared = jnp.sum(jnp.mean(matrix, axis=0) ** 2) - variance / BATCH
    found = per_example.noise_scale(gradients)
    close(found.variance, variance)
    close(found.squared_gradient, squared)
    close(found.noise_scale, variance / squared)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_none_or_one_has_gradients(x64, batch):
    net = fcfunc.mlp([3, 5, 4])
    params, x, labels = made(net, batch=batch)
    values, gradients = net.example_gradients(params, x, cross_entropy(labels))
    assert values.shape == per_example.squared_norms(gradients).shape == (batch,)
    assert jax.tree.map(jnp.shape, per_example.clipped_sum(gradients, 1.0)) == jax.tree.map(jnp.shape, params)


def test_a_nan_in_one_example_stays_in_its_results(x64):
    net = fcfunc.mlp([3, 5, 4], norm="rms_norm")
    params, x, labels = made(net)
    values, gradients = net.example_gradients(params, x.at[2].set(jnp.nan), cross_entropy(labels))
    norms, products = per_example.squared_norms(gradients), per_example.dot_products(gradients, gradients)
    others = np.arange(BATCH) != 2
    for a in (values, norms):
        assert np.isnan(a[2])
        assert np.isfinite(a[others]).all()
    assert np.isfinite(products[np.ix_(others, others)]).all()


def test_the_same_under_jit_and_vmap(example, x64):
    net = fcfunc.mlp([3, 5, 4])
    params, x, labels = made(net)

    def norms(x, labels):
        return per_example.squared_norms(net.example_gradients(params, x, cross_entropy(labels))[1])

    close(jax.jit(norms)(x, labels), norms(x, labels))
    pair = jnp.stack([x, 2 * x])
    close(jax.vmap(norms, in_axes=(0, None))(pair, labels)[1], norms(2 * x, labels))


def test_mixed_precision_sums_in_the_dtype_of_the_parameters():
    net = fcfunc.mlp([3, 16, 4], compute_dtype="bfloat16")
    params = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((BATCH, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, BATCH))
    _, gradients = net.example_gradients(params, x, cross_entropy(labels))
    total = per_example.weighted_sum(gradients, jnp.ones(BATCH))
    expected = jax.grad(lambda p: jnp.sum(cross_entropy(labels)(net.apply(p, x))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), total, expected)
    assert {a.dtype for a in jax.tree.leaves(total)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda z: jnp.mean(z), r"loss_fn must return one loss per example, \[7\], got float32\[\]"),
        (lambda z: jnp.sum(z, -1) - jnp.mean(z), "loss_fn mixes examples: row 0 of the outputs"),
        (lambda z: jnp.roll(jnp.sum(z**2, -1), 1), "loss_fn mixes examples"),
        (lambda z: z[0, 0] * jnp.sum(z, -1), "loss_fn mixes examples"),
    ],
    ids=["scalar", "minus the mean", "of the next row", "times another row"],
)
def test_a_loss_that_is_not_a_sum_over_examples_is_refused(loss_fn, message):
    net = fcfunc.mlp([3, 4])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)), jnp.float32)
    with pytest.raises(ValueError, match=message):
        net.example_gradients(net.init(jax.random.key(0)), x, loss_fn)


def test_a_loss_that_mixes_examples_is_nan_where_values_are_not_known():
    net = fcfunc.mlp([3, 4])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)), jnp.float32)

    @jax.jit
    def run(params):
        return net.example_gradients(params, x, lambda z: jnp.sum(z, -1) - jnp.mean(z))

    values, gradients = run(net.init(jax.random.key(0)))
    assert np.isnan(values).all()
    assert np.isnan(per_example.squared_norms(gradients)).all()


def test_batch_normalization_is_refused_with_the_reason():
    net = fcfunc.mlp([3, 4, 2], norm="batch_norm")
    with pytest.raises(ValueError, match="batch normalization mixes examples"):
        net.example_gradients(net.init(jax.random.key(0)), jnp.ones((5, 3)), lambda z: z[:, 0])


def test_gradients_of_another_network_are_refused():
    x = jnp.ones((5, 3))
    one, other = (
        net.example_gradients(net.init(jax.random.key(0)), x, lambda z: z[:, 0])[1]
        for net in (fcfunc.mlp([3, 4, 2]), fcfunc.mlp([3, 6, 2]))
    )
    with pytest.raises(ValueError, match="dot_products: gradients and others must come from the same network"):
        per_example.dot_products(one, other)
    with pytest.raises(TypeError, match="squared_norms|leaf_squared_norms: gradients must come from"):
        per_example.squared_norms(fcfunc.init(jax.random.key(0), [3, 4, 2]))
    with pytest.raises(ValueError, match=r"weighted_sum: weights must be \[5\], one per example, got \[4\]"):
        per_example.weighted_sum(one, jnp.ones(4))
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        per_example.clipped_sum(one, 0)


def step_of_examples(net, aggregate, **options):
    def loss_fn(params, batch, key):
        x, labels = batch
        return net.example_gradients(params, x, cross_entropy(labels))

    return train.make_train_step(loss_fn, optax.adam(0.01), aggregate=aggregate, donate=False, **options)


def test_a_step_that_reports_the_noise_trains_as_one_that_does_not(x64):
    net = fcfunc.mlp([3, 5, 4], norm="layer_norm")
    params, x, labels = made(net)
    state = train.init_state(params, optax.adam(0.01), jax.random.key(0))
    plain = train.make_train_step(
        lambda params, batch, key: jnp.mean(cross_entropy(batch[1])(net.apply(params, batch[0]))),
        optax.adam(0.01),
        donate=False,
    )
    expected, expected_metrics = plain(state, (x, labels))
    got, metrics = step_of_examples(net, per_example.mean_with_noise_scale)(state, (x, labels))
    jax.tree.map(close, got.params, expected.params)
    close(metrics["loss"], expected_metrics["loss"])
    noise = per_example.noise_scale(net.example_gradients(params, x, cross_entropy(labels))[1])
    close(metrics["noise_scale"], noise.noise_scale)
    close(metrics["signal_to_noise[1]['w']"], noise.signal_to_noise[1]["w"])


def test_an_aggregate_needs_all_examples_at_once_and_no_model_state():
    net = fcfunc.mlp([3, 4])
    with pytest.raises(ValueError, match="make_train_step: with aggregate, accumulate must be 1, got 2"):
        step_of_examples(net, per_example.mean_with_noise_scale, accumulate=2)
    step = step_of_examples(net, per_example.mean_with_noise_scale)
    params = net.init(jax.random.key(0))
    batch = jnp.ones((5, 3)), jnp.zeros(5, jnp.int32)
    state = train.init_state(params, optax.adam(0.01), jax.random.key(0), model_state=jnp.zeros(2))
    with pytest.raises(ValueError, match="aggregate cannot be combined with a model_state, which mixes examples"):
        step(state, batch)
    wrong = train.make_train_step(
        lambda params, batch, key: jnp.mean(net.apply(params, batch[0])), optax.adam(0.01), aggregate=lambda *a: a
    )
    with pytest.raises(TypeError, match=r"loss_fn with aggregate must return \(losses, gradients\), as"):
        wrong(train.init_state(params, optax.adam(0.01), jax.random.key(0)), batch)


def hard_ones(losses):
    return jnp.where(jax.lax.stop_gradient(losses > jnp.mean(losses)), losses, 0)


@pytest.mark.parametrize("mixing", [hard_ones, lambda losses: losses + 2e-4 * jnp.mean(losses)])
def test_a_loss_that_mixes_examples_by_a_little_or_behind_stop_gradient_is_rejected(mixing):
    net, rng = fcfunc.mlp([3, 5, 4]), np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((64, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 64))
    params, loss_fn = net.init(jax.random.key(0)), lambda outputs: mixing(cross_entropy(labels)(outputs))
    with pytest.raises(ValueError, match="loss_fn mixes examples"):
        net.example_gradients(params, x, loss_fn)
    assert jnp.isnan(jax.jit(lambda params: net.example_gradients(params, x, loss_fn)[0])(params)).any()


def scaled_by_the_batch(z):
    return z / jnp.max(jnp.abs(z))


@pytest.mark.parametrize("option", ["activation", "final_activation"])
def test_an_activation_that_mixes_examples_is_rejected(option):
    net = fcfunc.mlp([3, 5, 4], **{option: scaled_by_the_batch})
    params, x = net.init(jax.random.key(0)), jnp.ones((7, 3))
    run = lambda params: net.example_gradients(params, x, cross_entropy(jnp.zeros(7, jnp.int32)))
    for gradients in (run, jax.jit(run)):
        with pytest.raises(ValueError, match="the activation scaled_by_the_batch mixes examples"):
            gradients(params)


def test_gradients_that_are_all_equal_have_no_variance():
    net = fcfunc.mlp([3, 5, 4])
    x = jnp.tile(jnp.asarray(np.random.default_rng(0).standard_normal((1, 3)), jnp.float32), (8, 1))
    _, gradients = net.example_gradients(net.init(jax.random.key(0)), x, cross_entropy(jnp.zeros(8, jnp.int32)))
    noise = per_example.noise_scale(gradients)
    assert float(noise.variance) >= 0
    assert abs(float(noise.noise_scale)) < 1e-4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_each_device_keeps_its_examples_and_one_sum_follows(kind):
    net = fcfunc.mlp([24, 40, 40, 4], activation="tanh")
    params = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((64, 24)), jnp.float32), jnp.asarray(rng.integers(0, 4, 64))

    def clipped(params, x, labels):
        return per_example.clipped_sum(net.example_gradients(params, x, cross_entropy(labels))[1], 0.5)

    expected = jax.jit(clipped)(params, x, labels)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        args = jax.device_put(params, NamedSharding(mesh, PartitionSpec())), *jax.device_put((x, labels), rows)
        compiled = jax.jit(clipped).lower(*args).compile()
        got = compiled(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)
    program = str(compiled.as_text())
    assert "all-gather" not in program
    assert "all-to-all" not in program
    sums = re.findall(r"= (.*?) all-reduce", program)
    # Each gradient leaf is all-reduced once: weights of shape [fan_in, fan_out] and biases of shape [fan_out].
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(sums))
    assert sorted(shapes) == sorted(",".join(map(str, a.shape)) for a in jax.tree.leaves(params))
