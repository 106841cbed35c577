"""What the losses promise beyond their gradients: values, shifts, labels that are impossible or ignored, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcfunc import losses

LABELLED = [losses.softmax_cross_entropy_with_integer_labels, losses.negative_log_likelihood, losses.multiclass_svm]
IGNORING = LABELLED[:2]
PAIRED = [losses.softmax_cross_entropy, losses.sigmoid_binary_cross_entropy, losses.squared_error]


@pytest.fixture
def scores():
    return jax.nn.softmax(jax.random.normal(jax.random.key(0), (5, 4)), axis=-1)  # also probabilities


def loss_and_gradient(loss, scores, labels, **options):
    return loss(scores, labels, **options), jax.grad(lambda s: jnp.sum(loss(s, labels, **options)))(scores)


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy_with_integer_labels, *PAIRED])
def test_value_equals_that_of_optax(loss, scores):
    labels = jnp.array([0, 3, 1, 1, 2])
    second = labels if loss in LABELLED else jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(loss(scores, second), getattr(optax, loss.__name__)(scores, second), rtol=1e-5)


def test_svm_is_the_sum_over_the_wrong_classes():
    scores, labels = jnp.array([[3.2, 5.1, -1.7], [1.3, 4.9, 2.0], [2.2, 2.5, -3.1]]), jnp.array([0, 1, 2])
    np.testing.assert_allclose(losses.multiclass_svm(scores, labels), [2.9, 0, 12.9], atol=1e-6)


def test_l2_penalty_leaves_biases_out():
    params = [{"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 7.0)}]
    assert losses.l2_penalty(params) == 18
    grads = jax.grad(losses.l2_penalty)(params)
    np.testing.assert_array_equal(grads[0]["w"], params[0]["w"])
    np.testing.assert_array_equal(grads[0]["b"], 0)


@pytest.mark.parametrize("shift", [1e8, -1e8, 3e37])
def test_a_shift_of_all_logits_changes_neither_loss_nor_gradient(shift):
    logits, labels = jnp.array([[0.0, 16.0, -32.0], [8.0, 8.0, 8.0]]), jnp.array([0, 2])
    shifted = logits + shift  # rounded here, in the inputs, and only here
    exact = shifted - shifted.max(axis=-1, keepdims=True)
    for got, expected in zip(
        loss_and_gradient(losses.softmax_cross_entropy_with_integer_labels, shifted, labels),
        loss_and_gradient(losses.softmax_cross_entropy_with_integer_labels, exact, labels),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_ten_equal_logits_of_1e8_give_log_10():
    loss, grad = loss_and_gradient(
        losses.softmax_cross_entropy_with_integer_labels, jnp.full((1, 10), 1e8), jnp.array([4])
    )
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-6)
    np.testing.assert_allclose(grad[0], 0.1 - np.eye(10)[4], rtol=1e-5)


def test_many_equal_low_precision_logits_give_a_finite_loss():
    for dtype in (jnp.float16, jnp.bfloat16):
        loss = losses.softmax_cross_entropy_with_integer_labels(jnp.zeros((1, 100_000), dtype), jnp.array([7]))
        np.testing.assert_allclose(loss, np.log(100_000), rtol=1e-6)


@pytest.mark.parametrize("loss", LABELLED)
@pytest.mark.parametrize("label", [-1, -100, 4, 2**31 - 1])
def test_an_impossible_label_makes_loss_and_gradient_of_its_row_nan_and_no_other(loss, label, scores):
    labels = jnp.array([0, 1, label, 2, 3])
    value, grad = loss_and_gradient(loss, scores, labels)
    fine, fine_grad = loss_and_gradient(loss, scores, labels.at[2].set(0))
    assert np.isnan(value[2])
    assert np.isnan(grad[2]).all()
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(value[others], fine[others])
    np.testing.assert_array_equal(grad[others], fine_grad[others])


@pytest.mark.parametrize("loss", LABELLED)
def test_an_impossible_label_is_nan_with_one_class_too(loss):
    value, grad = loss_and_gradient(loss, jnp.ones((2, 1)), jnp.array([0, 1]))
    assert np.isnan(value).tolist() == [False, True]
    assert np.isnan(grad[:, 0]).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_narrow_label_dtypes_do_not_wrap_into_another_class(dtype):
    logits = jax.random.normal(jax.random.key(0), (1, 300))
    labels = jnp.array([-56]).astype(dtype) if jnp.iinfo(dtype).min < 0 else jnp.array([200]).astype(dtype)
    value = losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    expected = np.nan if jnp.iinfo(dtype).min < 0 else -jax.nn.log_softmax(logits, axis=-1)[:, 200]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("label", [2**32, 2**32 + 1, -(2**32)])
@pytest.mark.parametrize("loss", LABELLED)
def test_a_label_of_64_bits_does_not_wrap_into_a_class(loss, label, scores):
    value = loss(scores, np.full(5, label))
    assert np.isnan(value).all()


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy_with_integer_labels, losses.multiclass_svm])
def test_a_nan_score_makes_loss_and_gradient_of_its_row_nan(loss, scores):
    value, grad = loss_and_gradient(loss, scores.at[1, 2].set(jnp.nan), jnp.array([0, 1, 1, 3, 2]))
    assert np.isnan(value).tolist() == [False, True, False, False, False]
    assert np.isnan(grad).all(axis=1).tolist() == [False, True, False, False, False]


def test_a_negative_probability_makes_loss_and_gradient_nan():
    value, grad = loss_and_gradient(losses.negative_log_likelihood, jnp.array([[-0.5, 1.5]]), jnp.array([0]))
    assert np.isnan(value[0])
    assert np.isnan(grad[0, 0])


@pytest.mark.parametrize("loss", IGNORING)
@pytest.mark.parametrize("index", [-100, -1, 2])
def test_ignored_rows_have_neither_loss_nor_gradient_whatever_they_hold(loss, index, scores):
    labels = jnp.array([0, index, 1, 3, index])
    value, grad = loss_and_gradient(loss, scores.at[1].set(jnp.nan), labels, ignore_index=index)
    np.testing.assert_array_equal(value[np.array([1, 4])], 0)
    np.testing.assert_array_equal(grad[np.array([1, 4])], 0)
    plain, plain_grad = loss_and_gradient(loss, scores, jnp.array([0, 0, 1, 3, 0]))
    kept = np.array([0, 2, 3])
    np.testing.assert_array_equal(value[kept], plain[kept])
    np.testing.assert_array_equal(grad[kept], plain_grad[kept])


def test_cross_entropy_counts_a_zero_target_of_an_impossible_class_as_nothing():
    logits, targets = jnp.array([[0.0, -jnp.inf, 0.0]]), jnp.array([[0.5, 0.0, 0.5]])
    value, grad = loss_and_gradient(losses.softmax_cross_entropy, logits, targets)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-7)


def test_sigmoid_cross_entropy_is_exact_in_the_tails():
    logits, targets = jnp.array([80.0, -80.0, 30.0, jnp.inf]), jnp.array([1.0, 0.0, 1.0, 1.0])
    value, grad = loss_and_gradient(losses.sigmoid_binary_cross_entropy, logits, targets)
    np.testing.assert_allclose(value, [np.exp(-80), np.exp(-80), np.exp(-30), 0], rtol=1e-5)
    np.testing.assert_allclose(grad, [-np.exp(-80), np.exp(-80), -np.exp(-30), 0], rtol=1e-5)


@pytest.mark.parametrize("loss", [*LABELLED, *PAIRED])
def test_losses_of_low_precision_scores_are_float32_and_gradients_are_not(loss, scores):
    second = jnp.zeros(5, jnp.int32) if loss in LABELLED else jnp.zeros((5, 4), jnp.bfloat16)
    value, grad = loss_and_gradient(loss, scores.astype(jnp.bfloat16), second)
    assert (value.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("loss", LABELLED)
def test_float_labels_are_a_type_error(loss, scores):
    with pytest.raises(TypeError, match=rf"{loss.__name__}: labels must be integers, got float32\[5\]"):
        loss(scores, jnp.zeros(5))


@pytest.mark.parametrize("loss", LABELLED)
@pytest.mark.parametrize("shape", [(5, 1), (4,), (), (5, 4)])
def test_labels_of_another_shape_are_a_value_error(loss, shape, scores):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: labels must have the shape of the scores"):
        loss(scores, jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("loss", PAIRED)
def test_nothing_is_broadcast(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: one shape expected .*\[5\].*\[5, 1\]"):
        loss(jnp.zeros(5), jnp.zeros((5, 1)))


def test_l2_penalty_of_a_tree_without_weights_is_an_error():
    with pytest.raises(ValueError, match='no leaf named "w"'):
        losses.l2_penalty([{"kernel": jnp.ones((2, 2))}])


WEIGHABLE = [
    losses.softmax_cross_entropy_with_integer_labels,
    losses.softmax_cross_entropy,
    losses.sigmoid_binary_cross_entropy,
]


def arguments(loss, n=5, classes=4):
    logits = jax.random.normal(jax.random.key(0), (n, classes))
    labels = jax.random.randint(jax.random.key(1), (n,), 0, classes)
    return logits, labels if loss is WEIGHABLE[0] else jax.nn.softmax(
        jax.random.normal(jax.random.key(2), (n, classes))
    )


def of_rows(loss, mask):
    """A number per row in the shape that the loss takes it."""
    return jnp.broadcast_to(mask[:, None], (5, 4)) if loss is WEIGHABLE[2] else mask


@pytest.mark.parametrize("loss", WEIGHABLE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf])
def test_a_masked_row_has_loss_and_gradients_zero_whatever_stands_in_it(loss, hostile):
    logits, second = arguments(loss)
    where = of_rows(loss, jnp.array([True, False, True, False, True]))
    weights = of_rows(loss, jnp.array([1.0, jnp.nan, 2.0, 3.0, 4.0]))
    if loss is WEIGHABLE[0]:
        second = second.at[3].set(99)
    logits = logits.at[1].set(hostile)

    def total(logits, weights):
        each = loss(logits, second, where=where, weights=weights)
        return jnp.sum(each), each

    grads, each = jax.grad(total, argnums=(0, 1), has_aux=True)(logits, weights)
    for a in (each, *grads):
        np.testing.assert_array_equal(a[1::2], 0)
        assert np.isfinite(a).all()
        assert np.all(a[::2] != 0)


@pytest.mark.parametrize("loss", WEIGHABLE, ids=lambda loss: loss.__name__)
def test_a_batch_of_which_nothing_counts_has_loss_and_gradient_zero(loss):
    logits, second = arguments(loss)
    where = of_rows(loss, jnp.zeros(5, bool))
    mean = lambda logits: losses.mean(loss(logits, second, where=where), over=where)
    value, grad = jax.value_and_grad(mean)(jnp.full_like(logits, jnp.nan))
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, 0)


def test_the_mean_is_over_what_counts():
    logits, labels = arguments(WEIGHABLE[0])
    where = jnp.array([True, False, True, False, True])
    each = WEIGHABLE[0](logits, labels)
    masked = WEIGHABLE[0](logits, labels, where=where)
    np.testing.assert_allclose(losses.mean(masked, over=where), np.mean(each[::2]), rtol=1e-6)
    weights = jnp.arange(5.0)
    weighted = WEIGHABLE[0](logits, labels, weights=weights)
    np.testing.assert_allclose(losses.mean(weighted, over=weights), np.average(each, weights=weights), rtol=1e-6)
    with pytest.raises(ValueError, match=r"one shape expected for all of loss, over"):
        losses.mean(each, over=where[:3])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_that_of_optax(smoothing):
    logits, labels = arguments(WEIGHABLE[0])
    smooth = optax.losses.smooth_labels(jax.nn.one_hot(labels, 4), smoothing)
    expected = optax.softmax_cross_entropy(logits, smooth)
    one_hot = jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(WEIGHABLE[0](logits, labels, label_smoothing=smoothing), expected, rtol=1e-5)
    np.testing.assert_allclose(WEIGHABLE[1](logits, one_hot, label_smoothing=smoothing), expected, rtol=1e-5)


def test_class_weights_multiply_each_classes_part_as_in_torch():
    torch = pytest.importorskip("torch")
    logits, labels = arguments(WEIGHABLE[0])
    u = jnp.array([0.5, 2.0, 1.0, 3.0])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(logits)),
        torch.from_numpy(np.array(labels)).long(),
        weight=torch.from_numpy(np.array(u)),
        label_smoothing=0.2,
        reduction="none",
    )
    np.testing.assert_allclose(WEIGHABLE[0](logits, labels, class_weights=u, label_smoothing=0.2), expected, rtol=1e-5)


def test_positive_weights_are_those_of_torch():
    torch = pytest.importorskip("torch")
    logits, targets = arguments(WEIGHABLE[2])
    q = jnp.array([0.5, 2.0, 1.0, 3.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        *(torch.from_numpy(np.array(a)) for a in (logits, targets)),
        pos_weight=torch.from_numpy(np.array(q)),
        reduction="none",
    )
    np.testing.assert_allclose(WEIGHABLE[2](logits, targets, positive_weights=q), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", WEIGHABLE, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"where": jnp.ones(5)}, TypeError, r"where must be booleans, got float32\[5\]"),
        ({"where": jnp.ones((5, 1), bool)}, ValueError, "where must have the shape of the loss"),
        ({"weights": jnp.ones((1, 5))}, ValueError, "weights must have the shape of the loss"),
        ({"weights": jnp.ones(5, int)}, TypeError, r"weights must be of dtype .* got int32\[5\]"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    ],
)
def test_masks_and_weights_of_a_wrong_kind_are_refused(loss, options, error, message):
    with pytest.raises(error, match=f"{loss.__name__}: {message}"):
        loss(*arguments(loss), **options)
