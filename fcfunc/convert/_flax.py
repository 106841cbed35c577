"""Flax: `flax.linen` modules with their variables, and `flax.nnx` modules."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from fcfunc._arguments import library
from fcfunc.convert._layers import (
    Activation,
    Affine,
    Block,
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

ADVICE = "make a Sequential of the layers, or name the activation of the hidden layers: activation=..."


ACCURATE = {"use_fast_variance": False}
"""By default, Flax's norms compute the variance as a difference of squares, which loses digits if it is small."""


def from_flax(
    module: Any, variables: Any = None, *, activation: Any = "as given", final_activation: Any = None
) -> tuple[Network, list, Any]:
    """Converts a Flax module and its weights to a network.

    The layers of a linen module are taken in the order in which they are called, those of an nnx module in the order of
    its attributes. If the module is not a `Sequential`, its activations are function calls that are not recorded: pass
    `activation`. The outputs of the module and the network are compared on random rows.

    Args:
      module: a `flax.linen.Module` or `flax.nnx.Module` of `Dense` or `Linear`, `LayerNorm`, `RMSNorm`, `BatchNorm` and
        `Dropout`; a `Sequential` may also contain functions.
      variables: the variables of a linen module, `{"params": ..., "batch_stats": ...}`.
      activation, final_activation: the activations, as in `fcfunc.mlp`; they replace those of the module.

    Returns:
      `(net, params, state)`, with the outputs and gradients of the module. Flax keeps the biased running variance; to
      continue training the same way, pass `unbiased_variance=False` and its momentum, 0.99 by default, as `decay` to
      `apply_batch_norm`. If only some layers have a bias, or a norm has no scale, zeros or ones are filled in.

    Raises:
      ValueError: a layer, or an order of layers, cannot be represented; the message names it.
      TypeError: `module` is not a Flax module, or a linen module has no variables.
      ImportError: Flax is not installed.

    Example:
      >>> from flax import linen
      >>> module = linen.Sequential([linen.Dense(4), linen.gelu, linen.Dense(2)])
      >>> variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> net, params, state = from_flax(module, variables)
      >>> net.activation, net.dims
      ('gelu', (3, 4, 2))
    """
    where = "from_flax"
    flax = library(where, "flax", "flax.linen", "flax.nnx")
    linen, nnx = flax.linen, flax.nnx
    if isinstance(module, nnx.Module):
        layers, run = [*_nnx_layers(where, nnx, module, "")], _nnx_run(nnx, module)
    elif isinstance(module, linen.Module):
        if not isinstance(variables, dict) and not hasattr(variables, "keys"):
            raise TypeError(f"{where}: a linen module needs its variables, got {type(variables).__name__}")
        if "params" not in variables:
            raise TypeError(
                f"{where}: variables must have the key 'params', got {', '.join(map(str, variables))!s:.80}"
            )
        variables = linen.meta.unbox(variables)
        layers, run = _linen_layers(where, linen, module, variables), _linen_run(linen, module, variables)
    else:
        raise TypeError(f"{where}: module must be a flax.linen or flax.nnx module, got {type(module).__name__}")
    net, params, state = network_of(where, layers, activation=activation, final_activation=final_activation)
    check_same(where, net, params, state, run, ADVICE)
    return net, params, state


def to_flax(net: Network, params: list, state: Any = (), *, training: bool = False) -> tuple[Any, dict]:
    """Converts a network to a `flax.linen.Sequential` and its variables.

    Args:
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.
      training: whether dropout is active and batch normalization uses batch statistics; linen fixes it in the module.

    Returns:
      `(module, variables)`.

    Raises:
      ValueError: the network has a residual connection.
      ImportError: Flax is not installed.

    Example:
      >>> import fcfunc
      >>> net = fcfunc.mlp([3, 4, 2])
      >>> module, variables = to_flax(net, net.init(jax.random.key(0)))
      >>> module.apply(variables, jnp.ones((5, 3))).shape
      (5, 2)
    """
    linen = library("to_flax", "flax", "flax.linen").linen
    layers, variables = [], {}
    for block in layers_of("to_flax", net, params, state):
        name, dtype = f"layers_{len(layers)}", block.affine.w.dtype
        layers.append(linen.Dense(block.affine.w.shape[1], use_bias=block.affine.b is not None, param_dtype=dtype))
        variables.setdefault("params", {})[name] = _present(kernel=block.affine.w, bias=block.affine.b)
        if block.norm is not None:
            name, norm = f"layers_{len(layers)}", block.norm
            options = {"epsilon": norm.eps, "param_dtype": dtype, **ACCURATE}
            if norm.kind == "batch_norm":
                layers.append(linen.BatchNorm(use_running_average=not training, **options))
                variables.setdefault("batch_stats", {})[name] = _present(mean=norm.mean, var=norm.var)
            else:
                layers.append((linen.LayerNorm if norm.kind == "layer_norm" else linen.RMSNorm)(**options))
            variables["params"][name] = _present(scale=norm.scale, bias=norm.offset)
        layers += _after(block, lambda rate: linen.Dropout(rate, deterministic=not training))
    return linen.Sequential(layers), variables


