"""Laplace approximations, compared with Bayesian linear regression in closed form and explicit covariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fcfunc
from fcfunc import curvature, laplace, losses, per_example
from tests.test_curvature import close, explicit_ggn, plain_cross_entropy
from tests.test_per_example import NORMS, cross_entropy, made


@pytest.fixture
def linear(x64):
    """Ten examples of a linear regression with noise of variance 0.25, and the least-squares fit with a weak prior."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((10, 3)))
    y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.3 + 0.5 * rng.standard_normal(10)
    phi = jnp.concatenate([x, jnp.ones((10, 1))], axis=1)
    return x, y, phi


def posterior_of(of, net, params, x, loss_fn, **options):
    """Compiles `of` as one program, which takes less time than running its operations one by one."""
    return jax.jit(lambda params: of(net, params, x, loss_fn, **options))(params)


def predicted(net, posterior, x):
    return jax.jit(lambda posterior: laplace.predict(net, posterior, x))(posterior)


def half_squares(y, variance=0.25):
    return lambda f: (f[:, 0] - y) ** 2 / (2 * variance)


def fitted(phi, y, delta):
    theta = jnp.linalg.solve(phi.T @ phi / 0.25 + delta * jnp.eye(4), phi.T @ y / 0.25)
    return [{"w": theta[:3, None], "b": theta[3:]}]


def test_the_last_layer_of_a_linear_model_is_bayesian_linear_regression(linear):
    x, y, phi = linear
    net, delta = fcfunc.mlp([3, 1]), 0.7
    params = fitted(phi, y, delta)
    posterior = posterior_of(laplace.last_layer, net, params, x, half_squares(y), prior_precision=delta)
    new = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)))
    outputs, covariance = predicted(net, posterior, new)
    at = jnp.concatenate([new, jnp.ones((5, 1))], axis=1)
    sigma = jnp.linalg.inv(phi.T @ phi / 0.25 + delta * jnp.eye(4))
    close(outputs[:, 0], at @ ravel_theta(params))
    close(covariance[:, 0, 0], jnp.einsum("bi,ij,bj->b", at, sigma, at))


def ravel_theta(params):
    return jnp.concatenate([params[0]["w"][:, 0], params[0]["b"]])


@pytest.mark.parametrize("delta", [0.1, 0.7, 20.0])
def test_the_evidence_of_a_linear_model_is_that_of_the_gaussian_of_its_measurements(linear, delta):
    x, y, phi = linear
    posterior = posterior_of(
        laplace.last_layer, fcfunc.mlp([3, 1]), fitted(phi, y, delta), x, half_squares(y), prior_precision=delta
    )
    covariance = 0.25 * jnp.eye(10) + phi @ phi.T / delta  # of y, with the parameters integrated out
    expected = jax.scipy.stats.multivariate_normal.logpdf(y, jnp.zeros(10), covariance)
    left_out = -10 / 2 * jnp.log(2 * jnp.pi * 0.25)  # the constant of the likelihood, which the losses omit
    close(laplace.log_marginal_likelihood(posterior) + left_out, expected)


@pytest.mark.parametrize("of", [laplace.last_layer, laplace.kronecker])
def test_the_prior_precision_has_the_largest_evidence(x64, of):
    net = fcfunc.mlp([3, 5, 4], norm="layer_norm")
    params, x, labels = made(net, batch=40)
    posterior = posterior_of(of, net, params, x, cross_entropy(labels))
    slope = jax.grad(lambda log: laplace.log_marginal_likelihood(posterior, jnp.exp(log)))
    best = jnp.log(posterior.prior_precision)
    np.testing.assert_allclose(slope(best), 0, atol=1e-9)
    assert slope(best - 1) > 0.01
    assert slope(best + 1) < -0.01


def explicit_jacobian(net, params, x):
    flat, unravel = ravel_pytree(params)
    plain = fcfunc.mlp(**{**vars(net), "ops": "reference"})
    return jax.jit(jax.jacfwd(lambda flat: plain.apply(unravel(flat), x)))(flat)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("final", [None, "tanh"])
