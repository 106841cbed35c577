"""The network: `init(key, dims)` makes the params, `apply(params, x)` is the function they stand for.

A layer is `h ← f(norm(h W + b))`, then dropout, then `+ h`: of these only the affine map is always there. Layers that
are alike can be stacked and are then scanned: `stack`.
"""

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fcfunc import _arguments, _layout
from fcfunc import ops as hand_written
from fcfunc._arguments import as_array
from fcfunc._rule import accumulator

__all__ = [
    "ACTIVATIONS",
    "CONFIG",
    "NORMS",
    "Activation",
    "Params",
    "apply",
    "apply_batch_norm",
    "init",
    "init_batch_norm_state",
    "stack",
    "unstack",
]

Params = list[dict[str, jax.Array]]
Activation = str | Callable[[jax.Array], jax.Array] | None

ACTIVATIONS = (
    "elu",
    "gelu",
    "leaky_relu",
    "linear",
    "log_softmax",
    "relu",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
)
"""The names that `apply` knows; "linear", or None, is no activation."""

NORMS = {"batch_norm": ("scale", "offset"), "layer_norm": ("scale", "offset"), "rms_norm": ("scale",)}
"""The names of the norms, and the leaves that a hidden layer's params have for each."""

CONFIG = {
    "dims": list[int],
    "activation": ACTIVATIONS,
    "final_activation": (None, *ACTIVATIONS),
    "norm": (None, *NORMS),
    "residual": bool,
    "dropout_rate": (float, int),
    "compute_dtype": (None, "bfloat16", "float32"),
    "round_cotangent": bool,
    "flatten": bool,
}
"""What a saved configuration of a network may say: the options of `init` and `apply` that are plain data.

It is what `fcfunc.params_file.load` and `fcfunc.checkpoint.restore` take as `allowed`; `CONFIG | {"epochs": int}`
allows more. Names stand for functions of this package, and nothing is imported by them.
"""


class _Missing:
    """The default of `key`: None says that nothing is to be dropped, this that nothing was said."""

    def __repr__(self) -> str:
        return "<needed with dropout_rate>"


_MISSING: Any = _Missing()


def init(
    key: jax.Array,
    dims: Sequence[int],
    *,
    norm: str | None = None,
    w_init: Callable = jax.nn.initializers.he_normal(),
    b_init: Callable = jax.nn.initializers.zeros,
    param_dtype=jnp.float32,
) -> Params:
    """Parameters of a fully-connected network.

    Args:
      key: a random key, `jax.random.key(seed)`. Layer l uses `fold_in(key, l)`, so that a deeper network begins with
        the layers of a shallower one.
      dims: the widths, inputs first and outputs last: `[784, 128, 10]` is one hidden layer.
      norm: "layer_norm", "rms_norm" or "batch_norm": the hidden layers get a `scale` of ones and, but for "rms_norm",
        an `offset` of zeros. Give the same name to `apply`.
      w_init: an initialiser `(key, shape, dtype) -> array` for the weights, as in `jax.nn.initializers`. Others in use:
        `jax.nn.initializers.normal(1e-3)` (a scale times normal), `jax.nn.initializers.lecun_normal()` or
        `variance_scaling(1.0, "fan_in", "normal")` (the square root of 1/fan_in times normal).
      b_init: the same for the biases, e.g. `jax.nn.initializers.constant(0.1)`.
      param_dtype: of the parameters. Leave it at float32 and give `apply` a `compute_dtype` for mixed precision:
        updates of bfloat16 parameters round to nothing.

    Returns:
      A list with one `{"w": [fan_in, fan_out], "b": [fan_out]}` per layer.

    Raises:
      ValueError: fewer than two dims, or one that is not at least 1; an unknown norm.
      TypeError: no key, or dims that are no integers.

    Source: He et al. 2015, Delving Deep into Rectifiers, for the default weights.

    Example:
      >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [3, 4, 2]))
      [{'b': (4,), 'w': (3, 4)}, {'b': (2,), 'w': (4, 2)}]
    """
    dims = _checked_dims(dims)
    _arguments.key("init", key)
    if param_dtype is None:
        raise TypeError("init: param_dtype must be a dtype, got None")
    _arguments.dtype("init", param_dtype=param_dtype)
    options = tuple(dims), _norm_leaves("init", norm), w_init, b_init, jnp.dtype(param_dtype)
    # One compiled program starts in a third of the time of one operation at a time; a caller's own program contains it.
    # Hash: an initialiser of the caller's may have none.
    compiled = not _layout.traced(key) and all(isinstance(f, Hashable) for f in (w_init, b_init))
    return (_compiled_init if compiled else _init)(key, *options)


