"""Networks: a `Network` describes the layers, and its methods take the parameters as an argument.

A layer computes `h ← f(norm(h W + b))`, followed by dropout and `+ h`; everything but the affine map is optional.
Identical hidden layers can be stacked (see `stack`) and then run under `lax.scan`.
"""

from __future__ import annotations  # short signatures in help()

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _layout, ops, per_example, reference
from fcfunc._arguments import as_array
from fcfunc._compiler_options import quick_options
from fcfunc._rule import sum_dtype, upcast
from fcfunc.ops._layer import packed_layer

Params = list[dict[str, jax.Array]]
Activation = str | tuple[str, float] | Callable[[jax.Array], jax.Array] | None

NORMS = {"batch_norm": ("scale", "offset"), "layer_norm": ("scale", "offset"), "rms_norm": ("scale",)}
"""The leaves that each norm adds to the params of a hidden layer."""

NAMES = ("elu", "gelu", "leaky_relu", "log_softmax", "relu", "sigmoid", "silu", "softmax", "softplus", "tanh")
ACTIVATIONS = {name: (name, {}) for name in NAMES} | {"gelu_exact": ("gelu", {"approximate": False})}
"""The operation and its options for each activation name."""

PROBED = ("affine", "norm")
"""The values of a layer whose cotangents are needed for the gradients of its parameters."""

NUMBERS = {"elu": "alpha", "leaky_relu": "negative_slope"}
"""The option that is set by the number in a pair such as `("elu", 0.5)`."""

NAMESPACES = {"ops": ops, "reference": reference}
HE_NORMAL, ZEROS = jax.nn.initializers.he_normal(), jax.nn.initializers.zeros


class _Missing:
    """The default of `key`. None means "no dropout", so a missing key needs a separate value."""

    def __repr__(self) -> str:
        return "<required with dropout>"


_MISSING: Any = _Missing()


