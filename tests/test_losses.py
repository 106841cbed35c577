"""Properties of the losses beyond their gradients: values, shifts, impossible and ignored labels, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fcfunc import losses, reference
from tests.rules import slow

LABELED = [losses.softmax_cross_entropy_with_integer_labels, losses.negative_log_likelihood, losses.multiclass_svm]
IGNORING = LABELED[:2]
PAIRED = [losses.softmax_cross_entropy, losses.sigmoid_binary_cross_entropy, losses.squared_error]


@pytest.fixture
def scores():
    return jax.nn.softmax(jax.random.normal(jax.random.key(0), (5, 4)), axis=-1)  # valid as probabilities too


def loss_and_gradient(loss, scores, labels, **options):
    return loss(scores, labels, **options), jax.grad(lambda s: jnp.sum(loss(s, labels, **options)))(scores)


@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy_with_integer_labels, *PAIRED])
def test_value_equals_that_of_optax(loss, scores):
    labels = jnp.array([0, 3, 1, 1, 2])
    second = labels if loss in LABELED else jax.nn.one_hot(labels, 4)
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
    shifted = logits + shift  # the only rounding: in the inputs
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


@pytest.mark.parametrize("loss", LABELED)
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


@pytest.mark.parametrize("loss", LABELED)
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
@pytest.mark.parametrize("loss", LABELED)
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


@pytest.mark.parametrize("loss", [*LABELED, *PAIRED])
def test_losses_of_low_precision_scores_are_float32_and_gradients_are_not(loss, scores):
    second = jnp.zeros(5, jnp.int32) if loss in LABELED else jnp.zeros((5, 4), jnp.bfloat16)
    value, grad = loss_and_gradient(loss, scores.astype(jnp.bfloat16), second)
    assert (value.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("loss", LABELED)
def test_float_labels_are_a_type_error(loss, scores):
    with pytest.raises(TypeError, match=rf"{loss.__name__}: labels must be integers, got float32\[5\]"):
        loss(scores, jnp.zeros(5))


@pytest.mark.parametrize("loss", LABELED)
@pytest.mark.parametrize("shape", [(5, 1), (4,), (), (5, 4)])
def test_labels_of_another_shape_are_a_value_error(loss, shape, scores):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: labels must have the shape of the scores"):
        loss(scores, jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("loss", [*PAIRED, *(getattr(reference, loss.__name__) for loss in PAIRED)])
def test_nothing_is_broadcast(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: .* must have the same shape.*\[5\].*\[5, 1\]"):
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
    """Broadcasts one number per row to the shape that the loss takes."""
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
    with pytest.raises(ValueError, match=r"loss and over must have the same shape"):
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


def test_a_weight_of_zero_on_an_infinite_loss_costs_nothing():
    z, labels = jnp.array([[-jnp.inf, 0.0, 1.0]]), jnp.array([0])
    total = lambda z, w: jnp.sum(WEIGHABLE[0](z, labels, weights=w))
    assert float(total(z, jnp.zeros(1))) == 0
    np.testing.assert_array_equal(jax.grad(total)(z, jnp.zeros(1)), 0)
    binary = lambda z, **options: jnp.sum(WEIGHABLE[2](z, jnp.ones(1), **options))
    for options in ({"weights": jnp.zeros(1)}, {"positive_weights": jnp.zeros(1)}):
        value, grad = jax.value_and_grad(lambda z, o=options: binary(z, **o))(jnp.array([-jnp.inf]))
        assert float(value) == 0
        np.testing.assert_array_equal(grad, 0)
    targets = jnp.array([[1.0, 0.0]])
    masked = lambda t: jnp.sum(WEIGHABLE[1](jnp.array([[0.0, -jnp.inf]]), t, class_weights=jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(jax.grad(masked)(targets), 0)


def test_a_nan_in_the_weight_of_another_class_plays_no_part():
    u = jnp.array([1.0, 1.0, jnp.nan])
    value, grad = jax.value_and_grad(lambda z: jnp.sum(WEIGHABLE[0](z, jnp.array([1]), class_weights=u)))(
        jnp.zeros((1, 3))
    )
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(grad, [[1 / 3, -2 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("loss", WEIGHABLE, ids=lambda loss: loss.__name__)
def test_a_masked_nan_does_not_leak_into_second_derivatives(loss):
    logits, second = arguments(loss)
    logits, where = logits.at[1].set(jnp.nan), of_rows(loss, jnp.array([True, False, True, True, True]))
    first = jax.grad(lambda z: jnp.sum(loss(z, second, where=where)))
    again = jax.grad(lambda z: jnp.sum(first(z) ** 2))(logits)
    np.testing.assert_array_equal(again[1], 0)
    assert np.isfinite(again).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_labels_of_any_integer_dtype_work_in_strict_float64(dtype, x64):
    logits, labels = arguments(WEIGHABLE[0])
    expected = WEIGHABLE[0](logits, labels)
    np.testing.assert_allclose(WEIGHABLE[0](logits, np.asarray(labels).astype(dtype)), expected)
    x, w, b = jnp.eye(5), logits, jnp.zeros(4)
    chunked = losses.linear_softmax_cross_entropy(x, w, b, np.asarray(labels).astype(dtype), chunk_size=2)
    np.testing.assert_allclose(chunked, expected, rtol=1e-6)


def test_labels_too_large_for_32_bits_are_no_class_and_not_the_ignored_one():
    x, w, b = jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.zeros(5)
    labels = np.array([2**32 + 3, 3], np.int64)
    total = lambda x: losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=2, ignore_index=3)
    loss, pull = jax.vjp(total, x)
    np.testing.assert_array_equal(np.isnan(loss), [True, False])
    np.testing.assert_array_equal(np.isnan(pull(jnp.ones(2))[0]).all(1), [True, False])
    largest = np.array([2**32 - 1], np.uint32)
    assert np.isnan(WEIGHABLE[0](jnp.zeros((1, 3)), largest, ignore_index=-1)).all()


@pytest.mark.parametrize("laid", [("data", None), (None, "data")])
def test_arguments_sharded_differently_from_the_logits_get_their_gradients(laid):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    logits, labels = jax.random.normal(jax.random.key(0), (8, 12)), jnp.arange(8)
    weights, u, where = jnp.arange(1.0, 9.0), jnp.arange(1.0, 13.0), jnp.arange(8) % 3 > 0

    def total(logits, weights, u):
        each = WEIGHABLE[0](logits, labels, where=where, weights=weights, class_weights=u, label_smoothing=0.1)
        soft = WEIGHABLE[1](logits, jnp.full((8, 12), 1 / 12), where=where, weights=weights, class_weights=u)
        return jnp.sum(each) + jnp.sum(soft)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    expected = gradient(logits, weights, u)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(*laid)))
        got = gradient(placed, weights, u)
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [5, None])
def test_the_large_output_layer_takes_sharded_rows_on_an_explicit_mesh(chunk_size):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x, labels = jax.random.normal(jax.random.key(0), (8, 3)), jnp.arange(8)
    w, b = jax.random.normal(jax.random.key(1), (3, 12)), jnp.zeros(12)

    @jax.jit
    def gradient(x, w, b):
        loss = lambda x, w, b: jnp.sum(losses.linear_softmax_cross_entropy(x, w, b, labels, chunk_size=chunk_size))
        return jax.grad(loss, argnums=(0, 1, 2))(x, w, b)

    expected = gradient(x, w, b)
    with jax.set_mesh(mesh):
        w, b = (jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in (w, b))
        got = gradient(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), w, b)
        placed = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in (x, jnp.zeros(12)))
        for a, e in zip(gradient(next(placed), w, next(placed)), expected, strict=True):  # biases sharded, weights not
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
        sharded = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "data")))
        if chunk_size:
            with pytest.raises(ValueError, match="sharded classes cannot be processed in chunks"):
                gradient(x, sharded, b)
        else:
            np.testing.assert_allclose(gradient(x, sharded, b)[1], expected[1], rtol=1e-4, atol=1e-5)
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss", [losses.squared_error, losses.sigmoid_binary_cross_entropy, losses.softmax_cross_entropy]
)
def test_targets_that_lie_otherwise_than_the_outputs_are_taken_on_an_explicit_mesh(loss):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    outputs, targets = np.random.default_rng(0).random((2, 8, 6), np.float32)
    gradient = jax.jit(jax.grad(lambda outputs, targets: jnp.sum(loss(outputs, targets)), argnums=(0, 1)))
    laid = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data", "model"), PartitionSpec("data")))
    got = gradient(*map(jax.device_put, (outputs, targets), laid))
    for a, b in zip(got, gradient(outputs, targets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def unmasked(logits, labels, mask, **options):
    """The loss of each row, computed separately from only the logits that are not masked."""
    rows = [
        losses.softmax_cross_entropy(logits[i : i + 1, m], labels[i : i + 1, m], **options)[0] if m.any() else 0.0
        for i, m in enumerate(np.asarray(mask))
    ]
    return jnp.stack([jnp.asarray(row, jnp.float32) for row in rows])


MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]], bool)
OF_MASK = np.array([2, 0, 3, 1, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_masked_logits_take_no_part_in_the_cross_entropy(smoothing, scores):
    logits, labels = 3 * scores, jax.nn.one_hot(OF_MASK, 4)
    expected = unmasked(logits, labels, MASK, label_smoothing=smoothing)
    got = losses.softmax_cross_entropy(logits, labels, where=MASK, label_smoothing=smoothing)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    of_integers = losses.softmax_cross_entropy_with_integer_labels(
        logits, OF_MASK, where=MASK, label_smoothing=smoothing
    )
    np.testing.assert_allclose(of_integers, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hostile", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("loss", [losses.softmax_cross_entropy, losses.softmax_cross_entropy_with_integer_labels])
def test_masked_logits_have_gradient_zero_even_if_they_are_not_finite(loss, hostile, scores):
    labels = OF_MASK if loss in LABELED else jax.nn.one_hot(OF_MASK, 4)
    value, grad = loss_and_gradient(loss, scores, labels, where=MASK)
    hostile_value, hostile_grad = loss_and_gradient(loss, jnp.where(MASK, scores, hostile), labels, where=MASK)
    np.testing.assert_array_equal(hostile_value, value)
    np.testing.assert_array_equal(hostile_grad, grad)
    np.testing.assert_array_equal(grad[~MASK], 0)
    assert np.abs(grad[MASK]).max() > 0.1


@pytest.mark.parametrize("shift", [0.0, 1e30, -1e30])
def test_second_derivatives_of_masked_logits_are_finite(shift, scores):
    labels = jax.nn.one_hot(OF_MASK, 4)

    def squared_gradient(g):
        grads = jax.vjp(lambda z, t: losses.softmax_cross_entropy(z, t, where=MASK), scores + shift, labels)[1](g)
        return sum(jnp.sum(jnp.where(MASK, grad, 0)) for grad in grads)

    assert np.isfinite(jax.grad(squared_gradient)(jnp.ones(5))).all()


def test_a_label_of_a_masked_class_is_impossible(scores):
    loss, grad = loss_and_gradient(
        losses.softmax_cross_entropy_with_integer_labels, scores, np.array([1, 0, 3, 1, 1]), where=MASK
    )
    np.testing.assert_array_equal(np.isnan(loss), [True, False, False, False, False])
    assert np.isnan(grad[0][MASK[0]]).all()
    assert not np.isnan(grad[1:]).any()


def test_a_mask_of_logits_goes_with_the_other_options(scores):
    labels, weights, class_weights = jax.nn.one_hot(OF_MASK, 4), np.arange(5.0, dtype=np.float32), scores[0]
    got = losses.softmax_cross_entropy_with_integer_labels(
        scores, OF_MASK, where=MASK, weights=weights, class_weights=class_weights, ignore_index=3
    )
    own = class_weights[OF_MASK] * weights * unmasked(scores, labels, MASK)
    np.testing.assert_allclose(got, jnp.where(OF_MASK == 3, 0, own), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, slow(1), slow(-1), slow(-3), slow((0, 2)), (2, 0), slow([1])])
@pytest.mark.parametrize("loss", [*LABELED, losses.softmax_cross_entropy])
def test_the_classes_may_lie_along_any_axis(loss, axis):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.uniform(0.1, 1, (3, 4, 5)).astype(np.float32))
    axes = [i % 3 for i in (axis if isinstance(axis, tuple | list) else (axis,))]
    rows = [i for i in range(3) if i not in axes]
    last = jnp.transpose(scores, (*rows, *axes)).reshape(*(scores.shape[i] for i in rows), -1)
    labels = jnp.asarray(rng.integers(0, last.shape[-1], last.shape[:-1]))
    there = labels
    if loss is losses.softmax_cross_entropy:
        there, labels = scores, last
    np.testing.assert_array_equal(loss(scores, there, axis=axis), loss(last, labels))


def test_an_axis_of_none_is_all_of_them(scores):
    labels = jnp.eye(5, 4) / 4
    expected = losses.softmax_cross_entropy(scores.reshape(-1), labels.reshape(-1))
    np.testing.assert_array_equal(losses.softmax_cross_entropy(scores, labels, axis=None), expected)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint32])
@pytest.mark.parametrize("loss", PAIRED)
def test_integer_and_boolean_labels_are_numbers(loss, dtype, scores):
    labels = np.eye(4)[[0, 3, 1, 1, 2]]
    np.testing.assert_array_equal(loss(scores, labels.astype(dtype)), loss(scores, jnp.float32(labels)))
    assert loss_and_gradient(loss, scores.astype(jnp.bfloat16), labels.astype(dtype))[1].dtype == jnp.bfloat16


def test_an_integer_target_beyond_32_bits_is_not_another_number():
    np.testing.assert_allclose(losses.squared_error(jnp.zeros(1), np.array([2**33 + 1])), [2.0**66], rtol=1e-6)


def test_integer_targets_of_low_precision_outputs_are_not_rounded():
    np.testing.assert_array_equal(
        losses.squared_error(jnp.zeros(2, jnp.bfloat16), np.array([257, 4095])), [257**2, 4095**2]
    )


def test_a_python_integer_beyond_64_bits_is_no_class():
    assert np.isnan(losses.softmax_cross_entropy_with_integer_labels(jnp.zeros(3), 2**70))
    assert np.isnan(reference.softmax_cross_entropy_with_integer_labels(jnp.zeros(3), np.int64(2**32 + 1)))


@pytest.mark.parametrize("loss", [reference.softmax_cross_entropy, reference.sigmoid_binary_cross_entropy])
def test_references_broadcast_no_weights(loss):
    with pytest.raises(ValueError, match="weights must have the shape of the loss"):
        loss(jnp.zeros((3, 2)), jnp.zeros((3, 2)), weights=jnp.ones((3, 1)))


def test_targets_of_squared_error_default_to_zeros(scores):
    np.testing.assert_array_equal(losses.squared_error(scores), losses.squared_error(scores, jnp.zeros((5, 4))))


INTEGER = losses.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_impossible_label_gives_nan_in_the_gradient_of_class_weights(smoothing):
    total = lambda u: jnp.sum(INTEGER(jnp.zeros((2, 3)), jnp.array([0, 7]), class_weights=u, label_smoothing=smoothing))
    assert np.isnan(jax.grad(total)(jnp.ones(3))).all()


def test_an_unused_class_weight_of_nan_plays_no_part():
    u = jnp.array([2.0, jnp.nan, 1.0])
    np.testing.assert_allclose(INTEGER(jnp.zeros((1, 3)), jnp.array([0]), class_weights=u), 2 * np.log(3), rtol=1e-6)


def test_the_derivative_by_a_weight_is_the_loss_even_if_that_is_infinite():
    z, labels = jnp.array([[-jnp.inf, 0.0]]), jnp.array([0])
    assert jax.grad(lambda r: jnp.sum(INTEGER(z, labels, weights=r)))(jnp.zeros(1)) == jnp.inf


def test_full_smoothing_of_an_infinite_loss_is_infinite_and_not_nan():
    z, mask = jnp.array([[-jnp.inf, 0.0, 0.0]]), jnp.array([[True, True, False]])
    assert INTEGER(z, jnp.array([0]), label_smoothing=1.0, where=mask) == jnp.inf