def _init(key, dims, leaves, w_init, b_init, param_dtype):
    params = []
    for layer, shape in enumerate(itertools.pairwise(dims)):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, layer))
        params.append({"w": w_init(w_key, shape, param_dtype), "b": b_init(b_key, shape[1:], param_dtype)})
    for p, (name, fill) in itertools.product(params[:-1], {"scale": jnp.ones, "offset": jnp.zeros}.items()):
        if name in leaves:
            p[name] = fill(p["b"].shape, param_dtype)
    return params


# XLA's lower level of optimisation compiles the random numbers in half the time, and draws them as fast.
_compiled_init = jax.jit(_init, static_argnums=(1, 2, 3, 4, 5), compiler_options={"xla_backend_optimization_level": 1})


def apply(
    params: Params,
    x: jax.Array,
    *,
    activation: Activation | list[Activation] | tuple[Activation, ...] = "relu",
    final_activation: Activation = None,
    norm: str | None = None,
    residual: bool = False,
    dropout_rate: float = 0.0,
    key: jax.Array | None = _MISSING,
    compute_dtype=None,
    round_cotangent: bool = True,
    flatten: bool = False,
    head: Callable | None = None,
    ops: ModuleType = hand_written,
) -> jax.Array:
    r"""The network's outputs: `h = x`; for each layer :math:`h ← f(h W + b)`.

    A hidden layer in full: affine, `norm`, activation, dropout, and `+ h` with `residual`. Without a norm, affine and
    activation are the one rule `ops.layer`, which saves the least for the backward pass.

    Args:
      params: from `init`, or any list of `{"w", "b"}`. A hidden layer with `w` `[layers, width, width]` stands for as
        many layers, and is scanned: see `stack`.
      x: inputs, `[..., dims[0]]`; with `flatten=True` `[batch, d1, ..., dk]` with as many features in all. In the dtype
        of the params, unless `compute_dtype` is given.
      activation: after each layer but the last: a name in `ACTIVATIONS`, a function of an array, or a list of
        these, one per hidden layer. A function of this package with options, `functools.partial(ops.elu, alpha=0.5)`,
        counts as its name. Any other function, `lambda z: ops.gelu(z)` too, is differentiated apart from its affine
        map, which trades the memory of the pre-activation for the product that "gelu" and "silu" compute again.
      final_activation: after the last layer; None, the default, leaves it linear, as the losses on logits want it.
      norm: "layer_norm" or "rms_norm", in the hidden layers, whose params have a `scale` (and `offset`); None: no norm.
        "batch_norm" has a state: `apply_batch_norm`.
      residual: add its input to a hidden layer's output where their widths are equal.
      dropout_rate: the probability to drop each output of a hidden layer.
      key: with a `dropout_rate` above 0: a random key in training, and None, given as such, where nothing is to be
        dropped. Hidden layer l uses `fold_in(key, l)`.
      compute_dtype: of the operands of every product, forward and backward, and of what is kept between layers:
        "bfloat16" beside float32 params is mixed precision. The sums are in float32, the gradients in the params'
        dtype. Float16 is not offered: it needs its loss scaled, bfloat16 does not.
      round_cotangent: as for `ops.affine`.
      flatten: every axis of `x` after the first is features, as for images.
      head: what is done with the last layer, `(h, w, b) -> result`, instead of its affine map. A large output layer
        with its loss is `functools.partial(losses.linear_softmax_cross_entropy, labels=labels)`.
      ops: where the operations are looked up by name. `fcfunc.ops`, the default, has hand-written backward rules;
        with `fcfunc.reference` the whole network is plain JAX, and forward mode (`jax.jvp`, `jax.jacfwd`) works. One
        of your own needs `affine` and what is used besides; a `layer` in it goes before its `affine` and activation.

    Returns:
      `[..., dims[-1]]`, in the dtype of `x`, with `compute_dtype` in at least float32; with `head` what it returns.

    Raises:
      ValueError: a width that does not fit, naming the layer and both shapes; an unknown activation or norm, or a wrong
        number of activations; a norm whose params are missing, or params of a norm that is not asked for.
      TypeError: `x` and the params are not of one floating-point dtype; no key where one is needed.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 2])
      >>> apply(params, jnp.ones((5, 3)), activation="tanh").shape
      (5, 2)
    """
    if norm == "batch_norm":
        raise ValueError("apply: batch_norm has a state; use apply_batch_norm(params, state, x, training=...)")
    _check_list("apply", params)
    net = _Network("apply", norm, residual, dropout_rate, key, compute_dtype, round_cotangent, ops)
    state = [None] * (len(params) - 1)
    return _apply(net, params, state, x, activation, final_activation, flatten, head)[0]


