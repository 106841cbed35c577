"""PyTorch: `torch.nn` modules and state dicts."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc._arguments import library
from fcfunc.convert._layers import Activation, Affine, Block, Dropout, Norm, check_same, layers_of, network_of, unknown
from fcfunc.network import Network

PLAIN = {
    "Identity": None, "LogSigmoid": jax.nn.log_sigmoid, "LogSoftmax": "log_softmax", "Mish": jax.nn.mish,
    "ReLU": "relu", "ReLU6": jax.nn.relu6, "SELU": jax.nn.selu, "SiLU": "silu", "Sigmoid": "sigmoid",
    "Softmax": "softmax", "Softsign": jax.nn.soft_sign, "Tanh": "tanh",
}  # fmt: skip
"""The activation modules without relevant options, and their counterparts in this library."""

ADVICE = "make a torch.nn.Sequential of the layers, or name the activation of the hidden layers: activation=..."


def from_torch(
    module_or_state_dict: Any,
    *,
    activation: Any = "as given",
    final_activation: Any = None,
    norm_eps: float | None = None,
    layer_names: Sequence[str] | None = None,
) -> tuple[Network, list, Any]:
    """Converts a PyTorch module, or a state dict, to a network.

    The layers of a module are taken in the order in which they are registered. The outputs of the module, in evaluation
    mode, and of the network are compared on random rows. A leading `Flatten` is omitted.

    Args:
      module_or_state_dict: a `Sequential` or other module of `torch.nn.Linear`, `BatchNorm1d`, `LayerNorm`, `RMSNorm`,
        `Dropout` and activations; or the state dict of such a module, which does not contain the activations.
      activation, final_activation: the activations, as in `fcfunc.mlp`; they replace those of the module. `activation`
        is required for a state dict.
      norm_eps: the `eps` of the norms for a state dict; None uses PyTorch's defaults.
      layer_names: the layers of a state dict in the order in which they are applied, such as `["fc1", "norm1", "fc2"]`.
        With None, PyTorch's own state dict keeps its order, in which layers were registered. The layers of other dicts,
        such as those from a safetensors file, are sorted by number if their names differ in nothing else.

    Returns:
      `(net, params, state)`, with the outputs and gradients of the module in the dtype of its weights (float64 needs
      `jax_enable_x64`). `state` has the running statistics of batch normalization and is otherwise empty. To continue
      training as in PyTorch, pass `apply_batch_norm` a decay of 1 minus PyTorch's momentum. If only some layers have a
      bias, or a norm has no weight, zeros or ones are filled in.

    Raises:
      ValueError: a layer, or an order of layers, cannot be represented; the message names it.
      TypeError: the argument is neither a module nor a state dict; or it is a state dict, and `activation` is missing,
        or `layer_names` is missing and the order of the layers is not known.
      ImportError: PyTorch is not installed.

    Example:
      >>> import torch  # doctest: +SKIP
      >>> net, params, state = from_torch(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))  # doctest: +SKIP
    """
    where = "from_torch"
    torch = library(where, "torch", "torch")
    options = {"activation": activation, "final_activation": final_activation}
    if isinstance(module_or_state_dict, dict):
        if activation == "as given":
            raise TypeError(f"{where}: a state dict does not contain the activations; pass activation=...")
        return network_of(where, _layers_of_state_dict(where, module_or_state_dict, norm_eps, layer_names), **options)
    module = module_or_state_dict
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module or a state dict, got {type(module).__name__}")
    layers = [*_layers(where, torch, module, "")]
    _check_not_tied(where, module)
    net, params, state = network_of(where, layers, **options)

    def run(x):
        modes = {part: part.training for part in module.modules()}
        first = next(module.parameters())
        try:
            with torch.no_grad():
                rows = torch.from_numpy(np.asarray(x, np.float64)).to(first.dtype).to(first.device)
                return module.eval()(rows).to("cpu", torch.float64).numpy()
        except Exception as e:
            raise ValueError(f"{where}: the module cannot be called on [5, {net.dims[0]}] ({e!s:.120})") from None
        finally:
            for part, mode in modes.items():
                part.training = mode

    check_same(where, net, params, state, run, ADVICE)
    return net, params, state


def to_torch(net: Network, params: list, state: Any = ()) -> Any:
    """Converts a network to a `torch.nn.Sequential` with the same weights, in training mode.

    Args:
      net, params: the network and its parameters, stacked or not.
      state: the running statistics of batch normalization.

    Returns:
      The module, in the dtype of `params`.

    Raises:
      ValueError: the network has a residual connection, or an activation that PyTorch does not have.
      ImportError: PyTorch is not installed.

    Example:
      >>> to_torch(net, params)  # doctest: +SKIP
      Sequential(...)
    """
    where = "to_torch"
    torch = library(where, "torch", "torch")
    nn, modules = torch.nn, []
    for block in layers_of(where, net, params, state):
        modules.append(_linear(torch, block))
        dtype = modules[0].weight.dtype
        width = block.affine.w.shape[1]
        if block.norm is not None:
            made = {"batch_norm": nn.BatchNorm1d, "layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[block.norm.kind]
            modules.append(made(width, eps=block.norm.eps, dtype=dtype))
            values = {"weight": block.norm.scale, "bias": block.norm.offset}
            values |= {"running_mean": block.norm.mean, "running_var": block.norm.var}
            _fill(torch, modules[-1], {name: a for name, a in values.items() if a is not None})
        if block.activation is not None:
            modules.append(_activation_module(where, nn, block.activation))
        if block.rate:
            modules.append(nn.Dropout(block.rate))
    return nn.Sequential(*modules)


def _layers(where: str, torch, module, name: str):
    """The layers of a module in the order in which they are registered."""
    nn, kind = torch.nn, type(module).__name__
    here = f"{name or 'the module'}"
    if isinstance(module, nn.Linear):
        yield Affine(here, _array(module.weight).T, None if module.bias is None else _array(module.bias))
    elif isinstance(module, nn.BatchNorm1d):
        if module.running_mean is None:
            raise ValueError(f"{where}: {here}: batch normalization without running statistics cannot be represented")
        running = {"mean": _array(module.running_mean), "var": _array(module.running_var)}
        yield Norm(here, "batch_norm", _array(module.weight), _array(module.bias), module.eps, **running)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            raise ValueError(f"{where}: {here}: a norm over {list(module.normalized_shape)} cannot be represented")
        rms = isinstance(module, nn.RMSNorm)
        eps = torch.finfo(next(module.parameters(), torch.ones(())).dtype).eps if module.eps is None else module.eps
        offset = None if rms else _array(module.bias)
        yield Norm(here, "rms_norm" if rms else "layer_norm", _array(module.weight), offset, eps)
    elif isinstance(module, nn.Dropout):
        yield Dropout(here, module.p)
    elif kind in PLAIN and isinstance(module, getattr(nn, kind, ())):
        yield Activation(here, PLAIN[kind])
    elif isinstance(module, nn.LeakyReLU):
        yield Activation(here, ("leaky_relu", module.negative_slope))
    elif isinstance(module, nn.ELU):
        yield Activation(here, ("elu", module.alpha))
    elif isinstance(module, nn.GELU):
        yield Activation(here, "gelu" if module.approximate == "tanh" else "gelu_exact")
    elif isinstance(module, nn.Softplus) and module.beta == 1:
        yield Activation(here, "softplus")
    elif isinstance(module, nn.Flatten):
        return
    elif isinstance(module, nn.Sequential) or (
        [*module.children()] and not type(module).__module__.startswith("torch.nn.modules.conv")
    ):
        for child_name, child in module._modules.items():  # named_children omits a module that is used twice
            yield from _layers(where, torch, child, f"{name}.{child_name}" if name else child_name)
    elif [*module.parameters()] or type(module).__module__.startswith("torch."):
        raise unknown(where, here, kind)


def _check_not_tied(where: str, module) -> None:
    """Raises ValueError if two layers share weights, since every layer of a network has its own."""
    names: dict[int, str] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if names.setdefault(id(tensor), name) != name:
            raise ValueError(
                f"{where}: {name} and {names[id(tensor)]} are the same tensor; shared weights cannot be represented"
            )


def _layers_of_state_dict(where: str, state_dict: dict, eps: float | None, names: Sequence[str] | None):
    """The layers of a state dict in the order in which they are applied."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        groups.setdefault(prefix, {})[leaf] = value
    if names is not None:
        if sorted(names) != sorted(groups):
            raise ValueError(f"{where}: layer_names must list {', '.join(groups)!s:.120} in order, got {names!s:.120}")
        groups = {name: groups[name] for name in names}
    elif not hasattr(state_dict, "_metadata"):  # only PyTorch's own state dict has it
        groups = _by_number(where, groups)
    layers: list[Any] = []
    for prefix, leaves in groups.items():
        named, arrays = prefix or "the module", {name: _array(a) for name, a in leaves.items()}
        names, weight = arrays.keys() - {"num_batches_tracked"}, arrays.get("weight")
        if weight is not None and weight.ndim == 2 and names <= {"weight", "bias"}:
            layers.append(Affine(named, weight.T, arrays.get("bias")))
        elif {"running_mean", "running_var"} <= names <= {"weight", "bias", "running_mean", "running_var"}:
            running = {"mean": arrays["running_mean"], "var": arrays["running_var"]}
            layers.append(Norm(named, "batch_norm", weight, arrays.get("bias"), eps or 1e-5, **running))
        elif weight is not None and weight.ndim == 1 and names == {"weight", "bias"}:
            layers.append(Norm(named, "layer_norm", weight, arrays["bias"], eps or 1e-5))
        elif weight is not None and weight.ndim == 1 and names == {"weight"}:
            layers.append(Norm(named, "rms_norm", weight, None, eps or float(jnp.finfo(weight.dtype).eps)))
        else:
            shapes = {name: list(a.shape) for name, a in arrays.items()}
            raise ValueError(f"{where}: {named} with {shapes!s:.120} cannot be represented as a layer of fcfunc.mlp")
    return layers


