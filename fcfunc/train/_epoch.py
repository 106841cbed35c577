"""The step and the epoch that `fcfunc.train` compiles, and where their arrays lie."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments, _layout
from fcfunc._arguments import count, examples
from fcfunc.train._accumulate import accumulated, mean_dtype
from fcfunc.train._captured import FunctionKey
from fcfunc.train._permutation import permutation


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      params: the parameters, any tree.
      opt_state: the optimiser's state.
      step: how many steps were taken, an int32 scalar.
      key: the run's random key. It never changes: each step and each epoch derives its own by `fold_in(key, step)`, so
        that a run resumed from a saved state goes on exactly as it would have.
      model_state: what the loss carries from step to step besides the parameters; without leaves where it is nothing.
      position: how many examples of the current epoch were taken, an int32 scalar; 0 between epochs. A step that
        belongs to no epoch, of `make_train_step`, leaves the one it meets: the next begins anew.
      began: the step at which the current epoch began, an int32 scalar; its order is drawn by it.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    model_state: Any = ()
    position: Any = np.zeros((), np.int32)
    began: Any = np.zeros((), np.int32)


class Layouts(NamedTuple):
    """Where each array of a state and of its data lies."""

    state: tuple
    data: tuple


def remembered(make: Callable) -> Callable:
    """`make`, which returns the same program for the same functions and numbers; the last 32 are kept.

    JAX's own cache lives as long as a compiled function, so a program that is made anew would be compiled anew.
    Functions are given as `FunctionKey`, by which they are told apart.
    """

    @functools.lru_cache(maxsize=32)
    @functools.wraps(make)
    def cached(*args):
        return make(*(a.function if isinstance(a, FunctionKey) else a for a in args))

    return cached


def compiled(where: str, fun: Callable) -> Callable:
    """`fun(state, data)`, compiled for where its arguments lie: on an Auto mesh their types do not tell."""
    program = jax.jit(fun, donate_argnums=0, static_argnames="layouts")

    def located(run):
        def call(state, data, **more):
            data = examples(where, data)
            of_data = _layout.layouts(data)
            # On one device a step may take less time than looking at all its arrays.
            if not any(of_data) and not any(_layout.layouts(state.step)):
                return run(state, data, **more)
            if _layout.traced(state.step):
                return run(state, data, **more, layouts=Layouts(_layout.layouts(state), of_data))
            state = beside(state, data)
            with _layout.on_mesh_of((state, data)):
                return run(state, data, **more, layouts=Layouts(_layout.layouts(state), of_data))

        return call

    call = functools.wraps(fun)(located(program))
    call.lower, call.trace = located(program.lower), located(program.trace)  # type: ignore[attr-defined]
    return call


def beside(state, tree):
    """`state` with what lies on no mesh whole on every device of the mesh that `tree` lies on."""
    mesh = _layout.mesh_of(tree)
    if mesh is None:
        return state
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return _layout.each(lambda a, s: _layout.placed(a, whole) if s is None else a, state, _layout.layouts(state))


def take_step(loss_fn, optimizer, state, batch, accumulate, layouts):
    """One step: `(state, metrics)`, the metrics of before the update."""
    loss_key, _ = jax.random.split(state.key)
    key = jax.random.fold_in(loss_key, state.step)

    def value_fn(params):
        return loss_and_metrics(loss_fn, params, batch, key, state.model_state)[0]

    def gradient(params, batch, key, model_state):
        def of(params):
            return loss_and_metrics(loss_fn, params, batch, key, model_state)

        return jax.value_and_grad(of, has_aux=True)(params)

    if accumulate > 1:
        gradient = functools.partial(accumulated, gradient, accumulate, layouts)
    (loss, (metrics, model_state)), grads = gradient(state.params, batch, key, state.model_state)
    # optax itself mixes dtypes; a caller in strict mode need not know.
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("update"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=loss, grad=grads, value_fn=value_fn
        )
        params = optax.apply_updates(state.params, updates)
    new = state._replace(params=params, opt_state=opt_state, step=state.step + 1, model_state=model_state)
    if guards(opt_state):  # what belongs to a step that was skipped is left as it was, the parameters and this
        skipped = skips(opt_state) > skips(state.opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), state.model_state, model_state)
        new = new._replace(model_state=kept)
    if layouts is not None:
        new = _layout.each(_layout.constrained, new, layouts.state)
    return new, {"loss": loss, **metrics}


def guards(opt_state) -> list[optax.ApplyIfFiniteState]:
    """The states of `optax.apply_if_finite`, where it guards an optimiser."""
    is_guard = lambda node: isinstance(node, optax.ApplyIfFiniteState)  # noqa: E731
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_guard) if is_guard(node)]


def skips(opt_state) -> Any:
    """How many steps the guards have skipped so far."""
    return sum(guard.total_notfinite for guard in guards(opt_state))


def loss_and_metrics(loss_fn, params, batch, key, model_state):
    """`(loss, (metrics, model_state))`, whichever way the loss function is written."""
    if jax.tree.leaves(model_state):
        result = loss_fn(params, batch, key, model_state)
        if not isinstance(result, tuple) or len(result) != 3:
            raise TypeError(f"loss_fn with a model_state must return (loss, metrics, model_state), got {result!r:.200}")
        loss, metrics, new_state = result
        _check_same_kind(model_state, new_state)
        model_state = new_state
    else:
        result = loss_fn(params, batch, key)
        loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, _arguments.ARRAYS) or not isinstance(metrics, dict):
        raise TypeError(f"loss_fn must return a loss or (loss, dict of metrics), got {result!r:.200}")
    if jnp.shape(loss) != ():
        raise ValueError(
            f"loss_fn must return one number, the mean over the batch, got {_arguments.describe(loss)}; "
            "take jnp.mean of the per-example losses"
        )
    if "loss" in metrics:
        raise ValueError('loss_fn: the metrics must not hold a "loss" of their own')
    return loss, (metrics, model_state)


def _check_same_kind(before, after) -> None:
    """A state that changes its shapes or dtypes in a step would be another program in the next."""
    kinds = [jax.tree.map(_arguments.describe, tree) for tree in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"loss_fn must return a model_state like the one it was given, {kinds[0]}, got {kinds[1]}")


def take_epoch(where, loss_fn, optimizer, state, data, batch_size, accumulate, layouts, some=None, after=None):
    """Every example once, in an order drawn from the state's key and step.

    `some`: only so many examples, of whole batches or to the epoch's end, from the state's position in its epoch on.
    `after(before, state, metrics)` gives what is returned of each step besides its metrics.
    """
    n = count(where, data, batch_size)
    check_shares(f"{where}: batches", batch_size, layouts, accumulate)
    if some is None:
        state = state._replace(position=jnp.zeros((), jnp.int32))
    state = state._replace(began=jnp.where(state.position == 0, state.step, state.began))
    order = order_from(state, n, n if some is None else some)

    def step(before, indices):
        parts = accumulate if len(indices) == batch_size else 1
        state, metrics = take_step(loss_fn, optimizer, before, take(data, indices, layouts), parts, layouts)
        return state, metrics if after is None else (metrics, after(before, state, metrics))

    position = (state.position + len(order)) % n
    state, metrics = over_batches(step, state, order, batch_size)
    return state._replace(position=position), metrics


def order_from(state: TrainState, n: int, some: int) -> jax.Array:
    """The next examples of the state's epoch of n, as indices."""
    _, order_key = jax.random.split(state.key)
    with jax.named_scope("order"):
        places = state.position + jnp.arange(some, dtype=jnp.int32)
        # The barrier keeps XLA from fusing the order into the step: with one step, JAX 0.12 would compile for minutes.
        return jax.lax.optimization_barrier(permutation(jax.random.fold_in(order_key, state.began), n, places))