def test_the_last_layer_has_the_covariance_of_its_explicit_block(x64, bias, final):
    net = fcfunc.mlp([3, 5, 4], use_bias=bias, final_activation=final, activation="gelu")
    params, x, labels = made(net)
    posterior = posterior_of(laplace.last_layer, net, params, x, cross_entropy(labels), prior_precision=2.0)
    new = jnp.asarray(np.random.default_rng(1).standard_normal((6, 3)))
    count = sum(a.size for a in jax.tree.leaves(params[-1]))
    block = explicit_ggn(net, params, x, plain_cross_entropy(labels))[-count:, -count:]
    jacobian = explicit_jacobian(net, params, new)[..., -count:]
    expected = jnp.einsum("bcp,pq,bdq->bcd", jacobian, jnp.linalg.inv(block + 2 * jnp.eye(count)), jacobian)
    outputs, covariance = predicted(net, posterior, new)
    close(outputs, net.apply(params, new))
    close(covariance, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_kronecker_has_the_covariance_of_its_explicit_blocks(x64, norm):
    net = fcfunc.mlp([3, 5, 5, 4], norm=norm, activation="tanh")
    params, x, labels = made(net)
    posterior = posterior_of(laplace.kronecker, net, params, x, cross_entropy(labels), prior_precision=2.0)
    new = jnp.asarray(np.random.default_rng(1).standard_normal((6, 3)))
    is_block = lambda a: isinstance(a, curvature.Kronecker | curvature.Full)
    factors = jax.jit(lambda params: curvature.kronecker_factors(net, params, x, cross_entropy(labels)))(params)
    blocks = [
        jnp.kron(*a) if isinstance(a, curvature.Kronecker) else a.matrix
        for a in jax.tree.leaves(factors, is_leaf=is_block)
    ]
    precision = jax.scipy.linalg.block_diag(*blocks)
    jacobian = explicit_jacobian(net, params, new)
    sigma = jnp.linalg.inv(precision + 2 * jnp.eye(len(precision)))
    close(predicted(net, posterior, new)[1], jnp.einsum("bcp,pq,bdq->bcd", jacobian, sigma, jacobian))
    evidence = -jnp.sum(cross_entropy(labels)(net.apply(params, x))) - ravel_pytree(params)[0] @ ravel_pytree(params)[0]
    evidence += 0.5 * (len(precision) * jnp.log(2.0) - jnp.linalg.slogdet(precision + 2 * jnp.eye(len(precision)))[1])
    close(laplace.log_marginal_likelihood(posterior), evidence)


def test_stacked_layers_have_the_posterior_of_separate_ones(x64):
    net = fcfunc.mlp([3, 5, 5, 5, 4], norm="rms_norm", residual=True)
    params, x, labels = made(net)
    posteriors = [
        posterior_of(laplace.kronecker, net, p, x, cross_entropy(labels)) for p in (params, fcfunc.stack(params))
    ]
    close(posteriors[1].prior_precision, posteriors[0].prior_precision)
    close(predicted(net, posteriors[1], 2 * x)[1], predicted(net, posteriors[0], 2 * x)[1])


@pytest.mark.parametrize("of", [laplace.last_layer, laplace.kronecker])
def test_samples_have_the_covariance_of_the_posterior(x64, of):
    net = fcfunc.mlp([2, 3, 2], activation="tanh")
    params, x, labels = made(net)
    posterior = posterior_of(
        of, net, params, x, cross_entropy(labels), prior_precision=1e4
    )  # so narrow that the network is nearly linear in it
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(laplace.sample, in_axes=(0, None)))(keys, posterior)
    new = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2)))
    outputs = jax.jit(jax.vmap(net.apply, in_axes=(0, None)))(drawn, new)[:, 0]
    covariance = predicted(net, posterior, new)[1][0]
    # The relative standard error of a variance estimated from n samples is sqrt(2 / n), here 1%.
    np.testing.assert_allclose(jnp.cov(outputs.T), covariance, rtol=0.06, atol=0.03 * float(jnp.max(covariance)))


def test_samples_of_the_last_layer_leave_the_others_as_they_are(x64):
    net = fcfunc.mlp([2, 3, 2])
    params, x, labels = made(net)
    drawn = laplace.sample(jax.random.key(0), laplace.last_layer(net, params, x, cross_entropy(labels)))
    jax.tree.map(np.testing.assert_array_equal, drawn[0], params[0])
    assert not np.array_equal(drawn[1]["w"], params[1]["w"])


def test_probabilities_are_between_the_softmax_and_one_half(x64):
    logits = jnp.array([[3.0, 0.0]])
    for variance, expected in ((0.0, jax.nn.softmax(logits)[0, 0]), (1e9, 0.5)):
        got = laplace.probabilities(logits, variance * jnp.eye(2)[None])
        np.testing.assert_allclose(got[0, 0], expected, atol=1e-4)


def test_no_data_leave_the_prior(x64):
    net = fcfunc.mlp([3, 4, 2])
    params, x, labels = made(net, batch=0)
    posterior = posterior_of(laplace.last_layer, net, params, x, cross_entropy(labels), prior_precision=4.0)
    h = net.features(params, jnp.ones((1, 3)))
    close(predicted(net, posterior, jnp.ones((1, 3)))[1][0], (jnp.sum(h**2) + 1) / 4 * jnp.eye(2))


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan")])
def test_a_prior_precision_that_is_not_above_zero_is_refused(delta):
    net = fcfunc.mlp([3, 2])
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match="kronecker: prior_precision must be above 0"):
        laplace.kronecker(net, params, jnp.ones((5, 3)), lambda f: f[:, 0] ** 2, prior_precision=delta)


