"""An epoch of training as one compiled program, and the evaluation of a loss over all examples."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fcfunc import _arguments
from fcfunc._arguments import as_array, count, examples, fitting_batch_size
from fcfunc._stream import Stream, read_chunk
from fcfunc.train._accumulate import mean_dtype
from fcfunc.train._captured import FunctionId, cached_by_id, traced
from fcfunc.train._chunks import chunks_of_stream
from fcfunc.train._mesh import Layouts, jit_on_mesh, replicate_unplaced, shardings
from fcfunc.train._order import batch_sizes, even_size, order_from
from fcfunc.train._state import TrainState, epoch_start
from fcfunc.train._step import step_of, uniform


def make_train_epoch(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    *,
    accumulate: int = 1,
    shuffle: bool = True,
    donate: bool = True,
) -> Callable:
    """Makes a training epoch that is one compiled program: shuffling, batching and steps all run on the device.

    Args:
      loss_fn: as for `make_train_step`.
      optimizer: any optax optimizer.
      batch_size: examples per step, at least 1. If it does not divide the number of examples, the last step uses the
        remainder as a shorter batch, inside the same program; on a mesh whose devices do not divide that batch, each
        device processes all of it. If it exceeds the number of examples, they form one batch, with a warning.
      accumulate: as for `make_train_step`; the shorter batch is not split.
      shuffle: if False, use the examples in the given order.
      donate: as for `make_train_step`.

    Returns:
      `epoch(state, data) -> (state, metrics)`; each metric has one entry per step. Every example is used once, in an
      order derived from the state's key and step, unless `shuffle=False`. If the state is in the middle of an epoch,
      the rest of that epoch is abandoned. If `data` is a `Stream`, each of its chunks is one compiled program.

    Raises:
      ValueError: `batch_size` or `accumulate` is below 1. While tracing: the data is empty or its arrays differ in the
        number of examples; the loss is not a scalar; `batch_size` cannot be divided evenly over the devices that hold
        the examples, or into `accumulate` microbatches.

    Example:
      >>> import optax
      >>> from fcfunc.train import init_state
      >>> optimizer = optax.sgd(0.5)
      >>> epoch = make_train_epoch(lambda params, batch, key: jnp.mean((batch - params) ** 2), optimizer, batch_size=2)
      >>> state, metrics = epoch(init_state(jnp.float32(1), optimizer, jax.random.key(0)), jnp.arange(6.0))
      >>> metrics["loss"].shape
      (3,)
    """
    _arguments.function("make_train_epoch", loss_fn=loss_fn)
    _arguments.optimizer("make_train_epoch", optimizer)
    _arguments.positive("make_train_epoch", batch_size=batch_size, accumulate=accumulate)
    _arguments.boolean("make_train_epoch", shuffle=shuffle)
    epoch = epoch_of("make_train_epoch", step_of(loss_fn, optimizer), batch_size, accumulate, shuffle=shuffle)

    def train_epoch(state, data, layouts):
        return epoch(state._replace(epoch_position=jnp.zeros((), jnp.int32)), data, layouts)

    in_memory = jit_on_mesh("make_train_epoch", train_epoch, donate=bool(donate))

    @functools.cache
    def chunk_program(size):
        steps = steps_of("make_train_epoch", step_of(loss_fn, optimizer), size, accumulate)
        return jit_on_mesh("make_train_epoch", steps, donate=bool(donate))

    @functools.wraps(in_memory)
    def epoch_of_data(state, data):
        if not isinstance(data, Stream):
            return in_memory(state, data)
        size, parts = fitting_batch_size("make_train_epoch", batch_size, data.examples), []
        state = state._replace(epoch_position=jnp.zeros((), jnp.int32))
        for chunk in chunks_of_stream("make_train_epoch", data, state, size, shuffle=bool(shuffle)):
            state = replicate_unplaced(state, chunk.data)
            order = chunk.order(state, chunk.size, shuffle=bool(shuffle))
            state, metrics = chunk_program(size)(state, chunk.data, order=order, total=jnp.int32(data.examples))
            # Wait, so that no more than two chunks are in memory.
            parts.append(jax.device_get(metrics))
        return state, jax.tree.map(lambda *m: jnp.concatenate(m), *parts)

    return epoch_of_data


def epoch_of(where: str, step: Callable, batch_size: int, accumulate: int, *, shuffle: bool) -> Callable:
    """`epoch(state, data, layouts) -> (state, metrics)`, over all examples."""
    steps = steps_of(where, step, batch_size, accumulate)

    def epoch(state: TrainState, data: Any, layouts: Layouts):
        n = count(where, data)
        # The barrier keeps XLA from fusing the order into the step: for an epoch of one step, JAX 0.12 would compile
        # for minutes.
        return steps(state, data, layouts, jax.lax.optimization_barrier(order_from(state, n, n, shuffle)))

    return epoch


def steps_of(
    where: str, step: Callable, batch_size: int, accumulate: int, *, record: Callable | None = None
) -> Callable:
    """`steps(state, data, layouts, order, total=None) -> (state, metrics)`: part of an epoch.

    It takes the examples that `order` lists. If `data` is a chunk of a stream, `total` is the number of examples of the
    whole epoch. `record(before, after, metrics)` computes a value of each step that is returned next to its metrics.
    """

    def steps(state: TrainState, data: Any, layouts: Layouts, order: jax.Array, total: jax.Array | None = None):
        n = count(where, data)
        size = batch_size if total is not None else fitting_batch_size(where, batch_size, n)
        layouts.check_divides(f"{where}: batches", size, accumulate)
        state = state._replace(epoch_start=epoch_start(state))

        def on_batch(before, indices):
            microbatches = accumulate if len(indices) == size else 1
            after, metrics = step(before, layouts.gather_rows(data, indices), layouts, microbatches)
            return after, metrics if record is None else (metrics, record(before, after, metrics))

        position = (state.epoch_position + len(order)) % (n if total is None else total)
        state, metrics = _over_batches(on_batch, state, order, size, unroll=2 if _is_small(state.params) else 1)
        return state._replace(epoch_position=position), metrics

    return steps


def evaluate(
    loss_fn: Callable, params: Any, data: Any, *, batch_size: int = 1024, model_state: Any = ()
) -> dict[str, jax.Array]:
    """The means of the loss and its metrics over all examples.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `-> (loss, metrics)`, called with key None. It is compiled once for
        each function and each shape of the data.
      params: the parameters.
      data: a pytree of arrays with a common leading axis, the examples, or a `Stream` of them.
      batch_size: the largest number of examples that are evaluated at once, which bounds the memory. If the metrics are
        means over the batch, the result does not depend on it, apart from rounding.
      model_state: the `model_state` of the state, if the loss takes one; the new one that it returns is discarded.

    Returns:
      `{"loss": scalar, ...}`. Each batch is weighted by its number of examples.

    Raises:
      ValueError: `batch_size` is below 1; the data is empty or its arrays differ in the number of examples.

    Example:
      >>> evaluate(lambda params, batch, key: jnp.mean((batch - params) ** 2), jnp.float32(1), jnp.arange(4.0))
      {'loss': Array(1.5, dtype=float32)}
    """
    _arguments.function("evaluate", loss_fn=loss_fn)
    _arguments.positive("evaluate", batch_size=batch_size)
    if isinstance(params, TrainState):
        raise TypeError("evaluate: params must be parameters, got a TrainState; pass state.params")
    if not isinstance(data, Stream):
        data = examples("evaluate", data)
        count("evaluate", data)
    computed, _ = traced(uniform(loss_fn), params, sample_of("evaluate", data, batch_size), None, model_state)
    return evaluate_compiled(FunctionId(loss_fn, computed), params, data, model_state, int(batch_size))


def sample_of(where: str, data: Any, batch_size: int) -> Any:
    """The data or, of a stream, the first batch: arrays with the dtypes and the shape of an example."""
    if not isinstance(data, Stream):
        return data
    return jax.tree.map(as_array, read_chunk(where, data, 0, min(batch_size, data.examples)))


def function_id(loss_fn: Callable, state: TrainState, data: Any, key: Any) -> tuple[FunctionId, dict]:
    """The cache key of a loss function's compiled programs, and the shapes of its metrics."""
    computed, (_, (metrics, _)) = traced(uniform(loss_fn), state.params, data, key, state.model_state)
    return FunctionId(loss_fn, computed), metrics


