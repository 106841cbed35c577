"""Data sets in memory: readers that reject damaged files, a random split, and a standardizer.

A reader checks the type, size and header of a file before it allocates memory, and rejects arrays, or a file, of more
than `max_bytes`. While reading, it needs up to three times that memory, `read_csv` up to twenty times if cells are
short. A rejected file raises a ValueError (or a FileNotFoundError if it does not exist) with its path and what is
wrong. Nothing is unpickled. All arrays are NumPy arrays; `fcfunc.train` copies them to the device.
"""

import array
import csv
import gzip
import itertools
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from fcfunc import _arguments
from fcfunc._arguments import check_values
from fcfunc._files import MAX_BYTES, regular_file

__all__ = [
    "Dataset", "Standardizer", "Table", "check_values", "digits", "fashion_mnist",
    "read_csv", "read_idx", "read_npz", "split", "standardizer",
]  # fmt: skip

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_AXES = 32
MAX_MEMBERS = 10_000
"""The largest number of arrays in an NPZ file."""
MEMBER_BYTES = 2**20
"""How much larger than its arrays an NPZ file may be, for names, headers and the directory."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The methods that NumPy writes. For others, zipfile does not limit memory to the size that a member declares."""
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Dataset(NamedTuple):
    """Examples: inputs `x`, `[n, ...]`, and labels or targets `y`, `[n, ...]`."""

    x: Any
    y: Any


class Table(NamedTuple):
    """The contents of a CSV file: `x` float32 `[n, features]`, `y` int32 or float32 `[n]`, and names.

    `features` are the column names. `classes[i]` is the string that class index i in `y` stands for; `classes` is None
    if the target is numeric.
    """

    x: np.ndarray
    y: np.ndarray
    features: list[str]
    classes: list[str] | None


def digits() -> Dataset:
    """The handwritten digits of scikit-learn: 1797 images of 8 by 8 pixels.

    Returns:
      `x` float32 `[1797, 64]` in [0, 1], `y` int32 `[1797]` in [0, 10).

    Raises:
      ImportError: scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository.

    Example:
      >>> x, y = digits()
      >>> x.shape, y[:5]
      ((1797, 64), array([0, 1, 2, 3, 4], dtype=int32))
    """
    sklearn = _arguments.library("digits", "scikit-learn", "sklearn.datasets")
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return Dataset((x / 16).astype(np.float32), y.astype(np.int32))


