"""Helpers for reading and writing files."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcfunc import _arguments

MAX_BYTES = 2**31


def regular_file(path: str | os.PathLike) -> Path:
    """The path of a regular file, which can be read without waiting for a writer."""
    _arguments.path("reading a file", path=path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():  # a folder, or a FIFO, which would block when opened
        raise ValueError(f"{path}: not a regular file")
    return path


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and returns when it is on disk."""
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all; an existing file is replaced at the end."""
    path = path.resolve()  # so that a symbolic link is kept
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as staging:
        staged = Path(staging) / path.name
        write_synced(staged, content)
        os.replace(staged, path)


def to_host(a: Any) -> np.ndarray:
    """The whole array on the host. If other processes hold parts of it, every process must call this."""
    if isinstance(a, jax.Array) and not a.is_fully_addressable and not a.is_fully_replicated:
        return multihost_utils.process_allgather(a, tiled=True)
    return np.asarray(a)


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as JSON would return it; raises TypeError if it is not plain data that every reader can represent."""
    if depth > 32:
        raise TypeError(f"{where[:80]}...: expected plain data of at most 32 levels")
    if value is None or isinstance(value, bool | str):
        return value
    if (isinstance(value, int) and -(2**63) <= value < 2**63) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(v, f"{where}[{k!r}]", depth + 1) for k, v in value.items()}
    shown = f"{value!r:.80}" if not isinstance(value, int) else "an integer of more than 64 bits"
    raise TypeError(f"{where}: expected plain data with finite numbers of at most 64 bits, got {shown}")