def apply_batch_norm(
    params: Params,
    state: list[dict[str, jax.Array]],
    x: jax.Array,
    *,
    training: bool,
    decay: float = 0.9,
    activation: Activation | list[Activation] | tuple[Activation, ...] = "relu",
    final_activation: Activation = None,
    residual: bool = False,
    dropout_rate: float = 0.0,
    key: jax.Array | None = _MISSING,
    compute_dtype=None,
    round_cotangent: bool = True,
    flatten: bool = False,
    head: Callable | None = None,
    ops: ModuleType = hand_written,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """As `apply`, with batch normalisation in the hidden layers: the running statistics go in and come out.

    Args:
      params: from `init(key, dims, norm="batch_norm")`.
      state: from `init_batch_norm_state(params)`, or as it came back from the last step.
      x: as for `apply`.
      training: whether the batch is normalised by its own statistics and moves the running ones.
      decay: how much of the running statistics stays in a step.
      activation: as for `apply`.
      final_activation: as for `apply`.
      residual: as for `apply`.
      dropout_rate: as for `apply`.
      key: as for `apply`.
      compute_dtype: as for `apply`.
      round_cotangent: as for `apply`.
      flatten: as for `apply`.
      head: as for `apply`.
      ops: as for `apply`.

    Returns:
      `(outputs, state)`. A loss function that is differentiated returns the state beside the loss, as
      `jax.value_and_grad(..., has_aux=True)` has it.

    Raises:
      ValueError: as for `apply`; a state that does not fit the params; a training batch of fewer than two rows.
      TypeError: as for `apply`.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 2], norm="batch_norm")
      >>> outputs, state = apply_batch_norm(params, init_batch_norm_state(params), jnp.ones((5, 3)), training=True)
      >>> outputs.shape
      (5, 2)
    """
    _check_list("apply_batch_norm", params)
    if not isinstance(state, list | tuple):
        raise TypeError(f"apply_batch_norm: state must be a list, as from init_batch_norm_state, got {state!r:.80}")
    if len(state) != len(params) - 1:
        raise ValueError(
            f"apply_batch_norm: {len(params) - 1} states expected, one per hidden entry of params, got {len(state)}"
        )
    net = _Network(
        "apply_batch_norm",
        "batch_norm",
        residual,
        dropout_rate,
        key,
        compute_dtype,
        round_cotangent,
        ops,
        training,
        decay,
    )
    return _apply(net, params, state, x, activation, final_activation, flatten, head)


def init_batch_norm_state(params: Params) -> list[dict[str, jax.Array]]:
    """The running statistics of `apply_batch_norm` before the first step: mean 0, variance 1.

    Args:
      params: from `init(key, dims, norm="batch_norm")`, stacked or not.

    Returns:
      A list with one `{"mean", "var"}` per hidden layer, in at least float32, in the shapes of the biases.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 2], norm="batch_norm")
      >>> jax.tree.map(jnp.shape, init_batch_norm_state(params))
      [{'mean': (4,), 'var': (4,)}]
    """
    _check_list("init_batch_norm_state", params)
    return [
        {name: fill(p["b"].shape, accumulator(p["b"].dtype)) for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))}
        for p in params[:-1]
    ]


