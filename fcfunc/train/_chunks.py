"""The chunks of an epoch: all examples at once if they are in memory, or the chunks of a `Stream`."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from fcfunc._arguments import as_array
from fcfunc._stream import Stream, read_chunk
from fcfunc.train._order import batch_sizes, order_program
from fcfunc.train._state import TrainState


class Chunk(NamedTuple):
    """Examples that are in memory at the same time.

    Attributes:
      data: the examples.
      first: the index of the first one in the whole data.
      used: how many examples of the epoch come before this chunk.
      steps: how many steps of the epoch come before it.
      salt: distinguishes the order of its examples from those of other chunks; None if it is the only one.
    """

    data: Any
    first: int
    used: int
    steps: int
    salt: int | None

    def order(self, state: TrainState, limit: int, *, shuffle: bool) -> jax.Array:
        """The places in `data` of the next `limit` examples."""
        return order_program(self.size, limit, shuffle)(state, self.used, self.salt)

    @property
    def size(self) -> int:
        """The number of examples."""
        return jax.tree.leaves(self.data)[0].shape[0]


def chunks_of_stream(
    where: str, stream: Stream, state: TrainState, batch_size: int, *, shuffle: bool, check: Callable | None = None
) -> Iterator[Chunk]:
    """The chunks of a stream that are left in the state's epoch, each read while the previous one is in use.

    `check(data, first)` may raise an error for the values of a chunk.
    """
    rows = rows_per_chunk(stream, batch_size)
    total = -(-stream.examples // rows)
    position, used, steps, plan = int(state.epoch_position), 0, 0, []
    order = order_program(total, total, shuffle)(state, state.epoch_position, 0) if shuffle else range(total)
    for i in map(int, order):
        start, stop = i * rows, min((i + 1) * rows, stream.examples)
        if position < used + stop - start:
            plan.append((start, stop, used, steps, i + 1))
        used, steps = used + stop - start, steps + len(batch_sizes(stop - start, batch_size))

    def read(start, stop, used, steps, salt):
        data = read_chunk(where, stream, start, stop)
        if check is not None:
            check(data, start)
        return Chunk(jax.tree.map(as_array, data), start, used, steps, salt)

    with concurrent.futures.ThreadPoolExecutor(1, "fcfunc-stream") as reader:
        pending = reader.submit(read, *plan[0])
        for following in [*plan[1:], None]:
            chunk = pending.result()
            if following is not None:
                pending = reader.submit(read, *following)
            yield chunk


def rows_per_chunk(stream: Stream, batch_size: int) -> int:
    """The examples per chunk: whole batches, at least one."""
    return min(max(stream.chunk_size // batch_size, 1) * batch_size, stream.examples)


def steps_of_epoch(data: Any, n: int, batch_size: int) -> int:
    """The number of steps of an epoch over `n` examples; each chunk of a stream may end with a shorter batch."""
    if not isinstance(data, Stream):
        return len(batch_sizes(n, batch_size))
    rows = rows_per_chunk(data, batch_size)
    full, rest = divmod(n, rows)
    return full * len(batch_sizes(rows, batch_size)) + len(batch_sizes(rest, batch_size))