def test_the_posterior_is_made_inside_a_compiled_function(x64):
    net = fcfunc.mlp([3, 5, 4])
    params, x, labels = made(net)
    of = lambda params: laplace.predict(net, laplace.kronecker(net, params, x, cross_entropy(labels)), x)[1]
    close(jax.jit(of)(params), of(params))


def test_probabilities_do_not_depend_on_what_is_added_to_all_logits():
    logits, covariance = jnp.array([20.0, 20.0, 18.0]), jnp.diag(jnp.array([8.0, 0.0, 1.0]))
    got = laplace.probabilities(logits, covariance)
    np.testing.assert_allclose(got, laplace.probabilities(logits - 20, covariance), rtol=1e-5)
    together = laplace.probabilities(logits, 8 * jnp.ones((3, 3)))  # the differences of the logits have no variance
    np.testing.assert_allclose(together, jax.nn.softmax(logits), rtol=1e-5)


def test_for_two_classes_probabilities_are_the_expected_sigmoid():
    mean, covariance = jnp.array([1.5, -0.5]), jnp.array([[3.0, 0.5], [0.5, 1.0]])
    z = np.random.default_rng(0).multivariate_normal(mean, covariance, 200_000)
    expected = np.mean(1 / (1 + np.exp(z[:, 1] - z[:, 0])))
    np.testing.assert_allclose(laplace.probabilities(mean, covariance)[0], expected, atol=0.01)


@pytest.mark.parametrize(
    ("net", "loss_fn"),
    [
        (fcfunc.mlp([3, 4, 2], final_activation="log_softmax"), lambda outputs: -outputs[:, 0]),
        (fcfunc.mlp([3, 4, 2]), lambda outputs: losses.multiclass_svm(outputs, jnp.zeros(7, jnp.int32))),
    ],
)
def test_a_loss_without_curvature_is_an_error_and_nan_when_compiled(net, loss_fn):
    params, x = net.init(jax.random.key(0)), jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)), jnp.float32)
    with pytest.raises(ValueError, match="kronecker: the loss has no curvature with respect to the network's outputs"):
        laplace.kronecker(net, params, x, loss_fn)
    assert jnp.isnan(posterior_of(laplace.kronecker, net, params, x, loss_fn).prior_precision)


def test_parameters_of_0_have_no_best_precision():
    net, x = fcfunc.mlp([3, 2]), jnp.ones((7, 3))
    params = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="last_layer: the parameters are all 0"):
        laplace.last_layer(net, params, x, lambda outputs: jnp.sum(outputs**2, axis=-1))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_curvature_and_posteriors_are_those_of_one_device(kind):
    net = fcfunc.mlp([6, 8, 8, 4], norm="layer_norm", activation="tanh")
    params, rng = net.init(jax.random.key(0)), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
    labels, v = jnp.asarray(rng.integers(0, 4, 8)), jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def found(params, x, labels, v):
        of = net, params, x, cross_entropy(labels)
        posteriors = laplace.last_layer(*of), laplace.kronecker(*of)
        return (
            curvature.hessian_vector_product(*of, v),
            curvature.ggn_vector_product(*of, v),
            curvature.ggn_diagonal(*of),
            curvature.kronecker_factors(*of),
            per_example.along(net.example_gradients(params, x, cross_entropy(labels))[1], v),
            [laplace.predict(net, posterior, x) for posterior in posteriors],
            [laplace.log_marginal_likelihood(posterior) for posterior in posteriors],
            [laplace.sample(jax.random.key(1), posterior) for posterior in posteriors],
        )

    expected = found(params, x, labels, v)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        columns = jax.tree.map(lambda a: NamedSharding(mesh, PartitionSpec(*[None] * (a.ndim - 1), "data")), params)
        rows = jax.device_put((x, labels), NamedSharding(mesh, PartitionSpec("data")))
        got = found(jax.device_put(params, columns), *rows, jax.device_put(v, columns))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_samples_do_not_depend_on_the_choice_of_eigenvectors(x64):
    net = fcfunc.mlp([3, 4, 2], activation="tanh")
    params, x, labels = made(net)
    posterior = posterior_of(laplace.kronecker, net, params, x, cross_entropy(labels))
    turned = jax.tree.map(
        lambda a: a._replace(vectors=-a.vectors), posterior.blocks, is_leaf=lambda a: isinstance(a, laplace.Eigen)
    )
    one, other = (laplace.sample(jax.random.key(0), posterior._replace(blocks=b)) for b in (posterior.blocks, turned))
    jax.tree.map(close, one, other)
