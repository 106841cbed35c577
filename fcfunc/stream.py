"""Data sets that are larger than memory: examples that are read in chunks while training runs.

`train.fit`, `train.make_train_epoch` and `train.evaluate` accept a `Stream` in place of the data. Each chunk is trained
on by one compiled program while the next one is read. The chunks are visited in a random order, and the examples of
each chunk in a random order; every epoch visits each example exactly once.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fcfunc import _arguments
from fcfunc._files import regular_file
from fcfunc._layout import mesh_axes
from fcfunc._stream import Stream
from fcfunc.data import Dataset

__all__ = ["Stream", "from_arrays", "from_safetensors", "from_source", "from_table", "sharded"]

CHUNK_SIZE = 2**16


def from_arrays(arrays: Any, *, chunk_size: int = CHUNK_SIZE) -> Stream:
    """Streams arrays that are not in memory, such as memory-mapped files.

    Args:
      arrays: a pytree of objects with a `shape` and slices that NumPy can convert: `np.load(path, mmap_mode="r")`,
        `np.memmap`, or datasets of h5py or Zarr. All have the same leading axis, the examples.
      chunk_size: examples per chunk.

    Returns:
      A `Stream` of pytrees like `arrays`.

    Raises:
      ValueError: the arrays differ in the number of examples, or have none.

    Example:
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "x.npy")
      >>> np.save(path, np.arange(12.0).reshape(6, 2))
      >>> from_arrays({"x": np.load(path, mmap_mode="r")}, chunk_size=4).read(4, 6)
      {'x': array([[ 8.,  9.],
             [10., 11.]])}
    """
    for path, leaf in jax.tree.leaves_with_path(arrays):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "__getitem__"):
            kind = type(leaf).__name__
            raise TypeError(f"from_arrays: arrays{jax.tree_util.keystr(path)} must have a shape and slices, got {kind}")
    n = _arguments.count("from_arrays", jax.tree.map(lambda a: np.broadcast_to(np.int8(0), a.shape), arrays), "arrays")

    def read(start, stop):
        return jax.tree.map(lambda a: _copied(a, start, stop), arrays)

    return Stream(n, chunk_size, read)


def from_safetensors(path: Any, *, chunk_size: int = CHUNK_SIZE) -> Stream:
    """Streams the arrays of a safetensors file; needs safetensors.

    Args:
      path: the file. All its arrays have the same leading axis, the examples.
      chunk_size: examples per chunk.

    Returns:
      A `Stream` of `{name: array}`.

    Raises:
      ValueError: the file is damaged, or its arrays differ in the number of examples.

    Example:
      >>> import os, tempfile
      >>> from safetensors.numpy import save_file
      >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
      >>> save_file({"x": np.ones((6, 2), np.float32), "y": np.arange(6)}, path)
      >>> from_safetensors(path).read(4, 6)["y"]
      array([4, 5])
    """
    _arguments.positive("from_safetensors", chunk_size=chunk_size)
    safetensors = _arguments.library("from_safetensors", "safetensors", "safetensors")
    path = regular_file(path)
    try:
        file = safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: not a complete safetensors file ({e!s:.120})") from None
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    sizes = {name: (s.get_shape() or [0])[0] for name, s in slices.items()}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise ValueError(f"{path}: all arrays must have the same leading axis of at least 1, got {sizes!s:.120}")
    return Stream(next(iter(sizes.values())), chunk_size, lambda a, b: {name: s[a:b] for name, s in slices.items()})


def from_table(
    path: Any, *, target: str, features: Sequence[str] | None = None, chunk_size: int = CHUNK_SIZE
) -> Stream:
    """Streams the numeric columns of a Parquet or Arrow file; needs pyarrow.

    Args:
      path: a `.parquet` file, or an Arrow IPC file (`.arrow`, `.feather` without compression).
      target: the column that is `y`.
      features: the columns of `x`, in order; None: all other columns.
      chunk_size: examples per chunk. A Parquet file is read by row groups: chunks much smaller than these are slow.

    Returns:
      A `Stream` of `Dataset(x, y)`: `x` float32 `[n, features]`; `y` int32 if the column holds integers, else float32.

    Raises:
      ValueError: a column does not exist or is not numeric; a value is missing; the file is not of either format.

    Example:
      >>> import os, tempfile
      >>> import pyarrow as pa, pyarrow.parquet
      >>> path = os.path.join(tempfile.mkdtemp(), "rows.parquet")
      >>> pa.parquet.write_table(pa.table({"a": [1.0, 2.0, 3.0], "b": [4, 5, 6], "y": [0, 1, 1]}), path)
      >>> from_table(path, target="y").read(1, 3)
      Dataset(x=array([[2., 5.],
             [3., 6.]], dtype=float32), y=array([1, 1], dtype=int32))
    """
    _arguments.positive("from_table", chunk_size=chunk_size)
    pyarrow = _arguments.library("from_table", "pyarrow", "pyarrow.parquet")
    path = regular_file(path)
    with _errors_of_pyarrow(path, pyarrow):
        rows, schema, read_rows = (_parquet if Path(path).suffix.lower() == ".parquet" else _arrow)(path, pyarrow)
        kinds = dict(zip(schema.names, schema.types, strict=True))
    if rows < 1:
        raise ValueError(f"{path}: no rows")
    if len(kinds) != len(schema.names):
        raise ValueError(f"{path}: two columns have the same name, in {', '.join(schema.names)!s:.120}")
    names = [name for name in kinds if name != target] if features is None else list(features)
    for name in (*names, target):
        if name not in kinds:
            raise ValueError(f"{path}: no column {name!r}; it has {', '.join(kinds)!s:.120}")
        kind = kinds[name]
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
            raise ValueError(f"{path}: column {name!r} must be numeric, got {kind}")
    y_dtype = np.float32 if pyarrow.types.is_floating(kinds[target]) else np.int32

    def column(table, name, dtype):
        values = table.column(name)
        if values.null_count:
            raise ValueError(f"{path}: column {name!r} has missing values")
        values = values.to_numpy()
        if dtype == np.int32:  # a label that it cannot hold must stay out of range
            values = np.clip(values, np.iinfo(dtype).min, np.iinfo(dtype).max)
        return np.asarray(values, dtype)

    def read(start, stop):
        with _errors_of_pyarrow(path, pyarrow):
            table = read_rows(start, stop, [*names, target])
        if table.num_rows != stop - start:
            raise ValueError(f"{path}: damaged; expected {stop - start} rows from row {start} on, got {table.num_rows}")
        x = np.empty((stop - start, len(names)), np.float32)
        for i, name in enumerate(names):
            x[:, i] = column(table, name, np.float32)
        return Dataset(x, column(table, target, y_dtype))

    return Stream(rows, chunk_size, read)


def from_source(source: Any, *, chunk_size: int = CHUNK_SIZE) -> Stream:
    """Streams a source of single records, such as a Grain data source or a list.

    Args:
      source: has `len(source)` records, and `source[i]` is a pytree of numbers and arrays: a
        `grain.sources.RandomAccessDataSource`, a `grain.MapDataset`, or any sequence.
      chunk_size: examples per chunk.

    Returns:
      A `Stream` of the stacked records. Records are read one by one in Python, which takes microseconds each.

    Example:
      >>> from_source([{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}]).read(0, 2)
      {'x': array([1., 2.]), 'y': array([0, 1])}
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise TypeError(f"from_source: source must have len() and indices, got {type(source).__name__}")

    def read(start, stop):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(source[i] for i in range(start, stop)))

    return Stream(len(source), chunk_size, read)


