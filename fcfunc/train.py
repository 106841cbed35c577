"""Training as pure functions: a state goes in, a state comes out.

Everything here takes the loss as a function, `loss_fn(params, batch, key)`, and the optimiser as an optax
transformation; it knows neither the network nor the loss. `batch` and `data` are any tree of arrays that share their
first axis, the examples. `loss_fn` returns the loss, a scalar that is the mean over its batch, or `(loss, metrics)`
with a dict of further means. `key` is this step's own random key in training, and None in evaluation.

On a mesh nothing changes but where the arrays lie: the state's params by `fcfunc.sharding.shard`, the examples by
`fcfunc.sharding.global_batch`. Each batch lies as the data it is taken from, and a new state as the one before.

A network that carries something besides its parameters, such as the running statistics of batch normalisation, has it
in the state's `model_state`. Its loss is `loss_fn(params, batch, key, model_state) -> (loss, metrics, model_state)`.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _check, _compat
from fcfunc._accumulate import accumulated
from fcfunc._permutation import permutation
from fcfunc.data import check_values

__all__ = ["TrainState", "evaluate", "fit", "init_state", "make_fit", "make_train_epoch", "make_train_step"]


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      params: the parameters, any tree.
      opt_state: the optimiser's state.
      step: how many steps were taken, an int32 scalar.
      key: the run's random key. It never changes: each step and each epoch derives its own by `fold_in(key, step)`, so
        that a run resumed from a saved state goes on exactly as it would have.
      model_state: what the loss carries from step to step besides the parameters; without leaves where it is nothing.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    model_state: Any = ()


def init_state(
    params: Any, optimizer: optax.GradientTransformation, key: jax.Array, *, model_state: Any = ()
) -> TrainState:
    """The state of a run before its first step.

    Args:
      params: the initial parameters. They are copied: the steps donate the state's buffers, never the caller's.
      optimizer: any optax optimiser, e.g. `optax.sgd(0.1)`.
      key: a random key, from which the order of the examples and the keys of `loss_fn` are drawn.
      model_state: what the loss carries besides the parameters, e.g. `fcfunc.init_batch_norm_state(params)`.

    Returns:
      A `TrainState` at step 0. Where the params lie on a mesh, each array of the optimiser's that is made from one of
      them lies as that one, and the rest is whole on every device.

    Raises:
      TypeError: no key.
    """
    _check.key("init_state", key)
    with _compat.on_mesh_of(params):
        opt_state = optimizer.init(params)
    state = TrainState(params, opt_state, jnp.zeros((), jnp.int32), key, model_state)
    return _beside(jax.tree.map(jnp.copy, state), state.params)


def make_train_step(loss_fn: Callable, optimizer: optax.GradientTransformation, *, accumulate: int = 1) -> Callable:
    """A compiled step of training.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`.
      optimizer: any optax optimiser; one that needs the loss or the gradient itself (`optax.lbfgs`,
        `optax.contrib.reduce_on_plateau`) is given them.
      accumulate: take the batch in so many parts, one after the other, and step by the mean of their gradients: the
        memory of one part for the step of the whole. On a mesh each device sums its own gradients over the parts, and
        one sum over the devices ends it; params divided over the devices that divide the examples are gathered once,
        before. Loss and metrics must be plain means over the examples (a mean over those that count, `losses.mean`, is
        another in each part); each part, and each device's share of it, has a random key of its own, and statistics of
        its own; a `model_state` is the mean of the devices'.

    Returns:
      `step(state, batch) -> (state, metrics)` with `metrics["loss"]` the loss before the update. The state is donated:
      use the one that comes back.

    Raises:
      ValueError: `accumulate` below 1; while tracing: a loss that is no scalar, a batch that cannot be taken in parts.
    """
    _check.positive("make_train_step", accumulate=accumulate)

    def train_step(state, batch, layouts=None):
        _check_shares("make_train_step: a batch", _count("make_train_step", batch, 1), layouts, accumulate)
        return _step(loss_fn, optimizer, state, batch, accumulate, layouts)

    return _compiled(train_step)


def make_train_epoch(
    loss_fn: Callable, optimizer: optax.GradientTransformation, batch_size: int, *, accumulate: int = 1
) -> Callable:
    """An epoch of training as one compiled program: shuffle, batch and step, all on the device.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`.
      optimizer: any optax optimiser.
      batch_size: examples per step, at least 1. Where it does not divide the number of examples, the last step takes
        the remainder as a shorter batch of its own, inside the same program; on a mesh whose devices do not divide that
        one, each device takes all of it.
      accumulate: as for `make_train_step`; the shorter batch is taken whole.

    Returns:
      `epoch(state, data) -> (state, metrics)`; each metric has one entry per step. Every example is used once, in an
      order drawn from the state's key and step. The state is donated: use the one that comes back.

    Raises:
      ValueError: `batch_size` or `accumulate` below 1; while tracing: data that is empty, smaller than a batch, or
        whose arrays disagree about the number of examples; a loss that is no scalar; a `batch_size` that the devices
        over which the examples lie do not divide, or that cannot be taken in `accumulate` parts.
    """
    _check.positive("make_train_epoch", batch_size=batch_size, accumulate=accumulate)

    def train_epoch(state, data, layouts=None):
        return _epoch("make_train_epoch", loss_fn, optimizer, state, data, batch_size, accumulate, layouts)

    return _compiled(train_epoch)


def make_fit(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int,
    accumulate: int = 1,
    eval_fn: Callable | None = None,
    monitor: str = "loss",
    mode: str = "min",
    patience: int | None = None,
) -> Callable:
    """A whole run as a pure function, early stopping included, to be jitted and mapped: a sweep is one program.

    A sweep over seeds and learning rates: give `optimizer` its hyperparameters by `optax.inject_hyperparams`, which
    keeps them in its state; make a state for each member under `jax.vmap`; and call `jax.jit(jax.vmap(fit, ...))`.
    A member that has stopped stays as it is while the others go on. `fit` is the same for the host: it checks the
    values of the data, reports, and raises.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`.
      optimizer: any optax optimiser.
      epochs: passes over the data, at most.
      batch_size: examples per step.
      accumulate: as for `make_train_step`.
      eval_fn: the loss function of the evaluation, where it is not `loss_fn` with key None.
      monitor: the validation metric that decides which epoch is best.
      mode: "min" where less of it is better, "max" where more is.
      patience: as for `fit`.

    Returns:
      `fit(state, data, validation_data=None) -> (state, history)`. `history` is a dict of arrays `[epochs]`: the means
      of the training metrics over each epoch's examples, and of the validation metrics as `validation_<name>`, NaN for
      epochs that were not run; and the number of those that were, `epochs`. A loss that is not finite stops a run;
      with `patience` its best epoch is returned all the same. No value of the data is checked.

    Raises:
      ValueError: an option out of range; while tracing: as for `make_train_epoch` and `fit`.
    """
    _check.positive("make_fit", epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    _check_stopping("make_fit", mode, patience)
    sign = 1 if mode == "min" else -1

    def whole_fit(state, data, validation_data=None):
        n = _count("make_fit", data, batch_size)
        layouts = _Layouts(_compat.layouts(state), _compat.layouts(data))
        if patience is not None and validation_data is None:
            raise ValueError("make_fit: patience needs validation_data to judge an epoch by, got None")
        if validation_data is not None:
            _check_metrics("make_fit", eval_fn or loss_fn, state, validation_data, None, monitor)
        _check_metrics("make_fit", loss_fn, state, data, state.key, None)

        def one_epoch(state):
            state, metrics = _epoch("make_fit", loss_fn, optimizer, state, data, batch_size, accumulate, layouts)
            record = _means(metrics, n, batch_size)
            if validation_data is not None:
                scores = evaluate(eval_fn or loss_fn, state.params, validation_data, model_state=state.model_state)
                record |= {f"validation_{name}": m for name, m in scores.items()}
            return state, record

        def unfinished(carry):
            _, _, _, epoch, _, waited, failed = carry
            patient = jnp.bool_(True) if patience is None else waited < patience
            return (epoch < epochs) & patient & ~failed

        def next_epoch(carry):
            state, model, history, epoch, best, waited, _ = carry
            state, record = one_epoch(state)
            history = {name: history[name].at[epoch].set(m) for name, m in record.items()}
            if patience is not None:
                score = sign * record[f"validation_{monitor}"]
                better = score < best  # never true of a NaN
                new = (state.params, state.model_state)
                model = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, model)
                best, waited = jnp.where(better, score, best), jnp.where(better, 0, waited + 1)
            return state, model, history, epoch + 1, best, waited, ~jnp.isfinite(record["loss"])

        kinds = jax.eval_shape(one_epoch, state)[1]
        history = {name: jnp.full((epochs,), jnp.nan, m.dtype) for name, m in kinds.items()}
        model = (state.params, state.model_state)
        best = jnp.asarray(jnp.inf, kinds[f"validation_{monitor}"].dtype if patience is not None else jnp.float32)
        start = (state, model, history, jnp.int32(0), best, jnp.int32(0), jnp.bool_(False))
        state, model, history, done, *_ = jax.lax.while_loop(unfinished, next_epoch, start)
        if patience is not None:
            state = state._replace(params=model[0], model_state=model[1])
        return state, history | {"epochs": done}

    return whole_fit


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size", "layouts"))
def _evaluate(loss_fn, params, model_state, data, batch_size, layouts):
    n = _count("evaluate", data, 1)
    batch_size = min(batch_size, n)
    if not any(layouts.data):
        # Equal batches, where some not much smaller divide the examples: one step to compile instead of two.
        batch_size = next((size for size in range(batch_size, batch_size // 2, -1) if n % size == 0), batch_size)

    def step(_, indices):
        loss, (metrics, _) = _loss_and_metrics(loss_fn, params, _take(data, indices, layouts), None, model_state)
        return None, {"loss": loss, **metrics}

    _, metrics = _over_batches(step, None, jnp.arange(n), batch_size)
    return _means(metrics, n, batch_size)


def evaluate(
    loss_fn: Callable, params: Any, data: Any, *, batch_size: int = 1024, model_state: Any = ()
) -> dict[str, jax.Array]:
    """The means of the loss and its metrics over all examples, with no update and no randomness.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`, called with key None; compiled once for each
        function and each shape of data.
      params: the parameters.
      data: a tree of arrays with one first axis.
      batch_size: at most so many examples at a time, which bounds the memory; the result does not depend on it, but for
        rounding, as long as the metrics are means over the batch.
      model_state: the state's, where the loss takes one; what comes back of it is dropped.

    Returns:
      `{"loss": scalar, ...}`, each batch counted by its number of examples.

    Raises:
      ValueError: `batch_size` below 1, data that is empty or disagrees about the number of examples.
    """
    _check.positive("evaluate", batch_size=batch_size)
    return _evaluate(loss_fn, params, model_state, data, batch_size, _Layouts((), _compat.layouts(data)))


def fit(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Any,
    *,
    epochs: int,
    batch_size: int,
    accumulate: int = 1,
    validation_data: Any = None,
    eval_fn: Callable | None = None,
    monitor: str = "loss",
    mode: str = "min",
    patience: int | None = None,
    num_classes: int | None = None,
    on_epoch: Callable[[TrainState, dict], None] | None = None,
    progress: bool = False,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains for a number of epochs: the loop a person would otherwise write.

    Before anything runs, the values of the data are checked on the host: every real number finite, and with
    `num_classes` every integer array of one axis within `[0, num_classes)`.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`.
      optimizer: the optax optimiser that `state` was made with.
      state: from `init_state`, or of a run that goes on. It is copied, not donated.
      data: the training examples, a tree of arrays with one first axis; they are put on the device once.
      epochs: passes over the data.
      batch_size: examples per step.
      accumulate: as for `make_train_step`.
      validation_data: examples that are evaluated after each epoch, never trained on.
      eval_fn: the loss function of the evaluation, where it is not `loss_fn` with key None.
      monitor: the validation metric that decides which epoch is best.
      mode: "min" where less of it is better, "max" where more is.
      patience: stop after this many epochs in a row without a better one, and return the best epoch's parameters and
        model state (the rest of the state is the last epoch's). None: run to the end and return the last epoch's.
      num_classes: the number of classes, where the labels are to be checked.
      on_epoch: called with the state and the epoch's record, to log or to save. The next epoch donates that state's
        buffers: copy what is to be kept.
      progress: show a progress bar (needs tqdm, the extra `progress`).

    Returns:
      The state, and the history: one dict per epoch with `epoch`, `step`, `seconds`, the means of the training metrics
      over the epoch's examples, and the validation metrics as `validation_<name>`.

    Raises:
      ValueError: an option out of range, data that is empty, smaller than a batch, not finite or wrongly labelled;
        `patience` without `validation_data`; a `monitor` that is not among the metrics.
      TypeError: `loss_fn` returns something else than a loss or `(loss, metrics)`.
      FloatingPointError: an epoch's mean loss was not finite.
    """
    _check.positive("fit", epochs=epochs, batch_size=batch_size)
    _check_stopping("fit", mode, patience)
    if patience is not None and validation_data is None:
        raise ValueError("fit: patience needs validation_data to judge an epoch by, got None")
    n = _count("fit", data, batch_size)
    check_values(data, num_classes=num_classes, name="data")
    data = jax.tree.map(jnp.asarray, data)
    if validation_data is not None:
        _count("fit (validation_data)", validation_data, 1)
        check_values(validation_data, num_classes=num_classes, name="validation_data")
        validation_data = jax.tree.map(jnp.asarray, validation_data)
        _check_metrics("fit", eval_fn or loss_fn, state, validation_data, None, monitor)
    _check_metrics("fit", loss_fn, state, data, state.key, None)

    train_epoch = make_train_epoch(loss_fn, optimizer, batch_size, accumulate=accumulate)
    sizes = _batch_sizes(n, batch_size)
    state = jax.tree.map(jnp.copy, state)
    history, best_model, waited = [], {}, 0
    sign = 1 if mode == "min" else -1
    best = math.inf
    with _progress_bar(epochs) if progress else contextlib.nullcontext() as bar:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            state, metrics = train_epoch(state, data)
            record: dict[str, float] = {"epoch": epoch, "step": int(state.step)}
            record |= {name: float(np.average(np.asarray(m, np.float64), weights=sizes)) for name, m in metrics.items()}
            if validation_data is not None:
                scores = evaluate(eval_fn or loss_fn, state.params, validation_data, model_state=state.model_state)
                record |= {f"validation_{name}": float(m) for name, m in scores.items()}
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(
                    f"fit: the loss was {record['loss']} in epoch {epoch}; try a lower learning rate"
                )
            if bar is not None:
                _show(bar, record)
            if on_epoch is not None:
                on_epoch(state, record)
            if patience is not None:
                score = record[f"validation_{monitor}"]
                if sign * score < best:  # never true of a NaN
                    model = {"params": state.params, "model_state": state.model_state}
                    best, best_model, waited = sign * score, jax.tree.map(jnp.copy, model), 0
                else:
                    waited += 1
                    if waited >= patience:
                        break
    return state._replace(**best_model), history


