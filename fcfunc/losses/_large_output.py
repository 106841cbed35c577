"""The last layer of a network with many classes and its cross-entropy, in one rule; `fcfunc.losses` has it as well.

The logits, `[batch, classes]`, are what a large output layer cannot afford. Here they exist a chunk of classes at a
time, in the forward pass and again in the backward pass, which costs a fourth product where there were three.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array
from fcfunc._rule import accumulator, rule
from fcfunc.losses._cross_entropy import softmax_cross_entropy_with_integer_labels
from fcfunc.losses._labels import (
    each_score,
    hit,
    label_targets,
    masked,
    minus_targets,
    pick,
    settle,
    surprise,
    times_class,
    weighted,
)
from fcfunc.ops import affine
from fcfunc.ops._affine import product

DENSE_ELEMENTS = 2**24
"""Up to so many logits the dense loss is the faster one; measured by benchmarks/large_output.py."""

CHUNK_ELEMENTS = 2**21
"""About so many logits are in memory at a time where no chunk size is given."""


def linear_softmax_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int | None = None,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    class_weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    compute_dtype=None,
    round_cotangent: bool = True,
) -> jax.Array:
    r"""An affine layer and its softmax cross-entropy: :math:`\ell = \log \sum_k e^{z_k} - z_y`, `z = x w + b`.

    The same to rounding as `softmax_cross_entropy_with_integer_labels(affine(x, w, b), labels)`, whatever the chunk;
    the logits are accumulated and used in at least float32.

    Args:
      x: the last hidden layer, `[..., fan_in]`.
      w: weights, `[fan_in, classes]`.
      b: biases, `[classes]`.
      labels: integers in `[0, classes)`, `[...]`.
      chunk_size: how many classes to hold at a time, at least 1; one that does not divide the classes leaves a shorter
        last chunk. None: chosen by the number of rows; and the dense loss instead where the logits are few, or where
        the classes lie on several devices of an Explicit mesh, each of which then holds its own.
      where: as for `softmax_cross_entropy_with_integer_labels`.
      weights: as there.
      class_weights: as there.
      label_smoothing: as there.
      ignore_index: as there.
      compute_dtype: of the operands of the products, as for `affine`.
      round_cotangent: as for `affine`.

    Returns:
      `[...]`, in nats. Saved for the backward pass: the arguments and four numbers per row.

    Raises:
      TypeError: as for `affine` and `softmax_cross_entropy_with_integer_labels`.
      ValueError: the same, and a `chunk_size` below 1.

    Source: derived in docs/derivations.md#linear-layer-with-softmax-and-cross-entropy.

    Example:
      >>> x, w, b = jnp.array([[1., 2.]]), jnp.zeros((2, 5)), jnp.zeros(5)
      >>> linear_softmax_cross_entropy(x, w, b, jnp.array([4]), chunk_size=2)
      Array([1.609438], dtype=float32)
    """
    label_smoothing = _arguments.number("linear_softmax_cross_entropy", label_smoothing=label_smoothing)
    _arguments.ignored_label("linear_softmax_cross_entropy", ignore_index)
    operands = _checked(x, w, b, labels, where, weights, class_weights, label_smoothing, compute_dtype)
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index}
    products = {"compute_dtype": compute_dtype, "round_cotangent": round_cotangent}
    x, w = as_array(x), as_array(w)
    rows_of_x = tuple(range(x.ndim - 1))
    given: list[Any] = [None if a is None else as_array(a) for a in (labels, where, weights)]
    labels, where, weights = (_layout.laid_along(a, x, rows_of_x) for a in given)
    x = masked(x, labels, ignore_index=ignore_index, where=where)
    b, class_weights = (_layout.laid_along(None if a is None else as_array(a), w, (-1,)) for a in (b, class_weights))
    if chunk_size is not None and _classes_sharded(w):
        raise ValueError(
            "linear_softmax_cross_entropy: classes that lie on several devices are not taken by chunks; "
            "leave chunk_size at None, and each device holds the logits of its own"
        )
    if chunk_size is None:
        rows, classes = math.prod(jnp.shape(x)[:-1]), jnp.shape(w)[-1]
        if rows * classes <= DENSE_ELEMENTS or _classes_sharded(w):
            logits = affine(x, w, b, out_dtype=accumulator(operands), **products)
            return softmax_cross_entropy_with_integer_labels(
                logits, labels, where=where, weights=weights, class_weights=class_weights, **options
            )
        chunk_size = max(CHUNK_ELEMENTS // max(rows, 1), 256)
    return _linear_softmax_cross_entropy(
        x, w, b, labels, where, weights, class_weights, chunk_size=chunk_size, **options, **products
    )


def linear_softmax_cross_entropy_fwd(
    x,
    w,
    b,
    labels,
    where=None,
    weights=None,
    class_weights=None,
    *,
    chunk_size,
    label_smoothing=0.0,
    ignore_index=None,
    compute_dtype=None,
    round_cotangent=True,
):
    """`(loss, residuals)` of `linear_softmax_cross_entropy`, by chunks."""
    del round_cotangent
    operands = _checked(x, w, b, labels, where, weights, class_weights, label_smoothing, compute_dtype)
    _arguments.positive("linear_softmax_cross_entropy", chunk_size=chunk_size)
    classes = w.shape[1]

    def take(sums, start, size):
        row_max, total, own, own_weight, all_own, all_weight = sums
        z, _ = _chunk(x, w, b, start, size, operands)
        u = None if class_weights is None else _part(class_weights, start, size)
        # The maximum so far and the one before; where one is -inf another takes its place, -inf − -inf being no number.
        new_max = jnp.maximum(row_max, jax.lax.stop_gradient(jnp.max(z, axis=-1)))
        new = jnp.where(new_max == -jnp.inf, 0, new_max)
        old = jnp.where(row_max == -jnp.inf, new, row_max)
        shifted = z - jnp.expand_dims(new, -1)
        total = total * jnp.exp(old - new) + jnp.sum(jnp.exp(shifted), axis=-1)
        own = own + pick(z, labels, start)
        if u is not None:
            own_weight = own_weight + pick(u, labels, start)
        if label_smoothing:  # Σ u (max − z), which moves with the maximum
            u_chunk = times_class(jnp.ones_like(z), u)
            all_own = all_own + all_weight * (new - old) + jnp.sum(weighted(u_chunk, -shifted), axis=-1)
            all_weight = all_weight + jnp.sum(u_chunk, axis=-1)
        return new_max, total, own, own_weight, all_own, all_weight

    zeros = _layout.laid_along(jnp.zeros(labels.shape, accumulator(operands)), x, tuple(range(x.ndim - 1)))
    own_weight = zeros + 1 if class_weights is None else zeros
    sums, _ = _layout.vary_alike(((zeros - jnp.inf, zeros, zeros, own_weight, zeros, zeros), x))
    row_max, total, own, own_weight, all_own, all_weight = _over_chunks(take, sums, classes, chunk_size)
    log_sum = jnp.log(total)
    # ℓ = r ((1 − ε) u_y (log Σ − (z_y − max)) + ε/C (Σ u log Σ + Σ u (max − z)))
    surprise_of_row = weighted(own_weight, log_sum - (own - row_max))
    if label_smoothing:
        spread = label_smoothing / max(classes, 1)
        surprise_of_row = (1 - label_smoothing) * surprise_of_row + spread * (all_weight * log_sum + all_own)
    settled = functools.partial(settle, labels=labels, classes=classes, ignore_index=ignore_index, where=where)
    surprise_of_row = settled(surprise_of_row)
    loss = surprise_of_row if weights is None else settled(weighted(weights.astype(zeros.dtype), surprise_of_row))
    return loss, (x, w, b, labels, where, weights, class_weights, row_max, log_sum, own_weight, surprise_of_row)


def linear_softmax_cross_entropy_bwd(
    residuals,
    g,
    *,
    chunk_size,
    label_smoothing=0.0,
    ignore_index=None,
    compute_dtype=None,
    round_cotangent=True,
):
    """Cotangents `(dx, dw, db, None, None, dweights, dclass_weights)` of `linear_softmax_cross_entropy`."""
    x, w, b, labels, where, weights, class_weights, row_max, log_sum, own_weight, surprise_of_row = residuals
    operands = x.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    wide_in, classes = accumulator(operands), w.shape[1]
    narrow = operands if round_cotangent else wide_in
    batch = tuple(range(x.ndim - 1))
    by_w, by_rows = (((x.ndim - 1,), (1,)), ((), ())), ((batch, batch), ((), ()))
    settled = functools.partial(settle, labels=labels, classes=classes, ignore_index=ignore_index, where=where)
    gr = g if weights is None else g * weights.astype(g.dtype)
    rows = x.astype(operands).astype(narrow)

    def take(grads, start, size):
        dx, dw, db, du = grads
        z, w_chunk = _chunk(x, w, b, start, size, operands)
        hits, u = hit(z, labels, start), None if class_weights is None else _part(class_weights, start, size)
        # dz = g r (p Σ u t − u t), p = exp(z − max z − log Σ exp(z − max z))
        surprises = surprise(z, row_max, log_sum)
        p = jnp.exp(-surprises)
        by_row = minus_targets(p, hits, own_weight, class_weights, label_smoothing, classes, part=u)
        dz = settled(each_score(gr, z) * by_row)
        # dx = dz wᵀ, summed over the chunks; dw = xᵀ dz and db = 1ᵀ dz, of this chunk's classes
        dz_, w_, spec = dz.astype(narrow), w_chunk.astype(narrow), _layout.explicit_sharding
        dx = dx + product(dz_, w_, by_w, accumulate=wide_in, out_sharding=spec(x, w))
        dw_chunk = product(rows, dz_, by_rows, accumulate=wide_in, out_sharding=spec(w_chunk, x))
        dw, db = _put(dw, dw_chunk, start), _put(db, jnp.sum(dz, axis=batch), start)
        if u is not None:  # du = Σ g r t (−log p), over the rows
            by_class = weighted(label_targets(hits, label_smoothing, classes, z.dtype), surprises)
            du = _put(du, jnp.sum(settled(each_score(gr, z) * by_class), axis=batch), start)
        return dx, dw, db, du

    dx = _layout.laid_like(jnp.zeros(x.shape, wide_in), x)
    dw, db, du = (
        None if a is None else _layout.laid_like(jnp.zeros(a.shape, a.dtype), a) for a in (w, b, class_weights)
    )
    (dx, dw, db, du), _ = _layout.vary_alike(((dx, dw, db, du), x))
    dx, dw, db, du = _over_chunks(take, (dx, dw, db, du), classes, chunk_size)
    dweights = None if weights is None else settled(g * surprise_of_row).astype(weights.dtype)
    return dx.astype(x.dtype), dw, db, None, None, dweights, du


_linear_softmax_cross_entropy = rule(linear_softmax_cross_entropy_fwd, linear_softmax_cross_entropy_bwd)


def _over_chunks(take, carry, classes, size):
    """`take(carry, start, size)` for each chunk: whole ones in a loop, then a shorter one: nothing is padded."""
    whole, rest = divmod(classes, size)
    if whole == 1:
        carry = take(carry, 0, size)
    elif whole:
        starts = size * jnp.arange(whole)
        carry = jax.lax.scan(lambda carry, start: (take(carry, start, size), None), carry, starts)[0]
    return take(carry, whole * size, rest) if rest else carry


def _chunk(x, w, b, start, size, operands):
    """The logits of some classes and the weights that made them, in the operands' dtype."""
    w_chunk = _part(w, start, size).astype(operands)
    by_w = (((x.ndim - 1,), (0,)), ((), ()))
    sharding = _layout.product_sharding(x, w, x.ndim - 1)
    z = product(x.astype(operands), w_chunk, by_w, accumulate=accumulator(operands), out_sharding=sharding)
    return z + jnp.broadcast_to(_part(b, start, size).astype(z.dtype), z.shape), w_chunk


def _part(a, start, size):
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=-1)


def _put(whole, part, start):
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=-1)


def _checked(x, w, b, labels, where, weights, class_weights, label_smoothing, compute_dtype):
    """The operands' dtype, after the checks of all arguments."""
    name = "linear_softmax_cross_entropy"
    operands = _arguments.operands(name, compute_dtype, x=x, w=w, b=b)
    shape, kernel = jnp.shape(x), jnp.shape(w)
    if len(shape) < 1 or len(kernel) != 2 or jnp.shape(b) != kernel[1:] or shape[-1] != kernel[0]:
        raise ValueError(
            f"{name}: x [..., fan_in], w [fan_in, classes] and b [classes] expected, "
            f"got x {list(shape)}, w {list(kernel)}, b {list(jnp.shape(b))}"
        )
    _arguments.labels(name, labels, scores=jax.ShapeDtypeStruct((*shape[:-1], kernel[1]), operands))
    _arguments.counting(name, shape[:-1], where, weights, label_smoothing)
    _arguments.class_weights(name, class_weights, kernel[1])
    return operands


def _classes_sharded(w):
    sharding = _layout.explicit_sharding(jnp.asarray(w))
    return sharding is not None and any(axis is not None for axis in sharding.spec[1:])