@dataclasses.dataclass(frozen=True)
class Network:
    """A fully-connected network without its parameters, as returned by `fcfunc.mlp`.

    It is hashable, compares by value and is not a pytree: close over it, or pass it as a static argument. `print(net)`
    shows the layers.
    """

    dims: tuple[int, ...]
    _: dataclasses.KW_ONLY
    activation: Activation | tuple[Activation, ...] = "relu"
    final_activation: Activation = None
    norm: str | None = None
    norm_eps: float | None = None
    residual: bool = False
    dropout_rate: float = 0.0
    use_bias: bool = True
    compute_dtype: str | None = None
    ops: str = "ops"

    def __post_init__(self):
        try:
            if isinstance(self.dims, str | bytes | dict) or any(isinstance(d, bool) for d in self.dims):
                raise TypeError
            dims = tuple(operator.index(d) for d in self.dims)
        except TypeError:
            given = _arguments.describe(self.dims) if hasattr(self.dims, "dtype") else f"{self.dims!r:.80}"
            raise TypeError(f"mlp: dims must be a sequence of integers, got {given}") from None
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"mlp: dims must be at least two widths, each at least 1, got {list(dims)!s:.80}")
        names = [name for name, module in NAMESPACES.items() if self.ops is module or self.ops == name]
        if not names:
            error = ValueError if isinstance(self.ops, str) else TypeError
            raise error(f"mlp: ops must be fcfunc.ops or fcfunc.reference, got {self.ops!r:.80}")
        eps, dtype = self.norm_eps, self.compute_dtype
        valid = {
            "dims": dims,
            "activation": _checked_activations(self.activation, len(dims) - 2),
            "final_activation": _checked_activation("final_activation", self.final_activation),
            "norm_eps": None if eps is None else _arguments.number("mlp", norm_eps=eps),
            "dropout_rate": _arguments.number("mlp", dropout_rate=self.dropout_rate),
            "compute_dtype": None if dtype is None else _arguments.compute_dtype_of("mlp", dtype).name,
            "ops": names[0],
        }
        for name, value in valid.items():
            object.__setattr__(self, name, value)
        if self.norm is not None and (not isinstance(self.norm, str) or self.norm not in NORMS):
            raise ValueError(f"mlp: unknown norm {self.norm!r:.80}; known are {', '.join(NORMS)}")
        if self.norm_eps is not None and self.norm is None:
            raise ValueError(f"mlp: norm_eps needs a norm, got {self.norm_eps} without one")
        if self.norm_eps is not None and not 0 < self.norm_eps < math.inf:
            raise ValueError(f"mlp: norm_eps must be above 0 and finite, got {self.norm_eps}")
        if not 0 <= self.dropout_rate <= 1:
            raise ValueError(f"mlp: dropout_rate must be in [0, 1], got {self.dropout_rate}")
        _arguments.boolean("mlp", residual=self.residual, use_bias=self.use_bias)

    def __str__(self) -> str:
        values = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)[1:]]
        options = [f", {field.name}={_shown(value)}" for field, value in values if value != field.default]
        rows, total = [("layer", "params", "count", "bytes")], 0
        for i in range(len(self.dims) - 1):
            shapes = self._shapes(i)
            count = sum(map(math.prod, shapes.values()))
            leaves = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            rows.append((str(i), leaves, f"{count:,}", f"{4 * count:,}"))
            total += count
        rows.append(("total", "", f"{total:,}", f"{4 * total:,} in float32"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
        return "\n".join([f"mlp({list(self.dims)}{''.join(options)})", *lines])

    def to_dict(self) -> dict[str, Any]:
        """The network as plain data: `fcfunc.mlp(**net.to_dict())` equals `net`, even after a JSON round trip.

        Raises:
          TypeError: an activation is a function, which cannot be saved.

        Example:
          >>> mlp(**mlp([3, 4, 2], activation=("elu", 0.5)).to_dict()).activation
          ('elu', 0.5)
        """

        def plain(value):
            if callable(value):
                name = _shown(value)
                advice = f"use its name, {name!r}" if name in ACTIVATIONS else "give it to mlp again after loading"
                raise TypeError(f"to_dict: the activation {name} is a function, which cannot be saved; {advice}")
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def init(
        self,
        key: jax.Array,
        *,
        w_init: Callable | None = None,
        b_init: Callable | None = None,
        param_dtype: Any = "float32",
    ) -> Params:
        """Initializes the parameters.

        Args:
          key: a random key, `jax.random.key(seed)`. Layer l uses `fold_in(key, l)`, so a deeper network starts with
            the same layers as a shallower one.
          w_init: an initializer `(key, shape, dtype) -> array` for the weights, such as
            `jax.nn.initializers.lecun_normal()`; None: `he_normal()`.
          b_init: the same for the biases, such as `jax.nn.initializers.constant(0.1)`; None: zeros.
          param_dtype: dtype of the parameters. For mixed precision, leave it at float32 and use `compute_dtype`:
            small updates of bfloat16 parameters are lost to rounding.

        Returns:
          A list with one `{"w": [fan_in, fan_out], "b": [fan_out]}` per layer, without "b" if `use_bias=False`. With a
          norm, hidden layers also have a `scale` of ones and, except for "rms_norm", an `offset` of zeros.

        Raises:
          TypeError: `key` is not a random key, or `param_dtype` is not a floating-point dtype.

        Source: He et al. 2015, Delving Deep into Rectifiers, for the default weights.

        Example:
          >>> jax.tree.map(jnp.shape, mlp([3, 4, 2]).init(jax.random.key(0)))
          [{'b': (4,), 'w': (3, 4)}, {'b': (2,), 'w': (4, 2)}]
        """
        _arguments.key("init", key)
        if param_dtype is None:
            raise TypeError("init: param_dtype must be a dtype, got None")
        _arguments.dtype("init", param_dtype=param_dtype)
        w_init, b_init = HE_NORMAL if w_init is None else w_init, ZEROS if b_init is None else b_init
        _arguments.function("init", w_init=w_init, b_init=b_init)
        shapes = tuple(tuple(self._shapes(i).items()) for i in range(len(self.dims) - 1))
        # One compiled program starts in a third of the time that separate operations take. Under a caller's jit, the
        # caller's program contains it. A caller's initializer may not be hashable.
        compiled = not _layout.is_tracer(key) and all(isinstance(f, Hashable) for f in (w_init, b_init))
        return (_compiled_init() if compiled else _init)(key, shapes, w_init, b_init, jnp.dtype(param_dtype))

    def apply(self, params: Params, x: jax.Array, *, key: jax.Array | None = _MISSING) -> jax.Array:
        """Computes the outputs of the network.

        Args:
          params: from `init`, or any list of dicts of these shapes. A hidden layer with `w` `[layers, width, width]`
            represents that many layers and is scanned; see `fcfunc.stack`.
          x: inputs, `[..., dims[0]]`, in the dtype of the params unless the network has a `compute_dtype`.
          key: required if `dropout_rate` is above 0: a random key in training, None to disable dropout. Hidden layer l
            uses `fold_in(key, l)`.

        Returns:
          `[..., dims[-1]]`, in the dtype of `x`; with `compute_dtype` in at least float32.

        Raises:
          ValueError: the shapes of the params or `x` do not fit (the message names the layer); the network has batch
            normalization and therefore a state: use `apply_batch_norm`.
          TypeError: `x` and the params do not share one floating-point dtype; a required key is missing.

        Example:
          >>> net = mlp([3, 4, 2], activation="tanh")
          >>> net.apply(net.init(jax.random.key(0)), jnp.ones((5, 3))).shape
          (5, 2)
        """
        return self._last_layer(params, self._hidden_layers("apply", params, x, key)[0])

    def features(self, params: Params, x: jax.Array, *, key: jax.Array | None = _MISSING) -> jax.Array:
        """Computes the input of the last layer, for losses that include it, such as `linear_softmax_cross_entropy`.

        Args:
          params, x, key: see `apply`.

        Returns:
          `[..., dims[-2]]`, in the dtype of `x` or, with hidden layers, in `compute_dtype`.

        Example:
          >>> net = mlp([3, 4, 2])
          >>> net.features(net.init(jax.random.key(0)), jnp.ones((5, 3))).shape
          (5, 4)
        """
        return self._hidden_layers("features", params, x, key)[0]

    def apply_batch_norm(
        self,
        params: Params,
        state: list[dict[str, jax.Array]],
        x: jax.Array,
        *,
        training: bool,
        decay: float = 0.9,
        unbiased_variance: bool = True,
        key: jax.Array | None = _MISSING,
    ) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
        """Computes the outputs of a network with `norm="batch_norm"` and its new running statistics.

        Args:
          params, x, key: see `apply`.
          state: from `init_batch_norm_state(params)`, or as returned by the previous step.
          training: True to normalize the batch by its own statistics and update the running ones.
          decay, unbiased_variance: see `fcfunc.ops.batch_norm`.

        Returns:
          `(outputs, state)`. A loss function to be differentiated returns the loss and the state, as
          `jax.value_and_grad(..., has_aux=True)` expects.

        Raises:
          ValueError: see `apply`; the state does not fit the params; a training batch has fewer than two rows.
          TypeError: see `apply`.

        Example:
          >>> net = mlp([3, 4, 2], norm="batch_norm")
          >>> params = net.init(jax.random.key(0))
          >>> state = net.init_batch_norm_state(params)
          >>> outputs, state = net.apply_batch_norm(params, state, jnp.ones((5, 3)), training=True)
          >>> outputs.shape
          (5, 2)
        """
        where = "apply_batch_norm"
        if self.norm != "batch_norm":
            raise ValueError(f"{where}: the network has norm={self.norm!r}; use apply(params, x)")
        if not isinstance(state, list | tuple):
            raise TypeError(f"{where}: state must be a list, as from init_batch_norm_state, got {state!r:.80}")
        options = {"training": training, "decay": decay, "unbiased_variance": unbiased_variance}
        h, state = self._hidden_layers(where, params, x, key, state=state, **options)
        return self._last_layer(params, h), state

    def example_gradients(
        self, params: Params, x: jax.Array, loss_fn: Callable, *, key: jax.Array | None = _MISSING
    ) -> tuple[jax.Array, list[dict[str, Any]]]:
        """Computes per-example losses and factored gradients from one backward pass.

        The gradient of one example's loss with respect to the weights of a layer is the outer product of the layer's
        input and the cotangent of its affine output. The two factors are returned instead of the product;
        `fcfunc.per_example` has functions that work with them.

        Args:
          params, key: see `apply`.
          x: inputs, `[batch, dims[0]]`.
          loss_fn: `loss_fn(outputs) -> losses`, `[batch]`; each loss must depend only on its own row of the outputs.

        Returns:
          `(losses, gradients)`. The gradients have the structure of `params`, with `per_example.Outer` for `w` and
          `per_example.Rows` for the other leaves. They are gradients of the individual losses, not of their mean.

        Raises:
          ValueError: `x` is not `[batch, dims[0]]`; `loss_fn` does not return one loss per example, or a loss depends
            on other examples (in a compiled function, its gradient is NaN instead); the network has batch
            normalization, which mixes examples; see also `apply`.
          TypeError: see `apply`.

        Source: derived in docs/background/derivations.md#gradients-of-single-examples.

        Example:
          >>> net = mlp([3, 4, 2])
          >>> params = net.init(jax.random.key(0))
          >>> losses, gradients = net.example_gradients(params, jnp.ones((5, 3)), lambda y: jnp.sum(y**2, axis=-1))
          >>> losses.shape, gradients[1]["w"].inputs.shape, gradients[1]["w"].cotangents.shape
          ((5,), (5, 4), (5, 2))
        """
        where = "example_gradients"
        _arguments.function(where, loss_fn=loss_fn)
        outputs, pull = self._example_vjp(where, params, x, key)
        losses, g = per_example.losses_and_cotangents(where, loss_fn, outputs)
        return losses, pull(g)

    def example_vjp(
        self, params: Params, x: jax.Array, *, key: jax.Array | None = _MISSING
    ) -> tuple[jax.Array, Callable]:
        """Computes the outputs and their backward pass, like `jax.vjp`, but with per-example gradients.

        Args:
          params, x, key: see `example_gradients`.

        Returns:
          `(outputs, pull)`. `pull(g)` takes cotangents `[batch, dims[-1]]` in the dtype of the outputs, and returns
          the gradient of `sum(g[i] * outputs[i])` for each example `i`, factored as in `example_gradients`.

        Raises:
          ValueError, TypeError: see `example_gradients`.

        Example:
          >>> net = mlp([3, 4, 2])
          >>> outputs, pull = net.example_vjp(net.init(jax.random.key(0)), jnp.ones((5, 3)))
          >>> of_the_first_output = pull(jnp.zeros((5, 2)).at[:, 0].set(1))
          >>> of_the_first_output[1]["b"].values.shape
          (5, 2)
        """
        return self._example_vjp("example_vjp", params, x, key)

    def _example_vjp(self, where: str, params: Params, x: jax.Array, key) -> tuple[jax.Array, Callable]:
        if self.norm == "batch_norm":
            raise ValueError(f"{where}: batch normalization mixes examples, so there are no per-example gradients")
        self._check_params(where, params)
        _arguments.floating(where, x=x)
        hidden = map(self._activation_of, range(len(self.dims) - 2))
        for activation, width in zip((*hidden, self.final_activation), self.dims[1:], strict=True):
            if callable(activation) and _mixes_rows(activation, width):
                named = f"the activation {_shown(activation)} mixes examples"
                raise ValueError(f"{where}: {named}, so there are no per-example gradients")
        if jnp.ndim(x) != 2:
            raise ValueError(f"{where}: x must be [batch, {self.dims[0]}], got {list(np.shape(x))}")

        def outputs_of(probes):
            h, taps = self._hidden_layers(where, params, x, key, probes=probes)
            outputs, tap = self._last_layer(params, h, probes[-1])
            return outputs, [*taps, tap]

        # The derivative with respect to a zero added to an affine output is the cotangent of that output.
        _, shapes = jax.eval_shape(outputs_of, [{} for _ in params])
        probes = [{name: _layout.zeros(tap[name]) for name in PROBED if name in tap} for tap in shapes]
        outputs, pull, taps = jax.vjp(outputs_of, probes, has_aux=True)

        def factors(g):
            (cotangents,) = pull(g)
            gradients = []
            for p, tap, of in zip(params, taps, cotangents, strict=True):
                leaves: dict[str, Any] = {"w": per_example.Outer(tap["inputs"], of["affine"])}
                if "b" in p:
                    leaves["b"] = per_example.Rows(of["affine"])
                if "scale" in p:
                    leaves["scale"] = per_example.Rows(upcast(tap["normalized"]) * upcast(of["norm"]))
                if "offset" in p:
                    leaves["offset"] = per_example.Rows(of["norm"])
                gradients.append(leaves)
            return gradients

        return outputs, factors

    def init_batch_norm_state(self, params: Params) -> list[dict[str, jax.Array]]:
        """Initializes the running statistics for `apply_batch_norm` with mean 0 and variance 1.

        Args:
          params: from `init`, stacked or not.

        Returns:
          A list with one `{"mean", "var"}` per hidden layer, in at least float32, with the shape of its `scale`.

        Example:
          >>> net = mlp([3, 4, 2], norm="batch_norm")
          >>> jax.tree.map(jnp.shape, net.init_batch_norm_state(net.init(jax.random.key(0))))
          [{'mean': (4,), 'var': (4,)}]
        """
        if self.norm != "batch_norm":
            raise ValueError(f"init_batch_norm_state: the network has norm={self.norm!r}, which has no state")
        self._check_params("init_batch_norm_state", params)
        scales = [p["scale"] for p in params[:-1]]
        fills = {"mean": jnp.zeros, "var": jnp.ones}
        return [{name: fill(s.shape, sum_dtype(s.dtype)) for name, fill in fills.items()} for s in scales]

    def _shapes(self, i: int) -> dict[str, tuple[int, ...]]:
        """The shape of each leaf of layer i."""
        fan_in, fan_out = self.dims[i : i + 2]
        shapes: dict[str, tuple[int, ...]] = {"w": (fan_in, fan_out)}
        if self.use_bias:
            shapes["b"] = (fan_out,)
        if self.norm is not None and i < len(self.dims) - 2:
            shapes |= dict.fromkeys(NORMS[self.norm], (fan_out,))
        return shapes

    def _activation_of(self, i: int) -> Activation:
        several = isinstance(self.activation, tuple) and not _has_number(self.activation)
        return self.activation[i] if several else self.activation  # type: ignore[index,return-value]

    def _hidden_layers(self, where, params, x, key, *, state=None, probes=None, **batch_norm_options):
        """`(h, state)` after all layers but the last; with probes, `(h, taps)` for `example_gradients`."""
        if self.norm == "batch_norm" and state is None:
            advice = "use apply_batch_norm(params, state, x, training=...)"
            advice = "features does not support it" if where == "features" else advice
            raise ValueError(f"{where}: batch_norm has a state; {advice}")
        depths = self._check_params(where, params)
        self._check_inputs(where, params, x, key)
        if state is not None and len(state) != len(depths):
            raise ValueError(
                f"{where}: state must have {len(depths)} entries, one per hidden entry of params, got {len(state)}"
            )
        for i, given in enumerate(state or []):
            _check_leaves(f"{where}, state {i}", given, dict.fromkeys(("mean", "var"), np.shape(params[i]["scale"])))
        h, layer, new_state = as_array(x), 0, []
        params = jax.tree.map(as_array, params)
        nothing = [None] * len(depths)
        for p, s, probe, depth in zip(params, state or nothing, probes or nothing, depths, strict=False):
            activation = self._activation_of(layer)
            if any(self._activation_of(layer + i) != activation for i in range(depth)):
                raise ValueError(f"{where}: the {depth} layers of a stack must have the same activation")
            options = {"where": where, "activation": activation, "key": None if key is _MISSING else key}
            options["batch_norm_options"] = batch_norm_options
            run = _scanned_layers if p["w"].ndim == 3 else _hidden_layer
            h, s = run(self, p, s, h, layer, probe=probe, **options)
            new_state.append(s)
            layer += depth
        return h, new_state

    def _last_layer(self, params, h, probe=None) -> Any:
        """The outputs; with a probe, `(outputs, tap)`."""
        out_dtype = None if self.compute_dtype is None else sum_dtype(self.compute_dtype)
        p, tap = jax.tree.map(as_array, params[-1]), {"inputs": h}
        if probe is None:
            y = _affine_activation(self, self.final_activation, p, h, out_dtype)
        else:
            tap["affine"] = _affine(self, p, h, probe, out_dtype)
            y = _function(self, self.final_activation)(tap["affine"])
        if callable(self.final_activation):
            _check_activated("apply: final_activation", y, (*h.shape[:-1], self.dims[-1]))
        return y if probe is None else (y, tap)

    def _check_params(self, where: str, params) -> list[int]:
        """Checks that the params fit the network; returns the number of layers that each hidden entry represents."""
        _check_list(where, params)
        depths, layer, last = [], 0, len(self.dims) - 2
        for p in params[:-1]:
            depths.append(self._check_layer(where, p, layer) if layer < last else 1)
            layer += depths[-1]
        if layer != last:
            raise ValueError(f"{where}: dims {list(self.dims)} need params of {last + 1} layers, got {layer + 1}")
        self._check_layer(where, params[-1], layer)
        return depths

    def _check_layer(self, where: str, p, layer: int) -> int:
        """Checks the entry of the params that starts at `layer`; returns the number of layers that it represents."""
        here, dims, stack = f"{where}, layer {layer}", self.dims, ()
        if isinstance(p, dict) and jnp.ndim(p.get("w", 0)) == 3 and layer < len(dims) - 2:
            stack = np.shape(p["w"])[:1]
            widths = set(dims[layer : min(layer + stack[0], len(dims) - 2) + 1])
            if stack[0] < 1 or layer + stack[0] > len(dims) - 2 or len(widths) > 1:
                raise ValueError(
                    f"{here}: a stack of {stack[0]} layers must represent hidden layers of equal width, "
                    f"got w {list(np.shape(p['w']))} for dims {list(dims)}"
                )
        _check_leaves(here, p, {name: (*stack, *shape) for name, shape in self._shapes(layer).items()})
        _arguments.one_dtype(here, **p)
        return stack[0] if stack else 1

    def _check_inputs(self, where: str, params, x, key) -> None:
        _arguments.floating(where, x=x)
        if jnp.ndim(x) < 1 or np.shape(x)[-1] != self.dims[0]:
            w = list(np.shape(params[0]["w"])[-2:])
            raise ValueError(
                f"{where}: layer 0 expects {self.dims[0]} features (w is {w}), but x is {list(np.shape(x))}"
            )
        for i, p in enumerate(params):
            _arguments.operands(f"{where}, layer {i}", self.compute_dtype, x=x, w=p["w"])
        if key is not _MISSING and key is not None:
            _arguments.key(where, key)
        if self.dropout_rate and key is _MISSING:
            raise TypeError(
                f"{where}: dropout_rate {self.dropout_rate} needs key: a random key in training, or None for no dropout"
            )


def mlp(
    dims: Sequence[int],
    *,
    activation: Any = "relu",
    final_activation: Any = None,
    norm: str | None = None,
    norm_eps: float | None = None,
    residual: bool = False,
    dropout_rate: float = 0.0,
    use_bias: bool = True,
    compute_dtype: Any = None,
    ops: ModuleType | str = "ops",
) -> Network:
    """A fully-connected network of affine layers, with norm, activation, dropout and `+ h` after each hidden one.

    Without a norm, an affine layer and its activation are the single rule `ops.layer`, which takes the least memory.

    Args:
      dims: the widths, from inputs to outputs: `[784, 128, 10]` has one hidden layer.
      activation: activation of the hidden layers. One of "elu", "gelu", "gelu_exact", "leaky_relu", "log_softmax",
        "relu", "sigmoid", "silu", "softmax", "softplus" and "tanh"; "linear" or None for none; a name and a number,
        `("leaky_relu", 0.2)` for the slope or `("elu", 0.5)` for alpha; a function of an array; or a list of these, one
        per hidden layer. "gelu" is the tanh approximation, "gelu_exact" the form with erf. A function of your own is
        differentiated separately from its affine layer, whose output is then kept in memory.
      final_activation: activation of the last layer; None leaves it linear, as losses on logits expect.
      norm: "layer_norm" or "rms_norm" in the hidden layers, or "batch_norm", which has a state: use `apply_batch_norm`.
      norm_eps: the norm's `eps`, in squared units of its input; None: 1e-5.
      residual: add the input of a hidden layer to its output if their widths are equal.
      dropout_rate: the probability of dropping each output of a hidden layer.
      use_bias: whether the layers have a bias.
      compute_dtype: dtype of the operands of every matmul, forward and backward, and of the values kept between layers.
        For mixed precision, use "bfloat16" with float32 params. Accumulation is in float32, and gradients have the
        params' dtype. float16 is not supported because, unlike bfloat16, it needs loss scaling.
      ops: `fcfunc.ops` (the default), with hand-written backward rules, or `fcfunc.reference`, plain JAX, which
        supports forward mode (`jax.jvp`, `jax.jacfwd`). The names "ops" and "reference" are accepted too.

    Returns:
      A `Network`.

    Raises:
      ValueError: an option is out of range: an unknown name, a wrong number of activations, a rate outside [0, 1].
      TypeError: an option has the wrong type, such as dims that are not integers or an activation that is not hashable.

    Example:
      >>> print(mlp([784, 128, 10], norm="layer_norm"))
      mlp([784, 128, 10], norm='layer_norm')
      layer  params                                              count  bytes
      0      w [784, 128], b [128], scale [128], offset [128]  100,736  402,944
      1      w [128, 10], b [10]                                 1,290  5,160
      total                                                    102,026  408,104 in float32
    """
    return Network(
        dims, activation=activation, final_activation=final_activation, norm=norm, norm_eps=norm_eps,  # type: ignore
        residual=residual, dropout_rate=dropout_rate, use_bias=use_bias, compute_dtype=compute_dtype, ops=ops,  # type: ignore
    )  # fmt: skip


def init(key: jax.Array, dims: Sequence[int]) -> Params:
    """Initializes a plain network with He-normal weights and zero biases, like `fcfunc.mlp(dims).init(key)`.

    Args:
      key: a random key, `jax.random.key(seed)`.
      dims: the widths, from inputs to outputs.

    Returns:
      A list with one `{"w": [fan_in, fan_out], "b": [fan_out]}` per layer, in float32.

    Raises:
      ValueError: there are fewer than two dims, or one is below 1.
      TypeError: `key` is not a random key, or dims are not integers.

    Example:
      >>> jax.tree.map(jnp.shape, init(jax.random.key(0), [3, 4, 2]))
      [{'b': (4,), 'w': (3, 4)}, {'b': (2,), 'w': (4, 2)}]
    """
    return mlp(dims).init(key)


def apply(params: Params, x: jax.Array, *, activation: Any = "relu") -> jax.Array:
    r"""Computes the outputs of a plain network: :math:`h ← f(h W + b)` in each layer, without `f` in the last one.

    Args:
      params: from `init`.
      x: inputs, `[..., dims[0]]`, in the dtype of the params.
      activation: see `fcfunc.mlp`, which has all other options too.

    Returns:
      `[..., dims[-1]]`, in the dtype of `x`.

    Raises:
      ValueError: the shapes of the params or `x` do not fit (the message names the layer); the activation is unknown.
      TypeError: `x` and the params do not share one floating-point dtype.

    Example:
      >>> apply(init(jax.random.key(0), [3, 4, 2]), jnp.ones((5, 3)), activation="tanh").shape
      (5, 2)
    """
    _check_layers("apply", params)
    dims = [np.shape(params[0]["w"])[-2]]
    for p in params:
        *depth, _, fan_out = np.shape(p["w"])
        dims += [fan_out] * (depth[0] if depth else 1)
    return mlp(dims, activation=activation).apply(params, x)


def stack(params: Params) -> Params:
    """Stacks runs of identical hidden layers, so that `apply` scans them.

    A scanned run is compiled once, for any length, and its backward pass keeps only what the rules save.

    Args:
      params: from `init`. Layers are identical if their leaves have the same names, shapes and dtypes. The last layer
        stays separate.

    Returns:
      A list in which a run of two or more layers is one dict whose leaves have an extra leading axis: `w`
      `[layers, width, width]`.

    Raises:
      ValueError: there are no layers, or the params are an ensemble: `jax.vmap(stack)` stacks each network.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 4, 4, 4, 2])
      >>> jax.tree.map(jnp.shape, stack(params))[1]
      {'b': (3, 4), 'w': (3, 4, 4)}
    """
    _check_layers("stack", params)
    stacked = []
    for _, run in itertools.groupby(params[:-1], key=_kind):
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
      ValueError: there are no layers, or the params are an ensemble: `jax.vmap(unstack)` unstacks each network.

    Example:
      >>> params = init(jax.random.key(0), [3, 4, 4, 4, 4, 2])
      >>> len(unstack(stack(params)))
      5
    """
    _check_layers("unstack", params)
    layers = []
    for p in params:
        layers += [p] if p["w"].ndim == 2 else [jax.tree.map(lambda a, i=i: a[i], p) for i in range(len(p["w"]))]
    return layers


def unstacked_state(state: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The running statistics of batch normalization with one entry per layer, for stacked layers too."""
    entries = []
    for entry in state:
        several = np.ndim(entry["mean"]) > 1
        entries += [{n: a[i] for n, a in entry.items()} for i in range(len(entry["mean"]))] if several else [entry]
    return entries


def _init(key, shapes, w_init, b_init, param_dtype):
    params = []
    for layer, leaves in enumerate(shapes):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, layer))
        make = {
            "w": lambda shape, key=w_key: w_init(key, shape, param_dtype),
            "b": lambda shape, key=b_key: b_init(key, shape, param_dtype),
            "scale": lambda shape: jnp.ones(shape, param_dtype),
            "offset": lambda shape: jnp.zeros(shape, param_dtype),
        }
        params.append({name: make[name](shape) for name, shape in leaves})
    return params