class _Layouts(NamedTuple):
    """Where each array of a state and of its data lies."""

    state: tuple
    data: tuple


def _compiled(fun: Callable) -> Callable:
    """`fun(state, data)`, compiled for where its arguments lie: on an Auto mesh their types do not tell."""
    compiled = jax.jit(fun, donate_argnums=0, static_argnames="layouts")

    def located(run):
        def call(state, data):
            of_data = _compat.layouts(data)
            if not any(of_data) and not any(_compat.layouts(state.step)):
                return run(state, data)  # on one device, where a step may take less time than looking at all its arrays
            if _compat.traced(state.step):
                return run(state, data, layouts=_Layouts(_compat.layouts(state), of_data))
            state = _beside(state, data)
            with _compat.on_mesh_of((state, data)):
                return run(state, data, layouts=_Layouts(_compat.layouts(state), of_data))

        return call

    call = functools.wraps(fun)(located(compiled))
    call.lower, call.trace = located(compiled.lower), located(compiled.trace)  # type: ignore[attr-defined]
    return call


def _step(loss_fn, optimizer, state, batch, accumulate, layouts):
    loss_key, _ = jax.random.split(state.key)
    key = jax.random.fold_in(loss_key, state.step)

    def value_fn(params):
        return _loss_and_metrics(loss_fn, params, batch, key, state.model_state)[0]

    def gradient(params, batch, key, model_state):
        def of(params):
            return _loss_and_metrics(loss_fn, params, batch, key, model_state)

        return jax.value_and_grad(of, has_aux=True)(params)

    if accumulate > 1:
        gradient = functools.partial(accumulated, gradient, accumulate, layouts)
    (loss, (metrics, model_state)), grads = gradient(state.params, batch, key, state.model_state)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes; a caller in strict mode need not know
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=loss, grad=grads, value_fn=value_fn
        )
        params = optax.apply_updates(state.params, updates)
    new = TrainState(params, opt_state, state.step + 1, state.key, model_state)
    if layouts is not None:
        new = _compat.each(_compat.constrained, new, layouts.state)
    return new, {"loss": loss, **metrics}


