"""Whole runs: `fit` for the host, `make_fit` as a pure function; steps, epochs and evaluation."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments, _layout
from fcfunc._arguments import as_array, check_values, count, examples
from fcfunc.train._captured import FunctionKey, traced
from fcfunc.train._epoch import (
    Layouts,
    TrainState,
    batch_sizes,
    beside,
    check_shares,
    compiled,
    loss_and_metrics,
    means,
    order_from,
    over_batches,
    remembered,
    take,
    take_epoch,
    take_step,
)
from fcfunc.train._failure import NonFiniteError, advice, copied, good, outcome, replay, still_finite
from fcfunc.train._memory import check_fits
from fcfunc.train._progress import ProgressBar, report


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
    _arguments.optimizer("init_state", optimizer)
    _arguments.key("init_state", key)
    if not jax.tree.leaves(params):
        raise ValueError(f"init_state: params hold no array, got {params!r:.80}")
    for path, leaf in jax.tree.leaves_with_path(params):
        _arguments.array("init_state", **{f"params{jax.tree_util.keystr(path)}": leaf})
    with _layout.on_mesh_of(params):
        opt_state = optimizer.init(params)
    state = TrainState(params, opt_state, jnp.int32(0), key, model_state, jnp.int32(0), jnp.int32(0))
    return beside(jax.tree.map(jnp.copy, state), state.params)


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
    _arguments.function("make_train_step", loss_fn=loss_fn)
    _arguments.optimizer("make_train_step", optimizer)
    _arguments.positive("make_train_step", accumulate=accumulate)

    def train_step(state, batch, layouts=None):
        check_shares("make_train_step: a batch", count("make_train_step", batch, 1), layouts, accumulate)
        state, metrics = take_step(loss_fn, optimizer, state, batch, accumulate, layouts)
        return state._replace(position=jnp.zeros((), jnp.int32)), metrics

    return compiled("make_train_step", train_step)


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
      order drawn from the state's key and step; an epoch that the state is in the middle of is left. The state is
      donated: use the one that comes back.

    Raises:
      ValueError: `batch_size` or `accumulate` below 1; while tracing: data that is empty, smaller than a batch, or
        whose arrays disagree about the number of examples; a loss that is no scalar; a `batch_size` that the devices
        over which the examples lie do not divide, or that cannot be taken in `accumulate` parts.
    """
    _arguments.function("make_train_epoch", loss_fn=loss_fn)
    _arguments.optimizer("make_train_epoch", optimizer)
    _arguments.positive("make_train_epoch", batch_size=batch_size, accumulate=accumulate)

    def train_epoch(state, data, layouts=None):
        return take_epoch("make_train_epoch", loss_fn, optimizer, state, data, batch_size, accumulate, layouts)

    return compiled("make_train_epoch", train_epoch)


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
      epochs that were not run; and the number of those that were, `epochs`. A loss, or an array of the state, that
      becomes not finite stops a run, with the state of before that epoch; with `patience` its best epoch is returned
      all the same. Each call begins an epoch anew. No value of the data is checked, and `jax.jit` around it wraps NumPy
      integers of 64 bits.

    Raises:
      ValueError: an option out of range; while tracing: as for `make_train_epoch` and `fit`.
    """
    _arguments.function("make_fit", loss_fn=loss_fn, **({} if eval_fn is None else {"eval_fn": eval_fn}))
    _arguments.optimizer("make_fit", optimizer)
    _arguments.positive("make_fit", epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    _check_stopping("make_fit", mode, patience)
    sign = 1 if mode == "min" else -1

    def whole_fit(state, data, validation_data=None):
        data = examples("make_fit", data)
        n = count("make_fit", data, batch_size)
        layouts = Layouts(_layout.layouts(state), _layout.layouts(data))
        if patience is not None and validation_data is None:
            raise ValueError("make_fit: patience needs validation_data to judge an epoch by, got None")
        if validation_data is not None:
            validation_data = examples("make_fit", validation_data, "validation_data")
            _check_metrics("make_fit", eval_fn or loss_fn, state, validation_data, None, monitor)
        _check_metrics("make_fit", loss_fn, state, data, state.key, None)

        def one_epoch(state):
            state, metrics = take_epoch("make_fit", loss_fn, optimizer, state, data, batch_size, accumulate, layouts)
            record = means(metrics, n, batch_size)
            if validation_data is not None:
                scores = evaluate(eval_fn or loss_fn, state.params, validation_data, model_state=state.model_state)
                record |= {f"validation_{name}": m for name, m in scores.items()}
            return state, record

        def unfinished(carry):
            _, _, _, epoch, _, waited, lost = carry
            patient = jnp.bool_(True) if patience is None else waited < patience
            return (epoch < epochs) & patient & ~lost

        def next_epoch(carry):
            before, model, history, epoch, best, waited, _ = carry
            state, record = one_epoch(before)
            lost = ~(jnp.isfinite(record["loss"]) & still_finite(before, state))
            state = jax.tree.map(lambda a, b: jnp.where(lost, a, b), before, state)
            history = {name: history[name].at[epoch].set(m) for name, m in record.items()}
            if patience is not None:
                score = sign * record[f"validation_{monitor}"]
                better = score < best  # never true of a NaN
                new = (state.params, state.model_state)
                model = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, model)
                best, waited = jnp.where(better, score, best), jnp.where(better, 0, waited + 1)
            return state, model, history, epoch + 1, best, waited, lost

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


@remembered
def _evaluation(loss_fn, batch_size):
    @functools.partial(jax.jit, static_argnames="layouts")
    def evaluation(params, model_state, data, layouts):
        n = count("evaluate", data, 1)
        size = min(batch_size, n)
        if not any(layouts.data):
            # Equal batches, where some not much smaller divide the examples: one step to compile instead of two.
            size = next((s for s in range(size, size // 2, -1) if n % s == 0), size)

        def step(_, indices):
            loss, (metrics, _) = loss_and_metrics(loss_fn, params, take(data, indices, layouts), None, model_state)
            return None, {"loss": loss, **metrics}

        _, metrics = over_batches(step, None, jnp.arange(n), size)
        return means(metrics, n, size)

    return evaluation


@remembered
def _part(loss_fn, optimizer, batch_size, accumulate, some):
    """Some of an epoch's examples, as `fit` takes them."""

    def train_part(state, data, address=None, layouts=None):
        def after(before, state, metrics):
            if address is not None:
                report(address, state.step)
            return outcome(before, state, metrics)

        return take_epoch("fit", loss_fn, optimizer, state, data, batch_size, accumulate, layouts, some, after)

    return compiled("fit", train_part)


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
    _arguments.function("evaluate", loss_fn=loss_fn)
    _arguments.positive("evaluate", batch_size=batch_size)
    data = examples("evaluate", data)
    count("evaluate", data, 1)
    key = FunctionKey(loss_fn, _traced_loss(loss_fn, params, data, None, model_state)[0])
    return _evaluate(key, params, data, int(batch_size), model_state)


