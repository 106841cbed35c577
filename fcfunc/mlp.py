"""The network: `init(key, dims)` makes the params, `apply(params, x)` is the function they stand for."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp

from fcfunc import _check
from fcfunc import ops as hand_written

__all__ = ["ACTIVATIONS", "Activation", "Params", "apply", "init"]

Params = list[dict[str, jax.Array]]
Activation = str | Callable[[jax.Array], jax.Array] | None

ACTIVATIONS = ("linear", "log_softmax", "relu", "sigmoid", "softmax", "tanh")
"""The names that `apply` knows; "linear", or None, is no activation."""


def init(
    key: jax.Array,
    dims: Sequence[int],
    *,
    w_init: Callable = jax.nn.initializers.he_normal(),
    b_init: Callable = jax.nn.initializers.zeros,
    dtype=jnp.float32,
) -> Params:
    """Parameters of a fully-connected network.

    Args:
      key: a random key, `jax.random.key(seed)`. Layer l uses `fold_in(key, l)`, so that a deeper network begins with
        the layers of a shallower one.
      dims: the widths, inputs first and outputs last: `[784, 128, 10]` is one hidden layer.
      w_init: an initialiser `(key, shape, dtype) -> array` for the weights, as in `jax.nn.initializers`. Others in use:
        `jax.nn.initializers.normal(1e-3)` (a scale times normal), `jax.nn.initializers.lecun_normal()` or
        `variance_scaling(1.0, "fan_in", "normal")` (the square root of 1/fan_in times normal).
      b_init: the same for the biases, e.g. `jax.nn.initializers.constant(0.1)`.
      dtype: of the parameters.

    Returns:
      A list with one `{"w": [fan_in, fan_out], "b": [fan_out]}` per layer.

    Raises:
      ValueError: fewer than two dims, or one that is not at least 1.
      TypeError: no key, or dims that are no integers.

    Source: He et al. 2015, Delving Deep into Rectifiers, for the default weights.

    Example:
      >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [3, 4, 2]))
      [{'b': (4,), 'w': (3, 4)}, {'b': (2,), 'w': (4, 2)}]
    """
    dims = _checked_dims(dims)
    _check.key("init", key)
    params = []
    for layer, shape in enumerate(itertools.pairwise(dims)):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, layer))
        params.append({"w": w_init(w_key, shape, dtype), "b": b_init(b_key, shape[1:], dtype)})
    return params


def apply(
    params: Params,
    x: jax.Array,
    *,
    activation: Activation | list[Activation] | tuple[Activation, ...] = "relu",
    final_activation: Activation = None,
    flatten: bool = False,
    ops: ModuleType = hand_written,
) -> jax.Array:
    r"""The network's outputs: `h = x`; for each layer :math:`h ← f(h W + b)`.

    Args:
      params: from `init`, or any list of `{"w", "b"}`.
      x: inputs, `[..., dims[0]]`; with `flatten=True` `[batch, d1, ..., dk]` with as many features in all. In the dtype
        of the params.
      activation: after each layer but the last: a name in `ACTIVATIONS`, a function of an array, or a list of
        these, one per hidden layer.
      final_activation: after the last layer; None, the default, leaves it linear, as the losses on logits want it.
      flatten: every axis of `x` after the first is features, as for images.
      ops: where the operations are looked up by name. `fcfunc.ops`, the default, has hand-written backward rules;
        with `fcfunc.reference` the whole network is plain JAX, and forward mode (`jax.jvp`, `jax.jacfwd`) works.

    Returns:
      `[..., dims[-1]]`, in the dtype of `x`.

    Raises:
      ValueError: a width that does not fit, naming the layer and both shapes; an unknown activation, or a wrong number
        of them.
      TypeError: `x` and the params are not of one floating-point dtype.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 2])
      >>> apply(params, jnp.ones((5, 3)), activation="tanh").shape
      (5, 2)
    """
    hidden = _activations(activation, len(params) - 1, ops)
    final = _activation(final_activation, ops)
    _check_layers(params, x, flatten)
    for layer, (p, f) in enumerate(zip(params, [*hidden, final], strict=True)):
        x = f(ops.affine(x, p["w"], p["b"], flatten=flatten and layer == 0))
    return x


def _checked_dims(dims) -> list[int]:
    try:
        checked = [operator.index(d) for d in dims]
    except TypeError:
        raise TypeError(f"init: dims must be a sequence of integers, got {dims!r}") from None
    if len(checked) < 2 or min(checked) < 1:
        raise ValueError(f"init: dims must be at least two widths, each at least 1, got {checked}")
    return checked


def _activations(activation, count: int, ops: ModuleType) -> list[Callable]:
    if not isinstance(activation, list | tuple):
        return [_activation(activation, ops)] * count
    if len(activation) != count:
        raise ValueError(f"apply: {count} activations expected, one per hidden layer, got {len(activation)}")
    return [_activation(a, ops) for a in activation]


def _activation(activation: Activation, ops: ModuleType) -> Callable:
    if callable(activation):
        return activation
    if activation is None or activation == "linear":
        return lambda x: x
    if activation not in ACTIVATIONS:
        raise ValueError(f"apply: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    return getattr(ops, activation)


def _check_layers(params, x, flatten: bool) -> None:
    _check.floating("apply", x=x)
    if not params:
        raise ValueError("apply: params must hold at least one layer, got none")
    if jnp.ndim(x) < 1:
        raise ValueError("apply: x must be [..., fan_in], got a scalar")
    shape = jnp.shape(x)
    width = math.prod(shape[1:]) if flatten else shape[-1]
    came = f"x {list(shape)}"
    for layer, p in enumerate(params):
        if not isinstance(p, dict) or not {"w", "b"} <= p.keys():
            raise TypeError(f"apply, layer {layer}: a dict of w and b expected, got {p!r:.80}")
        _check.array(f"apply, layer {layer}", w=p["w"], b=p["b"])
        w, b = jnp.shape(p["w"]), jnp.shape(p["b"])
        if len(w) != 2 or w[0] != width or b != w[1:]:
            raise ValueError(
                f"apply, layer {layer}: w [{width}, fan_out] and b [fan_out] expected to follow {came}, "
                f"got w {list(w)} and b {list(b)}"
            )
        _check.one_dtype(f"apply, layer {layer}", x=x, w=p["w"], b=p["b"])
        width, came = w[1], f"layer {layer}'s w {list(w)}"
