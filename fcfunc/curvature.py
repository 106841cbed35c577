"""Curvature of the loss of a network: the Hessian, the generalized Gauss-Newton matrix and its Kronecker factors.

All functions use the sum of the losses over the examples, as in `Network.example_gradients`; divide by the batch size
for the mean. The generalized Gauss-Newton (GGN) matrix is `Σᵢ Jᵢᵀ Hᵢ Jᵢ`, where `J` is the Jacobian of the outputs with
respect to the parameters, and `H` is the Hessian of the loss with respect to the outputs. If the loss is convex in the
outputs, such as cross-entropy or squared error, the GGN matrix is positive semidefinite. If the loss is also the
negative log-likelihood of an exponential family in its natural parameters, it is the Fisher information.
"""

from __future__ import annotations  # short signatures in help()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fcfunc import _arguments, _layout
from fcfunc._rule import upcast
from fcfunc.network import _MISSING, Network, Params
from fcfunc.per_example import Outer, Rows, is_factored, losses_and_cotangents, matmul

__all__ = [
    "Full", "Kronecker", "ggn_diagonal", "ggn_vector_product", "hessian_vector_product", "kronecker_factors",
]  # fmt: skip


class Kronecker(NamedTuple):
    """The block for the weights of a layer as a Kronecker product `inputs ⊗ cotangents`, with `w` in row-major order.

    Attributes:
      inputs: the mean of `h hᵀ` over the examples, `[fan_in, fan_in]`; stacked layers have a leading axis `layers`.
      cotangents: the sum of `Gᵀ H G` over the examples, `[fan_out, fan_out]`; stacked layers have a leading axis
        `layers`. Row `c` of `G` is the derivative of output `c` with respect to the affine output of the layer.
    """

    inputs: jax.Array
    cotangents: jax.Array


class Full(NamedTuple):
    """The exact block for a bias, scale or offset.

    Attributes:
      matrix: the block, `[width, width]`; stacked layers have a leading axis `layers`.
    """

    matrix: jax.Array


def hessian_vector_product(
    net: Network, params: Params, x: jax.Array, loss_fn: Callable, direction: Any, *, key: Any = _MISSING
) -> Any:
    r"""Computes a Hessian-vector product :math:`∇^2 (\sum_i ℓ_i) v` without forming the Hessian.

    It differentiates the backward rules, which costs three to four times as much as a gradient.

    Args:
      net, params, x, loss_fn, key: the network, its parameters, inputs, the loss and a dropout key, as in
        `Network.example_gradients`.
      direction: the vector `v`, a pytree with the structure, shapes and dtypes of `params`.

    Returns:
      The product, a pytree with the structure of `params`.

    Raises:
      ValueError: `direction` does not have the structure, shapes and dtypes of `params`, or for the same reasons as
        `Network.example_gradients`.
      TypeError: for the same reasons as `Network.example_gradients`.

    Source: Pearlmutter 1994, Fast Exact Multiplication by the Hessian; derived in
    docs/background/derivations.md#curvature.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> squared = lambda outputs: jnp.sum(outputs**2, axis=-1)
      >>> hessian_vector_product(net, [{"w": jnp.ones((1, 1))}], jnp.array([[3.0]]), squared, [{"w": jnp.ones((1, 1))}])
      [{'w': Array([[18.]], dtype=float32)}]
    """
    where = "hessian_vector_product"
    *_, poison = _linearized(where, net, params, x, loss_fn, key)
    _check_direction(where, direction, params)

    def gradient(params):
        return jax.grad(lambda params: jnp.sum(loss_fn(net.apply(params, x, key=key))))(params)

    # The Hessian is symmetric, so the vector-Jacobian product of the gradient is the Hessian-vector product.
    return jax.tree.map(lambda a: a + poison.astype(a.dtype), jax.vjp(gradient, params)[1](direction)[0])