def stack(params: Params) -> Params:
    """Params whose runs of alike hidden layers are stacked, so that `apply` scans them.

    A scanned run is compiled once, however long it is, and its backward pass keeps what the rules save, nothing else.

    Args:
      params: from `init`; layers are alike where their leaves have the same names, shapes and dtypes. The last layer
        stays apart.

    Returns:
      A list in which a run of two or more is one dict, each leaf with a first axis more: `w` `[layers, width, width]`.

    Raises:
      ValueError: no layers, or an ensemble of networks: `jax.vmap(stack)` stacks the layers of each.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 4, 4, 4, 2])
      >>> jax.tree.map(jnp.shape, stack(params))[1]
      {'b': (3, 4), 'w': (3, 4, 4)}
    """
    _check_stackable("stack", params)
    stacked = []
    for _, run in itertools.groupby(params[:-1], key=_likeness):
        layers = list(run)
        square = len(set(layers[0]["w"].shape)) == 1 and layers[0]["w"].ndim == 2
        stacked += [jax.tree.map(lambda *a: jnp.stack(a), *layers)] if len(layers) > 1 and square else layers
    return [*stacked, params[-1]]


def unstack(params: Params) -> Params:
    """The inverse of `stack`: one dict per layer.

    Args:
      params: from `stack`, or any params.

    Returns:
      A list of `{"w": [fan_in, fan_out], ...}`.

    Raises:
      ValueError: no layers, or an ensemble of networks: `jax.vmap(unstack)` unstacks the layers of each.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 4, 4, 4, 2])
      >>> len(unstack(stack(params)))
      5
    """
    _check_stackable("unstack", params)
    layers = []
    for p in params:
        layers += [p] if p["w"].ndim == 2 else [jax.tree.map(lambda a, i=i: a[i], p) for i in range(len(p["w"]))]
    return layers


class _Network(NamedTuple):
    """What all hidden layers share."""

    where: str
    norm: str | None
    residual: bool
    rate: float
    key: Any
    compute_dtype: Any
    round_cotangent: bool
    ops: ModuleType
    training: bool = False
    decay: float = 0.9


class _Resolved(NamedTuple):
    """An activation: the function, its name where the rule of a layer knows it, and its options."""

    function: Callable
    name: str | None
    options: dict


def _apply(net: _Network, params, state, x, activation, final_activation, flatten, head):
    _check_layers(net, params, state, x, flatten)
    params, x = jax.tree.map(as_array, (params, x))
    if not 0 <= _arguments.number(net.where, dropout_rate=net.rate) <= 1:
        raise ValueError(f"{net.where}: dropout_rate must be in [0, 1], got {net.rate}")
    if net.key is not _MISSING and net.key is not None:
        _arguments.key(net.where, net.key)
    if net.rate and net.key is _MISSING:
        raise TypeError(
            f"{net.where}: dropout_rate {net.rate} needs key: a random key in training, or None to drop nothing"
        )
    if head is not None and final_activation is not None:
        raise ValueError(f"{net.where}: head takes the place of the last layer; final_activation must be None")
    depths = [len(p["w"]) if p["w"].ndim == 3 else 1 for p in params[:-1]]
    resolved = _activations(net, activation, sum(depths))
    final = _resolve(net, final_activation)
    if flatten:
        x = x.reshape(x.shape[0], -1)
    layer, new_state = 0, []
    for p, s, depth in zip(params[:-1], state, depths, strict=True):
        run = resolved[layer : layer + depth]
        if p["w"].ndim == 3:
            if any(f != run[0] for f in run):
                raise ValueError(f"{net.where}: the {depth} layers of one stack must have one activation")
            x, s = _scan(net, p, s, x, run[0], layer)
        else:
            x, s = _hidden(net, p, s, x, run[0], layer)
        new_state.append(s)
        layer += depth
    w, b = params[-1]["w"], params[-1]["b"]
    if head is not None:
        return head(x, w, b), new_state
    wide: dict[str, Any] = {}
    if net.compute_dtype is not None:
        wide["out_dtype"] = accumulator(jnp.dtype(net.compute_dtype))
    return _affine_then(net, final, x, w, b, **wide), new_state