def evaluate_compiled(
    loss_id: FunctionId, params: Any, data: Any, model_state: Any, batch_size: int = 1024
) -> dict[str, jax.Array]:
    """`evaluate` without its checks, for a loss whose id is known."""
    program = _evaluation(loss_id, batch_size)
    if not isinstance(data, Stream):
        return program(params, model_state, data, layouts=Layouts((), shardings(data)))
    rows, shares = max(data.chunk_size // batch_size, 1) * batch_size, []
    for start in range(0, data.examples, rows):
        stop = min(start + rows, data.examples)
        chunk = jax.tree.map(as_array, read_chunk("evaluate", data, start, stop))
        means = program(params, model_state, chunk, layouts=Layouts((), shardings(chunk)))
        shares.append({name: m * jnp.asarray((stop - start) / data.examples, m.dtype) for name, m in means.items()})
    return jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *shares)


@cached_by_id
def _evaluation(loss_fn, batch_size):
    loss = uniform(loss_fn)

    @functools.partial(jax.jit, static_argnames="layouts")
    def evaluation(params, model_state, data, layouts):
        n = count("evaluate", data)
        size = min(batch_size, n)
        if not any(layouts.data):
            size = even_size(n, size)

        def on_batch(_, indices):
            value, (metrics, _) = loss(params, layouts.gather_rows(data, indices), None, model_state)
            return None, {"loss": value, **metrics}

        _, metrics = _over_batches(on_batch, None, jnp.arange(n), size)
        return epoch_means(metrics, n, size)

    return evaluation