def _loss_and_metrics(loss_fn, params, batch, key, model_state):
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
    if not isinstance(loss, _check.ARRAYS) or not isinstance(metrics, dict):
        raise TypeError(f"loss_fn must return a loss or (loss, dict of metrics), got {result!r:.200}")
    if jnp.shape(loss) != ():
        raise ValueError(
            f"loss_fn must return one number, the mean over the batch, got {_check.describe(loss)}; "
            "take jnp.mean of the per-example losses"
        )
    if "loss" in metrics:
        raise ValueError('loss_fn: the metrics must not hold a "loss" of their own')
    return loss, (metrics, model_state)


def _check_same_kind(before, after) -> None:
    """A state that changes its shapes or dtypes in a step would be another program in the next."""
    kinds = [jax.tree.map(_check.describe, tree) for tree in (before, after)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"loss_fn must return a model_state like the one it was given, {kinds[0]}, got {kinds[1]}")


def _check_stopping(where: str, mode: str, patience: int | None) -> None:
    if patience is not None:
        _check.positive(where, patience=patience)
    if mode not in ("min", "max"):
        raise ValueError(f'{where}: mode must be "min" or "max", got {mode!r}')


def _check_metrics(where, loss_fn, state, data, key, monitor):
    """Refuses, before anything runs, what a history cannot hold; a metric of `make_train_epoch` may have any shape."""
    _, (metrics, _) = jax.eval_shape(
        lambda s, d, k: _loss_and_metrics(loss_fn, s.params, d, k, s.model_state), state, data, key
    )
    for name, metric in metrics.items():
        if name in ("epoch", "epochs", "step", "seconds"):
            raise ValueError(f"{where}: a metric must not be called {name!r}, which the history holds already")
        if not isinstance(metric, jax.ShapeDtypeStruct) or metric.shape != ():
            raise ValueError(
                f"{where}: each metric must be one number, the mean over the batch, got {metric} for {name!r}"
            )
    if monitor is not None and monitor not in {"loss", *metrics}:
        raise ValueError(f"{where}: monitor {monitor!r} is not among the metrics: {', '.join(['loss', *metrics])}")


