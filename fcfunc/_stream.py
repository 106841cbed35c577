"""A data set that is read in chunks. `fcfunc.stream` makes it, and `fcfunc.train` trains on it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fcfunc import _arguments


@dataclasses.dataclass(frozen=True)
class Stream:
    """Examples that are read in chunks while training runs; made by the functions of `fcfunc.stream`, or by yourself.

    Attributes:
      examples: the number of examples.
      chunk_size: examples per chunk; two chunks are in memory at a time. `fit` reads as many whole batches as fit in.
      read: `read(start, stop)` returns the examples in `[start, stop)`, a pytree of arrays with a common leading axis.
        It is called in a thread, and the same examples are read again in each epoch.

    Example:
      >>> import numpy as np
      >>> squares = Stream(10**9, 2**16, lambda start, stop: np.arange(start, stop, dtype=np.float32) ** 2)
      >>> squares.read(3, 5)
      array([ 9., 16.], dtype=float32)
    """

    examples: int
    chunk_size: int
    read: Callable[[int, int], Any]

    def __post_init__(self):
        _arguments.positive("Stream", examples=self.examples, chunk_size=self.chunk_size)
        object.__setattr__(self, "examples", int(self.examples))
        object.__setattr__(self, "chunk_size", int(self.chunk_size))
        _arguments.function("Stream", read=self.read)


def read_chunk(where: str, stream: Stream, start: int, stop: int) -> Any:
    """Examples of a stream; raises an error if they are not arrays of numbers, or not as many as it was asked for."""
    data = _arguments.numeric_arrays(where, stream.read(start, stop), "the stream's data")
    found = _arguments.count(where, data, "the stream's data")
    if found != stop - start:
        raise ValueError(
            f"{where}: the stream's read({start}, {stop}) must return {stop - start} examples, got {found}"
        )
    return data
