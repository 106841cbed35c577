"""Curvature, compared with the explicit Hessian and Jacobians of the same network in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fcfunc
from fcfunc import curvature, losses
from tests.test_per_example import NORMS, cross_entropy, made, networks


def close(got, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0))


def compiled(of, net, params, x, *args, **options):
    """Compiles `of` as one program, which takes less time than running its operations one by one."""
    return jax.jit(lambda params: of(net, params, x, *args, **options))(params)


def like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)


def explicit_ggn(net, params, x, loss_fn):
    """`Σᵢ Jᵢᵀ Hᵢ Jᵢ` for the flattened parameters, with `jax.jacfwd` of the plain network and `jax.hessian`."""
    plain = fcfunc.mlp(**{**vars(net), "ops": "reference"})
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def explicit(flat):
        outputs = plain.apply(unravel(flat), x)
        jacobian = jax.jacfwd(lambda flat: plain.apply(unravel(flat), x))(flat)  # [batch, outputs, params]
        of_all = jax.hessian(lambda outputs: jnp.sum(loss_fn(outputs)))(outputs)  # [batch, outputs, batch, outputs]
        return jnp.einsum("bcp,bcbd,bdq->pq", jacobian, of_all, jacobian)

    return explicit(flat)


def plain_cross_entropy(labels):
    return lambda z: jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]


@networks
def test_products_and_the_diagonal_are_those_of_the_explicit_matrices(x64, norm, residual, bias, activation):
    net = fcfunc.mlp([3, 5, 5, 4], norm=norm, residual=residual, use_bias=bias, activation=activation)
    plain = fcfunc.mlp(**{**vars(net), "ops": "reference"})
    params, x, labels = made(net)
    loss_fn, v = cross_entropy(labels), like(params, 1)
    flat, unravel = ravel_pytree(params)
    direction = ravel_pytree(v)[0]

    @jax.jit
    def found():
        ggn = curvature.ggn_vector_product(net, params, x, loss_fn, v)
        hessian = curvature.hessian_vector_product(net, params, x, loss_fn, v)
        return [ravel_pytree(a)[0] for a in (ggn, hessian, curvature.ggn_diagonal(net, params, x, loss_fn))]

    ggn, hessian, diagonal = found()
    explicit = explicit_ggn(net, params, x, plain_cross_entropy(labels))
    close(ggn, explicit @ direction)
    close(diagonal, jnp.diagonal(explicit))

    @jax.jit
    def expected(flat):
        gradient = jax.grad(lambda flat: jnp.sum(plain_cross_entropy(labels)(plain.apply(unravel(flat), x))))
        return jax.jvp(gradient, (flat,), (direction,))[1]

    close(hessian, expected(flat))


@pytest.mark.parametrize("norm", NORMS)
def test_kronecker_factors_are_the_means_and_sums_of_their_definition(x64, norm):
    net = fcfunc.mlp([3, 5, 5, 4], norm=norm, residual=True, activation="tanh")
    params, x, labels = made(net)
    found = compiled(curvature.kronecker_factors, net, params, x, cross_entropy(labels))
    explicit = explicit_ggn(net, params, x, plain_cross_entropy(labels))
    ends = np.cumsum([a.size for a in jax.tree.leaves(params)])
    blocks = [
        explicit[end - a.size : end, end - a.size : end] for end, a in zip(ends, jax.tree.leaves(params), strict=True)
    ]
    is_block = lambda a: isinstance(a, curvature.Kronecker | curvature.Full)
    for block, leaf, got in zip(blocks, jax.tree.leaves(params), jax.tree.leaves(found, is_leaf=is_block), strict=True):
        if isinstance(got, curvature.Full):
            close(got.matrix, block)
        else:  # the trace over the inputs of Σ h hᵀ ⊗ M is Σ |h|² M; for the factors it is the product of their traces
            assert got.inputs.shape == (leaf.shape[0],) * 2
            assert got.cotangents.shape == (leaf.shape[1],) * 2
    _, gradients = net.example_gradients(params, x, cross_entropy(labels))
    for layer, of in zip(found, gradients, strict=True):
        h = of["w"].inputs
        close(layer["w"].inputs, jnp.mean(h[:, :, None] * h[:, None, :], axis=0))
        close(layer["w"].cotangents, layer["b"].matrix)  # the bias depends on the cotangents only


def test_for_one_example_the_kronecker_product_is_the_block(x64):
    net = fcfunc.mlp([3, 5, 4], activation="gelu")
    params, x, labels = made(net, batch=1)
    found = compiled(curvature.kronecker_factors, net, params, x, cross_entropy(labels))
    explicit = explicit_ggn(net, params, x, plain_cross_entropy(labels))
    start = 0
    for layer in found:  # the leaves of a dict are flattened by name: b, w
        size, start = layer["w"].inputs.shape[0] * layer["w"].cotangents.shape[0], start + len(layer["b"].matrix)
        close(jnp.kron(*layer["w"]), explicit[start : start + size, start : start + size])
        start += size


@pytest.mark.parametrize("norm", NORMS)
def test_stacked_layers_have_the_curvature_of_separate_ones(x64, norm):
    net = fcfunc.mlp([3, 5, 5, 5, 4], norm=norm, residual=True)
    params, x, labels = made(net)
    stacked = fcfunc.stack(params)
    loss_fn, v = cross_entropy(labels), like(params, 1)
    for product in (curvature.ggn_vector_product, curvature.hessian_vector_product):
        expected = compiled(product, net, params, x, loss_fn, v)
        got = compiled(product, net, stacked, x, loss_fn, fcfunc.stack(v))
        jax.tree.map(close, got, fcfunc.stack(expected))
    expected = compiled(curvature.ggn_diagonal, net, params, x, loss_fn)
    jax.tree.map(close, compiled(curvature.ggn_diagonal, net, stacked, x, loss_fn), fcfunc.stack(expected))
    expected = compiled(curvature.kronecker_factors, net, params, x, loss_fn)
    got = compiled(curvature.kronecker_factors, net, stacked, x, loss_fn)
    jax.tree.map(close, got[1], jax.tree.map(lambda *a: jnp.stack(a), *expected[1:3]))


@pytest.mark.parametrize(
    ("of", "plain"),
    [
        (
            lambda y: (
                lambda z: losses.softmax_cross_entropy_with_integer_labels(z, y, label_smoothing=0.2, ignore_index=1)
            ),
            lambda y: (
                lambda z: (
                    (y != 1).astype(z.dtype)
                    * (
                        jax.nn.logsumexp(z, axis=-1)
                        - jnp.sum(z * (0.8 * jax.nn.one_hot(y, 4, dtype=z.dtype) + 0.05), axis=-1)
                    )
                )
            ),
        ),
        (
            lambda y: (
                lambda z: jnp.sum(losses.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(y, 4, dtype=z.dtype)), -1)
            ),
            lambda y: lambda z: jnp.sum(jax.nn.softplus(z) - z * jax.nn.one_hot(y, 4, dtype=z.dtype), -1),
        ),
        (
            lambda y: lambda z: jnp.sum(losses.squared_error(z, jax.nn.one_hot(y, 4, dtype=z.dtype)), -1),
            lambda y: lambda z: jnp.sum((z - jax.nn.one_hot(y, 4, dtype=z.dtype)) ** 2, -1),
        ),
        (lambda y: lambda z: jnp.prod(jnp.sin(z), -1), lambda y: lambda z: jnp.prod(jnp.sin(z), -1)),
    ],
    ids=["smoothed and ignored", "binary", "squared error", "not convex"],
)
def test_every_loss_has_the_curvature_of_its_formula(x64, of, plain):
    net = fcfunc.mlp([3, 5, 4], activation="silu", final_activation="tanh")
    params, x, labels = made(net)
    explicit = explicit_ggn(net, params, x, plain(labels))
    v = like(params, 1)
    close(
        ravel_pytree(compiled(curvature.ggn_vector_product, net, params, x, of(labels), v))[0],
        explicit @ ravel_pytree(v)[0],
    )
    close(ravel_pytree(compiled(curvature.ggn_diagonal, net, params, x, of(labels)))[0], jnp.diagonal(explicit))


@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_none_or_one_has_a_curvature(x64, batch):
    net = fcfunc.mlp([3, 5, 4])
    params, x, labels = made(net, batch=batch)
    explicit = explicit_ggn(net, params, x, plain_cross_entropy(labels)) if batch else jnp.zeros((44, 44))
    v = like(params, 1)
    product = compiled(curvature.ggn_vector_product, net, params, x, cross_entropy(labels), v)
    close(ravel_pytree(product)[0], explicit @ ravel_pytree(v)[0])
    factors = compiled(curvature.kronecker_factors, net, params, x, cross_entropy(labels))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(factors))


def test_a_nan_in_one_example_makes_the_sums_nan_and_dropout_draws_the_masks_of_apply(x64):
    net = fcfunc.mlp([3, 5, 4], dropout_rate=0.5)
    params, x, labels = made(net)
    key, v = jax.random.key(3), like(params, 1)
    flat, unravel = ravel_pytree(params)

    def loss(flat):
        return jnp.sum(cross_entropy(labels)(net.apply(unravel(flat), x, key=key)))

    expected = jax.vjp(jax.grad(loss), flat)[1](ravel_pytree(v)[0])[0]
    got = compiled(curvature.hessian_vector_product, net, params, x, cross_entropy(labels), v, key=key)
    close(ravel_pytree(got)[0], expected)
    spoiled = compiled(curvature.ggn_diagonal, net, params, x.at[2].set(jnp.nan), cross_entropy(labels), key=key)
    assert np.isnan(spoiled[0]["w"]).any()


def test_mixed_precision_gives_float32():
    net = fcfunc.mlp([3, 16, 4], compute_dtype="bfloat16")
    params = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((7, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 7))
    wide = fcfunc.mlp([3, 16, 4])
    for made_by in (curvature.ggn_diagonal, curvature.kronecker_factors):
        got, expected = (compiled(made_by, n, params, x, cross_entropy(labels)) for n in (net, wide))
        assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype("float32")}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.1), got, expected)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (lambda p: p[:1], "ggn_vector_product: direction must have the structure of params, got PyTreeDef"),
        (
            lambda p: jax.tree.map(lambda a: a[:1], p),
            r"ggn_vector_product: a leaf of direction is float32\[1\], but in params it is float32\[4\]",
        ),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(direction, message):
    net = fcfunc.mlp([3, 4, 2])
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        curvature.ggn_vector_product(net, params, jnp.ones((5, 3)), lambda z: z[:, 0], direction(params))


@pytest.mark.parametrize("of", [curvature.ggn_vector_product, curvature.hessian_vector_product])
def test_losses_that_mix_examples_and_batch_normalization_are_refused(of):
    net, batch_norm = fcfunc.mlp([3, 4, 2]), fcfunc.mlp([3, 4, 2], norm="batch_norm")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match="loss_fn mixes examples"):
        of(net, params, x, lambda z: jnp.sum(z, -1) - jnp.mean(z), params)
    params = batch_norm.init(jax.random.key(0))
    with pytest.raises(ValueError, match="batch normalization mixes examples"):
        of(batch_norm, params, x, lambda z: z[:, 0], params)


@pytest.mark.parametrize("of", [curvature.ggn_diagonal, curvature.kronecker_factors])
def test_losses_that_mix_examples_give_nan_in_a_compiled_function(of):
    net = fcfunc.mlp([3, 4, 2])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)
    found = compiled(of, net, net.init(jax.random.key(0)), x, lambda z: jnp.sum(z**2, -1) * jnp.mean(z))
    assert np.isnan(jax.tree.leaves(found)[0]).any()
