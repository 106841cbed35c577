"""Keras 3: `Sequential` models and functional models without branches."""

from typing import Any

import jax
import numpy as np

from fcfunc._arguments import library
from fcfunc.convert._layers import Activation, Affine, Dropout, Norm, check_same, layers_of, network_of, unknown
from fcfunc.network import Network

ACTIVATIONS = {
    "linear": None, "log_sigmoid": jax.nn.log_sigmoid, "log_softmax": "log_softmax", "mish": jax.nn.mish,
    "relu": "relu", "relu6": jax.nn.relu6, "selu": jax.nn.selu, "sigmoid": "sigmoid", "silu": "silu",
    "softmax": "softmax", "softplus": "softplus", "softsign": jax.nn.soft_sign, "tanh": "tanh",
    "elu": ("elu", 1.0), "gelu": "gelu_exact", "gelu_tanh": "gelu", "leaky_relu": ("leaky_relu", 0.2),
}  # fmt: skip
"""Keras' activations by name, with their default options; its GELU is the exact one."""

ADVICE = "only models whose layers follow one after the other can be converted"


def from_keras(model: Any) -> tuple[Network, list, Any]:
    """Converts a Keras 3 model and its weights to a network.

    Args:
      model: a built `keras.Sequential`, or a functional model without branches, of `Dense`, `BatchNormalization`,
        `LayerNormalization`, `RMSNormalization`, `Dropout` and activations. The outputs of the model and the network
        are compared on random rows. A leading `Flatten` is omitted.

    Returns:
      `(net, params, state)`, with the outputs and gradients of the model. Keras keeps the biased running variance with
      a momentum of 0.99; to continue training the same way, pass `unbiased_variance=False, decay=0.99` to
      `apply_batch_norm`. If only some layers have a bias, or a norm has no gamma, zeros or ones are filled in.

    Raises:
      ValueError: a layer, or an order of layers, cannot be represented; the message names it.
      TypeError: `model` is not a Keras model, or it is not built.
      ImportError: Keras is not installed.

    Example:
      >>> net, params, state = from_keras(model)  # doctest: +SKIP
    """
    where = "from_keras"
    keras = library(where, "keras", "keras")
    if not isinstance(model, keras.Model):
        raise TypeError(f"{where}: model must be a Keras model, got {type(model).__name__}")
    if not model.built:
        raise TypeError(f"{where}: the model has no weights yet; call model.build((None, features)) first")
    layers = [part for layer in model.layers for part in _layers(where, keras, layer)]
    net, params, state = network_of(where, layers)

    def run(x):
        rows = x.reshape(len(x), *model.input_shape[1:]) if isinstance(model.input_shape, tuple) else x
        return keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(rows), training=False))

    check_same(where, net, params, state, run, ADVICE)
    return net, params, state


def to_keras(net: Network, params: list, state: Any = ()) -> Any:
    """Converts a network to a built `keras.Sequential` with the same weights.

    Args:
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.

    Returns:
      The model. Keras has no name for the tanh approximation of GELU; to load a saved model that uses it, pass
      `custom_objects={"gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True)}`.

    Raises:
      ValueError: the network has a residual connection, or an activation that Keras does not have.
      ImportError: Keras is not installed.

    Example:
      >>> to_keras(net, params)  # doctest: +SKIP
    """
    where = "to_keras"
    keras = library(where, "keras", "keras")
    of, layers, weights = keras.layers, [], []
    for block in layers_of(where, net, params, state):
        w, b, dtype = block.affine.w, block.affine.b, str(block.affine.w.dtype)
        layers.append(of.Dense(w.shape[1], use_bias=b is not None, dtype=dtype))
        weights.append([a for a in (w, b) if a is not None])
        if block.norm is not None:
            norm, options = block.norm, {"epsilon": block.norm.eps, "dtype": dtype}
            made = {"batch_norm": of.BatchNormalization, "layer_norm": of.LayerNormalization}
            layers.append(made.get(norm.kind, of.RMSNormalization)(**options))
            weights.append([a for a in (norm.scale, norm.offset, norm.mean, norm.var) if a is not None])
        if block.activation is not None:
            layers.append(_activation_layer(where, keras, block.activation, dtype))
            weights.append([])
        if block.rate:
            layers.append(of.Dropout(block.rate, dtype=dtype))
            weights.append(None)
    model = keras.Sequential([keras.Input((net.dims[0],), dtype=str(params[0]["w"].dtype)), *layers])
    for layer, arrays in zip(layers, weights, strict=True):
        if arrays:
            layer.set_weights([np.asarray(a) for a in arrays])
    return model


