"""One training step: the gradient of the loss and the optimizer update."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments
from fcfunc.train._accumulate import accumulated
from fcfunc.train._mesh import Layouts, jit_on_mesh
from fcfunc.train._state import TrainState, step_key


def make_train_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    aggregate: Callable | None = None,
    donate: bool = True,
) -> Callable:
    """Makes a compiled training step.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`; if the state has a `model_state`,
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      optimizer: any optax optimizer; one that needs the loss or the gradient (`optax.lbfgs`,
        `optax.contrib.reduce_on_plateau`) receives them.
      accumulate: gradient accumulation: split the batch into this many microbatches, process them one after the other
        and use the mean of their gradients, with the memory use of one microbatch. On a mesh each device sums its own
        gradients, followed by a single sum over the devices. Loss and metrics must be means over all examples, not over
        unmasked ones (`losses.mean`). Each microbatch, and each device's part of it, has its own random key and batch
        statistics; a `model_state` is averaged over the devices.
      aggregate: how per-example gradients become the gradient of the step:
        `aggregate(losses, gradients, batch, key) -> (loss, gradient, metrics)`, where `loss_fn(params, batch, key)`
        returns `(losses, gradients)` as `net.example_gradients` does. `per_example.mean_with_noise_scale` reports the
        noise of the gradient, and `privacy.private_mean` trains with differential privacy. The optimizer then does not
        receive the loss. None: differentiate `loss_fn`.
      donate: let the step reuse the buffers of the state that is passed in, which must not be used afterwards ("Array
        has been deleted"). False keeps the old state valid, at the cost of a second copy.

    Returns:
      `step(state, batch) -> (state, metrics)`; `metrics["loss"]` is the loss before the update.

    Raises:
      ValueError: `accumulate` is below 1, or above 1 with `aggregate`. While tracing: the loss is not a scalar; the
        batch cannot be split evenly; the state has a `model_state` and `aggregate` is given.

    Example:
      >>> import optax
      >>> from fcfunc.train import init_state
      >>> optimizer = optax.sgd(0.5)
      >>> step = make_train_step(lambda params, batch, key: jnp.mean((batch - params) ** 2), optimizer)
      >>> state, metrics = step(init_state(jnp.float32(1), optimizer, jax.random.key(0)), jnp.arange(4.0))
      >>> metrics["loss"], state.params
      (Array(1.5, dtype=float32), Array(1.5, dtype=float32))
    """
    _arguments.function("make_train_step", loss_fn=loss_fn)
    _arguments.optimizer("make_train_step", optimizer)
    _arguments.positive("make_train_step", accumulate=accumulate)
    if aggregate is not None:
        _arguments.function("make_train_step", aggregate=aggregate)
        if accumulate > 1:
            raise ValueError(f"make_train_step: with aggregate, accumulate must be 1, got {accumulate}")
    step = step_of(loss_fn, optimizer, aggregate)

    def train_step(state, batch, layouts):
        n = _arguments.count("make_train_step", batch)
        layouts.check_divides("make_train_step: a batch", n, accumulate)
        state, metrics = step(state, batch, layouts, accumulate)
        return state._replace(epoch_position=jnp.zeros((), jnp.int32)), metrics

    return jit_on_mesh("make_train_step", train_step, donate=bool(donate))


def step_of(loss_fn: Callable, optimizer: optax.GradientTransformation, aggregate: Callable | None = None) -> Callable:
    """`step(state, batch, layouts, accumulate) -> (state, metrics)`, with the metrics before the update."""
    update = optax.with_extra_args_support(optimizer).update
    loss = uniform(loss_fn)
    gradient = jax.value_and_grad(loss, has_aux=True) if aggregate is None else of_examples(loss_fn, aggregate)

    def step(state: TrainState, batch: Any, layouts: Layouts, accumulate: int) -> tuple[TrainState, dict]:
        key = step_key(state)

        of_batch = gradient if accumulate == 1 else accumulated(gradient, accumulate, layouts)
        (value, (metrics, model_state)), grads = of_batch(state.params, batch, key, state.model_state)
        # optax mixes dtypes, which must not raise an error if the caller uses strict promotion.
        with jax.numpy_dtype_promotion("standard"), jax.named_scope("update"):
            more = {"grad": grads}
            if aggregate is None:  # the loss is not private, even if the gradient is
                of_params = lambda params: loss(params, batch, key, state.model_state)[0]  # noqa: E731
                more |= {"value": value, "value_fn": of_params}
            updates, opt_state = update(grads, state.opt_state, state.params, **more)
            params = optax.apply_updates(state.params, updates)
        if finite_guards(opt_state):  # a skipped step changes neither the parameters nor the model state
            skipped = skipped_steps(opt_state) > skipped_steps(state.opt_state)
            model_state = optax.tree.where(skipped, state.model_state, model_state)
        new = state._replace(params=params, opt_state=opt_state, step=state.step + 1, model_state=model_state)
        return layouts.constrain_state(new), {"loss": value, **metrics}

    return step


def uniform(loss_fn: Callable) -> Callable:
    """`(params, batch, key, model_state) -> (loss, (metrics, model_state))`, for a loss of any accepted signature."""

    def loss_and_metrics(params, batch, key, model_state):
        _check_signature(loss_fn, bool(jax.tree.leaves(model_state)))
        if jax.tree.leaves(model_state):
            result = loss_fn(params, batch, key, model_state)
            if not isinstance(result, tuple) or len(result) != 3:
                raise TypeError(
                    f"loss_fn with a model_state must return (loss, metrics, model_state), got {result!r:.200}"
                )
            loss, metrics, new_state = result
            _check_same_kind(model_state, new_state)
            model_state = new_state
        else:
            result = loss_fn(params, batch, key)
            loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(loss, _arguments.ARRAYS) or not isinstance(metrics, dict):
            raise TypeError(f"loss_fn must return a loss or (loss, dict of metrics), got {result!r:.200}")
        if np.shape(loss) != ():
            raise ValueError(
                f"loss_fn must return a scalar, the mean over the batch, got {_arguments.describe(loss)}; "
                "take jnp.mean of the per-example losses"
            )
        if "loss" in metrics:
            raise ValueError('loss_fn: the metrics must not contain an entry "loss", which is reserved')
        return loss, (metrics, model_state)

    return loss_and_metrics


def of_examples(loss_fn: Callable, aggregate: Callable) -> Callable:
    """Like `jax.value_and_grad` of `uniform(loss_fn)`, for a loss function that returns per-example gradients."""

    def gradient(params, batch, key, model_state):
        if jax.tree.leaves(model_state):
            raise ValueError("make_train_step: aggregate cannot be combined with a model_state, which mixes examples")
        _check_signature(loss_fn, False)
        result = loss_fn(params, batch, key)
        if not isinstance(result, tuple) or len(result) != 2 or jnp.ndim(result[0]) != 1:
            raise TypeError(
                "loss_fn with aggregate must return (losses, gradients), as net.example_gradients does, "
                f"got {result!r:.100}"
            )
        # A key that no layer uses.
        loss, grads, metrics = aggregate(*result, batch, jax.random.fold_in(key, 2**32 - 1))
        grads = jax.tree.map(lambda a, p: a.astype(p.dtype), grads, params)
        return (loss, (metrics, model_state)), grads

    return gradient


def finite_guards(opt_state) -> list[optax.ApplyIfFiniteState]:
    """The states of `optax.apply_if_finite` inside an optimizer state."""
    is_guard = lambda node: isinstance(node, optax.ApplyIfFiniteState)  # noqa: E731
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_guard) if is_guard(node)]


def skipped_steps(opt_state) -> Any:
    """The number of steps that the guards have skipped so far."""
    return sum(guard.total_notfinite for guard in finite_guards(opt_state))


def _check_signature(loss_fn: Callable, with_state: bool) -> None:
    """Raises TypeError if a loss function does not accept the arguments that it will receive."""
    names = ("params", "batch", "key", *(("model_state",) if with_state else ()))
    try:
        inspect.signature(loss_fn).bind(*names)
    except TypeError as e:
        why = "the state has a model_state" if with_state else "without init_state(..., model_state=...)"
        raise TypeError(f"loss_fn must accept ({', '.join(names)}): {why} ({e})") from None
    except ValueError:
        pass  # a function in C, without a signature


def _check_same_kind(before, after) -> None:
    """Raises ValueError if a step changed shapes or dtypes of the model state: the next would be recompiled."""
    kinds = [jax.tree.map(_arguments.describe, tree) for tree in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"loss_fn must return a model_state like the one it was given, {kinds[0]!s:.200}, got {kinds[1]!s:.200}"
        )
