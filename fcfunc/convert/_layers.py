"""Code shared by the converters: a network as a list of layers in the order in which they are applied."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc.network import NORMS, NUMBERS, Network, mlp, unstack, unstacked_state

DEFAULT_EPS = 1e-5

ACTIVATIONS_OF_JAX = {
    jax.nn.elu: "elu", jax.nn.gelu: "gelu", jax.nn.leaky_relu: "leaky_relu", jax.nn.log_softmax: "log_softmax",
    jax.nn.relu: "relu", jax.nn.sigmoid: "sigmoid", jax.nn.silu: "silu", jax.nn.softmax: "softmax",
    jax.nn.softplus: "softplus", jax.nn.tanh: "tanh", jnp.tanh: "tanh", jax.nn.identity: None,
}  # fmt: skip
"""The names of JAX's activation functions; any other function is kept."""


class Affine(NamedTuple):
    """`h W + b`, with `w` `[fan_in, fan_out]`."""

    name: str
    w: Any
    b: Any = None


class Norm(NamedTuple):
    """A normalization layer; missing leaves are None."""

    name: str
    kind: str
    scale: Any
    offset: Any
    eps: float
    mean: Any = None
    var: Any = None


class Activation(NamedTuple):
    """An activation in the form that `fcfunc.mlp` accepts."""

    name: str
    value: Any


class Dropout(NamedTuple):
    """Dropout; `rate` is the probability of dropping."""

    name: str
    rate: float


class Block(NamedTuple):
    """An affine layer with its norm, activation and dropout."""

    affine: Affine
    norm: Norm | None
    activation: Any
    rate: float


def of_jax(activation: Any) -> Any:
    """The name of a JAX activation in this library, or the function itself if it has none."""
    if isinstance(activation, str | tuple) or activation is None:
        return activation
    try:
        if activation in ACTIVATIONS_OF_JAX:
            return ACTIVATIONS_OF_JAX[activation]
    except TypeError:  # unhashable
        return activation
    options = dict(getattr(activation, "keywords", {}))
    function = ACTIVATIONS_OF_JAX.get(getattr(activation, "func", None))
    if getattr(activation, "args", ()) == () and options:
        if function == "gelu" and options.keys() == {"approximate"}:
            return "gelu" if options["approximate"] else "gelu_exact"
        if function == "leaky_relu" and options.keys() == {"negative_slope"}:
            return "leaky_relu", float(options["negative_slope"])
        if function == "elu" and options.keys() == {"alpha"}:
            return "elu", float(options["alpha"])
    return activation


def function_of_jax(activation: Any) -> Callable:
    """An activation as a JAX function; the inverse of `of_jax`."""
    if callable(activation):
        return activation
    functions = {name: function for function, name in ACTIVATIONS_OF_JAX.items() if name is not None}
    functions |= {"tanh": jax.nn.tanh, "gelu_exact": functools.partial(jax.nn.gelu, approximate=False)}
    if isinstance(activation, tuple):
        name, number = activation
        return functools.partial(functions[name], **{NUMBERS[name]: number})
    return functions[activation]


def network_of(
    where: str, layers: Sequence[Any], *, activation: Any = "as given", final_activation: Any = None
) -> tuple[Network, list, Any]:
    """Makes `(net, params, state)` from layers that are applied in sequence.

    An `activation` replaces all activations in `layers`.
    """
    if activation != "as given":
        layers = [layer for layer in layers if not isinstance(layer, Activation)]
    blocks = _blocks(where, layers)
    if not blocks:
        raise ValueError(f"{where}: there must be at least one affine layer, got none")
    *hidden, last = blocks
    if last.norm is not None:
        raise ValueError(f"{where}: {last.norm.name}: a norm after the last affine layer cannot be represented")
    if last.rate:
        raise ValueError(f"{where}: dropout after the last affine layer {last.affine.name} cannot be represented")
    norm = _common(where, "norm", [block.norm and block.norm.kind for block in hidden])
    eps = _common(where, "eps of the norms", [block.norm and block.norm.eps for block in hidden])
    with_bias = any(block.affine.b is not None for block in blocks)
    if activation == "as given":
        values = tuple(block.activation for block in hidden)
        activation, final_activation = (values[0] if len(set(values)) == 1 else values), last.activation
    net = mlp(
        [blocks[0].affine.w.shape[0], *(block.affine.w.shape[1] for block in blocks)],
        activation=list(activation) if isinstance(activation, tuple) and not _is_pair(activation) else activation,
        final_activation=final_activation,
        norm=norm,
        norm_eps=None if eps is None or eps == DEFAULT_EPS else eps,
        dropout_rate=_common(where, "dropout rate", [block.rate for block in hidden]) or 0.0,
        use_bias=with_bias,
    )
    params, state = [], []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        w = block.affine.w
        if after is not None and after.affine.w.shape[0] != w.shape[1]:
            expected = f"{after.affine.name} expects {after.affine.w.shape[0]} inputs"
            raise ValueError(f"{where}: {expected}, but {block.affine.name} before it has {w.shape[1]} outputs")
        leaves = {"w": w} | ({"b": _or(block.affine.b, np.zeros, w.shape[1], w.dtype)} if with_bias else {})
        if block.norm is not None:
            filled = {"scale": (block.norm.scale, np.ones), "offset": (block.norm.offset, np.zeros)}
            leaves |= {name: _or(*filled[name], w.shape[1], w.dtype) for name in NORMS[block.norm.kind]}
            if block.norm.kind == "batch_norm":
                dtype = jnp.promote_types(block.norm.mean.dtype, jnp.float32)  # running statistics need float32
                state.append({name: jnp.asarray(getattr(block.norm, name), dtype) for name in ("mean", "var")})
        params.append({name: jnp.asarray(a) for name, a in leaves.items()})
    return net, params, state or ()


