"""Saving and loading parameters in one safetensors file, together with their configuration.

The file is written and read by the safetensors library, which checks the header against the file before it allocates
memory, and does not execute code. This module adds a SHA-256 of all arrays and the configuration; `load` verifies it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcfunc import _arguments, _files
from fcfunc._files import MAX_BYTES, regular_file

__all__ = ["load", "save"]

HEADER_BYTES = 2**20
"""The longest header that is read, for about ten thousand arrays; the library itself allows a hundred times that."""

LEVELS = 64
"""The largest nesting depth of an array."""

DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
"""The dtypes that can be saved: those that both NumPy and the library support."""


def save(path: str | os.PathLike, params: Any, *, config: Any = None) -> None:
    """Writes parameters and their configuration to a file, completely or not at all.

    Args:
      path: the file, `*.safetensors` by convention.
      params: lists, dicts and named tuples of arrays, as from `net.init`, also combined with others, such as
        `{"layers": params, "input": standardizer}`. An array's name in the file is its path, e.g. `layers.0.w`. Sharded
        arrays are gathered.
      config: the configuration of the parameters, e.g. `net.to_dict()`: dicts with string keys, lists, strings,
        numbers, booleans and None.

    Raises:
      ImportError: safetensors is not installed.
      TypeError: `params` contains something else or a dtype that the file cannot hold; `config` contains other data.
      OSError: the file cannot be written; an existing file is left unchanged.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "params.safetensors"
      >>> import fcfunc
      >>> net = fcfunc.mlp([2, 3])
      >>> save(path, net.init(jax.random.key(0)), config=net.to_dict())
      >>> params, config = load(path)
      >>> fcfunc.mlp(**config) == net
      True
    """
    _arguments.path("params_file.save", path=path)
    if isinstance(params, jax.Array | np.ndarray | np.generic):
        raise TypeError("params_file.save: params must be a list, dict or named tuple of arrays, got an array")
    tensors = {name: _host(name, a) for name, a in _named(params, "").items()}
    text = json.dumps(_files.plain(config, "params_file.save: config"), sort_keys=True)
    metadata = {"config": text, "sha256": _digest(tensors, text)}
    content = _safetensors().numpy.save(tensors, metadata=metadata)
    _files.write_whole(Path(path), content)


def load(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> tuple[Any, Any]:
    """Reads a file that `save` wrote, or any other safetensors file.

    Args:
      path: the file.
      max_bytes: the largest accepted file. Reading needs memory for two copies of it, and a few kB for each array.

    Returns:
      `(params, config)`: lists and dicts of arrays as they were saved, and the configuration, or None if the file has
      none; for a network, `fcfunc.mlp(**config)` validates it. Names in the file, such as `layers.0.w`, are read as
      paths; named tuples become dicts. The arrays are JAX arrays. 64-bit arrays, such as torch's counters, stay NumPy
      arrays unless `jax_enable_x64` is set, because JAX would narrow them.

    Raises:
      ImportError: safetensors is not installed.
      FileNotFoundError: the file does not exist.
      ValueError: the file, which the message names, is not a complete safetensors file, is too large, or was altered
        after it was saved.

    Example:
      >>> import fcfunc, tempfile
      >>> path = Path(tempfile.mkdtemp()) / "params.safetensors"
      >>> save(path, fcfunc.init(jax.random.key(0), [2, 3]))
      >>> params, config = load(path)
      >>> params[0]["w"].shape, config
      ((2, 3), None)
    """
    _arguments.positive("params_file.load", max_bytes=max_bytes)
    path = regular_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes, more than the {max_bytes} allowed")
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_BYTES):
        raise ValueError(f"{path}: not a complete safetensors file ({size} bytes, with a header of {length})")
    library = _safetensors()
    try:
        with library.safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except Exception as e:  # the library's own errors, and NumPy's for an unknown dtype
        raise ValueError(f"{path}: not a complete safetensors file ({type(e).__name__}: {e!s:.200})") from None
    if any(name.count(".") >= LEVELS for name in tensors):
        raise ValueError(f"{path}: the name of an array has more than {LEVELS} parts")
    text = metadata.get("config", "null")
    if "config" in metadata and "sha256" not in metadata:
        raise ValueError(f"{path}: its metadata has a config but no sha256; it is damaged, or from another program")
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, text):
        raise ValueError(f"{path}: damaged; its arrays differ from the saved ones (SHA-256 mismatch)")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: the config is not valid JSON ({e!s:.80})") from None
    kept = {name: jax.dtypes.canonicalize_dtype(a.dtype) == a.dtype for name, a in tensors.items()}
    return _tree(path, {name: jax.device_put(a) if kept[name] else a for name, a in tensors.items()}), config


def _safetensors():
    return _arguments.library("params_file", "safetensors", "safetensors.numpy")


def _host(name: str, a) -> np.ndarray:
    """The array on the host, in the form in which it will be read back."""
    host = np.ascontiguousarray(_files.to_host(a)).reshape(np.shape(a))
    host = host.astype(host.dtype.newbyteorder("="))
    if host.dtype.name not in DTYPES:
        raise TypeError(f"params_file.save: the dtype of {name} must be one of {', '.join(DTYPES)}, got {host.dtype}")
    return host


def _digest(tensors: dict[str, np.ndarray], config: str) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        a = tensors[name]
        digest.update(f"{name} {a.dtype} {a.shape}".encode())
        digest.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    return digest.hexdigest()


def _named(tree: Any, prefix: str) -> dict[str, Any]:
    """The arrays of nested lists and dicts, by path."""
    where = repr(prefix) if prefix else "the top"
    if prefix.count(".") >= LEVELS:
        raise TypeError(f"params_file.save: params must have at most {LEVELS} levels")
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if type(tree) is list:
        nodes = {str(i): node for i, node in enumerate(tree)}
    elif type(tree) is dict:
        nodes = tree
        for name in nodes:
            wrong = not isinstance(name, str) or not name.isprintable() or name in ("", "__metadata__")
            if wrong or "." in name or name.isdigit():
                raise TypeError(
                    f"params_file.save: names must be printable, without dots and not only digits, got {name!r}"
                )
    elif isinstance(tree, jax.Array | np.ndarray | np.generic) and not jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        return {prefix: tree}
    else:
        raise TypeError(
            f"params_file.save: params must be lists, dicts and arrays, got {type(tree).__name__} at {where}"
        )
    if not nodes:
        raise TypeError(f"params_file.save: the empty {type(tree).__name__} at {where} cannot be saved")
    return {k: a for name, node in nodes.items() for k, a in _named(node, f"{prefix}.{name}".lstrip(".")).items()}


def _tree(path: Path, arrays: dict[str, Any]) -> Any:
    """Nested lists and dicts from the paths of their arrays."""
    root: dict = {}
    for name, a in arrays.items():
        node, parts = root, name.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {name} is inside an array")
        if parts[-1] in node:
            raise ValueError(f"{path}: {name} is an array but contains others")
        node[parts[-1]] = a

    def lists(node):
        if not isinstance(node, dict):
            return node
        nodes = {name: lists(child) for name, child in node.items()}
        if nodes and all(nodes.get(str(i)) is not None for i in range(len(nodes))):
            return [nodes[str(i)] for i in range(len(nodes))]
        return nodes

    return lists(root)