def ggn_vector_product(
    net: Network, params: Params, x: jax.Array, loss_fn: Callable, direction: Any, *, key: Any = _MISSING
) -> Any:
    r"""Computes the product of the generalized Gauss-Newton matrix with a vector, :math:`\sum_i J_i^T H_i J_i v`.

    It does not need forward mode, because `J v` is computed as the transpose of the backward pass. It costs about twice
    as much as a gradient.

    Args:
      net, params, x, loss_fn, key: the network, its parameters, inputs, the loss and a dropout key, as in
        `Network.example_gradients`.
      direction: the vector `v`, a pytree with the structure, shapes and dtypes of `params`.

    Returns:
      The product, a pytree with the structure of `params`.

    Raises:
      ValueError, TypeError: for the same reasons as `hessian_vector_product`.

    Source: Schraudolph 2002, Fast Curvature Matrix-Vector Products; derived in
    docs/background/derivations.md#curvature.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> squared = lambda outputs: jnp.sum(outputs**2, axis=-1)
      >>> ggn_vector_product(net, [{"w": jnp.ones((1, 1))}], jnp.array([[3.0]]), squared, [{"w": jnp.ones((1, 1))}])
      [{'w': Array([[18.]], dtype=float32)}]
    """
    where = "ggn_vector_product"
    _, _, times_hessian, _ = _linearized(where, net, params, x, loss_fn, key)
    _check_direction(where, direction, params)
    outputs, pull = jax.vjp(lambda params: net.apply(params, x, key=key), params)
    # g ↦ Jᵀ g is linear, and its derivative by g in the direction of the cotangent v is J v
    zeros = _layout.reshard_like(jnp.zeros_like(outputs), outputs)
    (tangents,) = jax.vjp(pull, zeros)[1]((direction,))
    return pull(times_hessian(tangents))[0]


def ggn_diagonal(net: Network, params: Params, x: jax.Array, loss_fn: Callable, *, key: Any = _MISSING) -> Any:
    r"""Computes the exact diagonal of the generalized Gauss-Newton matrix, :math:`\sum_i \text{diag}(J_i^T H_i J_i)`.

    It runs one backward pass per output of the network, vectorized, and allocates no array with the size of batch times
    parameters.

    Args:
      net, params, x, loss_fn, key: the network, its parameters, inputs, the loss and a dropout key, as in
        `Network.example_gradients`.

    Returns:
      The diagonal, a pytree with the structure and shapes of `params`, in at least float32.

    Raises:
      ValueError, TypeError: for the same reasons as `Network.example_gradients`.

    Source: Martens et al. 2012, Estimating the Hessian by Back-propagating Curvature; derived in
    docs/background/derivations.md#curvature.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> squared = lambda outputs: jnp.sum(outputs**2, axis=-1)
      >>> ggn_diagonal(net, [{"w": jnp.ones((1, 1))}], jnp.array([[3.0]]), squared)
      [{'w': Array([[18.]], dtype=float32)}]
    """

    def of_outer(h, g, hg):
        # Σᵢ hᵢₐ² (Gᵢᵀ Hᵢ Gᵢ)𝒸𝒸
        return matmul(jnp.swapaxes(h**2, -1, -2), jnp.sum(g * hg, axis=0))

    return _by_leaf(
        of_outer, lambda v, hv: jnp.sum(v * hv, axis=(0, -2)), *columns("ggn_diagonal", net, params, x, loss_fn, key)
    )


def kronecker_factors(net: Network, params: Params, x: jax.Array, loss_fn: Callable, *, key: Any = _MISSING) -> Any:
    r"""Computes the diagonal blocks of the generalized Gauss-Newton matrix, with Kronecker factors for weights (K-FAC).

    The block for the weights of a layer is :math:`\sum_i h_i h_i^T ⊗ G_i^T H_i G_i`. It is approximated by the mean of
    the first factors and the sum of the second, which is exact for one example and for constant inputs.

    Args:
      net, params, x, loss_fn, key: the network, its parameters, inputs, the loss and a dropout key, as in
        `Network.example_gradients`.

    Returns:
      A pytree with the structure of `params`, with `Kronecker` for `w` and `Full` for the other leaves, in at least
      float32.

    Raises:
      ValueError, TypeError: for the same reasons as `Network.example_gradients`.

    Source: Martens and Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate Curvature; Botev et
    al. 2017, Practical Gauss-Newton Optimisation for Deep Learning; derived in
    docs/background/derivations.md#curvature.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> squared = lambda outputs: jnp.sum(outputs**2, axis=-1)
      >>> kronecker_factors(net, [{"w": jnp.ones((1, 1))}], jnp.array([[3.0]]), squared)[0]["w"].inputs
      Array([[9.]], dtype=float32)
    """

    def of_outer(h, g, hg):
        inputs = summed_over_examples("...bi,...bj->...ij", h, h) / max(h.shape[-2], 1)
        return Kronecker(inputs, second_moment(g, hg))

    return _by_leaf(
        of_outer, lambda v, hv: Full(second_moment(v, hv)), *columns("kronecker_factors", net, params, x, loss_fn, key)
    )


