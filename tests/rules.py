"""The table of rules: add one row for a new rule, and every test of the table covers it."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcfunc import losses, ops, reference
from fcfunc._rule import rule


class Row(NamedTuple):
    """A rule, its reference implementation, and `draw(seed, n, d, dtype)`, which draws arguments of order 1.

    `n` and `d` are the numbers of rows and columns. A variant is a rule that also has a row with other options; the
    slowest checks run on that row only.
    """

    name: str
    fun: Callable
    reference: Callable
    draw: Callable
    variant: bool = False


def _normal(seed, *shapes, dtype):
    # Drawn with NumPy, because jax.random would compile once for every shape.
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes)


def _x(seed, n, d, dtype):
    return _normal(seed, (n, d), dtype=dtype)


def _affine(seed, n, d, dtype):
    return _normal(seed, (n, d), (d, d + 2), (d + 2,), dtype=dtype)


def _without_bias(seed, n, d, dtype):
    return _affine(seed, n, d, dtype)[:2]


def _images(seed, n, d, dtype):
    return _normal(seed, (n, 2, d), (2 * d, d + 2), (d + 2,), dtype=dtype)


def _labeled(seed, n, d, dtype):
    labels = np.random.default_rng(seed + 1).integers(0, max(d, 1), n, dtype=np.int32)
    return *_x(seed, n, d, dtype), jnp.asarray(labels)


def _labeled_columns(seed, n, d, dtype):
    """Puts the classes along the first axis."""
    labels = np.random.default_rng(seed + 1).integers(0, max(n, 1), d, dtype=np.int32)
    return *_x(seed, n, d, dtype), jnp.asarray(labels)


def _labeled_by_uint32(seed, n, d, dtype):
    x, labels = _labeled(seed, n, d, dtype)
    return x, labels.astype(jnp.uint32)


def _labeled_or_not(seed, n, d, dtype):
    """Every third label is -100, which is not a class."""
    x, labels = _labeled(seed, n, d, dtype)
    return x, jnp.where(jnp.arange(n) % 3 == 0, jnp.int32(-100), labels)


def _probs(seed, n, d, dtype):
    e = np.exp(np.random.default_rng(seed).standard_normal((n, d)))
    return jnp.asarray((e / e.sum(axis=1, keepdims=True)).astype(dtype)), _labeled(seed, n, d, dtype)[1]


def _pair(seed, n, d, dtype):
    return *_x(seed, n, d, dtype), jnp.asarray(np.random.default_rng(seed + 1).uniform(size=(n, d)).astype(dtype))


def _params(seed, n, d, dtype):
    first, b, second = _normal(seed, (n, d), (d,), (d, 2), dtype=dtype)
    return ([{"w": first, "b": b}, {"w": second}],)


def _scaled(seed, n, d, dtype):
    return _normal(seed, (n, d), (d,), dtype=dtype)


def _normed(seed, n, d, dtype):
    return _normal(seed, (n, d), (d,), (d,), dtype=dtype)


def _batch(seed, n, d, dtype):
    return _normal(seed, (n + 2, d), (d,), (d,), dtype=dtype)


def _keyed(seed, n, d, dtype):
    return *_x(seed, n, d, dtype), jax.random.key(seed)


def _classes_that_count(seed, n, d):
    """A mask of the logits that keeps class 0 of each row; if there are several rows, the last has no class at all."""
    mask = np.random.default_rng(seed + 4).uniform(size=(n, d)) < 0.6
    mask[:, :1], mask[1:][-1:] = True, False
    return mask


def _masked(seed, n, d, dtype):
    return *_x(seed, n, d, dtype), jnp.asarray(_classes_that_count(seed, n, d))


def _labeled_and_masked(seed, n, d, dtype):
    mask = _classes_that_count(seed, n, d)
    labels = mask.argmax(axis=1) if d else np.zeros(n)
    return *_x(seed, n, d, dtype), jnp.asarray(labels.astype(np.int32)), jnp.asarray(mask)


def _pair_and_masked(seed, n, d, dtype):
    return *_pair(seed, n, d, dtype), jnp.asarray(_classes_that_count(seed, n, d))


def _last_layer(seed, n, d, dtype):
    x, w, b = _affine(seed, n, d, dtype)
    return x, w, b, jnp.asarray(np.random.default_rng(seed + 1).integers(0, d + 2, n, dtype=np.int32))


def _positive(rng, shape, dtype):
    return rng.uniform(0.1, 2, shape).astype(dtype)


def _mask(rng, shape):
    """A mask that has both true and false elements if it has more than one element."""
    mask = rng.uniform(size=shape) < 0.7
    mask.flat[:1], mask.flat[1:][-1:] = True, False
    return mask


OF_ROWS = {
    "where": lambda rng, n, classes, dtype: _mask(rng, n),
    "weights": lambda rng, n, classes, dtype: _positive(rng, n, dtype),
    "class_weights": lambda rng, n, classes, dtype: _positive(rng, classes, dtype),
}
OF_ELEMENTS = {
    "where": lambda rng, n, classes, dtype: _mask(rng, (n, classes)),
    "weights": lambda rng, n, classes, dtype: _positive(rng, (n, classes), dtype),
    "positive_weights": lambda rng, n, classes, dtype: _positive(rng, classes, dtype),
}


def _and(draw, keywords, of=OF_ROWS):
    """Draws the arguments of `draw`, followed by the values of the keywords of a loss."""

    def drawn(seed, n, d, dtype):
        args, rng = draw(seed, n, d, dtype), np.random.default_rng(seed + 3)
        classes = d + 2 if draw is _last_layer else d
        return *args, *(jnp.asarray(of[keyword](rng, n, classes, dtype)) for keyword in keywords)

    return drawn


def _row(module, name, draw, *, keywords=(), variant=False, **options):
    """A row for the function `name` of a module; the last drawn arguments are passed as `keywords`."""
    fun, plain = getattr(module, name), getattr(reference, name)
    if not options and not keywords:
        return Row(name, fun, plain, draw, variant)
    label = "-".join([name, *(k for k in keywords if k != "key"), *(f"{k}={v}" for k, v in options.items())])

    def of(function):
        def call(*args):
            positional = len(args) - len(keywords)
            return function(*args[:positional], **dict(zip(keywords, args[positional:], strict=True)), **options)

        return call

    return Row(label, of(fun), of(plain), draw, variant)


def _statistics(batch_norm, *, then_use=False, **options):
    """`batch_norm` in training, as one array: the output and the new state below it, or a prediction with it."""

    def of_batch(x, scale, offset):
        zeros = jnp.zeros(x.shape[-1:], jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        state = {"mean": zeros + 0.25, "var": zeros + 0.75}
        out, state = batch_norm(x, scale, offset, state, training=True, **options)
        if then_use:
            return batch_norm(x, scale, offset, state, training=False)[0]
        return jnp.concatenate([out, jnp.stack([state["mean"], state["var"]]).astype(out.dtype)])

    return of_batch


def _batch_norm(label, **options):
    return Row(label, _statistics(ops.batch_norm, **options), _statistics(reference.batch_norm, **options), _batch)


RULES = [
    _row(ops, "affine", _affine),
    _row(ops, "affine", _images, variant=True, flatten=True),
    _row(ops, "relu", _x),
    _row(ops, "leaky_relu", _x, negative_slope=0.2),
    _row(ops, "elu", _x, alpha=0.7),
    _row(ops, "sigmoid", _x),
    _row(ops, "tanh", _x),
    _row(ops, "softplus", _x),
    _row(ops, "silu", _x),
    _row(ops, "gelu", _x),
    _row(ops, "gelu", _x, variant=True, approximate=False),
    _row(ops, "layer", _affine, activation="relu"),
    _row(ops, "affine", _without_bias, variant=True, b=None),
    _row(ops, "layer", _affine, variant=True, activation="gelu"),
    _row(ops, "layer", _without_bias, variant=True, b=None, activation="silu"),
    _row(ops, "layer", _affine, variant=True, activation="tanh"),
    _row(ops, "dropout", _keyed, keywords=("key",), rate=0.3),
    _row(ops, "layer_norm", _normed),
    _row(ops, "rms_norm", _scaled),
    _batch_norm("batch_norm"),
    _row(ops, "softmax", _x),
    _row(ops, "softmax", _x, variant=True, axis=0),
    _row(ops, "softmax", _masked, keywords=("where",), variant=True),
    _row(ops, "log_softmax", _x),
    _row(ops, "log_softmax", _x, variant=True, axis=0),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labeled, variant=True),
    _row(
        losses,
        "softmax_cross_entropy_with_integer_labels",
        _and(_labeled, OF_ROWS),
        keywords=OF_ROWS,
        label_smoothing=0.2,
    ),
    _row(
        losses,
        "softmax_cross_entropy_with_integer_labels",
        _labeled_and_masked,
        keywords=("where",),
        variant=True,
        label_smoothing=0.1,
    ),
    _row(losses, "linear_softmax_cross_entropy", _last_layer, chunk_size=3),
    _row(
        losses,
        "linear_softmax_cross_entropy",
        _and(_last_layer, OF_ROWS),
        keywords=OF_ROWS,
        variant=True,
        chunk_size=4,
        label_smoothing=0.2,
        ignore_index=1,
    ),
    _row(losses, "softmax_cross_entropy", _pair, variant=True),
    _row(losses, "softmax_cross_entropy", _and(_pair, OF_ROWS), keywords=OF_ROWS, label_smoothing=0.2),
    _row(losses, "softmax_cross_entropy", _pair_and_masked, keywords=("where",), variant=True, label_smoothing=0.1),
    _row(losses, "sigmoid_binary_cross_entropy", _pair, variant=True),
    _row(
        losses,
        "sigmoid_binary_cross_entropy",
        _and(_pair, OF_ELEMENTS, OF_ELEMENTS),
        keywords=OF_ELEMENTS,
        label_smoothing=0.2,
    ),
    _row(losses, "squared_error", _pair),
    _row(losses, "negative_log_likelihood", _probs),
    _row(losses, "negative_log_likelihood", _probs, variant=True, ignore_index=1),
    _row(losses, "multiclass_svm", _labeled),
    _row(losses, "multiclass_svm", _labeled, variant=True, margin=0.25),
    _row(losses, "l2_penalty", _params),
]


def _alone_and_in_pairs(name, draw, of, **static):
    """A row for each option of a loss, and for every pair of options."""
    options = [*of, *static]
    for chosen in (*itertools.combinations(options, 1), *itertools.combinations(options, 2)):
        keywords = tuple(o for o in chosen if o in of)
        fixed = {o: static[o] for o in chosen if o in static}
        if draw is _last_layer:
            fixed["chunk_size"] = 3
        yield _row(losses, name, _and(draw, keywords, of), keywords=keywords, **fixed)


_layer_of_relu = partial(reference.layer, activation="relu")


def _of_classes(name, draw):
    return _row(losses, name, draw, keywords=("where",))._replace(name=f"{name}-where of classes")


OPTIONS = [
    _row(ops, "affine", _affine, compute_dtype="float32"),
    _row(ops, "affine", _affine, compute_dtype="bfloat16"),
    _row(ops, "affine", _affine, out_dtype="float32"),
    _row(ops, "affine", _affine, compute_dtype="bfloat16", out_dtype="float32"),
    _row(ops, "affine", _images, flatten=True, compute_dtype="float32"),
    _row(ops, "leaky_relu", _x),
    _row(ops, "leaky_relu", _x, negative_slope=0.0),
    _row(ops, "elu", _x),
    *(
        _row(ops, "layer", _affine, activation=name)
        for name in ("sigmoid", "softplus", "softmax", "log_softmax", "elu")
    ),
    _row(ops, "layer", _affine, activation="elu", alpha=0.5),
    _row(ops, "layer", _affine, activation="leaky_relu"),
    _row(ops, "layer", _affine, activation="leaky_relu", negative_slope=0.2),
    _row(ops, "layer", _affine, activation="gelu", approximate=False),
    _row(ops, "layer", _without_bias, b=None, activation="relu"),
    _row(ops, "layer", _affine, activation="relu", compute_dtype="bfloat16"),
    _row(ops, "layer", _affine, activation="silu", compute_dtype="float32"),
    _row(ops, "layer", _affine, activation="tanh", out_dtype="float32"),
    _row(ops, "layer", _without_bias, b=None, activation="gelu", compute_dtype="bfloat16"),
    Row("layer_fwd-layer_bwd", partial(rule(ops.layer_fwd, ops.layer_bwd), activation="relu"), _layer_of_relu, _affine),
    _row(ops, "dropout", _keyed, keywords=("key",), rate=0.0),
    _row(ops, "dropout", _keyed, keywords=("key",), rate=1.0),
    _row(ops, "layer_norm", _normed, eps=0.1),
    _row(ops, "rms_norm", _scaled, eps=0.1),
    _batch_norm("batch_norm-decay=0.5", decay=0.5),
    _batch_norm("batch_norm-unbiased_variance=False", unbiased_variance=False),
    _batch_norm("batch_norm-decay=0-eps=0.1", decay=0.0, eps=0.1),
    _batch_norm("batch_norm-training=False", then_use=True),
    _row(ops, "softmax", _x, axis=None),
    _row(ops, "softmax", _masked, keywords=("where",), axis=0),
    _row(ops, "log_softmax", _masked, keywords=("where",)),
    *_alone_and_in_pairs(
        "softmax_cross_entropy_with_integer_labels", _labeled, OF_ROWS, label_smoothing=0.2, ignore_index=1
    ),
    _of_classes("softmax_cross_entropy_with_integer_labels", _labeled_and_masked),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labeled_columns, axis=0),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labeled_by_uint32)._replace(name="labels of uint32"),
    _row(losses, "softmax_cross_entropy_with_integer_labels", _labeled_by_uint32, ignore_index=-1),
    _row(
        losses,
        "softmax_cross_entropy_with_integer_labels",
        _and(_labeled_or_not, ["class_weights"]),
        keywords=["class_weights"],
        ignore_index=-100,
    ),
    *_alone_and_in_pairs("linear_softmax_cross_entropy", _last_layer, OF_ROWS, label_smoothing=0.2, ignore_index=1),
    _row(losses, "linear_softmax_cross_entropy", _last_layer),
    _row(losses, "linear_softmax_cross_entropy", _last_layer, chunk_size=1),
    _row(losses, "linear_softmax_cross_entropy", _last_layer, chunk_size=3, compute_dtype="bfloat16"),
    *_alone_and_in_pairs("softmax_cross_entropy", _pair, OF_ROWS, label_smoothing=0.2),
    _of_classes("softmax_cross_entropy", _pair_and_masked),
    _row(losses, "softmax_cross_entropy", _pair, axis=0),
    _row(losses, "softmax_cross_entropy", _pair, axis=None),
    _row(losses, "softmax_cross_entropy", _pair_and_masked, keywords=("where",), axis=0),
    *_alone_and_in_pairs("sigmoid_binary_cross_entropy", _pair, OF_ELEMENTS, label_smoothing=0.2),
    _row(losses, "squared_error", _x)._replace(name="squared_error-targets=None"),
    _row(losses, "multiclass_svm", _labeled, margin=0.0),
]
"""Each option alone, and pairs of options, for the tests that ask for them."""


def slow(*values):
    """Test parameters that `make test` skips and `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def rows(*, variants_are_slow: bool = True, options: bool = False):
    """Parametrizes a test by row. The tests of one row run in one process, which compiles its programs once.

    `options` adds the rows of `OPTIONS`, which are slow.
    """

    def param(row, *, is_slow):
        marks = [pytest.mark.xdist_group(row.name), *([pytest.mark.slow] if is_slow else [])]
        return pytest.param(row, id=row.name, marks=marks)

    params = [param(row, is_slow=row.variant and variants_are_slow) for row in RULES]
    return pytest.mark.parametrize("row", params + [param(row, is_slow=True) for row in OPTIONS if options])


def split_real(args):
    """The real arguments, and a function that replaces them."""
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


@partial(jax.jit, static_argnums=0)
def gradients(fun, args, g):
    """The output of `fun` and the gradients with respect to its real arguments, compiled."""
    reals, fill = split_real(args)
    out, pull = jax.vjp(lambda *reals: fun(*fill(reals)), *reals)
    return out, pull(g)