@functools.cache
def _compiled_init():
    return jax.jit(_init, static_argnums=(1, 2, 3, 4), compiler_options=quick_options(level=1))


def _hidden_layer(
    net, p, state, x, index, *, where, activation, key: Any, batch_norm_options, probe=None, scanned=False
):
    """The output of a hidden layer and its running statistics or, with a probe, its tap."""
    namespace, drops = NAMESPACES[net.ops], key is not None and net.dropout_rate > 0
    if probe is not None:
        y, state = _tapped(net, activation, p, x, probe)
    elif net.norm is None:
        # Packing saves memory unless the output is kept anyway, as the next layer's input. It is not kept in a scan, or
        # if a residual connection or dropout follows.
        y = _affine_activation(net, activation, p, x, pack=scanned or net.residual or drops)
    else:
        z = _affine(net, p, x)
        if net.norm == "batch_norm":
            z, state = _norm(net, p, z, state, **batch_norm_options)
        else:
            z = _norm(net, p, z)
        y = _function(net, activation)(z)
    if callable(activation):
        _check_activated(f"{where}: the activation of a hidden layer", y, (*x.shape[:-1], p["w"].shape[-1]))
    y = y.astype(x.dtype if net.compute_dtype is None else net.compute_dtype)  # a function may return another dtype
    if drops:
        y = namespace.dropout(y, rate=net.dropout_rate, key=jax.random.fold_in(key, index))  # type: ignore
    return (x.astype(y.dtype) + y if net.residual and x.shape == y.shape else y), state