def _layers(where: str, keras, layer):
    """Converts a Keras layer; a `Dense` with an activation becomes two layers."""
    of, here, kind = keras.layers, layer.name, type(layer).__name__

    def array(variable):
        return None if variable is None else keras.ops.convert_to_numpy(variable.value)

    def last_axis(axis):
        axes = axis if isinstance(axis, list | tuple) else [axis]
        if [*axes] not in ([-1], [1]):
            raise ValueError(f"{where}: {here}: a norm over the axes {axes} cannot be represented")

    if isinstance(layer, keras.Sequential):
        for part in layer.layers:
            yield from _layers(where, keras, part)
    elif getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise ValueError(f"{where}: {here}: a layer with LoRA or quantized weights cannot be represented")
    elif isinstance(layer, of.Dense):
        yield Affine(here, array(layer.kernel), array(layer.bias) if layer.use_bias else None)
        yield Activation(here, _activation(where, here, layer.activation))
    elif isinstance(layer, of.BatchNormalization):
        last_axis(layer.axis)
        running = {"mean": array(layer.moving_mean), "var": array(layer.moving_variance)}
        yield Norm(here, "batch_norm", array(layer.gamma), array(layer.beta), float(layer.epsilon), **running)
    elif isinstance(layer, of.LayerNormalization):
        last_axis(layer.axis)
        if getattr(layer, "rms_scaling", False):
            raise ValueError(
                f"{where}: {here}: rms_scaling=True divides by a standard deviation and cannot be represented"
            )
        yield Norm(here, "layer_norm", array(layer.gamma), array(layer.beta), float(layer.epsilon))
    elif isinstance(layer, getattr(of, "RMSNormalization", ())):
        last_axis(layer.axis)
        yield Norm(here, "rms_norm", array(layer.scale), None, float(layer.epsilon))
    elif isinstance(layer, of.Dropout):
        yield Dropout(here, float(layer.rate))
    elif isinstance(layer, of.Activation):
        yield Activation(here, _activation(where, here, layer.activation))
    elif isinstance(layer, of.LeakyReLU):
        yield Activation(here, ("leaky_relu", float(layer.negative_slope)))
    elif isinstance(layer, of.ELU):
        yield Activation(here, ("elu", float(layer.alpha)))
    elif isinstance(layer, of.ReLU) and layer.threshold == 0 and layer.max_value is None:
        yield Activation(here, ("leaky_relu", float(layer.negative_slope)) if layer.negative_slope else "relu")
    elif isinstance(layer, of.Softmax) and layer.axis == -1:
        yield Activation(here, "softmax")
    elif not isinstance(layer, of.InputLayer | of.Flatten | of.Identity):
        raise unknown(where, here, kind)


def _activation(where: str, here: str, function) -> Any:
    name = getattr(function, "__name__", type(function).__name__)
    if name not in ACTIVATIONS:
        raise ValueError(f"{where}: {here}: the activation {name} cannot be represented")
    return ACTIVATIONS[name]


def _activation_layer(where: str, keras, activation: Any, dtype: str):
    of = keras.layers
    if isinstance(activation, tuple):
        name, number = activation
        return of.LeakyReLU(number, dtype=dtype) if name == "leaky_relu" else of.ELU(number, dtype=dtype)
    if activation == "leaky_relu":
        return of.LeakyReLU(0.01, dtype=dtype)
    if activation == "gelu":
        return of.Activation(_gelu_tanh(keras), dtype=dtype)
    names = {value: name for name, value in ACTIVATIONS.items() if value is not None}
    names["elu"] = "elu"
    if activation not in names:
        raise ValueError(f"{where}: Keras does not have the activation {activation!r:.60}")
    return of.Activation(names[activation], dtype=dtype)


def _gelu_tanh(keras):
    def gelu_tanh(x):
        return keras.activations.gelu(x, approximate=True)

    return gelu_tanh
