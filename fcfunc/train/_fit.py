"""Whole training runs: `fit`, a loop on the host, and `make_fit`, a pure function."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcfunc import _arguments
from fcfunc._arguments import as_array, check_values, count, examples, fitting_batch_size, numeric_arrays
from fcfunc._layout import match_varying
from fcfunc._stream import Stream
from fcfunc.train._captured import FunctionId, cached_by_id, traced
from fcfunc.train._chunks import Chunk, chunks_of_stream, steps_of_epoch
from fcfunc.train._early_stopping import Best, EarlyStopping, checked_early_stopping
from fcfunc.train._epoch import (
    epoch_means,
    epoch_of,
    evaluate,
    evaluate_compiled,
    function_id,
    sample_of,
    steps_of,
)
from fcfunc.train._failure import non_finite_error, step_flags, still_finite
from fcfunc.train._memory import check_memory
from fcfunc.train._mesh import Layouts, jit_on_mesh, on_mesh_of, replicate_unplaced, shardings
from fcfunc.train._order import batch_sizes
from fcfunc.train._population import population_of
from fcfunc.train._progress import ProgressBar, report
from fcfunc.train._run import NO_SUMS, Run, check_saver, content_of, numbers, restored
from fcfunc.train._state import TrainState, copy_arrays
from fcfunc.train._step import step_of, uniform

RESERVED = ("epoch", "epochs", "kept_epoch", "step", "seconds")
"""Entries of a history whose names no metric may have."""


def make_fit(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int,
    accumulate: int = 1,
    shuffle: bool = True,
    eval_fn: Callable | None = None,
    monitor: str = "loss",
    mode: str = "min",
    patience: int | None = None,
    tol: float = 0.0,
    members_at_once: int | None = None,
) -> Callable:
    """A whole run, including early stopping, as a pure function that works with `jax.jit` and `jax.vmap`.

    A sweep over seeds and learning rates is then one program: pass the hyperparameters through
    `optax.inject_hyperparams`, which keeps them in the optimizer's state; make one state per run under `jax.vmap`; and
    call `jax.jit(jax.vmap(fit, ...))`, or `jax.jit(fit)` if `members_at_once` is set. A run that has stopped early is
    left unchanged while the others continue. `fit` is the host-side counterpart: it checks the values of the data,
    reports progress and raises errors.

    Args:
      loss_fn, optimizer, epochs, batch_size, accumulate, shuffle, eval_fn, monitor, mode, patience, tol: as for `fit`.
      members_at_once: the largest number of members of a population to train together. `fit` then takes states whose
        arrays have a leading axis of members, as from `jax.vmap` of `init_state`, and trains all of them on the same
        data, in chunks. On two CPU cores, 8 was fastest for networks of a thousand parameters, and 4 for ten thousand;
        `jax.vmap`, which trains all members together, is slower for large populations. If the states are sharded
        along the axis of members, each device trains its own. Under `jax.jit` this needs a mesh with Explicit axes, as
        from `jax.make_mesh`.

    Returns:
      `fit(state, data, validation_data=None) -> (state, history)`. The history is that of `fit`, without `step` and
      `seconds`; its arrays have length `epochs` and are NaN for epochs that were not run. With `members_at_once`, the
      arrays of the state and the history have a leading axis of members. If the loss or an array of
      the state becomes non-finite, the run ends and returns the state before that epoch, or the best epoch's model if
      `patience` is given. Each call begins a new epoch. The values of the data are not checked, and under `jax.jit`
      64-bit NumPy integers wrap around.

    Raises:
      ValueError: an option is out of range; while tracing, as for `make_train_epoch` and `fit`.

    Example:
      >>> import optax
      >>> from fcfunc.train import init_state
      >>> optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
      >>> run = make_fit(lambda params, batch, key: jnp.mean((batch - params) ** 2), optimizer, epochs=3, batch_size=4)
      >>> def with_rate(rate):
      ...     state = init_state(jnp.float32(0), optimizer, jax.random.key(0))
      ...     state.opt_state.hyperparams["learning_rate"] = rate
      ...     return run(state, jnp.ones(8))
      >>> states, history = jax.jit(jax.vmap(with_rate))(jnp.array([0.1, 0.4]))
      >>> history["loss"].shape
      (2, 3)
    """
    _arguments.function("make_fit", loss_fn=loss_fn, **({} if eval_fn is None else {"eval_fn": eval_fn}))
    _arguments.optimizer("make_fit", optimizer)
    _arguments.positive("make_fit", epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    _arguments.boolean("make_fit", shuffle=shuffle)
    if members_at_once is not None:
        _arguments.positive("make_fit", members_at_once=members_at_once)
    checked_early_stopping("make_fit", monitor, mode, patience, tol, validation=True)
    epoch_program = epoch_of("make_fit", step_of(loss_fn, optimizer), batch_size, accumulate, shuffle=shuffle)

    def check_metrics_of(function, state, data, key, stopping, prefix):
        _, (metrics, _) = jax.eval_shape(uniform(function), state.params, data, key, state.model_state)
        _check_metrics("make_fit", metrics, stopping, prefix)

    def whole_fit(state, data, validation_data=None):
        _check_state("make_fit", state)
        validation = validation_data is not None
        stopping = checked_early_stopping("make_fit", monitor, mode, patience, tol, validation=validation)
        data = examples("make_fit", data)
        n = count("make_fit", data)
        layouts = Layouts(shardings(state), shardings(data))
        if validation_data is not None:
            validation_data = examples("make_fit", validation_data, "validation_data")
            check_metrics_of(eval_fn or loss_fn, state, validation_data, None, stopping, "validation_")
        check_metrics_of(loss_fn, state, data, state.key, stopping, "")

        def one_epoch(state):
            state, metrics = epoch_program(state._replace(epoch_position=jnp.zeros((), jnp.int32)), data, layouts)
            record = epoch_means(metrics, n, min(batch_size, n))
            if validation_data is not None:
                scores = evaluate(eval_fn or loss_fn, state.params, validation_data, model_state=state.model_state)
                record |= {f"validation_{name}": m for name, m in scores.items()}
            return state, record

        def unfinished(run: _Loop):
            return (run.epoch < epochs) & ~stopping.stops(run.best) & ~run.diverged

        def next_epoch(run: _Loop):
            state, record = one_epoch(run.state)
            diverged = ~(jnp.isfinite(record["loss"]) & still_finite(run.state, state))
            state = optax.tree.where(diverged, run.state, state)
            history = {name: run.history[name].at[run.epoch].set(m) for name, m in record.items()}
            best = stopping.judge(run.best, run.epoch + 1, record, state)
            best = optax.tree.where(diverged, run.best, best)
            return _Loop(state, history, run.epoch + 1, best, diverged)

        shapes = jax.eval_shape(one_epoch, state)[1]
        history = {name: jnp.full((epochs,), jnp.nan, m.dtype) for name, m in shapes.items()}
        start = _Loop(state, history, jnp.int32(0), stopping.start(state), jnp.bool_(False))
        # Inside shard_map, what an epoch returns varies over the axes that its arguments vary over.
        run = jax.lax.while_loop(unfinished, next_epoch, match_varying(start))
        numbers = {"epoch": jnp.arange(1, epochs + 1), "epochs": run.epoch, "kept_epoch": run.best.epoch}
        return stopping.restore(run.best, run.state), run.history | numbers

    return whole_fit if members_at_once is None else population_of(whole_fit, int(members_at_once))


class _Loop(NamedTuple):
    """The carry of the loop over epochs in `make_fit`."""

    state: TrainState
    history: dict
    epoch: jax.Array
    best: Best
    diverged: jax.Array


def fit(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Any,
    *,
    epochs: int,
    batch_size: int,
    accumulate: int = 1,
    shuffle: bool = True,
    validation_data: Any = None,
    eval_fn: Callable | None = None,
    monitor: str = "loss",
    mode: str = "min",
    patience: int | None = None,
    tol: float = 0.0,
    num_classes: int | None = None,
    on_epoch: Callable[[TrainState, dict], bool | None] | None = None,
    every: int | None = None,
    on_steps: Callable[[TrainState], None] | None = None,
    saver: Any = None,
    progress: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains for a given number of epochs.

    Before training, the values of the data are checked on the host: real numbers must be finite and, given
    `num_classes`, the values of every one-dimensional integer array must be in `[0, num_classes)`. A step with a
    non-finite loss or new state ends the run with an error that carries the last good state; for this, the state from
    the beginning of the epoch, or of the last `every` steps, is kept. To skip up to k such steps in a row instead,
    guard the optimizer: `optax.apply_if_finite(optimizer, k)`. The first bad step after those k ends the run.

    A second call with the same function, optimizer and shapes recompiles nothing unless values that `loss_fn` or the
    optimizer captures have changed: each call traces both again and compares. A function that you compiled yourself,
    with `jax.jit`, keeps the captured values of its first call.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`; if the state has a `model_state`,
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      optimizer: the optax optimizer that `state` was made with.
      state: from `init_state` or from an earlier run. A state in the middle of an epoch resumes there, and the rest of
        that epoch is the first of `epochs`. The state is copied, not donated.
      data: the training examples, a pytree of arrays with a common leading axis. It is copied to the device once;
        PyTorch tensors and DataFrames are converted. Or a `Stream`, for data that is larger than memory: see
        `fcfunc.stream`. The values of its chunks are checked when they are read for the first time.
      epochs: the number of passes over the data.
      batch_size: examples per step. If it exceeds the number of examples, they form one batch, with a warning.
      accumulate: as for `make_train_step`.
      shuffle: if False, use the examples of every epoch in the given order.
      validation_data: examples, or a `Stream`, that are evaluated after each epoch and never trained on.
      eval_fn: the loss function for the evaluation; None: `loss_fn` with key None.
      monitor: the metric that decides which epoch is best: "validation_loss", "training_loss" or one of these prefixes
        and the name of another metric. Without a prefix, it is the validation metric if there is `validation_data`.
      mode: "min" if lower is better, "max" if higher is.
      patience: stop after this many epochs in a row without a better one, and return the parameters and model state of
        the best epoch (the rest of the state is that of the last epoch). None: run all epochs and return the last
        state. Without a `saver`, the count starts with the first epoch of this call, also in a resumed run.
      tol: an epoch resets the count of `patience` only if it improves on the best one by more than this. The returned
        parameters are those of the best epoch regardless.
      num_classes: the number of classes; if given, the labels are checked.
      on_epoch: called with the state and the epoch's record, for logging or saving; if it returns True, the run ends
        after this epoch.
      every: save and call `on_steps` after this many steps within an epoch, and at its end. The compiled program then
        covers this many steps and is called several times per epoch. None: save at the end of each epoch.
      on_steps: called with the state, after `on_epoch` at the end of an epoch. A run that resumes from such a state,
        with the same options, takes exactly the steps the uninterrupted run would have taken.
      saver: a `checkpoint.Saver`, which saves the run in the background. If its folder holds a checkpoint, the run
        continues from there instead of from `state`: the same call returns the same state and the same history,
        however often it was interrupted, and at once if the run was complete, or if `on_epoch` had ended it. `epochs`
        counts those of the whole run.
        `on_epoch` may be called again for the last epoch before an interruption.
      progress: show a progress bar on standard error (needs tqdm); it also moves within an epoch, unless several
        processes share a mesh. If standard error is not a terminal, each epoch prints a line instead.

    Returns:
      `(state, history)`. The history is a dict of arrays with one entry per epoch: `epoch` (1, 2, ...), `step`,
      `seconds`, the means of the training metrics over the epoch's examples (`loss`, ...) and the validation metrics
      (`validation_loss`, ...). Two entries are integers: `epochs`, the number of epochs that were run, and
      `kept_epoch`, the one whose parameters are returned (the last, if the metric was always NaN):
      `history["loss"][kept_epoch - 1]` is its loss.

    Raises:
      ValueError: an option is out of range; the data is empty, non-finite or has labels out of range; `monitor` is not
        among the metrics or needs `validation_data`; the saver's folder holds a run with other options.
      TypeError: `loss_fn` returns something other than a loss or `(loss, metrics)`; the data cannot be converted.
      NonFiniteError: the loss or an array of the state became non-finite. This FloatingPointError carries the last good
        state, the step, the indices of its examples and the path of the first non-finite array.
      MemoryError: the data is larger than the free memory of the device; raised before anything is copied.
      OSError: a checkpoint cannot be written.

    Example:
      >>> import optax
      >>> from fcfunc.train import init_state
      >>> loss_fn, optimizer = lambda params, batch, key: jnp.mean((batch - params) ** 2), optax.sgd(0.4)
      >>> state = init_state(jnp.float32(0), optimizer, jax.random.key(0))
      >>> state, history = fit(loss_fn, optimizer, state, jnp.ones(8), epochs=5, batch_size=4)
      >>> state.params.round(3), history["loss"].shape, history["kept_epoch"]
      (Array(1., dtype=float32), (5,), 5)
    """
    given = {"eval_fn": eval_fn, "on_epoch": on_epoch, "on_steps": on_steps}
    _arguments.function("fit", loss_fn=loss_fn, **{name: f for name, f in given.items() if f is not None})
    _arguments.optimizer("fit", optimizer)
    _check_state("fit", state)
    _arguments.positive("fit", epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    _arguments.boolean("fit", shuffle=shuffle)
    stopping = checked_early_stopping("fit", monitor, mode, patience, tol, validation=validation_data is not None)
    if saver is not None:
        check_saver("fit", saver)
    if on_steps is not None and every is None:
        raise ValueError("fit: on_steps needs every, the number of steps from one call to the next")
    if every is not None and on_steps is None and saver is None:
        raise ValueError("fit: every needs on_steps or saver")
    if every is not None:
        _arguments.positive("fit", every=every)
    streamed = isinstance(data, Stream)
    data = data if streamed else numeric_arrays("fit", data)
    n = data.examples if streamed else count("fit", data)
    batch_size = fitting_batch_size("fit", batch_size, n)
    if validation_data is not None and not isinstance(validation_data, Stream):
        validation_data = numeric_arrays("fit", validation_data, "validation_data")
        count("fit", validation_data, "validation_data")
    position = int(state.epoch_position)
    if not 0 <= position < n:
        raise ValueError(f"fit: the state is at example {position} of its epoch, but data has {n} examples")
    trees: dict[str, Any] = {"data": data, "validation_data": validation_data}
    in_memory = {name: tree for name, tree in trees.items() if not isinstance(tree, Stream)}
    check_memory("fit", **in_memory)
    for name, tree in in_memory.items():
        check_values(tree, num_classes=num_classes, name=name)
    given_data, data = data, data if streamed else jax.tree.map(as_array, data)
    eval_id, names = None, []
    if validation_data is not None:
        if not isinstance(validation_data, Stream):
            validation_data = jax.tree.map(as_array, validation_data)
        eval_id, metrics = function_id(eval_fn or loss_fn, state, sample_of("fit", validation_data, 1024), None)
        _check_metrics("fit", metrics, stopping, "validation_")
        names = [f"validation_{name}" for name in ("loss", *metrics)]
    sample = sample_of("fit", data, batch_size)
    loss_id, metrics = function_id(loss_fn, state, sample, state.key)
    _check_metrics("fit", metrics, stopping, "")
    names = ["loss", *metrics, *names]
    optimizer_id = FunctionId(optimizer, _traced_update(optimizer, state))
    checked = set()

    def check_once(chunk, first):
        if first not in checked:
            check_values(chunk, num_classes=num_classes, name=f"the stream's chunk at example {first}: data")
            checked.add(first)

    def chunks_of_epoch(state):
        if not streamed:
            return [Chunk(data, first=0, used=0, steps=0, salt=None)]
        return chunks_of_stream("fit", data, state, batch_size, shuffle=bool(shuffle), check=check_once)

    def run_chunk(chunk, probe, limit, state, **handle):
        """Trains on the next `limit` examples; returns the state, each step's metrics and skips, and if all are ok."""
        update = FunctionId(probe) if probe else optimizer_id
        program = _chunk_program(loss_id, update, batch_size, int(accumulate))
        order = chunk.order(state, int(limit), shuffle=bool(shuffle))
        total = {"total": np.int32(n)} if streamed else {}
        state, record = program(state, chunk.data, order=order, **total, **handle)
        return state, *jax.device_get(record)

    options = {"examples": n, "batch_size": int(batch_size), "accumulate": int(accumulate), "shuffle": bool(shuffle)}
    options |= {"every": every and int(every), "patience": patience and int(patience), "tol": stopping.tol}
    options |= {
        "metrics": names,
        "monitor": stopping.monitor,
        "mode": mode,
        "chunk_size": data.chunk_size if streamed else None,
    }
    steps, first_step = steps_of_epoch(data, n, batch_size), int(state.epoch_start if position else state.step)
    state = replicate_unplaced(copy_arrays(state), sample)
    run = Run(state, stopping.start(state), [], NO_SUMS, 0.0, False)
    with contextlib.ExitStack() as stack:
        save = None
        if saver is not None:
            run = restored("fit", saver, run, options, epochs)
            save = stack.enter_context(saver.writing(options))
        bar = stack.enter_context(ProgressBar(epochs, steps, first_step, len(run.records))) if progress else None
        while len(run.records) < epochs and not run.ended and not stopping.stops(run.best):
            epoch, start = len(run.records) + 1, time.perf_counter() - run.seconds
            position = int(run.state.epoch_position)
            for chunk in chunks_of_epoch(run.state):
                for sizes in _chunk_sizes(chunk, position, batch_size, every):
                    before = run.state
                    # Processes that share a program would disagree on how often to report.
                    reports = bar and bar.redraws and jax.process_count() == 1
                    handle = {"handle": bar.handle()} if bar and reports else {}
                    state, metrics, skipped, ok = run_chunk(chunk, None, sizes.sum(), before, **handle)
                    if not ok:
                        given = chunk.data if streamed else given_data
                        part = chunk._replace(data=given)
                        take = functools.partial(run_chunk, chunk)
                        raise non_finite_error(
                            take, loss_fn, before, part, sizes, epoch, run.history, shuffle=bool(shuffle)
                        )
                    sums = run.sums.plus(metrics, skipped, sizes)
                    run = run._replace(state=state, sums=sums, seconds=time.perf_counter() - start)
                    if every and int(state.epoch_position):
                        if save is not None:
                            save(functools.partial(content_of, run))
                        if on_steps is not None:
                            on_steps(state)
            record: dict[str, Any] = {"epoch": epoch, "step": int(run.state.step), **run.sums.means()}
            scores = {}
            if eval_id is not None:
                scores = evaluate_compiled(eval_id, run.state.params, validation_data, run.state.model_state)
                scores = {f"validation_{name}": m for name, m in scores.items()}
                record |= {name: float(m) for name, m in scores.items()}
            record["seconds"] = time.perf_counter() - start
            if bar:
                bar.end_epoch(record)
            ended = on_epoch is not None and _is_true(on_epoch(run.state, record))
            best = stopping.judge(run.best, epoch, record | scores, run.state)
            record = record if save is None else numbers("fit", record)
            run = Run(run.state, best, [*run.records, record], NO_SUMS, 0.0, ended)
            if save is not None:
                save(functools.partial(content_of, run))
            if on_steps is not None:
                on_steps(run.state)
    return stopping.restore(run.best, run.state), run.history


def _is_true(value: Any) -> bool:
    """Whether a callback returned True, in Python or as an array; other values, such as a count, are ignored."""
    return isinstance(value, bool | np.bool_ | jax.Array) and np.asarray(value).dtype == bool and bool(value)


@cached_by_id
def _chunk_program(loss_fn, optimizer, batch_size, accumulate):
    """Part of an epoch, as `fit` runs it. The state is not donated, since it is needed if the new one is non-finite."""

    def train_chunk(state, data, layouts, order, total=None, handle=None):
        def record(before, after, metrics):
            if handle is not None:
                report(handle, after.step)
            return step_flags(before, after, metrics)

        steps = steps_of("fit", step_of(loss_fn, optimizer), batch_size, accumulate, record=record)
        after, (metrics, flags) = steps(state, data, layouts, order, total)
        ok = jnp.all(flags["finite"] | flags["skipped"]) & still_finite(state, after)
        return after, (metrics, flags["skipped"], ok)

    return jit_on_mesh("fit", train_chunk, donate=False)


def _chunk_sizes(chunk: Chunk, position: int, batch_size: int, every: int | None):
    """The batch sizes of the rest of a chunk, split after every `every` steps counted from the epoch's beginning."""
    inside = max(position - chunk.used, 0)
    sizes = batch_sizes(chunk.size - inside, batch_size)
    first = chunk.steps + -(-inside // batch_size)
    cuts = [i for i in range(1, len(sizes)) if every and (first + i) % every == 0]
    return np.split(sizes, cuts)


def _check_state(where: str, state) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(f"{where}: state must be a TrainState, as from init_state, got {type(state).__name__}")


def _traced_update(optimizer, state):
    """The traced update; None if it needs more than the gradient, and the optimizer is then compared by identity."""
    try:
        with on_mesh_of(state.params), jax.numpy_dtype_promotion("standard"):
            return traced(optimizer.update, state.params, state.opt_state, state.params)[0]
    except Exception:
        return None


def _check_metrics(where: str, metrics: dict, stopping: EarlyStopping, prefix: str) -> None:
    """Raises ValueError if a history cannot hold these metrics, or if they lack the monitored one with this prefix."""
    for name, metric in metrics.items():
        if name in RESERVED:
            raise ValueError(f"{where}: a metric must not be called {name!r}, a name that the history reserves")
        if not isinstance(metric, jax.ShapeDtypeStruct) or metric.shape != ():
            raise ValueError(
                f"{where}: each metric must be a scalar, the mean over the batch, got {metric} for {name!r}"
            )
    monitored = "validation_" if stopping.monitor.startswith("validation_") else ""
    monitor = stopping.monitor.removeprefix(monitored)
    if monitored == prefix and monitor not in {"loss", *metrics}:
        raise ValueError(f"{where}: monitor {monitor!r} is not among the metrics: {', '.join(['loss', *metrics])}")