def _scanned_layers(net: Network, p, state, x, first, *, probe, **options):
    """Runs the hidden layers that are stacked in `p`: compiled once, keeping only what the rules save."""

    def step(x, slices):
        p, state, index, probe = slices
        y, state = _hidden_layer(net, p, state, x, index, probe=probe, scanned=True, **options)
        return _layout.reshard_like(y, x), state  # a layer with sharded weights shards its output differently

    x = x if net.compute_dtype is None else x.astype(net.compute_dtype)
    return jax.lax.scan(step, x, (p, state, first + jnp.arange(len(p["w"])), probe))


def _tapped(net: Network, activation: Activation, p, x, probe):
    """The output of a layer before dropout, with the probe added to its affine output and norm, and its tap."""
    z = _affine(net, p, x, probe)
    tap = {"inputs": x, "affine": z}
    if net.norm is not None:
        identity = {"scale": jnp.ones_like(p["scale"]), "offset": jnp.zeros_like(p["scale"])}
        tap["normalized"] = jax.lax.stop_gradient(_norm(net, identity, z))
        z = _norm(net, p, z)
        z = z + probe.get("norm", jnp.zeros((), z.dtype))
        tap["norm"] = z
    return _function(net, activation)(z), tap


def _affine(net: Network, p, x, probe=None, out_dtype=None):
    z = NAMESPACES[net.ops].affine(x, p["w"], p.get("b"), compute_dtype=net.compute_dtype, out_dtype=out_dtype)
    return z if probe is None else z + probe.get("affine", jnp.zeros((), z.dtype))


