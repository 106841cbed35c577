"""Data sets in memory: readers that reject damaged files, a split, and a standardizer.

A reader checks a file's kind, size and header before it allocates memory, and rejects arrays, or a file, of more than
`max_bytes`; while reading it needs up to three times that, `read_csv` up to twenty times if cells are short. A rejected
file is a ValueError (a FileNotFoundError if there is none) that names the file and what is wrong with it. Nothing is
unpickled. All arrays are NumPy arrays; `fcfunc.train` puts them on the device.
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

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts it
FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_AXES = 32
MAX_MEMBERS = 10_000
"""The most arrays that an NPZ file may hold."""
MEMBER_BYTES = 2**20
"""What an NPZ file may be larger than its arrays: names, headers, the directory."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What NumPy writes; zipfile bounds the memory of no other method by what a member says of its size."""
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class Dataset(NamedTuple):
    """Examples: inputs `x`, `[n, ...]`, and labels or targets `y`, `[n, ...]`."""

    x: Any
    y: Any


class Table(NamedTuple):
    """A CSV file: `x` float32 `[n, features]`; `y` int32 or float32 `[n]`; names of columns and of classes.

    `classes` holds the strings that the integers in `y` stand for, or None if the target is numeric.
    """

    x: np.ndarray
    y: np.ndarray
    features: list[str]
    classes: list[str] | None


def digits() -> Dataset:
    """The handwritten digits that come with scikit-learn: 1797 images of 8 by 8.

    Returns:
      `x` float32 `[1797, 64]` in [0, 1], `y` int32 `[1797]` in [0, 10).

    Raises:
      ImportError: scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository.
    """
    sklearn = _arguments.library("digits", "scikit-learn", "sklearn.datasets")
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return Dataset((x / 16).astype(np.float32), y.astype(np.int32))


def fashion_mnist(folder: str | os.PathLike = FASHION_MNIST_FOLDER) -> tuple[Dataset, Dataset]:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 by 28, in bytes.

    Args:
      folder: where the four IDX files are, gzipped or not; by default that of the Debian package
        `dataset-fashion-mnist`.

    Returns:
      `(train, test)`, each with `x` uint8 `[n, 28, 28]` and `y` int32 `[n]` in [0, 10).

    Raises:
      FileNotFoundError: the folder or a file is missing.
      ValueError: a file is damaged, or images and labels differ in number.

    Source: H. Xiao, K. Rasul and R. Vollgraf 2017, Fashion-MNIST. MIT license.
    """
    _arguments.path("fashion_mnist", folder=folder)
    folder = Path(folder)
    parts = []
    for part in ("train", "t10k"):
        x = read_idx(_plain_or_gzipped(folder / f"{part}-images-idx3-ubyte"))
        y = read_idx(_plain_or_gzipped(folder / f"{part}-labels-idx1-ubyte"))
        if x.ndim != 3 or y.shape != x.shape[:1]:
            raise ValueError(f"{folder}: {part} has images {list(x.shape)} and labels {list(y.shape)}")
        parts.append(Dataset(x, y.astype(np.int32)))
    return parts[0], parts[1]


def read_idx(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> np.ndarray:
    """An array from an IDX file, the format of MNIST, gzipped or not.

    Args:
      path: the file; one that begins with the gzip signature is decompressed.
      max_bytes: the largest array that is accepted.

    Returns:
      The array, in the machine's byte order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an IDX file, is truncated, is longer than its header says, or is too large.

    Source: Y. LeCun, The MNIST database, for the format.
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
                raise ValueError(f"{path}: the gzip stream is damaged or cut off ({e})") from None


