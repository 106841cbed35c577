"""Exports a trained network to a file that runs without fcfunc: StableHLO for JAX runtimes, ONNX for others.

The file computes predictions for batches of any size. Parameters and running statistics are constants in it, dropout is
omitted, and inputs are standardized if a `Standardizer` is given.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _files
from fcfunc.network import Network, unstack, unstacked_state

__all__ = ["onnx", "stablehlo"]

OPSET = 20
"""The ONNX operator set, the first one that has GELU."""

OPERATORS = {
    "elu": "Elu", "gelu": "Gelu", "gelu_exact": "Gelu", "leaky_relu": "LeakyRelu", "log_softmax": "LogSoftmax",
    "relu": "Relu", "sigmoid": "Sigmoid", "softmax": "Softmax", "softplus": "Softplus", "tanh": "Tanh",
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "elu": {"alpha": 1.0}, "gelu": {"approximate": "tanh"}, "leaky_relu": {"alpha": 0.01},
    "log_softmax": {"axis": -1}, "softmax": {"axis": -1},
}  # fmt: skip
"""The ONNX operators of the activations and their attributes; SiLU is a product with a sigmoid."""


def stablehlo(
    path: str | os.PathLike,
    net: Network,
    params: Any,
    *,
    state: Any = (),
    standardizer: Any = None,
    final_activation: str | None = None,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes a network as StableHLO in the format of `jax.export`.

    To run it without fcfunc, call `jax.export.deserialize(path.read_bytes()).call(x)` with float32 `x`,
    `[batch, features]`. JAX guarantees that newer releases read it for at least six months.

    Args:
      path: the file to write.
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.
      standardizer: a `data.Standardizer`, or another pair of `mean` and `scale`, which is applied to the inputs.
      final_activation: an activation of the outputs, such as "softmax" for probabilities instead of logits; None uses
        that of the network.
      platforms: the platforms to compile for.

    Raises:
      ValueError: params, state or standardizer do not match the network.
      OSError: the file cannot be written.

    Example:
      >>> import fcfunc, tempfile
      >>> path = Path(tempfile.mkdtemp()) / "net.stablehlo"
      >>> net = fcfunc.mlp([4, 8, 3])
      >>> stablehlo(path, net, net.init(jax.random.key(0)), final_activation="softmax")
      >>> jax.export.deserialize(bytearray(path.read_bytes())).call(jnp.ones((5, 4))).shape
      (5, 3)
    """
    where = "export.stablehlo"
    net, (mean, rest, scale) = _checked(where, path, net, params, state, standardizer, final_activation)
    params, state = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, state))

    def predict(x):
        # Two divisions, because XLA would merge the constants of (x - mean) - rest.
        z = x if mean is None or rest is None or scale is None else (x - mean) / scale - rest / scale
        if net.norm == "batch_norm":
            return net.apply_batch_norm(params, state, z, training=False, key=None)[0]
        return net.apply(params, z, key=None)

    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"batch, {net.dims[0]}"), jnp.float32)
    exported = jax.export.export(jax.jit(predict), platforms=platforms)(x)
    _files.write_whole(Path(path), bytes(exported.serialize()))


def onnx(
    path: str | os.PathLike,
    net: Network,
    params: Any,
    *,
    state: Any = (),
    standardizer: Any = None,
    final_activation: str | None = None,
) -> None:
    """Writes a network as ONNX, for ONNX Runtime and other programs.

    The model maps an input `x` to an output `y`, both float32 with a batch of any size, and computes in float32. The
    onnx library checks the model before it is written.

    Args:
      path, net, params, state, standardizer, final_activation: the file, the network, its parameters and running
        statistics, the standardizer and the activation of the outputs, as in `stablehlo`.

    Raises:
      ValueError: params, state or standardizer do not match the network, or an activation is a function, which ONNX
        cannot represent.
      ImportError: onnx is not installed.
      OSError: the file cannot be written.

    Example:
      >>> import fcfunc, tempfile
      >>> path = Path(tempfile.mkdtemp()) / "net.onnx"
      >>> net = fcfunc.mlp([4, 8, 3])
      >>> onnx(path, net, net.init(jax.random.key(0)), final_activation="softmax")
      >>> import onnxruntime
      >>> session = onnxruntime.InferenceSession(path)
      >>> session.run(["y"], {"x": np.ones((5, 4), np.float32)})[0].shape
      (5, 3)
    """
    where = "export.onnx"
    library = _arguments.library(where, "onnx", "onnx", "onnx.checker")
    net, (mean, rest, scale) = _checked(where, path, net, params, state, standardizer, final_activation)
    graph = _Graph(library)
    h = "x"
    if scale is not None:
        h = graph.add("Sub", graph.add("Sub", h, graph.constant(mean)), graph.constant(rest))
        h = graph.add("Div", h, graph.constant(scale))
    layers = jax.device_get(unstack(params))
    states = unstacked_state(jax.device_get(state)) if net.norm == "batch_norm" else [None] * len(layers)
    for i, p in enumerate(layers):
        before, hidden = h, i < len(layers) - 1
        h = graph.add("MatMul", h, graph.constant(p["w"]))
        h = graph.add("Add", h, graph.constant(p["b"])) if "b" in p else h
        if hidden and net.norm is not None:
            h = _norm(graph, net, p, states[i], h)
        h = _activation(where, graph, net._activation_of(i) if hidden else net.final_activation, h)
        if hidden and net.residual and net.dims[i] == net.dims[i + 1]:
            h = graph.add("Add", before, h)
    graph.add("Identity", h, output="y")
    helper, real = library.helper, library.TensorProto.FLOAT
    made = helper.make_graph(
        graph.nodes,
        "fcfunc",
        [helper.make_tensor_value_info("x", real, ["batch", net.dims[0]])],
        [helper.make_tensor_value_info("y", real, ["batch", net.dims[-1]])],
        graph.constants,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="fcfunc")
    model.ir_version = 10  # the version of this operator set, which older runtimes can read
    library.checker.check_model(model, full_check=True)
    _files.write_whole(Path(path), model.SerializeToString())


