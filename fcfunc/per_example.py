"""Functions of per-example gradients that never form those gradients.

`Network.example_gradients` returns the gradient of each example in factored form, with the structure of the parameters:
an `Outer` for the weights of a layer and `Rows` for every other leaf. Only `materialized` allocates an array with the
size of batch times parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout
from fcfunc._rule import sum_dtype, upcast

__all__ = [
    "NoiseScale", "Outer", "Rows", "along", "clipped_sum", "dot_products", "leaf_squared_norms", "materialized",
    "mean_with_noise_scale", "noise_scale", "squared_norms", "weighted_sum",
]  # fmt: skip


class Outer(NamedTuple):
    """Gradients with respect to the weights of a layer; that of example `i` is `inputs[i] ⊗ cotangents[i]`.

    Attributes:
      inputs: the inputs of the layer, `[batch, fan_in]`; for stacked layers `[layers, batch, width]`.
      cotangents: the cotangents of its affine output, `[batch, fan_out]`; for stacked layers `[layers, batch, width]`.
    """

    inputs: jax.Array
    cotangents: jax.Array


class Rows(NamedTuple):
    """Gradients with respect to a bias, scale or offset, one row per example.

    Attributes:
      values: the gradients, `[batch, fan_out]`; for stacked layers `[layers, batch, width]`.
    """

    values: jax.Array


def leaf_squared_norms(gradients) -> Any:
    r"""Computes the squared norm of each example's gradient for each leaf: :math:`|h_i|^2 |g_i|^2` for weights.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.

    Returns:
      A pytree with the structure of the parameters, `[batch]` for each leaf or `[layers, batch]` for stacked layers, in
      at least float32.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.

    Source: derived in docs/background/derivations.md#gradients-of-single-examples.

    Example:
      >>> outer = Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
      >>> leaf_squared_norms([{"w": outer, "b": Rows(outer.cotangents)}])
      [{'b': Array([9.], dtype=float32), 'w': Array([45.], dtype=float32)}]
    """
    return _leaf_squared_norms("leaf_squared_norms", gradients)


def _leaf_squared_norms(where: str, gradients) -> Any:
    def scaled(a):
        """The largest element of each row, and the squared norm of the row divided by it, to avoid underflow."""
        a = upcast(a)
        largest = jnp.max(jnp.abs(a), axis=-1, initial=0)
        safe = jnp.where(largest == 0, 1, largest)
        return largest, jnp.sum((a / safe[..., None]) ** 2, axis=-1)

    def of_outer(h, g):
        # |h gᵀ|² = |h|² |g|²
        (h_max, h_rest), (g_max, g_rest) = scaled(h), scaled(g)
        return (h_max * g_max) ** 2 * h_rest * g_rest

    def of_rows(r):
        largest, rest = scaled(r)
        return largest**2 * rest

    return _by_leaf(where, of_outer, of_rows, gradients)


def squared_norms(gradients) -> jax.Array:
    """Computes the squared norm of each example's gradient over all leaves.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.

    Returns:
      The squared norms, `[batch]`, in at least float32.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.

    Example:
      >>> squared_norms([{"w": Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))}])
      Array([45.], dtype=float32)
    """
    return whole_squared_norms("squared_norms", gradients)


def whole_squared_norms(where: str, gradients) -> jax.Array:
    """`squared_norms`, with error messages that name the function `where`."""
    norms = jax.tree.leaves(_leaf_squared_norms(where, gradients))
    return sum(jnp.sum(a, axis=0) if a.ndim > 1 else a for a in norms)  # type: ignore[return-value]


def weighted_sum(gradients, weights: jax.Array) -> Any:
    r"""Computes a weighted sum of the gradients: :math:`\sum_i c_i h_i ⊗ g_i = H^T (c ∘ G)` for weights.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.
      weights: the weight `c` of each example, `[batch]`.

    Returns:
      A pytree with the structure and shapes of the parameters, in at least float32.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.
      ValueError: `weights` is not `[batch]`.

    Example:
      >>> outer = Outer(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0], [1.0]]))
      >>> weighted_sum([{"w": outer}], jnp.array([1.0, 10.0]))
      [{'w': Array([[ 3.],
             [16.]], dtype=float32)}]
    """
    where = "weighted_sum"
    _arguments.floating(where, weights=weights)
    count = _batch_size(where, gradients=gradients)
    if np.shape(weights) != (count,):
        raise ValueError(f"{where}: weights must be [{count}], one per example, got {list(np.shape(weights))}")

    def of_outer(h, g):
        # dW = Hᵀ (c ∘ G), with G in the dtype that the backward pass of `ops.affine` uses
        g = of_each(g).astype(g.dtype)
        # If both are sharded, the result is sharded like w.
        transposed = _layout.dot_sharding(jnp.swapaxes(g, -1, -2), h, g.ndim - 1)
        return matmul(jnp.swapaxes(h, -1, -2), g, transposed and _layout.transposed(transposed))

    def of_rows(r):
        return jnp.sum(of_each(r), axis=-2)

    def of_each(a):
        return upcast(a) * jnp.broadcast_to(weights[:, None].astype(sum_dtype(a.dtype)), a.shape)

    return _by_leaf(where, of_outer, of_rows, gradients)


def clipped_sum(gradients, max_norm: float) -> Any:
    r"""Sums the gradients after clipping each to a norm of at most `max_norm`: :math:`c_i = \min(1, C / |∇_i|)`.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.
      max_norm: the bound `C`, above 0, on the contribution of one example to the sum.

    Returns:
      A pytree with the structure and shapes of the parameters, in at least float32. An example with a non-finite
      gradient makes the sum NaN.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.
      ValueError: `max_norm` is not above 0.

    Source: Goodfellow 2015, Efficient Per-Example Gradient Computations; Abadi et al. 2016, Deep Learning with
    Differential Privacy.

    Example:
      >>> outer = Outer(jnp.array([[3.0], [1.0]]), jnp.array([[1.0], [1.0]]))
      >>> clipped_sum([{"w": outer}], 2.0)
      [{'w': Array([[3.]], dtype=float32)}]
    """
    where = "clipped_sum"
    return weighted_sum(gradients, clip_factors(where, gradients, whole_squared_norms(where, gradients), max_norm))


def clip_factors(where: str, gradients, squared: jax.Array, max_norm: float) -> jax.Array:
    """`min(1, C / |∇|)`, or NaN if the norm is non-finite or a traced `C` is not above 0.

    In half precision it is slightly smaller, because `c ∘ G` is rounded and no example may contribute more than `C`.
    """
    if not _layout.is_tracer(max_norm) and not _arguments.number(where, max_norm=max_norm) > 0:
        raise ValueError(f"{where}: max_norm must be above 0, got {max_norm}")
    halves = [a.dtype for a in jax.tree.leaves(gradients) if a.dtype != sum_dtype(a.dtype)]
    max_norm = max_norm * (1 - max((float(jnp.finfo(dtype).eps) / 2 for dtype in halves), default=0))
    factors = jnp.minimum(1, max_norm * jax.lax.rsqrt(jnp.maximum(squared, jnp.finfo(squared.dtype).tiny)))
    return jnp.where(jnp.isfinite(squared) & (max_norm > 0), factors, jnp.nan)


def dot_products(gradients, others) -> jax.Array:
    r"""Computes the dot products between two sets of gradients: :math:`(h_i · h_j) (g_i · g_j)` for weights.

    With `others` equal to `gradients`, this is the empirical neural tangent kernel of the losses. Between training and
    test examples, it is the first-order influence of a gradient step on one example on the loss of the other.

    Args:
      gradients, others: per-example gradients from `Network.example_gradients`, at the same parameters.

    Returns:
      The dot products, `[batch, others]`, in at least float32.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.
      ValueError: the two come from different networks.

    Example:
      >>> outer = Outer(jnp.array([[3.0], [1.0]]), jnp.array([[1.0], [2.0]]))
      >>> dot_products([{"w": outer}], [{"w": outer}])
      Array([[9., 6.],
             [6., 4.]], dtype=float32)
    """
    where = "dot_products"
    for name, given in {"gradients": gradients, "others": others}.items():
        _batch_size(where, **{name: given})
    widths = [jax.tree.map(lambda a: (*a.shape[:-2], a.shape[-1]), tree) for tree in (gradients, others)]
    if widths[0] != widths[1]:
        advice = "both stacked or both unstacked"
        raise ValueError(f"{where}: gradients and others must come from the same network, {advice}")
    flat, rest = (jax.tree.leaves(tree, is_leaf=is_factored) for tree in (gradients, others))
    total: Any = 0
    for a, b in zip(flat, rest, strict=True):
        # (h gᵀ) · (h' g'ᵀ) = (h · h') (g · g')
        products = [matmul(upcast(x), jnp.swapaxes(upcast(y), -1, -2)) for x, y in zip(a, b, strict=True)]
        product = products[0] if len(products) == 1 else products[0] * products[1]
        total = total + (jnp.sum(product, axis=0) if product.ndim > 2 else product)
    return total


def along(gradients, direction) -> jax.Array:
    r"""Computes the dot product of each example's gradient with a direction: :math:`h_i^T V g_i` for weights.

    This is the rate of change of each loss along the direction.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.
      direction: a pytree with the structure and shapes of the parameters.

    Returns:
      The dot products, `[batch]`, in at least float32.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.
      ValueError: `direction` does not have the structure and shapes of the parameters.

    Example:
      >>> outer = Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))
      >>> along([{"w": outer}], [{"w": jnp.array([[1.0], [1.0]])}])
      Array([9.], dtype=float32)
    """
    where = "along"
    _batch_size(where, gradients=gradients)
    flat, treedef = jax.tree.flatten(gradients, is_leaf=is_factored)
    if jax.tree.structure(direction) != treedef:
        raise ValueError(f"{where}: direction must have the structure of the parameters, {treedef!s:.200}")
    for a, v in zip(flat, jax.tree.leaves(direction), strict=True):
        expected = (*a[0].shape[:-2], *(part.shape[-1] for part in a))
        if np.shape(v) != expected:
            raise ValueError(f"{where}: a leaf of direction must be {list(expected)}, got {list(np.shape(v))}")
    total: Any = 0
    for a, v in zip(flat, jax.tree.leaves(direction), strict=True):
        if isinstance(a, Outer):
            product = jnp.sum(matmul(upcast(a.inputs), upcast(v)) * upcast(a.cotangents), axis=-1)
        else:
            product = matmul(upcast(a.values), upcast(v)[..., None])[..., 0]
        total = total + (jnp.sum(product, axis=0) if product.ndim > 1 else product)
    return total


def materialized(gradients) -> Any:
    """Forms the per-example gradients with a leading axis for the examples; use it for small networks and in tests.

    Args:
      gradients: per-example gradients from `Network.example_gradients`.

    Returns:
      A pytree with the structure of the parameters and leaves `[batch, ...]`, as `jax.vmap(jax.grad(...))` returns.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.

    Example:
      >>> materialized([{"w": Outer(jnp.array([[1.0, 2.0]]), jnp.array([[3.0]]))}])
      [{'w': Array([[[3.],
              [6.]]], dtype=float32)}]
    """

    def of_outer(h, g):
        return jnp.moveaxis(upcast(h)[..., :, None] * upcast(g)[..., None, :], -3, 0)

    return _by_leaf("materialized", of_outer, lambda r: jnp.moveaxis(upcast(r), -2, 0), gradients)


class NoiseScale(NamedTuple):
    """The size of the gradient and of its noise, estimated from one batch.

    Attributes:
      noise_scale: `tr Σ / |G|²`, the batch size at which the noise of the mean gradient is as large as the gradient. It
        is negative or very large if the batch is too small to resolve the gradient.
      squared_gradient: an unbiased estimate of `|G|²`, the squared norm of the expected gradient.
      variance: an unbiased estimate of `tr Σ`, the total variance of a single example's gradient.
      signal_to_noise: `|G|² / tr Σ` of each leaf, in a pytree with the structure of the parameters.
    """

    noise_scale: jax.Array
    squared_gradient: jax.Array
    variance: jax.Array
    signal_to_noise: Any


def noise_scale(gradients) -> NoiseScale:
    r"""Estimates the simple gradient noise scale :math:`\text{tr} Σ / |G|^2`.

    For `n` examples with gradients `∇_i` and mean `M`, the unbiased estimates are
    :math:`\text{tr} Σ = (\sum |∇_i|^2 - n |M|^2) / (n - 1)` and :math:`|G|^2 = |M|^2 - \text{tr} Σ / n`.

    Args:
      gradients: per-example gradients of at least two examples, from `Network.example_gradients`.

    Returns:
      A `NoiseScale`.

    Raises:
      TypeError: a leaf of `gradients` is not an `Outer` or `Rows`.
      ValueError: fewer than two examples.

    Source: McCandlish et al. 2018, An Empirical Model of Large-Batch Training, appendix A.

    Example:
      >>> outer = Outer(jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]))
      >>> noise_scale([{"w": outer}]).variance
      Array(2., dtype=float32)
    """
    return _mean_and_noise("noise_scale", gradients)[1]


def mean_with_noise_scale(losses: jax.Array, gradients, batch: Any, key: Any) -> tuple[jax.Array, Any, dict]:
    """Returns the mean gradient, with its noise as metrics; pass it as `aggregate` to `train.make_train_step`.

    Training is the same as with the mean of the losses.

    Args:
      losses, gradients: the result of `Network.example_gradients` for at least two examples.
      batch, key: not used.

    Returns:
      `(loss, gradient, metrics)`. The metrics are the fields of `NoiseScale`; the signal-to-noise ratio of a leaf has a
      name such as `signal_to_noise[0]['w']`. The `noise_scale` of a single batch is noisy: for a better estimate,
      divide the mean of `variance` over several steps by the mean of `squared_gradient`.

    Raises:
      ValueError, TypeError: for the same reasons as `noise_scale`.

    Example:
      >>> import optax
      >>> from fcfunc import train
      >>> net, optimizer = fcfunc.mlp([2, 1], use_bias=False), optax.sgd(0.1)
      >>> def loss_fn(params, batch, key):
      ...     x, y = batch
      ...     return net.example_gradients(params, x, lambda outputs: (outputs[:, 0] - y) ** 2)
      >>> step = train.make_train_step(loss_fn, optimizer, aggregate=mean_with_noise_scale)
      >>> state = train.init_state(net.init(jax.random.key(0)), optimizer, jax.random.key(1))
      >>> state, metrics = step(state, (jnp.eye(2), jnp.ones(2)))
      >>> sorted(metrics)
      ['loss', 'noise_scale', "signal_to_noise[0]['w']", 'squared_gradient', 'variance']
    """
    del batch, key
    mean, noise = _mean_and_noise("mean_with_noise_scale", gradients)
    of_leaves = jax.tree.leaves_with_path(noise.signal_to_noise)
    metrics = {f"signal_to_noise{jax.tree_util.keystr(path)}": ratio for path, ratio in of_leaves}
    names = ("noise_scale", "squared_gradient", "variance")
    metrics |= {name: getattr(noise, name) for name in names}
    return jnp.mean(upcast(losses)), mean, metrics


def _mean_and_noise(where: str, gradients) -> tuple[Any, NoiseScale]:
    n = _batch_size(where, gradients=gradients)
    if n < 2:
        raise ValueError(f"{where}: gradients must have at least two examples for a variance, got {n}")
    mean = jax.tree.map(lambda a: a / n, weighted_sum(gradients, jnp.ones(n)))
    squared_mean = jax.tree.map(lambda a: jnp.sum(a**2), mean)
    squared = jax.tree.map(jnp.sum, _leaf_squared_norms(where, gradients))
    # tr Σ = (Σ |∇|² − n |M|²) / (n − 1), negative only through rounding;  |G|² = |M|² − tr Σ / n
    variance = jax.tree.map(lambda s, m: jnp.maximum(s - n * m, 0) / (n - 1), squared, squared_mean)
    signal = jax.tree.map(lambda m, v: m - v / n, squared_mean, variance)
    whole_signal, whole_variance = (sum(jax.tree.leaves(tree)) for tree in (signal, variance))
    ratio = jax.tree.map(jnp.divide, signal, variance)
    return mean, NoiseScale(whole_variance / whole_signal, whole_signal, whole_variance, ratio)  # type: ignore[arg-type]


def losses_and_cotangents(where: str, loss_fn: Callable, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each row of the outputs and its derivative by that row; NaN or an error if the loss mixes rows."""
    losses, pull = jax.vjp(loss_fn, outputs)
    batch = outputs.shape[0]
    if not isinstance(losses, jax.Array) or losses.shape != (batch,):
        given = _arguments.describe(losses) if isinstance(losses, jax.Array) else type(losses).__name__
        raise ValueError(f"{where}: loss_fn must return one loss per example, [{batch}], got {given}")
    (g,) = pull(_layout.reshard_like(jnp.ones_like(losses), losses))
    # If each loss depends only on its own row, cotangents c give c_i g_i, exactly for powers of two.
    rng = np.random.default_rng(0)
    signs = np.where(np.arange(batch) % 2, -1.0, 1.0) * 2.0 ** rng.integers(0, 3, batch)
    c = _layout.reshard_like(jnp.asarray(signs, losses.dtype), losses)
    (scaled,) = pull(c)
    expected = upcast(g) * c[:, None].astype(sum_dtype(g.dtype))
    off = jnp.abs(upcast(scaled) - expected) > 1e-3 * jnp.max(jnp.abs(expected), axis=-1, keepdims=True)
    # The values must not depend on other rows either, which `stop_gradient` would hide from the cotangents.
    odd = _layout.reshard_like(jnp.asarray(np.arange(batch) % 2 == 1), losses)
    for others in (odd, ~odd):
        moved = jnp.where(others[:, None], 1 - 3 * outputs, outputs)
        change = jnp.abs(upcast(loss_fn(moved)) - upcast(losses))
        size = jnp.abs(upcast(losses)) + upcast(jnp.max(jnp.abs(outputs), axis=-1, initial=0)).astype(change.dtype)
        off |= (~others & jnp.isfinite(losses) & ~(change <= 1e-5 * size))[:, None]
    if _layout.is_tracer(off):  # row by row, so that no device of a mesh waits for the rows of another
        nan = jnp.where(jnp.any(off, axis=-1), jnp.nan, 0)
        return losses + nan.astype(losses.dtype), g + nan[:, None].astype(g.dtype)
    if bool(jnp.any(off)):
        row = int(jnp.argmax(jnp.any(off, axis=-1)))
        raise ValueError(f"{where}: loss_fn mixes examples: row {row} of the outputs changes the loss of another row")
    return losses, g


