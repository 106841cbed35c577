"""Exported networks, run by other programs."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

import fcfunc
from fcfunc import data, export
from tests.helpers import drawn_network, predicted
from tests.rules import slow

READER = """
import sys
sys.modules["fcfunc"] = None
import jax, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for n in (1, 7):
    x = np.load(sys.argv[2])[:n]
    np.testing.assert_allclose(exported.call(x), np.load(sys.argv[3])[:n], rtol=1e-5, atol=1e-6)
print("same")
"""


def by_onnx(path, x) -> Any:
    return onnxruntime.InferenceSession(path).run(["y"], {"x": x})[0]


def by_stablehlo(path, x):
    return jax.export.deserialize(bytearray(path.read_bytes())).call(x)


@pytest.mark.parametrize("seed", [seed if seed < 20 else slow(seed) for seed in range(100)])
def test_a_drawn_network_computes_the_same_elsewhere(seed, tmp_path):
    net, params, state, x = drawn_network(np.random.default_rng(seed), residual=bool(seed % 2))
    export.onnx(tmp_path / "net.onnx", net, params, state=state)
    outputs = predicted(net, params, state, x)
    np.testing.assert_allclose(by_onnx(tmp_path / "net.onnx", x), outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_onnx(tmp_path / "net.onnx", x[:1]), outputs[:1], rtol=1e-5, atol=1e-5)
    if seed < 20:
        export.stablehlo(tmp_path / "net.stablehlo", net, params, state=state)
        np.testing.assert_allclose(by_stablehlo(tmp_path / "net.stablehlo", x), outputs, rtol=1e-5, atol=1e-6)


def test_a_process_without_fcfunc_reads_stablehlo_and_takes_any_batch(tmp_path):
    net = fcfunc.mlp([4, 8, 8, 3], activation="gelu", norm="layer_norm", residual=True, dropout_rate=0.5)
    params = net.init(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    export.stablehlo(tmp_path / "net", net, fcfunc.stack(params))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", net.apply(params, x, key=None))
    command = [sys.executable, "-c", READER, *(str(tmp_path / name) for name in ("net", "x.npy", "y.npy"))]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "same\n"


@pytest.mark.parametrize(("write", "read"), [(export.onnx, by_onnx), (export.stablehlo, by_stablehlo)])
def test_standardization_and_softmax_are_part_of_the_file(write, read, tmp_path):
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(1990, 2020, 50), rng.normal(0, 1e-3, 50), rng.normal(1e6, 1.0, 50)], axis=1)
    x = x.astype(np.float32)
    scaled, net = data.standardizer(x), fcfunc.mlp([3, 8, 4])
    params = net.init(jax.random.key(0))
    write(tmp_path / "net", net, params, standardizer=scaled, final_activation="softmax")
    expected = jax.nn.softmax(net.apply(params, scaled(x)))
    np.testing.assert_allclose(read(tmp_path / "net", x), expected, rtol=1e-5, atol=1e-6)
    one_by_one = np.concatenate([read(tmp_path / "net", row[None]) for row in x[:5]])  # a different XLA program
    np.testing.assert_allclose(one_by_one, expected[:5], rtol=1e-5, atol=1e-6)


def test_stacked_layers_and_running_statistics_are_unstacked(tmp_path):
    net = fcfunc.mlp([3, 5, 5, 5, 2], norm="batch_norm", activation="silu")
    params = fcfunc.stack(net.init(jax.random.key(0)))
    state, x = net.init_batch_norm_state(params), np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32)
    _, state = net.apply_batch_norm(params, state, x, training=True)
    export.onnx(tmp_path / "net.onnx", net, params, state=state)
    np.testing.assert_allclose(
        by_onnx(tmp_path / "net.onnx", x), predicted(net, params, state, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("write", [export.onnx, export.stablehlo])
def test_what_does_not_fit_is_refused_and_nothing_is_written(write, tmp_path):
    net = fcfunc.mlp([3, 4, 2], norm="batch_norm")
    params = net.init(jax.random.key(0))
    with pytest.raises(ValueError, match="needs its state, 1 entries"):
        write(tmp_path / "net", net, params)
    plain, state = fcfunc.mlp([3, 4, 2]), net.init_batch_norm_state(params)
    with pytest.raises(ValueError, match="expected the leaves"):
        write(tmp_path / "net", plain, params, state=state)
    with pytest.raises(ValueError, match="standardizer must have 3 features, got"):
        write(tmp_path / "net", net, params, state=state, standardizer=data.standardizer(np.ones((5, 2))))
    with pytest.raises(ValueError, match="unknown activation 'argmax'"):
        write(tmp_path / "net", net, params, state=state, final_activation="argmax")
    with pytest.raises(TypeError, match="net must be a Network"):
        write(tmp_path / "net", None, params)
    assert not [*tmp_path.iterdir()]


def test_a_custom_activation_is_in_stablehlo_and_refused_by_onnx(tmp_path):
    net = fcfunc.mlp([3, 4, 2], activation=jnp.sin)
    params = net.init(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    export.stablehlo(tmp_path / "net", net, params)
    np.testing.assert_allclose(by_stablehlo(tmp_path / "net", x), net.apply(params, x), rtol=1e-6)
    with pytest.raises(ValueError, match="is a function, which ONNX cannot represent"):
        export.onnx(tmp_path / "net.onnx", net, params)


def test_extreme_inputs_give_what_the_network_gives(tmp_path):
    x = np.array([[0.0], [1e4], [-1e4], [1e-30], [88.0], [-104.0]], np.float32)
    for activation in ("softplus", "silu", "gelu", "gelu_exact", "sigmoid", "tanh", ("elu", 0.5)):
        net = fcfunc.mlp([1, 1], final_activation=activation)
        params = [{"w": jnp.ones((1, 1)), "b": jnp.zeros(1)}]
        export.onnx(tmp_path / "net.onnx", net, params)
        np.testing.assert_allclose(by_onnx(tmp_path / "net.onnx", x), net.apply(params, x), rtol=1e-5, atol=1e-6)


def test_a_missing_onnx_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    net = fcfunc.mlp([3, 2])
    with pytest.raises(ImportError, match="onnx is not installed; pip install onnx"):
        export.onnx(tmp_path / "net.onnx", net, net.init(jax.random.key(0)))