def _hidden(net: _Network, p, state, x, activation: _Resolved, layer, *, stacked=False):
    """One hidden layer, and its running statistics."""
    if net.norm is None:
        # In one program the output is the next layer's input, and kept; not so in a scan, nor if more is done with it.
        pack = stacked or net.residual or bool(net.rate and net.key is not None)
        y = _affine_then(net, activation, x, p["w"], p["b"], pack=pack)
    else:
        leaves = (p[name] for name in NORMS[net.norm])
        z = net.ops.affine(x, p["w"], p["b"], **_products(net))
        if net.norm == "batch_norm":
            z, state = net.ops.batch_norm(z, *leaves, state, training=net.training, decay=net.decay)
        else:
            z = getattr(net.ops, net.norm)(z, *leaves)
        y = activation.function(z, **activation.options)
    if y.shape != (*x.shape[:-1], p["w"].shape[-1]):
        expected = [*x.shape[:-1], p["w"].shape[-1]]
        raise ValueError(f"{net.where}: a hidden activation must keep the shape {expected}, got {list(y.shape)}")
    y = y.astype(
        x.dtype if net.compute_dtype is None else net.compute_dtype
    )  # whatever a function of the caller's gave
    if net.rate and net.key is not None:
        y = net.ops.dropout(y, rate=net.rate, key=jax.random.fold_in(net.key, layer))
    if net.residual and x.shape[-1] == y.shape[-1]:
        y = x.astype(y.dtype) + y
    return y, state


def _scan(net: _Network, p, state, x, activation: _Resolved, first):
    """As many hidden layers as `p` holds, by a scan: compiled once, and free of what a rule does not save."""

    def step(x, slices):
        y, state = _hidden(net, slices[0], slices[1], x, activation, slices[2], stacked=True)
        return _layout.laid_like(y, x), state  # a layer divided by columns, or by rows, lays its output otherwise

    if net.compute_dtype is not None:
        x = x.astype(net.compute_dtype)
    return jax.lax.scan(step, x, (p, state, first + jnp.arange(len(p["w"]))))


def _affine_then(net: _Network, activation: _Resolved, x, w, b, *, pack=True, **options):
    options |= _products(net)
    if activation.name is not None and hasattr(net.ops, "layer"):
        options |= {"pack": pack} if net.ops is hand_written else {}
        return net.ops.layer(x, w, b, activation=activation.name, **activation.options, **options)
    return activation.function(net.ops.affine(x, w, b, **options), **activation.options)


def _products(net: _Network) -> dict:
    """The options of every product; the defaults are left out, which a namespace of one's own need not know."""
    options = {} if net.compute_dtype is None else {"compute_dtype": jnp.dtype(net.compute_dtype).name}
    return options if net.round_cotangent else options | {"round_cotangent": False}


def _likeness(p):
    return {name: (leaf.shape, leaf.dtype) for name, leaf in p.items()}


def _check_stackable(where: str, params) -> None:
    _check_list(where, params)
    if not all(isinstance(p, dict) and "w" in p for p in params):
        raise TypeError(f"{where}: params as from init expected, a list of dicts with w and b, got {params!r:.80}")
    if jnp.ndim(params[-1]["w"]) != 2:
        raise ValueError(
            f"{where}: the last layer's w must be [fan_in, fan_out], got {list(jnp.shape(params[-1]['w']))}; "
            f"for an ensemble of networks take jax.vmap({where})"
        )


def _check_list(where: str, params) -> None:
    if not isinstance(params, list | tuple):
        raise TypeError(f"{where}: params must be a list of layers, as from init, got {type(params).__name__}")
    if not params:
        raise ValueError(f"{where}: params must be a list of at least one layer, got {params!r}")


def _norm_leaves(where: str, norm: str | None) -> tuple[str, ...]:
    if norm is not None and (not isinstance(norm, str) or norm not in NORMS):
        raise ValueError(f"{where}: unknown norm {norm!r}; known are {', '.join(NORMS)}")
    return NORMS[norm] if norm else ()


def _checked_dims(dims) -> list[int]:
    try:
        checked = [operator.index(d) for d in dims]
    except TypeError:
        raise TypeError(f"init: dims must be a sequence of integers, got {dims!r}") from None
    if len(checked) < 2 or min(checked) < 1:
        raise ValueError(f"init: dims must be at least two widths, each at least 1, got {checked}")
    return checked