def columns(where: str, net: Network, params: Params, x: jax.Array, loss_fn: Callable, key) -> tuple[Any, Any]:
    """The factored derivatives of each output, with a leading axis of outputs, and their products with `H`."""
    outputs, pull, loss_hessian, _ = _linearized(where, net, params, x, loss_fn, key)
    jacobian, hessians = output_columns(outputs, pull), jax.vmap(loss_hessian)(_basis(outputs))

    def times_hessian(g):  # Σ_d H_bcd G_d for each example b
        return jnp.einsum("cbd,d...bo->c...bo", hessians.astype(g.dtype), g)

    return jacobian, jax.tree.map(
        lambda a: (
            Outer(a.inputs, times_hessian(a.cotangents)) if isinstance(a, Outer) else Rows(times_hessian(a.values))
        ),
        jacobian,
        is_leaf=is_factored,
    )


def output_columns(outputs: jax.Array, pull: Callable) -> Any:
    """The factored derivatives of each output: cotangents and rows are `[outputs, ..., batch, fan_out]`."""
    shapes = jax.eval_shape(pull, outputs)
    by_kind = {Outer: Outer(None, 0), Rows: Rows(0)}  # type: ignore[arg-type]  (all outputs share the inputs)
    axes = jax.tree.map(lambda a: by_kind[type(a)], shapes, is_leaf=is_factored)
    return jax.tree.map(upcast, jax.vmap(pull, out_axes=axes)(_basis(outputs)))


def _basis(outputs: jax.Array) -> jax.Array:
    """One-hot cotangents that select each output in turn, for all examples at once."""
    count = outputs.shape[-1]
    columns = jnp.broadcast_to(jnp.eye(count, dtype=outputs.dtype)[:, None, :], (count, *outputs.shape))
    return jax.vmap(lambda column: _layout.reshard_like(column, outputs))(columns)


def second_moment(g: jax.Array, hg: jax.Array) -> jax.Array:
    """`Σᵢ Gᵢᵀ Hᵢ Gᵢ`, `[..., width, width]`, from arrays `[outputs, ..., batch, width]`."""
    return summed_over_examples("c...bi,c...bj->...ij", g, hg)


def summed_over_examples(subscripts: str, *operands: jax.Array) -> jax.Array:
    """An einsum that sums over the examples; on an Explicit mesh its result is replicated."""
    sharding = _layout.explicit_sharding(*operands)
    replicated = sharding and NamedSharding(sharding.mesh, PartitionSpec())
    return jnp.einsum(subscripts, *operands, out_sharding=replicated)


def _linearized(
    where: str, net: Network, params, x, loss_fn: Callable, key
) -> tuple[jax.Array, Callable, Callable, jax.Array]:
    """The outputs, their factored backward pass, the map `tangents ↦ Hᵢ tangentsᵢ` for each example, and 0.

    In a compiled function, that 0 and the products are NaN if the losses mix examples.
    """
    if not isinstance(net, Network):
        raise TypeError(f"{where}: net must be a Network, as from fcfunc.mlp, got {type(net).__name__}")
    _arguments.function(where, loss_fn=loss_fn)
    outputs, pull = net.example_vjp(params, x, key=key)
    _, g = losses_and_cotangents(where, loss_fn, outputs)
    poison = jnp.where(jnp.any(jnp.isnan(g)), jnp.nan, 0).astype(g.dtype)
    _, second = jax.vjp(jax.grad(lambda outputs: jnp.sum(loss_fn(outputs))), outputs)
    return outputs, pull, lambda tangents: second(tangents)[0] + poison, poison


def _by_leaf(of_outer: Callable, of_rows: Callable, jacobian, by_hessian) -> Any:
    def of_leaf(a, b):
        return of_outer(a.inputs, a.cotangents, b.cotangents) if isinstance(a, Outer) else of_rows(a.values, b.values)

    return jax.tree.map(of_leaf, jacobian, by_hessian, is_leaf=is_factored)


def _check_direction(where: str, direction, params) -> None:
    if jax.tree.structure(direction) != jax.tree.structure(params):
        given = f"{jax.tree.structure(direction)!s:.150}"
        raise ValueError(f"{where}: direction must have the structure of params, got {given}")
    kinds = [[_arguments.describe(a) for a in jax.tree.leaves(tree)] for tree in (direction, params)]
    if kinds[0] != kinds[1]:
        wrong = next(pair for pair in zip(*kinds, strict=True) if pair[0] != pair[1])
        raise ValueError(f"{where}: a leaf of direction is {wrong[0]}, but in params it is {wrong[1]}")
