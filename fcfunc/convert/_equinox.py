"""Equinox: `eqx.nn.MLP` and `eqx.nn.Sequential`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._arguments import library
from fcfunc.convert._layers import (
    Activation,
    Affine,
    Dropout,
    Norm,
    check_same,
    function_of_jax,
    layers_of,
    network_of,
    of_jax,
    unknown,
)
from fcfunc.network import Network

ADVICE = "give its layers as an eqx.nn.Sequential"


def from_equinox(module: Any, state: Any = None) -> tuple[Network, list, Any]:
    """Converts an Equinox module and its weights to a network.

    Args:
      module: an `eqx.nn.MLP`, or an `eqx.nn.Sequential` of `Linear`, `LayerNorm`, `RMSNorm`, `BatchNorm`, `Dropout`,
        `Lambda` and `Identity`. The outputs of the module and the network are compared on random rows.
      state: the `eqx.nn.State` of a module with batch normalization.

    Returns:
      `(net, params, state)`, with the outputs and gradients of the module. Equinox keeps the biased running variance
      with a decay of 0.99; to continue training the same way, pass `unbiased_variance=False, decay=0.99` to
      `apply_batch_norm`.

    Raises:
      ValueError: a layer, or an order of layers, cannot be represented; the message names it.
      TypeError: `module` is not such a module.
      ImportError: Equinox is not installed.

    Example:
      >>> import equinox as eqx
      >>> module = eqx.nn.MLP(3, 2, width_size=4, depth=1, key=jax.random.key(0))
      >>> net, params, state = from_equinox(module)
      >>> net.dims
      (3, 4, 2)
    """
    where = "from_equinox"
    eqx = library(where, "equinox", "equinox")
    if not isinstance(module, eqx.nn.MLP | eqx.nn.Sequential | eqx.nn.Linear):
        raise TypeError(f"{where}: module must be an eqx.nn.MLP or eqx.nn.Sequential, got {type(module).__name__}")
    net, params, new_state = network_of(where, [*_layers(where, eqx, module, "", state)])

    def run(x):
        still = eqx.nn.inference_mode(module)
        rows = jnp.asarray(x)
        if net.norm == "batch_norm":
            return jax.vmap(lambda x: still(x, state)[0], axis_name="batch")(rows)
        return jax.vmap(lambda x: still(x))(rows)

    check_same(where, net, params, new_state, run, ADVICE)
    return net, params, new_state


def to_equinox(net: Network, params: list, state: Any = ()) -> Any:
    """Converts a network to an `eqx.nn.Sequential` for a single example; use `jax.vmap` for a batch.

    Args:
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.

    Returns:
      The module, or `(module, state)` with batch normalization, which uses the axis name "batch".

    Raises:
      ValueError: the network has a residual connection.
      ImportError: Equinox is not installed.

    Example:
      >>> import fcfunc
      >>> net = fcfunc.mlp([3, 4, 2])
      >>> module = to_equinox(net, net.init(jax.random.key(0)))
      >>> jax.vmap(module)(jnp.ones((5, 3))).shape
      (5, 2)
    """
    eqx = library("to_equinox", "equinox", "equinox")
    key, layers, running = jax.random.key(0), [], []
    for block in layers_of("to_equinox", net, params, state):
        w, b, width = block.affine.w, block.affine.b, block.affine.w.shape[1]
        linear = eqx.nn.Linear(*w.shape, use_bias=b is not None, key=key)
        linear = eqx.tree_at(lambda layer: layer.weight, linear, jnp.asarray(w.T))
        layers.append(linear if b is None else eqx.tree_at(lambda layer: layer.bias, linear, jnp.asarray(b)))
        if block.norm is not None:
            norm = block.norm
            if norm.kind == "batch_norm":
                made = eqx.nn.BatchNorm(width, "batch", eps=norm.eps, mode="ema", dtype=norm.mean.dtype)
                running.append((len(layers), norm.mean, norm.var))
            elif norm.kind == "layer_norm":
                made = eqx.nn.LayerNorm(width, eps=norm.eps)
            else:
                made = eqx.nn.RMSNorm(width, eps=norm.eps, use_bias=False)
            made = eqx.tree_at(lambda layer: layer.weight, made, jnp.asarray(norm.scale))
            if norm.offset is not None:
                made = eqx.tree_at(lambda layer: layer.bias, made, jnp.asarray(norm.offset))
            layers.append(made)
        if block.activation is not None:
            layers.append(eqx.nn.Lambda(function_of_jax(block.activation)))
        if block.rate:
            layers.append(eqx.nn.Dropout(block.rate))
    module = eqx.nn.Sequential(layers)
    if not running:
        return module
    module, new_state = eqx.nn.make_with_state(lambda: module)()
    for i, mean, var in running:
        norm = module.layers[i]
        new_state = new_state.set(norm.ema_state_index, (jnp.asarray(mean), jnp.asarray(var)))
        new_state = new_state.set(norm.ema_first_time_index, jnp.array(False))
    return module, new_state


def _layers(where: str, eqx, module, name: str, state):
    nn, here = eqx.nn, name or "the module"
    if isinstance(module, nn.MLP):
        *hidden, last = module.layers
        for i, layer in enumerate(hidden):
            yield from _layers(where, eqx, layer, f"layers[{i}]", state)
            yield Activation("activation", _scalar(where, module.activation))
        yield from _layers(where, eqx, last, f"layers[{len(hidden)}]", state)
        yield Activation("final_activation", _scalar(where, module.final_activation))
    elif isinstance(module, nn.Sequential):
        for i, layer in enumerate(module.layers):
            yield from _layers(where, eqx, layer, f"{name}layers[{i}]", state)
    elif isinstance(module, nn.Linear):
        if "scalar" in (module.in_features, module.out_features):
            raise ValueError(f"{where}: {here}: scalar inputs or outputs cannot be represented; use size 1")
        yield Affine(here, module.weight.T, module.bias)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.shape) != 1:
            raise ValueError(f"{where}: {here}: a norm over {list(module.shape)} cannot be represented")
        rms = isinstance(module, nn.RMSNorm)
        if rms and module.bias is not None:
            raise ValueError(f"{where}: {here}: an RMS norm with a bias cannot be represented; set use_bias=False")
        offset = None if rms else module.bias
        yield Norm(here, "rms_norm" if rms else "layer_norm", module.weight, offset, float(module.eps))
    elif isinstance(module, nn.BatchNorm):
        if state is None:
            raise ValueError(f"{where}: {here}: batch normalization needs the eqx.nn.State of the module, got None")
        mean, var = _running(module, state)
        yield Norm(here, "batch_norm", module.weight, module.bias, float(module.eps), mean, var)
    elif isinstance(module, nn.Dropout):
        yield Dropout(here, float(module.p))
    elif isinstance(module, nn.Lambda):
        yield Activation(here, of_jax(module.fn))
    elif not isinstance(module, nn.Identity):
        raise unknown(where, here, type(module).__name__)


def _running(norm, state):
    """The running mean and variance; in mode "batch", they are corrected for their initial bias."""
    if norm.mode == "ema":
        return state.get(norm.ema_state_index)
    mean, var = state.get(norm.batch_state_index)
    seen = 1 - np.asarray(norm.momentum, np.float64) ** int(state.get(norm.batch_counter))
    return (mean / seen, var / seen) if seen > 0 else (mean, var)


def _scalar(where: str, activation) -> Any:
    """The activation of an `eqx.nn.MLP`; raises if it has parameters."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(activation)):
        raise ValueError(f"{where}: an activation with parameters, {type(activation).__name__}, cannot be represented")
    program = jax.make_jaxpr(activation)(0.0).jaxpr  # the default for the last layer is an unnamed identity function
    return None if program.outvars == program.invars else of_jax(activation)