def _batch_size(where: str, **trees) -> int:
    """The number of examples in factored gradients; raises TypeError or ValueError for anything else."""
    ((name, gradients),) = trees.items()
    leaves = jax.tree.leaves(gradients, is_leaf=is_factored)
    if not leaves or not all(map(is_factored, leaves)):
        wrong = next((type(a).__name__ for a in leaves if not is_factored(a)), "nothing")
        raise TypeError(f"{where}: {name} must come from Network.example_gradients, got {wrong} among the leaves")
    counts = {a.shape[-2] for leaf in leaves for a in leaf}
    if len(counts) > 1:
        raise ValueError(f"{where}: all leaves of {name} must have the same number of examples, got {sorted(counts)}")
    return counts.pop()


def is_factored(a) -> bool:
    return isinstance(a, Outer | Rows)


def _by_leaf(where: str, of_outer: Callable, of_rows: Callable, gradients) -> Any:
    _batch_size(where, gradients=gradients)
    return jax.tree.map(lambda a: of_outer(*a) if isinstance(a, Outer) else of_rows(*a), gradients, is_leaf=is_factored)


def matmul(a, b, sharding=None):
    """`a @ b` for stacks of matrices with at least float32 accumulation, sharded like the rows of `a` by default."""
    sharding = sharding or _layout.dot_sharding(a, b, a.ndim - 1)
    return jnp.matmul(a, b, preferred_element_type=sum_dtype(a.dtype), out_sharding=sharding)