def to_nnx(net: Network, params: list, state: Any = (), *, rngs: Any = None) -> Any:
    """Converts a network to a `flax.nnx.Sequential` with the same weights.

    Args:
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.
      rngs: the `flax.nnx.Rngs` for dropout; None uses `Rngs(0)`.

    Returns:
      The module; `module.eval()` and `module.train()` switch dropout and batch normalization.

    Raises:
      ValueError: the network has a residual connection.
      ImportError: Flax is not installed.

    Example:
      >>> import fcfunc
      >>> net = fcfunc.mlp([3, 4, 2])
      >>> to_nnx(net, net.init(jax.random.key(0)))(jnp.ones((5, 3))).shape
      (5, 2)
    """
    nnx = library("to_nnx", "flax", "flax.nnx").nnx
    rngs = nnx.Rngs(0) if rngs is None else rngs
    layers: list[Any] = []
    for block in layers_of("to_nnx", net, params, state):
        w, b, width = block.affine.w, block.affine.b, block.affine.w.shape[1]
        layers.append(nnx.Linear(*w.shape, use_bias=b is not None, param_dtype=w.dtype, rngs=rngs))
        _set(layers[-1], kernel=w, bias=b)
        if block.norm is not None:
            norm = block.norm
            kinds = {"batch_norm": nnx.BatchNorm, "layer_norm": nnx.LayerNorm, "rms_norm": nnx.RMSNorm}
            layers.append(kinds[norm.kind](width, epsilon=norm.eps, param_dtype=w.dtype, rngs=rngs, **ACCURATE))
            _set(layers[-1], scale=norm.scale, bias=norm.offset, mean=norm.mean, var=norm.var)
        layers += _after(block, lambda rate: nnx.Dropout(rate, rngs=rngs))
    return nnx.Sequential(*layers)


def _present(**arrays) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in arrays.items() if a is not None}


def _set(module, **arrays) -> None:
    for name, a in _present(**arrays).items():
        getattr(module, name)[...] = a


def _after(block: Block, dropout) -> list:
    """The activation and the dropout after a layer."""
    after = [] if block.activation is None else [function_of_jax(block.activation)]
    return [*after, dropout(block.rate)] if block.rate else after


def _norm(where: str, here: str, kind: str, module, leaves: dict, running: dict) -> Norm:
    """Converts a norm over the last axis; `leaves` and `running` are its arrays by Flax's names."""
    for option, usual in {"axis": (-1,), "reduction_axes": (-1,), "feature_axes": (-1,)}.items():
        value = getattr(module, option, usual)
        if tuple(value if isinstance(value, tuple | list) else (value,)) not in (usual, (1,)):
            raise ValueError(
                f"{where}: {here}: a norm over axes other than the last cannot be represented, got {option}={value}"
            )
    mean, var = running.get("mean"), running.get("var")
    return Norm(here, kind, leaves.get("scale"), leaves.get("bias"), float(module.epsilon), mean, var)