def _evaluate(loss_key, params, data, batch_size=1024, model_state=()):
    evaluation = _evaluation(loss_key, batch_size)
    return evaluation(params, model_state, data, layouts=Layouts((), _layout.layouts(data)))


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
    every: int | None = None,
    on_steps: Callable[[TrainState], None] | None = None,
    progress: bool = False,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains for a number of epochs: the loop a person would otherwise write.

    Before anything runs, the values of the data are checked on the host: every real number finite, and with
    `num_classes` every integer array of one axis within `[0, num_classes)`. A step whose loss, or whose new state,
    is not finite ends the run with the last good state; for that a copy of the state is kept of where the epoch, or
    the last `every` steps, began. To skip such steps instead, up to k in a row, guard the optimiser:
    `optax.apply_if_finite(optimizer, k)`. The step that optax would let through after them ends the run.

    Called again with the same function, optimizer and shapes, it compiles nothing, unless values that `loss_fn` or the
    optimizer captures have changed: each call traces them anew and compares. The exception is JAX's own: a function
    that you compiled, with `jax.jit` say, keeps the values of its first call. The programs of the last functions are
    kept, with what they capture.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`.
      optimizer: the optax optimiser that `state` was made with.
      state: from `init_state`, or of a run that goes on; one in the middle of an epoch goes on there, and the first of
        `epochs` is the rest of that one. It is copied, not donated.
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
        It counts from the first epoch of this call: a run that goes on knows nothing of the epochs before.
      num_classes: the number of classes, where the labels are to be checked.
      on_epoch: called with the state and the epoch's record, to log or to save. The next epoch donates that state's
        buffers: copy what is to be kept.
      every: call `on_steps` after so many steps of an epoch, and at its end; the epoch is then a program for so many
        steps, called several times.
      on_steps: called with the state, to save a run whose epochs take long; as for `on_epoch`. A run that was
        interrupted and goes on from such a state, with the same `batch_size`, `accumulate` and `every`, takes the very
        steps that it would have taken.
      progress: show a progress bar on standard error (needs tqdm). It moves some five times a second within an epoch,
        by reports that the compiled epoch sends every so many steps; where several processes share a mesh, after each
        epoch. If standard error is not a terminal, each epoch prints a line instead.

    Returns:
      The state, and the history: one dict per epoch with `epoch`, `step`, `seconds`, the means of the training metrics
      over the epoch's examples, and the validation metrics as `validation_<name>`.

    Raises:
      ValueError: an option out of range, data that is empty, smaller than a batch, not finite or wrongly labelled;
        `patience` without `validation_data`; a `monitor` that is not among the metrics.
      TypeError: `loss_fn` returns something else than a loss or `(loss, metrics)`.
      NonFiniteError: a loss or an array of the state became not finite: a FloatingPointError with the last good state,
        the step, the indices of its examples and the path of the first array that is not finite.
      MemoryError: the data are larger than what is free on the device; before anything is copied.
    """
    eval_key = None
    given = {"eval_fn": eval_fn, "on_epoch": on_epoch, "on_steps": on_steps}
    _arguments.function("fit", loss_fn=loss_fn, **{name: f for name, f in given.items() if f is not None})
    _arguments.optimizer("fit", optimizer)
    if not isinstance(state, TrainState):
        raise TypeError(f"fit: state must be a TrainState, as from init_state, got {type(state).__name__}")
    _arguments.positive("fit", epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    _check_stopping("fit", mode, patience)
    if patience is not None and validation_data is None:
        raise ValueError("fit: patience needs validation_data to judge an epoch by, got None")
    if (every is None) != (on_steps is None):
        raise ValueError("fit: every and on_steps go together: after how many steps, and what is called then")
    examples("fit", data)
    n = count("fit", data, batch_size)
    if validation_data is not None:
        examples("fit", validation_data, "validation_data")
    if every is not None:
        _arguments.positive("fit", every=every)
    position = int(state.position)
    if not 0 <= position < n:
        raise ValueError(f"fit: the state is at example {position} of its epoch, and data has {n} of them")
    check_fits("fit", data=data, validation_data=validation_data)
    check_values(data, num_classes=num_classes, name="data")
    given_data, data = data, jax.tree.map(as_array, data)
    if validation_data is not None:
        count("fit", validation_data, 1, "validation_data")
        check_values(validation_data, num_classes=num_classes, name="validation_data")
        validation_data = jax.tree.map(as_array, validation_data)
        eval_key = _check_metrics("fit", eval_fn or loss_fn, state, validation_data, None, monitor)
    loss_key = _check_metrics("fit", loss_fn, state, data, state.key, None)
    optimizer_key = FunctionKey(optimizer, _traced_update(optimizer, state))

    def take_some(probe, count, state, **address):
        update = FunctionKey(probe) if probe else optimizer_key
        return _part(loss_key, update, int(batch_size), int(accumulate), int(count))(state, data, **address)

    steps, first_step = len(batch_sizes(n, batch_size)), int(state.began if position else state.step)
    state = copied(state)
    history, best_model, waited = [], {}, 0
    sign = 1 if mode == "min" else -1
    best = math.inf
    with ProgressBar(epochs, steps, first_step) if progress else contextlib.nullcontext() as bar:
        for epoch in range(1, epochs + 1):
            start, parts = time.perf_counter(), []
            for sizes in _parts(n, position, batch_size, every):
                before = copied(state)
                # The processes that share a program would not agree on how often to report.
                reports = bar and bar.redraws and jax.process_count() == 1
                address = {"address": bar.address()} if bar and reports else {}
                state, (metrics, outcomes) = take_some(None, sizes.sum(), state, **address)
                if not good(before, state, outcomes):
                    found = replay(take_some, copied(before), sizes)
                    raise _non_finite(epoch, found, before, n, batch_size, history, loss_fn, given_data)
                parts.append((jax.tree.map(np.asarray, metrics), np.asarray(outcomes["skipped"]), sizes))
                if on_steps is not None:
                    on_steps(state)
            position = 0
            record: dict[str, float] = {"epoch": epoch, "step": int(state.step), **_means_of_parts(parts)}
            if eval_key is not None:
                scores = _evaluate(eval_key, state.params, validation_data, model_state=state.model_state)
                record |= {f"validation_{name}": float(m) for name, m in scores.items()}
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            if bar:
                bar.show(record)
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


def _parts(n: int, position: int, batch_size: int, every: int | None):
    """The sizes of the batches of an epoch from a position on, cut after each `every` steps from its beginning."""
    sizes = batch_sizes(n - position, batch_size)
    first = -(-position // batch_size)
    cuts = [i for i in range(1, len(sizes)) if every and (first + i) % every == 0]
    return np.split(sizes, cuts)


def _means_of_parts(parts) -> dict[str, float]:
    """The means of metrics over the examples of an epoch, but for steps that a guard has skipped."""
    metrics, skipped, sizes = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    taken = ~skipped
    if not taken.any():
        return dict.fromkeys(metrics, math.nan)
    return {name: float(np.average(np.float64(m[taken]), weights=sizes[taken])) for name, m in metrics.items()}


def _non_finite(epoch, found, good, n, batch_size, history, loss_fn, data):
    """The error of a run that is to end."""
    if found is None:  # taken one by one the steps are another program, whose last bits may differ
        message = (
            f"fit: not finite in epoch {epoch}, and not when its steps were taken again; `state` is of before them"
        )
        return NonFiniteError(message, good, int(good.step), np.arange(0), "loss", history)
    state, leaf, loss = found
    step, position = int(state.step), int(state.position)
    began = jnp.where(state.position == 0, state.step, state.began)
    indices = np.asarray(order_from(state._replace(began=began), n, min(batch_size, n - position)))
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    message = (
        f"fit: {leaf} was not finite at step {step} (epoch {epoch}), with a loss of {loss:.6g} on "
        f"the examples {shown}; {advice(loss_fn, state, data, indices)}. The exception's state is that before this step"
    )
    return NonFiniteError(message, state, step, indices, leaf, history)


def _check_stopping(where: str, mode: str, patience: int | None) -> None:
    if patience is not None:
        _arguments.positive(where, patience=patience)
    if mode not in ("min", "max"):
        raise ValueError(f'{where}: mode must be "min" or "max", got {mode!r}')


def _traced_loss(loss_fn, params, data, key, model_state):
    return traced(functools.partial(loss_and_metrics, loss_fn), params, data, key, model_state)


def _traced_update(optimizer, state):
    """What the update computes, None if it needs more than the gradient: then the optimizer is told by identity."""
    try:
        with _layout.on_mesh_of(state.params), jax.numpy_dtype_promotion("standard"):
            return traced(optimizer.update, state.params, state.opt_state, state.params)[0]
    except Exception:
        return None


def _check_metrics(where, loss_fn, state, data, key, monitor) -> FunctionKey:
    """Refuses, before anything runs, what a history cannot hold; a metric of `make_train_epoch` may have any shape.

    Returns the key of the function.
    """
    computed, (_, (metrics, _)) = _traced_loss(loss_fn, state.params, data, key, state.model_state)
    for name, metric in metrics.items():
        if name in ("epoch", "epochs", "step", "seconds"):
            raise ValueError(f"{where}: a metric must not be called {name!r}, which the history holds already")
        if not isinstance(metric, jax.ShapeDtypeStruct) or metric.shape != ():
            raise ValueError(
                f"{where}: each metric must be one number, the mean over the batch, got {metric} for {name!r}"
            )
    if monitor is not None and monitor not in {"loss", *metrics}:
        raise ValueError(f"{where}: monitor {monitor!r} is not among the metrics: {', '.join(['loss', *metrics])}")
    return FunctionKey(loss_fn, computed)