def fashion_mnist(folder: str | os.PathLike = FASHION_MNIST_FOLDER) -> tuple[Dataset, Dataset]:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 by 28 pixels, one byte each.

    Args:
      folder: the folder with the four IDX files, gzipped or not; by default that of the Debian package
        `dataset-fashion-mnist`.

    Returns:
      `(train, test)`, each with `x` uint8 `[n, 28, 28]` and `y` int32 `[n]` in [0, 10).

    Raises:
      FileNotFoundError: the folder or a file does not exist.
      ValueError: a file is damaged, or the numbers of images and labels differ.

    Source: H. Xiao, K. Rasul and R. Vollgraf 2017, Fashion-MNIST. MIT license.

    Example:
      >>> training, test = fashion_mnist("folder/of/the/four/files")  # doctest: +SKIP
    """
    _arguments.path("fashion_mnist", folder=folder)
    folder = Path(folder)
    parts = []
    for part in ("train", "t10k"):
        x = read_idx(_plain_or_gzipped(folder / f"{part}-images-idx3-ubyte"))
        y = read_idx(_plain_or_gzipped(folder / f"{part}-labels-idx1-ubyte"))
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(f"{folder}: {part} images {list(x.shape)} do not match labels {list(y.shape)}")
        parts.append(Dataset(x, y.astype(np.int32)))
    return parts[0], parts[1]


def read_idx(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """Reads an array from an IDX file, the format of MNIST, gzipped or not.

    Args:
      path: the file; if it begins with the gzip signature, it is decompressed.
      max_bytes: the largest accepted size of the array.

    Returns:
      The array, in native byte order.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not an IDX file, is truncated, is longer than its header says, or is too large.

    Source: Y. LeCun, The MNIST database, for the format.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "labels.idx")
      >>> with open(path, "wb") as f:
      ...     n = f.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))  # unsigned bytes, one axis of length 3
      >>> read_idx(path)
      array([7, 2, 1], dtype=uint8)
    """
    _arguments.positive("read_idx", max_bytes=max_bytes)
    path = regular_file(path)
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not zipped:
            return _parse_idx(path, raw, max_bytes)
        with gzip.GzipFile(fileobj=raw) as unzipped:
            try:
                return _parse_idx(path, unzipped, max_bytes)  # pyright: ignore[reportArgumentType]
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise ValueError(f"{path}: the gzip stream is damaged or truncated ({e})") from None


def read_npz(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Reads the arrays of an NPZ file, by name.

    Args:
      path: the file.
      max_bytes: the largest accepted total size of the arrays, decompressed.

    Returns:
      A dict of arrays of numbers or booleans.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not an NPZ file, contains something other than numeric arrays, is damaged or too large.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "data.npz")
      >>> np.savez(path, x=np.zeros((5, 2)), y=np.arange(5))
      >>> {name: a.shape for name, a in read_npz(path).items()}
      {'x': (5, 2), 'y': (5,)}
    """
    _arguments.positive("read_npz", max_bytes=max_bytes)
    path = regular_file(path)
    size = path.stat().st_size
    if size > max_bytes + MEMBER_BYTES:
        raise ValueError(f"{path}: {size} bytes, more than the {max_bytes} allowed")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            claimed, total = _claimed_members(path), sum(m.file_size for m in members)
            if claimed not in (len(members), 0xFFFF):  # the latter: the number is elsewhere, in a larger field
                raise ValueError(f"{path}: damaged; expected {claimed} arrays, found {len(members)}")
            if total > max_bytes or len(members) > MAX_MEMBERS:
                raise ValueError(
                    f"{path}: {len(members)} arrays, {total} bytes decompressed, more than the {max_bytes} bytes or "
                    f"{MAX_MEMBERS} arrays allowed"
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{path}: two arrays have the name {name!r}")
                arrays[name] = _read_npy(path, archive, member)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, UnicodeError, OSError) as e:
        raise ValueError(f"{path}: not a complete NPZ file ({e})") from None
    if not arrays:
        raise ValueError(f"{path}: contains no array")
    return arrays


def _claimed_members(path: Path) -> int:
    """The number of members in the last record of a zip file, which zipfile does not compare with what it finds."""
    with open(path, "rb") as f:
        f.seek(max(path.stat().st_size - 22 - 0xFFFF, 0))  # the record is followed by a comment of at most 65,535 bytes
        end = f.read()
    at = end.rfind(b"PK\5\6")
    return int.from_bytes(end[at + 10 : at + 12], "little")


def read_csv(path: str | os.PathLike, *, target: str | None = None, max_bytes: int = MAX_BYTES) -> Table:
    r"""Reads features and a target from a CSV file.

    The first row is a header if any of its cells except the last is not a number. Every feature must be a finite
    number. A target of integers with at most nine digits becomes int32, other numbers become float32, and strings
    become their indices in sorted order.

    Args:
      path: the file, UTF-8, comma-separated.
      target: the name of the target column in the header; None: the last column.
      max_bytes: the largest accepted file.

    Returns:
      A `Table`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is empty or too large, rows differ in their number of cells, a cell is not a finite number,
        or the target is not in the header; the message names the line.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "bees.csv"
      >>> n = path.write_text("length,width,kind\n1.5,0.2,wasp\n2,0.4,bee\n")
      >>> table = read_csv(path)
      >>> table.features, table.classes, table.y
      (['length', 'width'], ['bee', 'wasp'], array([1, 0], dtype=int32))
    """
    _arguments.positive("read_csv", max_bytes=max_bytes)
    path = regular_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes, more than the {max_bytes} allowed")
    try:
        rows = _rows(path)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{path}: empty")
        _, cells = first
        width = len(cells)
        if width < 2:
            raise ValueError(f"{path}: expected at least two columns, features and a target, got {width}")
        has_header = any(_number(cell) is None for cell in cells[:-1])
        header = cells if has_header else [f"column {i + 1}" for i in range(width)]
        if target is not None and target not in header:
            raise ValueError(f"{path}: no column {target!r}; the header has {', '.join(header)}")
        if target is not None and header.count(target) > 1:
            raise ValueError(f"{path}: {header.count(target)} columns have the name {target!r}")
        at = width - 1 if target is None else header.index(target)
        features = [name for i, name in enumerate(header) if i != at]
        numbers, targets = array.array("f"), []
        for line, cells in rows if has_header else itertools.chain([first], rows):
            if len(cells) != width:
                raise ValueError(f"{path}, line {line}: expected {width} cells, got {len(cells)}")
            targets.append(cells.pop(at))
            for name, cell in zip(features, cells, strict=True):
                number = _number(cell)
                if number is None or not abs(number) <= FLOAT32_MAX:
                    raise ValueError(f"{path}, line {line}, {name}: expected a finite number, got {cell[:40]!r}")
                numbers.append(number)
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({e})") from None
    if not targets:
        raise ValueError(f"{path}: a header without rows")
    y, classes = _target(path, targets, has_header)
    return Table(np.array(numbers, np.float32).reshape(-1, width - 1), y, features, classes)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The non-empty rows of a CSV file, each with the number of its last line."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, strict=True)
        for row in reader:
            if row:
                yield reader.line_num, [cell.strip() for cell in row]