def _linen_layers(where: str, linen, module, variables) -> list:
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})

    def layer_of(part, path):
        here, leaves, running = "/".join(path) or "the module", _at(params, path), _at(stats, path)
        kind = type(part).__name__
        if isinstance(part, linen.Dense):
            return Affine(here, leaves["kernel"], leaves.get("bias"))
        for name, of in {"BatchNorm": "batch_norm", "LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}.items():
            if isinstance(part, getattr(linen, name)):
                return _norm(where, here, of, part, leaves, running)
        if isinstance(part, linen.Dropout):
            return Dropout(here, float(part.rate))
        raise unknown(where, here, kind)

    if isinstance(module, linen.Sequential):
        layers: list[Any] = []
        for i, part in enumerate(module.layers):
            path = (f"layers_{i}",)
            if isinstance(part, linen.Sequential):
                inner = {name: _at(tree, path) for name, tree in variables.items()}
                layers += _linen_layers(where, linen, part, inner)
            elif isinstance(part, linen.Module):
                layers.append(layer_of(part, path))
            else:
                layers.append(Activation(f"layers[{i}]", of_jax(part)))
        return layers

    called: list[Any] = []

    def watch(next_fun, args, kwargs, context):
        part = context.module
        inside = context.method_name == "__call__" and type(part).__module__.startswith("flax.")
        if inside and not isinstance(part, linen.Sequential):
            called.append(layer_of(part, part.path))
        return next_fun(*args, **kwargs)

    kernels = [a for path, a in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path[-1])]
    if not kernels:
        raise ValueError(f"{where}: module must have at least one Dense layer")
    run, errors = _linen_run(linen, module, variables), []
    for width in dict.fromkeys(kernel.shape[0] for kernel in kernels):  # one of these is the width of the inputs
        called.clear()
        try:
            with linen.intercept_methods(watch):
                run(jnp.zeros((2, width), kernels[0].dtype))
        except library(where, "flax", "flax.errors").errors.ScopeParamShapeError as e:
            errors.append(e)
        else:
            return called
    raise ValueError(f"{where}: the module cannot be called on an array [batch, features] ({errors[0]!s:.120})")


FOR_PREDICTION = {
    "training": False, "train": False, "is_training": False, "deterministic": True, "use_running_average": True,
}  # fmt: skip
"""Common arguments of linen modules that select prediction instead of training."""


def _linen_run(linen, module, variables):
    taken = inspect.signature(type(module).__call__).parameters
    options = {name: value for name, value in FOR_PREDICTION.items() if name in taken}
    return lambda x: module.apply(variables, jnp.asarray(x), **options)


def _at(tree, path) -> dict:
    for name in path:
        tree = tree.get(name, {}) if hasattr(tree, "get") else {}
    return tree


def _nnx_layers(where: str, nnx, module, name: str):
    here, kind = name or "the module", type(module).__name__

    def leaves(*names):
        values = {n: getattr(module, n, None) for n in names}
        return {n: v[...] for n, v in values.items() if v is not None}

    if isinstance(module, nnx.Linear) and type(module).__call__ is nnx.Linear.__call__:
        arrays = leaves("kernel", "bias")
        yield Affine(here, arrays["kernel"], arrays.get("bias"))
    elif isinstance(module, nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm):
        kinds = {nnx.BatchNorm: "batch_norm", nnx.LayerNorm: "layer_norm", nnx.RMSNorm: "rms_norm"}
        of = next(name for base, name in kinds.items() if isinstance(module, base))
        yield _norm(
            where, here, of, module, leaves("scale", "bias"), leaves("mean", "var") if of == "batch_norm" else {}
        )
    elif isinstance(module, nnx.Dropout):
        yield Dropout(here, float(module.rate))
    elif isinstance(module, nnx.Linear) or (
        type(module).__module__.startswith("flax.") and not isinstance(module, nnx.Sequential | nnx.List)
    ):
        raise unknown(where, here, kind)
    else:
        parts = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
        for part_name, part in parts:
            inner = f"{name}.{part_name}".strip(".")
            if isinstance(part, list | tuple):
                for i, one in enumerate(part):
                    yield from _nnx_part(where, nnx, one, f"{inner}[{i}]")
            else:
                yield from _nnx_part(where, nnx, part, inner)


def _nnx_part(where: str, nnx, part, name: str):
    if isinstance(part, nnx.Module):
        yield from _nnx_layers(where, nnx, part, name)
    elif callable(part) and not isinstance(part, nnx.Variable | nnx.Object) and not isinstance(part, type):
        yield Activation(name, of_jax(part))


def _nnx_run(nnx, module):
    def run(x):
        still = nnx.clone(module)
        still.eval()
        return still(jnp.asarray(x))

    return run
