"""Networks inside other JAX libraries, as listed in docs/guides/importing-and-exporting.md."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import fcfunc
from fcfunc import curvature, losses, stream

pytestmark = pytest.mark.filterwarnings("default")  # dependencies of these libraries emit warnings

NET = fcfunc.mlp([4, 8, 3], activation="tanh", norm="layer_norm")


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def problem():
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    return NET.init(jax.random.key(0)), jnp.asarray(x)


def test_a_grain_data_set_is_a_stream():
    grain = pytest.importorskip("grain")

    class Source:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"x": np.full(2, i, np.float32)}

    doubled = grain.MapDataset.source(Source()).map(lambda record: {"x": 2 * record["x"]})
    found = stream.from_source(doubled).read(3, 5)
    np.testing.assert_array_equal(found["x"], [[6, 6], [8, 8]])


def test_jax_export_serializes_a_gradient():
    params, x = problem()
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(NET.apply(params, x) ** 2)))
    exported = jax.export.deserialize(jax.export.export(gradient)(params, x).serialize())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), exported.call(params, x), gradient(params, x)
    )


@pytest.mark.parametrize("ops", ["ops", "reference"])
def test_jax2onnx_converts_a_network(ops):
    to_onnx = pytest.importorskip("jax2onnx").to_onnx
    import onnxruntime

    net, (params, x) = dataclasses.replace(NET, ops=ops), problem()
    session = onnxruntime.InferenceSession(
        to_onnx(lambda x: net.apply(params, x), inputs=[("B", 4)]).SerializeToString()
    )
    (outputs,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_allclose(outputs, net.apply(params, x), rtol=1e-4, atol=1e-5)


def test_laplax_multiplies_with_the_curvature_of_a_network_in_plain_jax():
    create = pytest.importorskip("laplax.curv.ggn").create_ggn_mv_without_data
    params, x = problem()
    labels, v = jnp.arange(6) % 3, jax.tree.map(jnp.ones_like, params)
    plain = dataclasses.replace(NET, ops="reference")  # laplax uses forward mode
    product = create(lambda input, params: plain.apply(params, input), params, "cross_entropy", 1.0)
    theirs = product(v, {"input": x, "target": labels})

    def loss_fn(outputs):
        return losses.softmax_cross_entropy_with_integer_labels(outputs, labels)

    ours = curvature.ggn_vector_product(NET, params, x, loss_fn, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), theirs, ours)


def test_a_network_is_a_part_of_a_flax_module():
    linen = pytest.importorskip("flax.linen")

    class Doubled(linen.Module):
        net: fcfunc.Network

        @linen.compact
        def __call__(self, x):
            return 2 * self.net.apply(self.param("net", self.net.init), x)

    _, x = problem()
    module = Doubled(NET)
    variables = module.init(jax.random.key(1), x)
    gradient = jax.grad(lambda variables: jnp.sum(module.apply(variables, x) ** 2))(variables)  # type: ignore[arg-type]
    expected = jax.grad(lambda params: jnp.sum((2 * NET.apply(params, x)) ** 2))(variables["params"]["net"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient["params"]["net"], expected)


def test_a_network_is_a_part_of_an_equinox_module():
    eqx = pytest.importorskip("equinox")

    class Doubled(eqx.Module):
        params: list
        net: fcfunc.Network = eqx.field(static=True)

        def __call__(self, x):
            return 2 * self.net.apply(self.params, x)

    params, x = problem()
    gradient = eqx.filter_jit(eqx.filter_grad(lambda module: jnp.sum(module(x) ** 2)))(Doubled(params, NET))
    expected = jax.grad(lambda params: jnp.sum((2 * NET.apply(params, x)) ** 2))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradient.params, expected)


def test_blackjax_samples_the_parameters_of_a_network():
    blackjax = pytest.importorskip("blackjax")
    net = fcfunc.mlp([1, 4, 1], activation="tanh")
    x = jnp.linspace(-2, 2, 30)[:, None]

    def log_density(params):
        prior = sum(jnp.sum(a**2) for a in jax.tree.leaves(params))
        return -0.5 * prior - jnp.sum(losses.squared_error(net.apply(params, x), jnp.sin(x))) / (2 * 0.1**2)

    params = net.init(jax.random.key(0))
    warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
    (state, parameters), _ = warmup.run(jax.random.key(1), params, 200)
    step = blackjax.nuts(log_density, **parameters).step
    _, samples = jax.lax.scan(lambda s, key: (step(key, s)[0],) * 2, state, jax.random.split(jax.random.key(2), 100))
    mean = jnp.mean(jax.vmap(lambda params: net.apply(params, x))(samples.position), axis=0)
    assert float(jnp.max(jnp.abs(mean - jnp.sin(x)))) < 0.2
