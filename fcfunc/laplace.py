"""Laplace approximations: a Gaussian posterior over the parameters of a trained network, and predictions with it.

The losses must be negative log-likelihoods, such as softmax cross-entropy, or `(y − f)² / (2 σ²)` for a regression with
noise of variance `σ²`. With a prior `N(0, 1/δ)` over each parameter and the generalized Gauss-Newton matrix `G` of the
summed losses, the posterior is `N(θ, (G + δ I)⁻¹)`. By default, the prior precision `δ` maximizes the marginal
likelihood.
"""

from __future__ import annotations  # short signatures in help()

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout, curvature
from fcfunc._rule import upcast
from fcfunc.curvature import Kronecker
from fcfunc.network import Network, Params
from fcfunc.per_example import Outer

__all__ = ["Posterior", "kronecker", "last_layer", "log_marginal_likelihood", "predict", "probabilities", "sample"]


class Eigen(NamedTuple):
    """The eigendecomposition of a positive semidefinite matrix, with the eigenvectors in columns."""

    values: jax.Array
    vectors: jax.Array


class Factors(NamedTuple):
    """A Kronecker product `inputs ⊗ cotangents`, as in `curvature.Kronecker`."""

    inputs: Eigen
    cotangents: Eigen


class Posterior(NamedTuple):
    """A Gaussian posterior over the parameters of a network.

    Attributes:
      params: the mean, which is the trained parameters.
      blocks: the eigendecompositions of the curvature, one entry per layer. The entry has a block for each leaf, or a
        single block for the whole layer from `last_layer`; it is None for a layer that is held fixed.
      prior_precision: the prior precision `δ`.
      loss: the sum of the losses at `params`.
    """

    params: Params
    blocks: list
    prior_precision: jax.Array
    loss: jax.Array


def last_layer(
    net: Network, params: Params, x: jax.Array, loss_fn: Callable, *, prior_precision: float | None = None
) -> Posterior:
    r"""Computes a Laplace approximation over the last layer, with the full covariance of its weights and bias.

    The other layers are held fixed. For a layer with `n` parameters, it computes the eigenvectors of an `[n, n]`
    matrix.

    Args:
      net: the network, evaluated without dropout. A `final_activation`, if there is one, is linearized.
      params: trained parameters.
      x: the training examples, `[batch, dims[0]]`.
      loss_fn: `loss_fn(outputs) -> losses`, which returns the negative log-likelihood of each example, `[batch]`.
      prior_precision: the prior precision `δ`, above 0; None maximizes the marginal likelihood.

    Returns:
      A `Posterior`.

    Raises:
      ValueError: `prior_precision` is not above 0; or it is None, and the loss has no curvature with respect to the
        outputs or the parameters are all 0 (inside a compiled function, `prior_precision` is NaN instead); or for the
        same reasons as `Network.example_gradients`.
      TypeError: for the same reasons as `Network.example_gradients`.

    Source: MacKay 1992, A Practical Bayesian Framework for Backpropagation Networks; Kristiadi et al. 2020, Being
    Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU Networks; derived in docs/background/derivations.md#laplace.

    Example:
      >>> net = fcfunc.mlp([1, 1])
      >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 1.0])
      >>> params = [{"w": jnp.ones((1, 1)), "b": jnp.zeros(1)}]
      >>> posterior = last_layer(net, params, x, lambda f: (f[:, 0] - y) ** 2 / 2, prior_precision=1.0)
      >>> predict(net, posterior, jnp.array([[0.0], [3.0]]))[1][:, 0, 0]  # 1/3 + x²/3
      Array([0.33333334, 3.3333333 ], dtype=float32)
    """
    where = "last_layer"
    _check_precision(where, prior_precision)
    jacobian, by_hessian = curvature.columns(where, net, params, x, loss_fn, None)
    inputs, g = _augmented(jacobian[-1])
    hg = by_hessian[-1]["w"].cotangents
    # Σ_b φ_bi φ_bj (Gᵀ H G)_bop, for one output p of the layer at a time to avoid an array of batch × n × fan_out
    moments = jnp.einsum("cbo,cbp->pbo", g, hg)
    blocks = jax.lax.map(lambda m: curvature.summed_over_examples("bi,bo,bj->ioj", inputs, m, inputs), moments)
    size = inputs.shape[-1] * g.shape[-1]
    block = _eigen(jnp.moveaxis(blocks, 0, -1).reshape(size, size))
    return _posterior(where, net, params, x, loss_fn, [*([None] * (len(params) - 1)), block], prior_precision)