def split(data: Any, fractions: Sequence[float], *, seed: int, stratify: Any = None) -> tuple[Any, ...]:
    """Splits examples at random into disjoint parts.

    Args:
      data: a pytree of NumPy arrays, or of DataFrames and Series, with a common leading axis.
      fractions: the fraction of each part, positive, with a sum of 1.
      seed: the seed of the random order; the same seed gives the same parts.
      stratify: labels, `[n]`, such as `data.y`; each part then receives its fraction of every class, to within two
        examples. None: the split ignores labels.

    Returns:
      One pytree for each fraction; together they contain all examples.

    Raises:
      ValueError: the fractions are not positive with a sum of 1, a part would be empty, or there is not one label for
        each example.

    Example:
      >>> [part.shape for part in split(np.zeros((10, 3)), [0.8, 0.2], seed=0)]
      [(8, 3), (2, 3)]
      >>> y = np.repeat([0, 1], [10, 90])
      >>> [np.bincount(part).tolist() for part in split(y, [0.8, 0.2], seed=0, stratify=y)]
      [[8, 72], [2, 18]]
    """
    try:
        fractions = [float(f) for f in fractions]
    except (TypeError, ValueError):
        raise TypeError(f"split: fractions must be numbers, got {fractions!r:.80}") from None
    _arguments.integer("split", seed=seed)
    if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"split: fractions must be positive with a sum of 1, got {fractions}")
    n = _arguments.count("split", data)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if stratify is not None:
        labels = np.asarray(stratify)
        if labels.shape != (n,):
            raise ValueError(f"split: stratify must be [{n}], one label for each example, got {list(labels.shape)}")
        # Spread the examples of each class evenly over the order, starting at a random fraction of a step.
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        classes, places = classes[order], np.empty(n)
        for k, count in enumerate(counts):
            places[classes == k] = (np.arange(count) + rng.uniform()) / count
        order = order[np.argsort(places, kind="stable")]
    ends = np.round(np.cumsum(fractions) * n).astype(int)
    parts = [rng.permutation(part) if stratify is not None else part for part in np.split(order, ends[:-1])]
    if min(map(len, parts)) == 0:
        raise ValueError(f"split: {n} examples are too few for fractions of {fractions}")
    return tuple(jax.tree.map(lambda a, rows=rows: getattr(a, "iloc", a)[rows], data) for rows in parts)


class Standardizer(NamedTuple):
    """Computes `(x - mean) / scale` with the statistics of the training part; call it on every part.

    `fcfunc.params_file.save` saves it together with the parameters, and `Standardizer(**loaded)` restores it.

    Attributes:
      mean: the mean of each column, float64.
      scale: the standard deviation of each column, float64; 1 for a constant column.
    """

    mean: Any
    scale: Any

    def __call__(self, x: Any) -> Any:
        """The standardized `x`, float32."""
        return ((x - self.mean) / self.scale).astype(np.float32)

    def inverse(self, z: Any) -> Any:
        """The values in their original unit, `z * scale + mean`, float32."""
        return (z * self.scale + self.mean).astype(np.float32)


