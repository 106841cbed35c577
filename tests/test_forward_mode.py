"""Forward mode works for the reference but not for hand-written rules; second derivatives work for both."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import fcfunc
from fcfunc import reference
from fcfunc.network import ACTIVATIONS
from tests.rules import slow

X = jax.random.normal(jax.random.key(0), (3, 4))
LABELS = jnp.array([0, 1, 1])


def network(activation="tanh", key=None, **options):
    net = fcfunc.mlp([4, 5, 5, 2], activation=activation, ops=reference, **options)
    params = net.init(jax.random.key(1))
    return lambda x: net.apply(params, x, key=key)


def batch_normalized(x):
    net = fcfunc.mlp([4, 5, 2], activation="tanh", norm="batch_norm", ops=reference)
    params = net.init(jax.random.key(1))
    return net.apply_batch_norm(params, net.init_batch_norm_state(params), x, training=True)[0]


def large_output(x):
    net = fcfunc.mlp([4, 5, 5, 2], activation="tanh", ops=reference)
    params = net.init(jax.random.key(1))
    return reference.linear_softmax_cross_entropy(net.features(params, x), **params[-1], labels=LABELS)


PLAIN = {name: network(name) for name in ACTIVATIONS} | {
    "layer_norm": network(norm="layer_norm"),
    "rms_norm": network(norm="rms_norm"),
    "batch_norm": batch_normalized,
    "dropout": network(dropout_rate=0.3, key=jax.random.key(2)),
    "residual": network(residual=True),
    "large output": large_output,
    "cross-entropy": lambda x: reference.softmax_cross_entropy_with_integer_labels(
        x, LABELS, where=jnp.array([True, False, True]), label_smoothing=0.1
    ),
    "cross-entropy with a distribution": lambda x: reference.softmax_cross_entropy(x, jax.nn.softmax(X)),
    "binary cross-entropy": lambda x: reference.sigmoid_binary_cross_entropy(x, jax.nn.softmax(X)),
    "squared error": lambda x: reference.squared_error(x, jnp.ones_like(x)),
    "svm": lambda x: reference.multiclass_svm(x, LABELS),
    "likelihood": lambda x: reference.negative_log_likelihood(jnp.exp(x), LABELS),
}


SOME = ("gelu",)


@pytest.mark.parametrize("fun", [PLAIN[name] if name in SOME else slow(PLAIN[name]) for name in PLAIN], ids=PLAIN)
def test_the_reference_has_jvp_jacfwd_linearize_and_jet(fun):
    v = jax.random.normal(jax.random.key(3), X.shape)
    out, tangent = jax.jvp(fun, (X,), (v,))
    linear_out, linear = jax.linearize(fun, X)
    chex.assert_trees_all_close((linear_out, linear(v)), (out, tangent), rtol=1e-4, atol=1e-5)
    jacobian = jax.jacfwd(fun)(X)
    np.testing.assert_allclose(jnp.tensordot(jacobian, v, 2), tangent, rtol=1e-3, atol=1e-4)
    zeros = jnp.zeros_like(X)
    _, (first, second) = jet.jet(fun, (X,), ((v, zeros),))
    np.testing.assert_allclose(first, tangent, rtol=1e-4, atol=1e-5)
    _, curvature = jax.jvp(lambda x: jax.jvp(fun, (x,), (v,))[1], (X,), (v,))
    np.testing.assert_allclose(second, curvature, rtol=1e-3, atol=1e-3)


def test_jet_knows_no_scan_and_takes_the_unstacked_network():
    net = fcfunc.mlp([4, 5, 5, 5, 2], activation="tanh", ops=reference)
    params = fcfunc.stack(net.init(jax.random.key(1)))
    _, (first,) = jet.jet(lambda x: net.apply(fcfunc.unstack(params), x), (X,), ((jnp.ones_like(X),),))
    _, tangent = jax.jvp(lambda x: net.apply(params, x), (X,), (jnp.ones_like(X),))
    np.testing.assert_allclose(first, tangent, rtol=1e-4, atol=1e-5)


def test_a_rule_says_that_it_has_no_forward_mode():
    params = fcfunc.init(jax.random.key(1), [4, 5, 2])
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff .* to a custom_vjp function"):
        jax.jvp(lambda x: fcfunc.apply(params, x), (X,), (X,))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
def test_second_derivatives_of_a_whole_network_are_those_of_its_reference(norm, x64):
    def loss_of(ops):
        net = fcfunc.mlp([3, 4, 4, 4, 2], activation="gelu", norm=norm, residual=True, ops=ops)
        return net, lambda params: jnp.sum(net.apply(params, x) ** 2)

    (net, ours), (_, theirs) = loss_of(fcfunc.ops), loss_of(reference)
    params = fcfunc.stack(net.init(jax.random.key(1), param_dtype=jnp.float64))
    x = jax.random.normal(jax.random.key(0), (3, 3), jnp.float64)
    for second in (
        lambda f: jax.jvp(jax.grad(f), (params,), (params,))[1],
        lambda f: jax.grad(lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(f)(p))))(params),
    ):
        chex.assert_trees_all_close(second(ours), second(theirs), rtol=1e-9, atol=1e-9)