def kronecker(
    net: Network, params: Params, x: jax.Array, loss_fn: Callable, *, prior_precision: float | None = None
) -> Posterior:
    r"""Computes a Laplace approximation over all parameters, with independent leaves and Kronecker-factored weights.

    Args:
      net, params, x, loss_fn, prior_precision: the network, its trained parameters, the training examples, the negative
        log-likelihood and the prior precision, as in `last_layer`.

    Returns:
      A `Posterior`.

    Raises:
      ValueError, TypeError: for the same reasons as `last_layer`.

    Source: Ritter et al. 2018, A Scalable Laplace Approximation for Neural Networks; Immer et al. 2021, Scalable
    Marginal Likelihood Estimation for Model Selection in Deep Learning; derived in
    docs/background/derivations.md#laplace.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 1.0])
      >>> params = [{"w": jnp.ones((1, 1))}]
      >>> posterior = kronecker(net, params, x, lambda f: (f[:, 0] - y) ** 2 / 2, prior_precision=1.0)
      >>> predict(net, posterior, jnp.array([[0.0], [3.0]]))[1][:, 0, 0]  # x²/3
      Array([0., 3.], dtype=float32)
    """
    _check_precision("kronecker", prior_precision)
    factors = curvature.kronecker_factors(net, params, x, loss_fn, key=None)
    is_block = lambda a: isinstance(a, Kronecker | curvature.Full)  # noqa: E731
    blocks = jax.tree.map(
        lambda a: Factors(*map(_eigen, a)) if isinstance(a, Kronecker) else _eigen(a.matrix),
        factors,
        is_leaf=is_block,
    )
    return _posterior("kronecker", net, params, x, loss_fn, blocks, prior_precision)


def log_marginal_likelihood(posterior: Posterior, prior_precision: float | jax.Array | None = None) -> jax.Array:
    r"""Computes the log evidence :math:`-\sum_i ℓ_i - \tfrac12 δ |θ|^2 + \tfrac12 \sum_k \log δ / (λ_k + δ)`.

    Args:
      posterior: a posterior from `last_layer` or `kronecker`. `θ` are the parameters that it covers, and `λ` the
        eigenvalues of the curvature.
      prior_precision: the prior precision `δ`, above 0; None uses that of the posterior.

    Returns:
      The log evidence, a scalar that is differentiable with respect to `prior_precision`.

    Raises:
      ValueError: `prior_precision` is not above 0.

    Source: MacKay 1992, A Practical Bayesian Framework for Backpropagation Networks; derived in
    docs/background/derivations.md#laplace.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 1.0])
      >>> params = [{"w": jnp.ones((1, 1))}]
      >>> posterior = kronecker(net, params, x, lambda f: (f[:, 0] - y) ** 2 / 2, prior_precision=1.0)
      >>> log_marginal_likelihood(posterior)  # −1/2 − log(3)/2
      Array(-1.0493062, dtype=float32)
    """
    where = "log_marginal_likelihood"
    _check_posterior(where, posterior)
    _check_precision(where, prior_precision)
    delta = posterior.prior_precision if prior_precision is None else prior_precision
    values, squared = _eigenvalues(posterior.blocks), _squared_norm(posterior)
    # log δ / (λ + δ) = −log(1 + λ / δ)
    return -posterior.loss - delta * squared / 2 - sum(jnp.sum(jnp.log1p(v / delta)) for v in values) / 2