def _by_number(where: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Sorts layers by the numbers in their names, such as `net.0` and `net.10`."""
    if len({re.sub(r"\d+", "#", name) for name in groups}) > 1:
        raise TypeError(
            f"{where}: the order of the layers {', '.join(groups)!s:.120} is not known; pass layer_names=[...]"
        )
    return dict(sorted(groups.items(), key=lambda item: [*map(int, re.findall(r"\d+", item[0]))]))


def _array(tensor) -> Any:
    """Converts a tensor, also of bfloat16, to a NumPy array; arrays from a safetensors file are unchanged."""
    if tensor is None or not hasattr(tensor, "detach"):
        return None if tensor is None else np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def _tensor(torch, a):
    if a.dtype == jnp.bfloat16:
        return torch.from_numpy(a.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(a))


def _linear(torch, block: Block):
    w, b = block.affine.w, block.affine.b
    linear = torch.nn.Linear(*w.shape, bias=b is not None, dtype=_tensor(torch, w[:0]).dtype)
    _fill(torch, linear, {"weight": w.T} | ({} if b is None else {"bias": b}))
    return linear


def _fill(torch, module, values: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, a in values.items():
            getattr(module, name).copy_(_tensor(torch, a))


def _activation_module(where: str, nn, activation: Any):
    with_options = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU}
    if isinstance(activation, tuple):
        return with_options[activation[0]](activation[1])
    simple = {
        "elu": nn.ELU, "gelu": lambda: nn.GELU(approximate="tanh"), "gelu_exact": nn.GELU, "leaky_relu": nn.LeakyReLU,
        "log_softmax": lambda: nn.LogSoftmax(-1), "softmax": lambda: nn.Softmax(-1), "softplus": nn.Softplus,
    }  # fmt: skip
    simple |= {
        value: getattr(nn, kind) for kind, value in PLAIN.items() if value not in (None, "softmax", "log_softmax")
    }
    if activation not in simple:
        raise ValueError(f"{where}: PyTorch does not have the activation {activation!r:.60}")
    return simple[activation]()