def _means(metrics, n: int, batch_size: int):
    """The means over all examples of metrics that are means over the batches, one entry for each."""
    weights = _batch_sizes(n, batch_size) / n
    return {
        name: jnp.average(_real(m), axis=0, weights=jnp.asarray(weights, _real(m).dtype)) for name, m in metrics.items()
    }


def _real(metric):
    """A metric in at least float32: the mean of counts is no count, and a mean in bfloat16 is a poor one."""
    return metric.astype(jnp.float64 if metric.dtype == jnp.float64 else jnp.float32)


def _epoch(where, loss_fn, optimizer, state, data, batch_size, accumulate, layouts):
    """Every example once, in an order drawn from the state's key and step."""
    n = _count(where, data, batch_size)
    _check_shares(f"{where}: batches", batch_size, layouts, accumulate)
    _, order_key = jax.random.split(state.key)
    order = permutation(jax.random.fold_in(order_key, state.step), n)

    def step(state, indices):
        parts = accumulate if len(indices) == batch_size else 1
        return _step(loss_fn, optimizer, state, _take(data, indices, layouts), parts, layouts)

    return _over_batches(step, state, order, batch_size)


def _over_batches(step, carry, indices, batch_size):
    """Scans `step` over whole batches of `indices`, then takes the remainder as one shorter batch."""
    n = indices.shape[0]
    whole = n - n % batch_size
    carry, metrics = jax.lax.scan(step, carry, indices[:whole].reshape(whole // batch_size, batch_size))
    if whole < n:
        carry, last = step(carry, indices[whole:])
        metrics = jax.tree.map(lambda m, x: jnp.concatenate([m, jnp.expand_dims(x, 0)]), metrics, last)
    return carry, metrics


def _take(data, indices, layouts):
    """The examples at some indices, each of them once and within bounds, laid as the data."""
    of_data = layouts.data if layouts else (None,) * len(jax.tree.leaves(data))
    return _compat.each(functools.partial(_compat.taken, indices=indices), data, of_data)


def _check_shares(what: str, n: int, layouts, parts: int) -> None:
    over = _compat.rows(layouts.data) if layouts else None
    devices = over.devices if over else 1
    if n % (parts * devices):
        shares = [f"{devices} devices, over which the examples lie"] if over else []
        shares += [f"{parts} parts"] if parts > 1 else []
        raise ValueError(f"{what} of {n} examples cannot be divided evenly by {' times '.join(shares)}")


def _beside(state, tree):
    """`state` with what lies on no mesh whole on every device of the mesh that `tree` lies on."""
    mesh = _compat.mesh_of(tree)
    if mesh is None:
        return state
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return _compat.each(lambda a, s: _compat.placed(a, whole) if s is None else a, state, _compat.layouts(state))


def _batch_sizes(n: int, batch_size: int) -> np.ndarray:
    whole, rest = divmod(n, batch_size)
    return np.array([batch_size] * whole + [rest] * (rest > 0))


def _count(where: str, data, batch_size: int) -> int:
    """The number of examples, at least a batch of them."""
    leaves = jax.tree.leaves_with_path(data)
    sizes = {jax.tree_util.keystr(path): jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        came = ", ".join(f"{path or 'data'} {list(size)}" for path, size in sizes.items()) or "no array"
        raise ValueError(f"{where}: arrays with one first axis, the examples, expected, got {came}")
    (n,) = next(iter(sizes.values()))
    if n < max(batch_size, 1):
        raise ValueError(f"{where}: at least {max(batch_size, 1)} examples (one batch) expected, got {n}")
    return n


def _progress_bar(epochs: int):
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("fit: progress=True needs tqdm; pip install 'fcfunc[progress]'") from None
    return tqdm(total=epochs, unit="epoch", dynamic_ncols=True)


def _show(bar, record: dict[str, float]) -> None:
    shown = {name: f"{value:.4f}" for name, value in record.items() if name not in ("epoch", "step", "seconds")}
    bar.set_postfix(shown, refresh=False)
    bar.update()
