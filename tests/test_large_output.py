"""The chunked output layer equals the dense one for any chunk, size, logits and labels, and stores no logits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fcfunc
from fcfunc import losses, reference, train
from fcfunc.losses import _large_output
from tests.helpers import temporaries
from tests.rules import slow


def draw(n, d, classes, *, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((n, d), (d, classes), (classes,)))
    w *= scale / d**0.5
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(b), jnp.asarray(rng.integers(0, classes, n))


def dense(x, w, b, labels, **options):
    return reference.softmax_cross_entropy_with_integer_labels(reference.affine(x, w, b), labels, **options)


def assert_equal(x, w, b, labels, *, rtol=1e-5, atol=1e-5, **options):
    chunk_size = options.pop("chunk_size")
    g = jnp.asarray(np.random.default_rng(1).standard_normal(labels.shape).astype(np.float32))

    def pulled(loss):
        out, pull = jax.vjp(lambda x, w, b: loss(x, w, b, labels, **options), x, w, b)
        return out, pull(g)

    ours = pulled(functools.partial(losses.linear_softmax_cross_entropy, chunk_size=chunk_size))
    chex.assert_trees_all_close(ours, pulled(dense), rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_size", [slow(1), slow(3), 4, slow(7), slow(13), slow(14), slow(100)])
@pytest.mark.parametrize("n", [slow(1), 6])
def test_it_is_the_dense_loss_whatever_the_chunk(chunk_size, n):
    assert_equal(*draw(n, 5, 13), chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_logits_of_ten_thousand_are_no_less_exact(chunk_size, x64):
    x, w, b, labels = draw(6, 5, 13, scale=1e4)
    total = lambda loss, x, w, b: jnp.sum(loss(x, w, b, labels))
    chunked = functools.partial(losses.linear_softmax_cross_entropy, chunk_size=chunk_size)
    wide = [a.astype(jnp.float64) for a in (x, w, b)]
    truth = jax.grad(total, argnums=(1, 2, 3))(dense, *wide)
    for f in (chunked, dense):  # both are within the rounding error of the logits
        grads = jax.grad(total, argnums=(1, 2, 3))(f, x, w, b)
        chex.assert_trees_all_close(jax.tree.map(lambda a: a.astype(jnp.float64), grads), truth, rtol=1e-2, atol=1e-2)
    loss = losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size)
    np.testing.assert_allclose(loss, dense(wide[0], wide[1], wide[2], labels), rtol=1e-5, atol=2e-3)


def test_a_short_last_chunk_adds_no_column():
    """A padded column that is not masked adds exp(0) to the sum, which is visible if the logits are small."""
    x, w, b, labels = draw(4, 3, 5, scale=0.1)
    np.testing.assert_allclose(
        losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=4), dense(x, w, b, labels), rtol=1e-6
    )
    far_below = b - 50  # so that exp(0) would dominate the sum
    np.testing.assert_allclose(
        losses.linear_softmax_cross_entropy(x, w, far_below, labels, chunk_size=4),
        dense(x, w, far_below, labels),
        rtol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("label", [8, 9, 10])
def test_a_label_on_the_last_partial_chunk_is_found(label):
    x, w, b, _ = draw(3, 4, 11)
    assert_equal(x, w, b, jnp.full(3, label), chunk_size=4)


@pytest.mark.parametrize("chunk_size", [4, 20])
def test_impossible_and_ignored_labels_are_as_in_the_plain_loss(chunk_size):
    x, w, b, _ = draw(6, 4, 11)
    labels = jnp.array([-1, 11, 12, 3, -100, 2**31 - 1])
    loss, pull = jax.vjp(
        lambda x: losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size, ignore_index=-100),
        x,
    )
    (dx,) = pull(jnp.ones(6))
    np.testing.assert_array_equal(np.isnan(loss), [1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(np.isnan(dx).all(1), [1, 1, 1, 0, 0, 1])
    assert float(loss[4]) == 0.0
    np.testing.assert_array_equal(dx[4], 0)


@pytest.mark.parametrize("hostile", [np.nan, slow(np.inf)])
@pytest.mark.parametrize("chunk_size", [3, slow(None)])
def test_a_row_that_does_not_count_leaks_nothing_not_even_into_the_weights(hostile, chunk_size):
    x, w, b, labels = draw(4, 3, 7)
    options = {"chunk_size": chunk_size, "where": jnp.array([True, False, True, True]), "ignore_index": 5}
    labels = labels.at[3].set(5)

    def total(x, w, b):
        return jnp.sum(losses.linear_softmax_cross_entropy(x, w, b, labels, **options))

    grad = jax.value_and_grad(total, argnums=(0, 1, 2))
    clean, dirty = (x.at[jnp.array([1, 3])].set(value) for value in (0, hostile))
    chex.assert_trees_all_equal(grad(dirty, w, b), grad(clean, w, b))


@pytest.mark.slow
def test_a_class_masked_by_a_bias_of_minus_infinity_stays_out():
    x, w, b, labels = draw(4, 3, 9)
    b = b.at[:4].set(-jnp.inf)  # all of the first chunk
    assert_equal(x, w, b, labels % 5 + 4, chunk_size=4)


@pytest.mark.slow
def test_bfloat16_operands_give_the_plain_losses_gradients_to_their_rounding():
    x, w, b, labels = draw(32, 16, 50)
    chunked = functools.partial(losses.linear_softmax_cross_entropy, chunk_size=16, compute_dtype="bfloat16")
    total = lambda loss: jax.grad(lambda x, w, b: jnp.sum(loss(x, w, b, labels)), argnums=(0, 1, 2))(x, w, b)
    for got, expected in zip(total(chunked), total(dense), strict=True):
        chex.assert_type(got, jnp.float32)
        assert float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)) < 1e-2
    text = str(jax.make_jaxpr(lambda: total(chunked))())
    assert "bf16" in text
    assert "f32[32,16] f32[16," not in text


def memory_of_gradient(fun, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return temporaries(jax.value_and_grad(fun, argnums=(0, 1, 2)), *shapes)


def mean_of(loss):
    return lambda *args: jnp.mean(loss(*args))


def test_it_needs_a_twentieth_of_the_dense_losses_temporaries():
    shapes = [((2048, 512), "float32"), ((512, 65536), "float32"), ((65536,), "float32"), ((2048,), "int32")]
    chosen = memory_of_gradient(mean_of(losses.linear_softmax_cross_entropy), *shapes)
    assert chosen <= memory_of_gradient(mean_of(dense), *shapes) / 20


def test_a_million_classes_need_less_than_a_gigabyte_beside_weights_and_gradients():
    shapes = [((2048, 512), "float32"), ((512, 2**20), "float32"), ((2**20,), "float32"), ((2048,), "int32")]
    assert memory_of_gradient(mean_of(losses.linear_softmax_cross_entropy), *shapes) < 2**30
    assert memory_of_gradient(mean_of(dense), *shapes) > 8 * 10**9


def test_few_logits_are_taken_densely_and_many_by_chunks():
    def scans(n, classes):
        x, w, b, labels = (
            jax.ShapeDtypeStruct(s, d)
            for s, d in [((n, 8), "f4"), ((8, classes), "f4"), ((classes,), "f4"), ((n,), "i4")]
        )
        return "scan" in str(jax.make_jaxpr(losses.linear_softmax_cross_entropy)(x, w, b, labels))

    assert not scans(128, 1000)
    assert scans(2048, _large_output.DENSE_MAX_LOGITS // 2048 + 1)


def test_the_train_step_uses_it_on_the_features_of_a_network():
    net = fcfunc.mlp([6, 16, 40])
    params = net.init(jax.random.key(0))
    data = (jax.random.normal(jax.random.key(1), (64, 6)), jax.random.randint(jax.random.key(2), (64,), 0, 40))

    def plain(params, batch, key):
        x, y = batch
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y))

    def chunked(params, batch, key):
        x, y = batch
        h = net.features(params, x)
        return jnp.mean(losses.linear_softmax_cross_entropy(h, **params[-1], labels=y, chunk_size=7))

    ends = []
    for loss_fn in (plain, chunked):
        optimizer = optax.sgd(0.1)
        state = train.init_state(params, optimizer, jax.random.key(3))
        state, _ = train.make_train_epoch(loss_fn, optimizer, 16)(state, data)
        ends.append(state.params)
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_without_a_bias_it_is_the_loss_with_a_bias_of_zero(chunk_size):
    x, w, labels = jnp.ones((2, 4)), jax.random.normal(jax.random.key(0), (4, 7)), jnp.array([0, 6])
    expected = losses.linear_softmax_cross_entropy(x, w, jnp.zeros(7), labels, chunk_size=chunk_size)
    got = losses.linear_softmax_cross_entropy(x, w, None, labels, chunk_size=chunk_size)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_features_of_a_stacked_network_are_its_input():
    net = fcfunc.mlp([4, 4, 4, 4, 9])
    params = fcfunc.stack(net.init(jax.random.key(0)))
    x, labels = jnp.ones((3, 4)), jnp.array([0, 8, 4])
    expected = losses.softmax_cross_entropy_with_integer_labels(net.apply(params, x), labels)
    got = losses.linear_softmax_cross_entropy(net.features(params, x), **params[-1], labels=labels, chunk_size=2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_rows_meet_no_infinite_logit_in_the_backward_pass(chunk_size, smoothing):
    b, labels = jnp.array([0, jnp.inf, 0, 0]), jnp.array([0, 1, 2])
    options = {"chunk_size": chunk_size, "label_smoothing": smoothing, "where": jnp.zeros(3, bool)}

    def total(w, b, u):
        each = losses.linear_softmax_cross_entropy(jnp.ones((3, 2)), w, b, labels, class_weights=u, **options)
        return jnp.sum(each)

    grads = jax.grad(total, argnums=(0, 1, 2))(jnp.ones((2, 4)), b, jnp.ones(4))
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