def standardizer(x: np.ndarray) -> Standardizer:
    """Makes a `Standardizer`, which scales each column to mean 0 and standard deviation 1.

    Args:
      x: the training part only, `[n, ...]`; statistics of all data would leak the test part into training.

    Returns:
      A `Standardizer` for arrays `[m, ...]`. A constant column is shifted to 0 and not scaled.

    Example:
      >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
      >>> scaler = standardizer(x)
      >>> scaler(x)
      array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> scaler.inverse(scaler(x))
      array([[ 1., 10.],
             [ 3., 30.]], dtype=float32)
    """
    if not isinstance(x, np.ndarray):
        raise TypeError(f"standardizer: x must be a NumPy array, got {type(x).__name__}")
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    return Standardizer(np.asarray(mean), np.where(scale > 0, scale, 1.0))


def _plain_or_gzipped(path: Path) -> Path:
    gzipped = path.with_name(path.name + ".gz")
    if not path.exists() and not gzipped.exists():
        raise FileNotFoundError(f"{gzipped}: no such file, with or without .gz")
    return path if path.exists() else gzipped


def _parse_idx(path: Path, f: BinaryIO, max_bytes: int) -> np.ndarray:
    magic = f.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_DTYPES or magic[3] == 0:
        raise ValueError(f"{path}: not an IDX file (its first four bytes are {magic.hex() or 'missing'})")
    dtype, header = np.dtype(IDX_DTYPES[magic[2]]), f.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{path}: truncated in the header")
    shape = [int(d) for d in np.frombuffer(header, ">u4")]
    size = math.prod(shape) * dtype.itemsize
    if _claimed_elements(shape) * dtype.itemsize > max_bytes or len(shape) > MAX_AXES:
        raise ValueError(f"{path}: the header claims {shape}, {size} bytes, more than the {max_bytes} allowed")
    body = f.read(size + 1)
    if len(body) != size:
        came = f"only {len(body)} follow; it is truncated" if len(body) < size else "more follow"
        raise ValueError(f"{path}: the header claims {shape}, {size} bytes, but {came}")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _claimed_elements(shape) -> int:
    """The number of elements of an array, counting an axis of size 0 as 1, as NumPy's own limit does."""
    return math.prod(max(d, 1) for d in shape)


def _read_npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array of an archive; compares its header with the member's size before allocating memory."""
    where = f"{path}, {member.filename}"
    if member.compress_type not in COMPRESSIONS:
        raise ValueError(f"{where}: compression method {member.compress_type} is not one that NumPy writes")
    try:
        with archive.open(member) as f:
            version = np.lib.format.read_magic(f)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](f)
            size, there = math.prod(shape) * dtype.itemsize, member.file_size - f.tell()
    except MemoryError:
        raise
    except Exception as e:  # NumPy parses the header with ast and tokenize, which raise many types of errors
        raise ValueError(f"{where}: not an array in NPY format ({type(e).__name__})") from None
    if dtype.kind not in "biufc":
        raise ValueError(f"{where}: expected an array of numbers, got dtype {dtype}")
    if not all(type(d) is int and d >= 0 for d in shape) or len(shape) > MAX_AXES:
        raise ValueError(f"{where}: the header claims an impossible shape, {list(shape)!s:.80}")
    if size != there or _claimed_elements(shape) * dtype.itemsize > 2**62:
        raise ValueError(f"{where}: the header claims {list(shape)} of {dtype}, {size} bytes, but {there} follow")
    try:
        with archive.open(member) as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _number(cell: str) -> float | None:
    """The number in a cell, or None if it is not a number; digits grouped by `_` do not count as one."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _target(path: Path, cells: list[str], has_header: bool) -> tuple[np.ndarray, list[str] | None]:
    numbers = [_number(cell) for cell in cells]
    if all(number is None for number in numbers):
        classes = sorted(set(cells))
        index = {name: i for i, name in enumerate(classes)}
        return np.array([index[cell] for cell in cells], np.int32), classes
    for i, number in enumerate(numbers):
        if number is None or not abs(number) <= FLOAT32_MAX:
            line, _ = next(itertools.islice(_rows(path), i + has_header, None))
            raise ValueError(f"{path}, line {line}: expected a finite number as the target, got {cells[i][:40]!r}")
    if all(re.fullmatch(r"[+-]?\d{1,9}", cell) for cell in cells):
        return np.array([int(cell) for cell in cells], np.int32), None
    return np.array(numbers, np.float32), None