def _norm(net: Network, p, z, *state, **options):
    eps = {} if net.norm_eps is None else {"eps": net.norm_eps}
    leaves = [p[name] for name in NORMS[str(net.norm)]]
    return getattr(NAMESPACES[net.ops], str(net.norm))(z, *leaves, *state, **eps, **options)


def _affine_activation(net: Network, activation: Activation, p, x, out_dtype=None, *, pack=True):
    if activation is None or callable(activation):
        return _function(net, activation)(_affine(net, p, x, out_dtype=out_dtype))
    options: dict[str, Any] = {"compute_dtype": net.compute_dtype, "out_dtype": out_dtype}
    name, more = _operation(activation)
    if net.ops == "reference":
        return reference.layer(x, p["w"], p.get("b"), activation=name, **options, **more)
    return packed_layer(x, p["w"], p.get("b"), activation=name, pack=pack, **options, **more)


def _function(net: Network, activation: Activation) -> Callable:
    if activation is None:
        return lambda z: z
    if callable(activation):
        return activation
    name, options = _operation(activation)
    return lambda z: getattr(NAMESPACES[net.ops], name)(z, **options)


def _operation(activation: Any) -> tuple[str, dict]:
    """The operation, as its name and options, for an activation given as a name, or as a name and a number."""
    if isinstance(activation, tuple):
        name, number = activation
        return name, {NUMBERS[name]: number}
    return ACTIVATIONS[activation]