def layers_of(where: str, net: Network, params: Any, state: Any) -> list[Block]:
    """The layers of a network as NumPy arrays. Raises ValueError for features that other libraries do not have."""
    if not isinstance(net, Network):
        raise TypeError(f"{where}: net must be a Network, as from fcfunc.mlp, got {type(net).__name__}")
    residual = [
        i for i, (a, b) in enumerate(zip(net.dims[:-2], net.dims[1:-1], strict=True)) if net.residual and a == b
    ]
    if residual:
        raise ValueError(f"{where}: the residual connection of layer {residual[0]} cannot be represented")
    if net.compute_dtype is not None:
        raise ValueError(f"{where}: compute_dtype={net.compute_dtype!r} cannot be represented")
    layers = jax.device_get(unstack(params))
    shapes = [{name: a.shape for name, a in p.items()} for p in layers]
    if shapes != [net._shapes(i) for i in range(len(net.dims) - 1)]:
        raise ValueError(f"{where}: params must match the network, {list(net.dims)}, got {shapes!s:.120}")
    if net.norm == "batch_norm":
        state = unstacked_state(jax.device_get(state))
        if len(state) != len(layers) - 1:
            raise ValueError(f"{where}: a network with batch normalization needs its state, {len(layers) - 1} entries")
    eps = DEFAULT_EPS if net.norm_eps is None else net.norm_eps
    blocks = []
    for i, p in enumerate(layers):
        hidden, norm = i < len(layers) - 1, None
        if hidden and net.norm is not None:
            running = state[i] if net.norm == "batch_norm" else {}
            norm = Norm(
                f"layer {i}", net.norm, p["scale"], p.get("offset"), eps, running.get("mean"), running.get("var")
            )
        activation = net._activation_of(i) if hidden else net.final_activation
        affine = Affine(f"layer {i}", p["w"], p.get("b"))
        blocks.append(Block(affine, norm, activation, net.dropout_rate if hidden else 0.0))
    return blocks


def check_same(where: str, net: Network, params, state, run: Callable, advice: str) -> None:
    """Raises ValueError if the outputs of a converted network and the original differ on random rows.

    `run(x)` returns the outputs of the original in evaluation mode.
    """
    dtype = params[0]["w"].dtype
    x = np.random.default_rng(0).standard_normal((5, net.dims[0])).astype(np.float32).astype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        if net.norm == "batch_norm":
            ours = net.apply_batch_norm(params, state, jnp.asarray(x), training=False, key=None)[0]
        else:
            ours = net.apply(params, jnp.asarray(x), key=None)
    ours, theirs = np.asarray(ours, np.float64), np.asarray(run(x), np.float64)
    near = 0.05 if jnp.finfo(dtype).bits < 32 else 1e-3
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=near, atol=near * (1 + np.abs(theirs).max())):
        raise ValueError(
            f"{where}: the original does not simply apply its layers in order, so it cannot be converted; {advice}"
        )


def unknown(where: str, name: str, kind: str) -> ValueError:
    """The error for a layer that cannot be represented."""
    return ValueError(f"{where}: {name} ({kind}) cannot be represented as a layer of fcfunc.mlp")


def _blocks(where: str, layers: Sequence[Any]) -> list[Block]:
    """Groups each affine layer with the norm, activation and dropout that follow it."""
    blocks: list[Block] = []
    for layer in layers:
        if isinstance(layer, Affine):
            blocks.append(Block(layer, None, None, 0.0))
            continue
        if (isinstance(layer, Dropout) and not layer.rate) or (isinstance(layer, Activation) and layer.value is None):
            continue
        kind = type(layer).__name__.lower()
        if not blocks:
            raise ValueError(f"{where}: {layer.name}: {kind} before the first affine layer cannot be represented")
        block = blocks[-1]
        norm, activation, rate = block.norm, block.activation, block.rate
        if isinstance(layer, Norm) and norm is None and activation is None and not rate:
            norm = layer
        elif isinstance(layer, Activation) and activation is None and not rate:
            activation = layer.value
        elif isinstance(layer, Dropout) and not rate:
            rate = layer.rate
        else:
            order = "norm, activation and dropout, in this order and each at most once"
            raise ValueError(
                f"{where}: {layer.name}: {kind} cannot be represented here; an affine layer allows {order}"
            )
        blocks[-1] = Block(block.affine, norm, activation, rate)
    return blocks


def _common(where: str, what: str, values: list[Any]) -> Any:
    """The common value of all hidden layers; raises ValueError if they differ."""
    if len(set(values)) > 1:
        raise ValueError(
            f"{where}: all hidden layers must have the same {what}, got {', '.join(map(str, values))!s:.80}"
        )
    return values[0] if values else None


def _or(a: Any, fill: Callable, width: int, dtype) -> Any:
    return fill(width, dtype) if a is None else a


def _is_pair(activation: Any) -> bool:
    return len(activation) == 2 and isinstance(activation[1], int | float)