def over_batches(step, carry, indices, batch_size):
    """Scans `step` over whole batches of `indices`, then takes the remainder as one shorter batch."""
    n = indices.shape[0]
    whole = n - n % batch_size
    carry, metrics = jax.lax.scan(step, carry, indices[:whole].reshape(whole // batch_size, batch_size))
    if whole < n:
        carry, last = step(carry, indices[whole:])
        metrics = jax.tree.map(lambda m, x: jnp.concatenate([m, jnp.expand_dims(x, 0)]), metrics, last)
    return carry, metrics


def take(data, indices, layouts):
    """The examples at some indices, each of them once and within bounds, laid as the data."""
    of_data = layouts.data if layouts else (None,) * len(jax.tree.leaves(data))
    with jax.named_scope("gather"):
        return _layout.each(functools.partial(_layout.taken, indices=indices), data, of_data)


def means(metrics, n: int, batch_size: int):
    """The means over all examples of metrics that are means over the batches, one entry for each."""
    weights = batch_sizes(n, batch_size) / n
    real = {name: m.astype(mean_dtype(m.dtype)) for name, m in metrics.items()}
    return {name: jnp.average(m, axis=0, weights=jnp.asarray(weights, m.dtype)) for name, m in real.items()}


def batch_sizes(n: int, batch_size: int) -> np.ndarray:
    """The examples of each step of an epoch."""
    whole, rest = divmod(n, int(batch_size))
    return np.array([batch_size] * whole + [rest] * (rest > 0))


def check_shares(what: str, n: int, layouts, parts: int) -> None:
    """Raises where examples cannot be divided evenly over the devices that they lie on, and into parts."""
    over = _layout.rows(layouts.data) if layouts else None
    devices = over.devices if over else 1
    if n % (parts * devices):
        shares = [f"{devices} devices, over which the examples lie"] if over else []
        shares += [f"{parts} parts"] if parts > 1 else []
        raise ValueError(f"{what} of {n} examples cannot be divided evenly by {' times '.join(shares)}")