def _has_number(activation: Any) -> bool:
    second = activation[1] if isinstance(activation, list | tuple) and len(activation) == 2 else None
    return isinstance(second, int | float | np.number) and not isinstance(second, bool)


def _checked_activations(activation: Any, count: int) -> Any:
    if not isinstance(activation, list | tuple) or _has_number(activation):
        return _checked_activation("activation", activation)
    if len(activation) != count:
        raise ValueError(f"mlp: activation must list {count} entries, one per hidden layer, got {len(activation)}")
    return tuple(_checked_activation("activation", a) for a in activation)


def _checked_activation(argument: str, activation: Any) -> Any:
    if activation is None or (isinstance(activation, str) and activation == "linear"):
        return None
    if _has_number(activation):
        name, number = activation[0], _arguments.number("mlp", activation=activation[1])
        if not isinstance(name, str) or name not in NUMBERS:
            raise ValueError(f"mlp: {argument}: only {' and '.join(NUMBERS)} take a number, got {activation!r:.80}")
        if not math.isfinite(number) or (name == "elu" and number < 0):
            bound = " and at least 0" if name == "elu" else ""
            raise ValueError(f"mlp: {argument}: the number for {name} must be finite{bound}, got {number}")
        return name, number
    if callable(activation):
        if not isinstance(activation, Hashable):
            raise TypeError(f"mlp: {argument} must be hashable, got {type(activation).__name__}")
        name = getattr(activation, "__name__", None)
        return name if name in ACTIVATIONS and activation is getattr(ops, str(name), None) else activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"mlp: {argument}: unknown activation {activation!r:.80}; known are {known} and linear")
    return activation