def _activations(net: _Network, activation, count: int) -> list[_Resolved]:
    if not isinstance(activation, list | tuple):
        return [_resolve(net, activation)] * count
    if len(activation) != count:
        raise ValueError(f"{net.where}: {count} activations expected, one per hidden layer, got {len(activation)}")
    return [_resolve(net, a) for a in activation]


def _resolve(net: _Network, activation: Activation) -> _Resolved:
    if activation is None or activation == "linear":
        return _Resolved(_identity, None, {})
    options = {}
    if isinstance(activation, functools.partial) and not activation.args:
        options, function = activation.keywords, activation.func
    else:
        function = activation
    name = getattr(function, "__name__", None) if callable(function) else function
    if callable(function) and (name not in ACTIVATIONS or function is not getattr(hand_written, name, None)):
        return _Resolved(activation, None, {})  # type: ignore[arg-type]
    if name not in ACTIVATIONS:
        raise ValueError(f"{net.where}: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    for option in options.keys() - inspect.signature(getattr(hand_written, name)).parameters.keys():
        raise ValueError(f"{net.where}: {name} has no option {option!r}")
    return _Resolved(getattr(net.ops, name), name, options)


def _identity(x):
    return x


def _check_layers(net: _Network, params, state, x, flatten: bool) -> None:
    where = net.where
    _arguments.floating(where, x=x)
    _check_list(where, params)
    if jnp.ndim(x) < 1:
        raise ValueError(f"{where}: x must be [..., fan_in], got a scalar")
    leaves = _norm_leaves(where, net.norm)
    shape = jnp.shape(x)
    width = math.prod(shape[1:]) if flatten else shape[-1]
    came = f"x {list(shape)}"
    for layer, p in enumerate(params):
        # An entry is a layer, unless one before it is a stack: then it is not the layer of that number.
        stacks = any(jnp.ndim(q["w"]) == 3 for q in params[:layer])
        here, hidden = f"{where}, {'entry' if stacks else 'layer'} {layer}", layer < len(params) - 1
        if not isinstance(p, dict) or not {"w", "b"} <= p.keys():
            raise TypeError(f"{here}: a dict of w and b expected, got {p!r:.80}")
        _arguments.array(here, **p)
        w, b = jnp.shape(p["w"]), jnp.shape(p["b"])
        stacked = len(w) == 3 and hidden
        if stacked and (w[0] < 1 or w[1:] != (width, width) or b != (w[0], width)):
            raise ValueError(
                f"{here}: stacked w [layers, {width}, {width}] and b [layers, {width}] expected to follow {came}, "
                f"got w {list(w)} and b {list(b)}"
            )
        if not stacked and (len(w) != 2 or w[0] != width or b != w[1:]):
            raise ValueError(
                f"{here}: w [{width}, fan_out] and b [fan_out] expected to follow {came}, "
                f"got w {list(w)} and b {list(b)}"
            )
        _arguments.operands(here, net.compute_dtype, x=x, w=p["w"], b=p["b"])
        used = ("w", "b", *leaves) if hidden else ("w", "b")
        for name in used:
            if name not in p:
                raise ValueError(f"{here}: {net.norm} needs the leaf {name!r}; init(..., norm={net.norm!r}) makes it")
            if name != "w" and jnp.shape(p[name]) != b:
                raise ValueError(f"{here}: {name} {list(b)} expected, got {list(jnp.shape(p[name]))}")
        for name in p.keys() - set(used):
            raise ValueError(f"{here}: the params have a leaf {name!r}, which is not used with norm={net.norm!r}")
        _arguments.one_dtype(here, **{name: p[name] for name in used})
        if hidden and net.norm == "batch_norm":
            _check_state(here, state[layer], b)
        width, came = w[-1], f"layer {layer}'s w {list(w)}"


def _check_state(here: str, state, shape) -> None:
    if not isinstance(state, dict) or state.keys() != {"mean", "var"}:
        raise TypeError(f"{here}: a state of mean and var expected, got {state!r:.80}")
    for name, a in state.items():
        if jnp.shape(a) != shape:
            raise ValueError(f"{here}: {name} {list(shape)} expected in the state, got {list(jnp.shape(a))}")