def sharded(stream: Stream, sharding: NamedSharding) -> Stream:
    """A stream whose chunks are arrays on a mesh. Each process reads only the examples of its own devices.

    Args:
      stream: the stream; every process can read all of it, as from a file system that they share.
      sharding: how the leading axis of a chunk, the examples, is sharded: `NamedSharding(mesh, P("data"))`. A chunk
        that cannot be divided evenly over the devices, such as the last one, is replicated.

    Returns:
      A `Stream` of global arrays.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> rows = from_arrays(np.arange(6.0, dtype=np.float32))
      >>> sharded(rows, NamedSharding(mesh, jax.P("data"))).read(0, 6).sharding.spec == jax.P("data")
      True
    """
    for name, value, kind in (("stream", stream, Stream), ("sharding", sharding, NamedSharding)):
        if not isinstance(value, kind):
            raise TypeError(f"sharded: {name} must be a {kind.__name__}, got {type(value).__name__}")

    def read(start, stop):
        n = stop - start
        divides = n % math.prod(sharding.mesh.shape[a] for a in mesh_axes((*sharding.spec, None)[0])) == 0
        here = sharding if divides else NamedSharding(sharding.mesh, PartitionSpec())
        places: Any = here.addressable_devices_indices_map((n,))
        rows_of = {device: place[0].indices(n)[:2] for device, place in places.items()}
        parts = {rows: stream.read(start + rows[0], start + rows[1]) for rows in set(rows_of.values())}

        def globally(*leaves):
            of_rows = dict(zip(parts, map(_arguments.clipped, leaves), strict=True))
            shards = [jax.device_put(of_rows[rows], device) for device, rows in rows_of.items()]
            return jax.make_array_from_single_device_arrays((n, *np.shape(leaves[0])[1:]), here, shards)

        return jax.tree.map(globally, *parts.values())

    return Stream(stream.examples, stream.chunk_size, read)


def _copied(a, start, stop):
    """Rows of an array, in memory; the pages of a memory-mapped file are released again."""
    copy = np.array(a[start:stop])
    mapped = getattr(a, "_mmap", None)
    # A copy-on-write map would lose what its owner has changed.
    if mapped is not None and hasattr(mapped, "madvise") and getattr(a, "mode", "c") != "c":
        # Otherwise the whole file would count as memory of this process after one epoch.
        mapped.madvise(mmap.MADV_DONTNEED)
    return copy


@contextlib.contextmanager
def _errors_of_pyarrow(path, pyarrow):
    """Turns pyarrow's errors, which name no file, into a ValueError."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as e:
        raise ValueError(
            f"{path}: not a complete Parquet or Arrow IPC file ({_arguments.first_line(e):.160})"
        ) from None


def _parquet(path, pyarrow):
    """The number of rows, the schema, and a function that reads rows `[start, stop)` of some columns."""
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if sum(sizes) != file.metadata.num_rows:  # pyarrow reads such a file by either number, without an error
        raise ValueError(f"{path}: damaged; has {file.metadata.num_rows} rows, and {sum(sizes)} in its row groups")
    ends = np.cumsum([0, *sizes])

    def read_rows(start, stop, names):
        first, last = np.searchsorted(ends, start, "right") - 1, np.searchsorted(ends, stop, "left")
        table = file.read_row_groups(list(range(first, last)), columns=names)
        if table.num_rows != ends[last] - ends[first]:
            raise ValueError(f"{path}: damaged; {ends[last] - ends[first]} rows expected, {table.num_rows} read")
        return table.slice(start - int(ends[first]), stop - start)

    return int(ends[-1]), file.schema_arrow, read_rows


def _arrow(path, pyarrow):
    """The same for an Arrow IPC file, which is memory-mapped."""
    table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    return table.num_rows, table.schema, lambda start, stop, names: table.select(names).slice(start, stop - start)