def epoch_means(metrics: dict, n: int, batch_size: int) -> dict:
    """The means over all examples, from metrics with the mean of each batch."""
    weights = batch_sizes(n, batch_size) / n
    real = {name: m.astype(mean_dtype(m.dtype)) for name, m in metrics.items()}
    return {name: jnp.average(m, axis=0, weights=jnp.asarray(weights, m.dtype)) for name, m in real.items()}


def num_steps(examples: int, *, epochs: int, batch_size: int) -> int:
    """The number of steps in a whole run, for a learning-rate schedule.

    Args:
      examples: the number of training examples, `len(x)`.
      epochs: passes over them.
      batch_size: examples per step; a shorter last batch counts as a step.

    Returns:
      `epochs * ceil(examples / batch_size)`.

    Raises:
      ValueError: a number is not an integer of at least 1.

    Example:
      >>> import optax
      >>> steps = num_steps(1_797, epochs=20, batch_size=128)
      >>> schedule = optax.cosine_decay_schedule(0.1, steps)
      >>> steps
      300
    """
    _arguments.positive("num_steps", examples=examples, epochs=epochs, batch_size=batch_size)
    return int(epochs) * len(batch_sizes(int(examples), batch_size))


def _is_small(params: Any) -> bool:
    """Whether a step is so short that the loop around it counts: two steps per iteration saved 3 to 9% of the time.

    Three steps and more took longer than one. From about a hundred thousand parameters on, nothing was gained. The last
    bits of a result then depend on how `every` and the chunks of a stream divide an epoch, but not on interruptions.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(params)) <= 2**16


def _over_batches(on_batch: Callable, carry: Any, indices: jax.Array, batch_size: int, *, unroll: int = 1):
    """Scans `on_batch` over full batches of `indices`, then processes the remainder as one shorter batch."""
    n = indices.shape[0]
    full = n - n % batch_size
    batches = indices[:full].reshape(full // batch_size, batch_size)
    carry, metrics = jax.lax.scan(on_batch, carry, batches, unroll=unroll)
    if full < n:
        carry, last = on_batch(carry, indices[full:])
        metrics = jax.tree.map(lambda m, x: jnp.concatenate([m, jnp.expand_dims(x, 0)]), metrics, last)
    return carry, metrics