class _Graph:
    """The nodes and constants of an ONNX graph; each node has one output."""

    def __init__(self, library):
        self.library, self.nodes, self.constants = library, [], []

    def constant(self, a) -> str:
        """Adds a float32 constant and returns its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(self.library.numpy_helper.from_array(np.ascontiguousarray(a, np.float32), name))
        return name

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """Adds a node and returns the name of its output."""
        name = output or f"h{len(self.nodes)}"
        self.nodes.append(self.library.helper.make_node(operator, list(inputs), [name], **attributes))
        return name


def _checked(where, path, net, params, state, standardizer, final_activation):
    """The network with its final activation, and the float32 mean (in two parts) and scale of its inputs."""
    _arguments.path(where, path=path)
    if not isinstance(net, Network):
        raise TypeError(f"{where}: net must be a Network, as from fcfunc.mlp, got {type(net).__name__}")
    if final_activation is not None:
        net = dataclasses.replace(net, final_activation=final_activation)
    net._check_params(where, params)
    if net.norm == "batch_norm" and len(state) != len(params) - 1:
        raise ValueError(f"{where}: a network with batch normalization needs its state, {len(params) - 1} entries")
    if standardizer is None:
        return net, (None, None, None)
    mean, scale = np.asarray(standardizer.mean, np.float64), np.asarray(standardizer.scale, np.float64)
    if mean.shape != (net.dims[0],) or scale.shape != mean.shape:
        shapes = f"mean {list(mean.shape)} and scale {list(scale.shape)}"
        raise ValueError(f"{where}: standardizer must have {net.dims[0]} features, got {shapes}")
    rounded = mean.astype(np.float32)
    # Float32 rounds the mean of a column such as a year by too much compared to its spread, so subtract the rest too.
    return net, tuple(a.astype(np.float32)[None] for a in (rounded, mean - rounded, scale))


def _norm(graph: _Graph, net: Network, p, running, h: str) -> str:
    eps = 1e-5 if net.norm_eps is None else net.norm_eps
    scale = graph.constant(p["scale"])
    if net.norm == "rms_norm":
        axes = graph.library.numpy_helper.from_array(np.array([-1], np.int64), f"axes{len(graph.constants)}")
        graph.constants.append(axes)
        mean = graph.add("ReduceMean", graph.add("Mul", h, h), axes.name, keepdims=1)
        root = graph.add("Sqrt", graph.add("Add", mean, graph.constant(eps)))
        return graph.add("Mul", graph.add("Div", h, root), scale)
    offset = graph.constant(p["offset"])
    if net.norm == "layer_norm":
        return graph.add("LayerNormalization", h, scale, offset, axis=-1, epsilon=eps)
    mean, var = graph.constant(running["mean"]), graph.constant(running["var"])
    return graph.add("BatchNormalization", h, scale, offset, mean, var, epsilon=eps)


def _activation(where: str, graph: _Graph, activation: Any, h: str) -> str:
    if activation is None:
        return h
    if activation == "silu":
        return graph.add("Mul", h, graph.add("Sigmoid", h))
    name, number = activation if isinstance(activation, tuple) else (activation, None)
    if name not in OPERATORS:
        raise ValueError(f"{where}: the activation {activation!r:.60} is a function, which ONNX cannot represent")
    options = OPTIONS.get(name, {}) if number is None else {"alpha": number}
    return graph.add(OPERATORS[name], h, **options)