@functools.lru_cache(maxsize=256)
def _mixes_rows(activation: Callable, width: int) -> bool:
    """Whether an output row depends on other input rows, tested on random numbers."""
    rows = np.random.default_rng(0).standard_normal((4, width)).astype(np.float32)
    try:
        with jax.ensure_compile_time_eval():
            together, alone = activation(jnp.asarray(rows))[1:2], activation(jnp.asarray(rows[1:2]))
            return not np.allclose(together, alone, rtol=1e-4, atol=1e-5, equal_nan=True)
    except Exception:  # it fails again when applied, or cannot be tested because it closes over a tracer
        return False


def _check_activated(what: str, y, shape: tuple[int, ...]) -> None:
    """Raises if a caller's activation does not return floating-point numbers of the given shape."""
    if not isinstance(y, jax.Array) or not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"{what} must return floating-point numbers, got {_arguments.describe(y)}")
    if y.shape != shape:
        raise ValueError(f"{what} must keep the shape {list(shape)}, got {list(y.shape)}")


def _shown(value: Any) -> str:
    """A value as text for messages, with functions shown by name."""
    if isinstance(value, tuple) and any(map(callable, value)):
        return f"({', '.join(map(_shown, value))})"
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def _check_list(where: str, params) -> None:
    if not isinstance(params, list | tuple):
        raise TypeError(f"{where}: params must be a list of layers, as from init, got {type(params).__name__}")
    if not params:
        raise ValueError(f"{where}: params must be a list of at least one layer, got {params!r}")