def predict(net: Network, posterior: Posterior, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Predicts with the linearized network: the outputs and their covariance :math:`J (G + δ I)^{-1} J^T`.

    The covariance is that of the outputs; for the variance of a measurement, add the variance of its noise.

    Args:
      net: the network for which the posterior was computed.
      posterior: a posterior from `last_layer` or `kronecker`.
      x: inputs, `[batch, dims[0]]`.

    Returns:
      `(outputs, covariance)`, `[batch, dims[-1]]` and `[batch, dims[-1], dims[-1]]`.

    Raises:
      ValueError, TypeError: for the same reasons as `Network.example_gradients`.

    Source: Immer et al. 2021, Improving Predictions of Bayesian Neural Nets via Local Linearization; derived in
    docs/background/derivations.md#laplace.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 1.0])
      >>> params = [{"w": jnp.ones((1, 1))}]
      >>> posterior = kronecker(net, params, x, lambda f: (f[:, 0] - y) ** 2 / 2, prior_precision=1.0)
      >>> predict(net, posterior, jnp.array([[2.0]]))
      (Array([[2.]], dtype=float32), Array([[[1.3333334]]], dtype=float32))
    """
    _check_posterior("predict", posterior)
    outputs, pull = net.example_vjp(posterior.params, x, key=None)
    jacobian, delta, total = curvature.output_columns(outputs, pull), posterior.prior_precision, 0
    for block, layer in zip(posterior.blocks, jacobian, strict=True):
        if block is None:
            continue
        if isinstance(block, Eigen):
            inputs, g = _augmented(layer)
            total = total + _covariance(g[..., None, :] * inputs[None, :, :, None], block, delta)
            continue
        for name, leaf in layer.items():
            if isinstance(leaf, Outer):
                total = total + _kronecker_covariance(*leaf, block[name], delta)
            else:
                total = total + _covariance(leaf.values[..., None, :], block[name], delta)
    return outputs, jnp.asarray(total)


def probabilities(outputs: jax.Array, covariance: jax.Array) -> jax.Array:
    r"""Approximates the expected softmax probabilities for Gaussian logits with mean `m`.

    .. math:: p_c ∝ 1 / \sum_k \exp((m_k - m_c) / \sqrt{1 + π v_{ck} / 8})

    `v_{ck}` is the variance of the difference of logits `c` and `k`, so the result does not change if one number is
    added to all logits.

    Args:
      outputs: the mean logits `m`, `[..., classes]`.
      covariance: the covariance of the logits, `[..., classes, classes]`.

    Returns:
      The probabilities, `[..., classes]`.

    Raises:
      ValueError: the shapes do not match.
      TypeError: the arguments are not floating-point arrays.

    Source: MacKay 1992, The Evidence Framework Applied to Classification Networks, for two classes; applied here to
    each pair of classes and derived in docs/background/derivations.md#laplace.

    Example:
      >>> probabilities(jnp.array([2.0, 0.0]), jnp.diag(jnp.array([8.0, 8.0])))
      Array([0.6772335 , 0.32276645], dtype=float32)
    """
    where = "probabilities"
    _arguments.floating(where, outputs=outputs, covariance=covariance)
    shape = np.shape(outputs)
    if not shape or np.shape(covariance) != (*shape, shape[-1]):
        given = f"{list(shape)} and {list(np.shape(covariance))}"
        raise ValueError(
            f"{where}: expected outputs [..., classes] and covariance [..., classes, classes], got {given}"
        )
    own = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    # v_ck = Σ_cc + Σ_kk − 2 Σ_ck
    variance = jnp.maximum(own[..., :, None] + own[..., None, :] - 2 * covariance, 0)
    differences = outputs[..., None, :] - outputs[..., :, None]
    return jax.nn.softmax(-jax.nn.logsumexp(differences / jnp.sqrt(1 + jnp.pi / 8 * variance), axis=-1))


def sample(key: jax.Array, posterior: Posterior) -> Params:
    """Draws parameters from the posterior; use `jax.vmap` over keys to draw an ensemble.

    For predictions, use `predict`. The posterior belongs to the linearized network, and the network itself predicts
    worse with sampled parameters.

    Args:
      key: a random key.
      posterior: a posterior from `last_layer` or `kronecker`.

    Returns:
      Parameters with the structure, shapes and dtypes of `posterior.params`; layers that are held fixed are unchanged.

    Raises:
      TypeError: `key` is not a random key.

    Example:
      >>> net = fcfunc.mlp([1, 1], use_bias=False)
      >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 1.0])
      >>> params = [{"w": jnp.ones((1, 1))}]
      >>> posterior = kronecker(net, params, x, lambda f: (f[:, 0] - y) ** 2 / 2, prior_precision=1.0)
      >>> jax.tree.map(jnp.shape, sample(jax.random.key(0), posterior))
      [{'w': (1, 1)}]
    """
    _arguments.key("sample", key)
    _check_posterior("sample", posterior)
    delta, drawn = posterior.prior_precision, []
    for i, (block, p) in enumerate(zip(posterior.blocks, posterior.params, strict=True)):
        layer_key = jax.random.fold_in(key, i)
        if block is None:
            steps = jax.tree.map(jnp.zeros_like, p)
        elif isinstance(block, Eigen):
            flat = _drawn(layer_key, block, delta).reshape(-1, p["w"].shape[-1])
            steps = {"w": flat[: len(p["w"])]} | ({"b": flat[-1]} if "b" in p else {})
        else:
            keys = dict(zip(sorted(p), jax.random.split(layer_key, len(p)), strict=True))
            steps = {name: _drawn(keys[name], block[name], delta) for name in p}
        drawn.append(jax.tree.map(lambda a, step: a + step.astype(a.dtype), p, steps))
    return drawn


def _drawn(key, block, delta):
    """`(G + δ I)^(−1/2) z` with the symmetric square root, which does not depend on the choice of eigenvectors."""
    if isinstance(block, Eigen):
        z = jax.random.normal(key, block.values.shape, block.values.dtype)
        z = jnp.einsum("...ik,...i->...k", block.vectors, z) / jnp.sqrt(block.values + delta)
        return jnp.einsum("...ik,...k->...i", block.vectors, z)
    values, u, v = _products(block), block.inputs.vectors, block.cotangents.vectors
    z = jax.random.normal(key, values.shape, values.dtype)
    z = jnp.einsum("...ik,...io,...ol->...kl", u, z, v) / jnp.sqrt(values + delta)
    return jnp.einsum("...ik,...kl,...ol->...io", u, z, v)


def _covariance(jacobian, block: Eigen, delta):
    """`J (G + δ I)⁻¹ Jᵀ` for a full block, over the last two axes of `jacobian`, `[outputs, ..., batch, *, *]`."""
    j = jacobian.reshape(*jacobian.shape[:-2], -1)
    rotated = jnp.einsum("c...bi,...ik->c...bk", j, block.vectors)
    return _over_layers(jnp.einsum("c...bk,d...bk,...k->...bcd", rotated, rotated, 1 / (block.values + delta)))


def _kronecker_covariance(h, g, block: Factors, delta):
    """The same for the weights of a layer, as a sum over the eigenvectors of both factors."""
    h = jnp.matmul(h, block.inputs.vectors) ** 2
    g = jnp.einsum("c...bo,...ol->c...bl", g, block.cotangents.vectors)
    by_column = jnp.matmul(h, 1 / (_products(block) + delta))
    return _over_layers(jnp.einsum("c...bl,d...bl,...bl->...bcd", g, g, by_column))


def _over_layers(covariance):
    return jnp.sum(covariance, axis=0) if covariance.ndim > 3 else covariance


def _augmented(layer) -> tuple[jax.Array, jax.Array]:
    """The inputs of a layer, with a 1 appended for the bias, and the derivatives with respect to its affine output."""
    inputs, g = layer["w"]
    if "b" in layer:
        inputs = jnp.pad(inputs, [*[(0, 0)] * (inputs.ndim - 1), (0, 1)], constant_values=1)
    return inputs, g


def _eigen(matrix) -> Eigen:
    values, vectors = jnp.linalg.eigh(matrix)
    return Eigen(jnp.maximum(values, 0), vectors)


def _products(block: Factors) -> jax.Array:
    return block.inputs.values[..., :, None] * block.cotangents.values[..., None, :]


def _eigenvalues(blocks: list) -> list[jax.Array]:
    """The eigenvalues of all blocks."""
    is_block = lambda a: isinstance(a, Eigen | Factors)  # noqa: E731
    leaves = jax.tree.leaves(blocks, is_leaf=is_block)
    return [a.values if isinstance(a, Eigen) else _products(a) for a in leaves]


def _squared_norm(posterior: Posterior) -> Any:
    """`|θ|²` of the parameters that the posterior covers."""
    covered = [p for block, p in zip(posterior.blocks, posterior.params, strict=True) if block is not None]
    return sum(jnp.sum(upcast(a) ** 2) for a in jax.tree.leaves(covered))


def _posterior(where, net, params, x, loss_fn, blocks, prior_precision) -> Posterior:
    loss = jnp.sum(upcast(loss_fn(net.apply(params, x, key=None))))
    posterior = Posterior(params, blocks, jnp.ones((), loss.dtype), loss)
    delta = _best_precision(where, posterior) if prior_precision is None else prior_precision
    return posterior._replace(prior_precision=jnp.asarray(delta, loss.dtype))


def _check_posterior(where: str, posterior) -> None:
    if not isinstance(posterior, Posterior):
        given = type(posterior).__name__
        raise TypeError(f"{where}: posterior must come from last_layer or kronecker, got {given}")


def _check_precision(where: str, delta) -> None:
    if delta is None or _layout.is_tracer(delta):
        return
    if not _arguments.number(where, prior_precision=delta) > 0:
        raise ValueError(f"{where}: prior_precision must be above 0, got {delta}")


def _best_precision(where: str, posterior: Posterior) -> jax.Array:
    """The `δ` that maximizes the evidence, where `Σ λ/(λ + δ) = δ |θ|²`; it is at most the number of `λ` over `|θ|²`.

    The left side divided by `δ` falls monotonically from infinity to 0, so the solution is unique; it is found by
    bisection of `log δ`.
    """
    values, squared = _eigenvalues(posterior.blocks), _squared_norm(posterior)
    curved = jnp.max(jnp.stack([jnp.max(v, initial=0) for v in values])) > 0
    if not _layout.is_tracer(curved):
        if not curved:
            advice = "use a loss of logits, not of log-probabilities or a piecewise linear loss"
            raise ValueError(f"{where}: the loss has no curvature with respect to the network's outputs; {advice}")
        if not squared > 0:
            raise ValueError(f"{where}: the parameters are all 0, so no prior precision is optimal; pass one")
    tiny = jnp.finfo(squared.dtype).tiny
    high = jnp.log(sum(v.size for v in values) / jnp.maximum(squared, tiny))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        delta = jnp.exp(middle)
        above = sum(jnp.sum(v / (v + delta)) for v in values) > delta * squared
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 60, halve, (jnp.asarray(high - 60, high.dtype), high))
    return jnp.where(curved & (squared > 0), jnp.exp((low + high) / 2), jnp.nan)