def read_npz(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file, by name.

    Args:
      path: the file.
      max_bytes: the largest total size that is accepted, decompressed.

    Returns:
      A dict of arrays of numbers or booleans.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an NPZ file, contains anything but arrays of numbers, is damaged or too large.
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
            total = sum(m.file_size for m in members)
            if total > max_bytes or len(members) > MAX_MEMBERS:
                raise ValueError(
                    f"{path}: {len(members)} arrays, {total} bytes when unpacked, more than the {max_bytes} allowed "
                    f"(or than {MAX_MEMBERS} arrays)"
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{path}: two arrays are called {name!r}")
                arrays[name] = _read_npy(path, archive, member)
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, UnicodeError, OSError) as e:
        raise ValueError(f"{path}: not a whole NPZ file ({e})") from None
    if not arrays:
        raise ValueError(f"{path}: holds no array")
    return arrays


def read_csv(path: str | os.PathLike, *, target: str | None = None, max_bytes: int = MAX_BYTES) -> Table:
    """Features and a target from a CSV file.

    The first row is a header if one of its cells except the last is not a number. Every feature must be a finite
    number. A target of integers of at most nine digits is read as int32, of other numbers as float32, and of strings as
    the indices of the sorted strings.

    Args:
      path: the file, UTF-8, comma-separated.
      target: the name of the target's column in the header; None: the last column.
      max_bytes: the largest file that is accepted.

    Returns:
      A `Table`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is empty or too large, a row and the first one differ in their number of cells, a cell is
        not a finite number, or the target is not in the header; each with the line.
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
            raise ValueError(f"{path}: at least two columns expected, features and a target, got {width}")
        has_header = any(_number(cell) is None for cell in cells[:-1])
        header = cells if has_header else [f"column {i + 1}" for i in range(width)]
        if target is not None and target not in header:
            raise ValueError(f"{path}: no column {target!r}; the header has {', '.join(header)}")
        if target is not None and header.count(target) > 1:
            raise ValueError(f"{path}: {header.count(target)} columns are called {target!r}")
        at = width - 1 if target is None else header.index(target)
        features = [name for i, name in enumerate(header) if i != at]
        numbers, targets = array.array("f"), []
        for line, cells in rows if has_header else itertools.chain([first], rows):
            if len(cells) != width:
                raise ValueError(f"{path}, line {line}: {width} cells expected, got {len(cells)}")
            targets.append(cells.pop(at))
            for name, cell in zip(features, cells, strict=True):
                number = _number(cell)
                if number is None or not abs(number) <= FLOAT32_MAX:
                    raise ValueError(f"{path}, line {line}, {name}: a finite number expected, got {cell[:40]!r}")
                numbers.append(number)
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({e})") from None
    if not targets:
        raise ValueError(f"{path}: a header and no rows")
    y, classes = _target(path, targets, has_header)
    return Table(np.array(numbers, np.float32).reshape(-1, width - 1), y, features, classes)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file with the line that each ends in, without empty lines."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, strict=True)
        for row in reader:
            if row:
                yield reader.line_num, [cell.strip() for cell in row]


def split(data: Any, fractions: Sequence[float], *, seed: int, stratify: Any = None) -> tuple[Any, ...]:
    """Splits examples at random into parts that share none.

    Args:
      data: a pytree of NumPy arrays, or of DataFrames and Series, with a common leading axis.
      fractions: the share of each part, positive, with a sum of 1.
      seed: of the order; the same seed gives the same parts.
      stratify: labels, `[n]`, such as `data.y`: each part receives its share of every class, to within two examples.
        None: of all examples together.

    Returns:
      One tree for each fraction, together all examples.

    Raises:
      ValueError: the fractions are not as said, a part would be empty, or there is not one label for each example.

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
        raise ValueError(f"split: positive fractions with a sum of 1 expected, got {fractions}")
    n = _arguments.count("split", data)
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if stratify is not None:
        labels = np.asarray(stratify)
        if labels.shape != (n,):
            raise ValueError(f"split: stratify must be [{n}], one label for each example, got {list(labels.shape)}")
        # The examples of each class are spread evenly over the order, beginning at a random fraction of a step.
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        classes, places = classes[order], np.empty(n)
        for k, count in enumerate(counts):
            places[classes == k] = (np.arange(count) + rng.uniform()) / count
        order = order[np.argsort(places, kind="stable")]
    ends = np.round(np.cumsum(fractions) * n).astype(int)
    parts = [rng.permutation(part) if stratify is not None else part for part in np.split(order, ends[:-1])]
    if min(map(len, parts)) == 0:
        raise ValueError(f"split: {n} examples are too few for parts of {fractions}")
    return tuple(jax.tree.map(lambda a, rows=rows: getattr(a, "iloc", a)[rows], data) for rows in parts)


class Standardizer(NamedTuple):
    """`(x - mean) / scale`, with the statistics of the training part; call it on every part.

    `fcfunc.params_file.save` saves it beside the parameters, and `Standardizer(**loaded)` makes it again.

    Attributes:
      mean: of each column, float64.
      scale: the standard deviation of each column, float64; 1 where the column is constant.
    """

    mean: Any
    scale: Any

    def __call__(self, x: Any) -> Any:
        """The standardized `x`, float32."""
        return ((x - self.mean) / self.scale).astype(np.float32)

    def inverse(self, z: Any) -> Any:
        """The values that `z` stands for, in their own unit: `z * scale + mean`, float32."""
        return (z * self.scale + self.mean).astype(np.float32)


def standardizer(x: np.ndarray) -> Standardizer:
    """The standardization of each column to mean 0 and standard deviation 1.

    Args:
      x: the training part alone, `[n, ...]`: statistics of the whole data would leak the test part into training.

    Returns:
      A `Standardizer` of `[m, ...]`. A constant column is shifted to 0 and not scaled.

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
        raise FileNotFoundError(f"{gzipped}: no such file (nor without .gz)")
    return path if path.exists() else gzipped


def _parse_idx(path: Path, f: BinaryIO, max_bytes: int) -> np.ndarray:
    magic = f.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_DTYPES or magic[3] == 0:
        raise ValueError(f"{path}: not an IDX file (its first four bytes are {magic.hex() or 'missing'})")
    dtype, header = np.dtype(IDX_DTYPES[magic[2]]), f.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{path}: cut off in the header")
    shape = [int(d) for d in np.frombuffer(header, ">u4")]
    size = math.prod(shape) * dtype.itemsize
    if _claimed_elements(shape) * dtype.itemsize > max_bytes or len(shape) > MAX_AXES:
        raise ValueError(f"{path}: the header claims {shape}, {size} bytes, more than the {max_bytes} allowed")
    body = f.read(size + 1)
    if len(body) != size:
        came = f"only {len(body)} follow: it is cut off" if len(body) < size else "more follow"
        raise ValueError(f"{path}: the header claims {shape}, {size} bytes, and {came}")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _claimed_elements(shape) -> int:
    """The number of elements of an array, in which an axis of size 0 counts as 1, as in NumPy's own limit."""
    return math.prod(max(d, 1) for d in shape)


def _read_npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array of an archive; its header is compared with the member's size before memory is allocated."""
    where = f"{path}, {member.filename}"
    if member.compress_type not in COMPRESSIONS:
        raise ValueError(f"{where}: packed by another method than NumPy's, {member.compress_type}")
    try:
        with archive.open(member) as f:
            version = np.lib.format.read_magic(f)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[version](f)
            size, there = math.prod(shape) * dtype.itemsize, member.file_size - f.tell()
    except MemoryError:
        raise
    except Exception as e:  # NumPy reads the header with ast and tokenize, whose errors are many
        raise ValueError(f"{where}: not an array in NPY format ({type(e).__name__})") from None
    if dtype.kind not in "biufc":
        raise ValueError(f"{where}: an array of numbers expected, got dtype {dtype}")
    if not all(type(d) is int and d >= 0 for d in shape) or len(shape) > MAX_AXES:
        raise ValueError(f"{where}: the header claims an impossible shape, {list(shape)!s:.80}")
    if size != there or _claimed_elements(shape) * dtype.itemsize > 2**62:
        raise ValueError(f"{where}: the header claims {list(shape)} of {dtype}, {size} bytes, and {there} follow")
    try:
        with archive.open(member) as f:
            return np.lib.format.read_array(f, allow_pickle=False)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _number(cell: str) -> float | None:
    """The number in a cell, None if there is none; digits grouped by `_` do not count as a number."""
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
            raise ValueError(f"{path}, line {line}: a finite number expected as the target, got {cells[i][:40]!r}")
    if all(re.fullmatch(r"[+-]?\d{1,9}", cell) for cell in cells):
        return np.array([int(cell) for cell in cells], np.int32), None
    return np.array(numbers, np.float32), None