def _check_layers(where: str, params) -> None:
    """Raises if `params` is not a list of layers, stacked or not."""
    _check_list(where, params)
    for i, p in enumerate(params):
        here = f"{where}, layer {i}"
        if not isinstance(p, dict) or "w" not in p:
            raise TypeError(f"{here}: params must be dicts of w and b, got {p!r:.80}")
        _arguments.array(here, **p)
        if jnp.ndim(p["w"]) not in (2, 3) or (i == len(params) - 1 and jnp.ndim(p["w"]) != 2):
            shape, advice = list(np.shape(p["w"])), f"for an ensemble of networks use jax.vmap({where})"
            raise ValueError(f"{here}: w must be [fan_in, fan_out], got {shape}; {advice}")


def _check_leaves(here: str, given, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises if `given` is not a dict of arrays with these shapes."""
    if not isinstance(given, dict):
        raise TypeError(f"{here}: expected a dict of {', '.join(sorted(shapes))}, got {given!r:.80}")
    if given.keys() != shapes.keys():
        expected, got = (", ".join(sorted(map(str, names))) for names in (shapes, given))
        raise ValueError(f"{here}: expected the leaves {expected}, got {got}")
    _arguments.array(here, **given)
    for name, shape in shapes.items():
        if np.shape(given[name]) != shape:
            raise ValueError(f"{here}: {name} must be {list(shape)}, got {list(np.shape(given[name]))}")


def _kind(p) -> dict:
    return {name: (leaf.shape, leaf.dtype) for name, leaf in p.items()}
