"""Saving and restoring a run: the whole `TrainState`, and the plain configuration that made it.

The arrays are written and read by orbax-checkpoint (the extra `checkpoint`). Added here is a manifest, put in place
last: the name, shape, dtype and SHA-256 of every array, the size and SHA-256 of every file, and a SHA-256 of itself.
All are verified when a checkpoint is restored; a folder without a manifest is not a checkpoint.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fcfunc import _arguments, _files

__all__ = ["Checkpoint", "restore", "save", "steps"]

FORMAT = 1
"""Of the manifest; a number above it was written by a newer release."""

ARRAYS, MANIFEST = "arrays", "manifest.json"
"""What a checkpoint's folder holds: orbax's files, and last of all the manifest, which makes it a checkpoint."""


class Checkpoint(NamedTuple):
    """What `restore` returns.

    Attributes:
      state: like the one given, with the saved arrays, sharded like the given ones.
      config: the configuration that was saved.
      step: the step that was saved.
      devices: the number of devices that the saved arrays were on.
    """

    state: Any
    config: Any
    step: int
    devices: int


def save(folder: Any, state: Any, *, config: Any = None, keep: int = 3, score: float | None = None) -> Path:
    """Saves a state as `folder/<step>`, and removes what need not be kept. Every process calls it.

    Args:
      folder: for the checkpoints of one run, on a file system that all processes share; created if it does not exist.
        Only one run at a time may write to it: what a killed save left there (`.<step>.unfinished`) is removed.
      state: a `TrainState`, or any pytree of arrays and random keys with a `step`.
      config: what made the run: dicts with string keys, lists, strings, numbers, booleans and None.
      keep: how many of the last checkpoints to keep.
      score: if given, the checkpoint with the highest score is kept too.

    Returns:
      The checkpoint's folder. It is complete and verified by its manifest, or it does not exist.

    Raises:
      TypeError: a config that is not such data, a state without a step, an array whose dtype JAX would narrow.
      ValueError: `keep` below 1, a score that is not finite, a step below 0, or not above those in the folder
        (saving the same arrays and config again is not an error).
      OSError: it cannot be written, naming the checkpoint; earlier checkpoints are untouched.
    """
    _arguments.positive("checkpoint.save", keep=keep)
    if score is not None and not np.isfinite(_arguments.number("checkpoint.save", score=score)):
        raise ValueError(f"checkpoint.save: a finite score expected, got {score}")
    step = _step_of(state)
    arrays, keys = _named(state)
    described = {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": _sha256(a)} for name, a in arrays.items()
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "score": None if score is None else float(score),
        "devices": len(set().union(*(a.sharding.device_set for a in arrays.values()))),
        "keys": keys,
        "arrays": described,
        "config": _files.plain(config, "checkpoint.save: config"),
    }
    folder = _local(folder)
    where, unfinished = folder / str(step), folder / f".{step}.unfinished"
    last = max(steps(folder), default=-1)
    if step == last and _content(_manifest(where)) == _content(manifest):
        return where
    if step <= last:
        raise ValueError(
            f"checkpoint.save: {folder} holds step {last}, and this is step {step}; take another folder, or move "
            f"what is above step {step} out of this one"
        )
    first = jax.process_index() == 0
    with _as_os_error(where, unfinished):
        with _all_or_none():
            if first:
                _start(folder, where, unfinished)
        with _orbax() as (ocp, checkpointer):
            full = {name: a for name, a in arrays.items() if a.size}  # orbax refuses empty arrays
            checkpointer.save(unfinished / ARRAYS, args=ocp.args.StandardSave(full))
        with _all_or_none():
            if first:
                _files.write_synced(unfinished / MANIFEST, _bytes(manifest | {"files": _hashes(unfinished, kept=True)}))
                os.rename(unfinished, where)
                _sync(folder)
    with _all_or_none():
        if first:
            _prune(folder, keep)
    return where


def restore(folder: Any, like: Any, *, step: int | None = None) -> Checkpoint:
    """Restores a state, by default the last one. Every process calls it.

    Args:
      folder: as for `save`.
      like: a state of the same network and optimizer, as `init_state` makes it: the arrays are sharded like its arrays,
        on as many devices as there are now. Arrays, but not random keys, may be `jax.ShapeDtypeStruct`.
      step: which checkpoint; None: the last.

    Returns:
      A `Checkpoint`, every array of it verified by its SHA-256.

    Raises:
      FileNotFoundError: no checkpoint there, or not of that step.
      ValueError: a checkpoint of a different network, optimizer or dtype, of a newer format, or one whose bytes are not
        those that were saved, naming the file or the array, what is wrong, and the checkpoint before it.
    """
    folder = _local(folder)
    if step is not None:
        _arguments.integer("checkpoint.restore", step=step)
    found = steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "a checkpoint" if step is None else f"the checkpoint {step}"
        raise FileNotFoundError(f"{folder}: {wanted} expected, found {', '.join(map(str, found)) or 'none'}")
    step = found[-1] if step is None else step
    where = folder / str(step)
    arrays, keys = _named(like)
    earlier = [other for other in found if other < step]
    with _append_to_error(f"; the checkpoint before it is step={earlier[-1]}" if earlier else ""):
        manifest = _manifest(where)
        _check_alike(where, manifest, arrays, keys)
        _check_files(where, manifest["files"])
        full = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in arrays.items() if a.size
        }
        empty = {name: jnp.zeros(a.shape, a.dtype) for name, a in arrays.items() if not a.size}
        restored = {name: jax.device_put(a, arrays[name].sharding) for name, a in empty.items()}
        with _orbax() as (ocp, checkpointer):
            try:
                restored |= checkpointer.restore(where / ARRAYS, args=ocp.args.StandardRestore(full))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{where}: its arrays cannot be read ({_arguments.first_line(e)})") from None
        for name, a in restored.items():
            if _sha256(a) != manifest["arrays"][name]["sha256"]:
                raise ValueError(f"{where}: damaged; {name} is not as it was saved (its SHA-256 differs)")
    return Checkpoint(_unnamed(like, restored), manifest["config"], step, manifest["devices"])


def steps(folder: Any) -> list[int]:
    """The steps whose whole checkpoints are in a folder.

    Args:
      folder: as for `save`.

    Returns:
      In order; none if the folder does not exist. What a killed save left, or anything else there, does not count.
    """
    folder = _local(folder)
    if not folder.is_dir():
        return []
    return sorted(int(d.name) for d in folder.iterdir() if _is_step(d) and (d / MANIFEST).is_file())


@contextlib.contextmanager
def _orbax():
    ocp = _arguments.library("checkpoint", "orbax-checkpoint", "orbax.checkpoint").checkpoint
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # each of its threads logs the error that is raised here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own deprecations
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                yield ocp, checkpointer
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _as_os_error(where: Path, unfinished: Path):
    """Whatever fails while writing is an OSError that names the checkpoint; what was written of it is removed."""
    try:
        yield
    except ImportError:
        raise
    except Exception as e:
        if jax.process_count() > 1 and isinstance(e, RuntimeError):
            raise  # a collective that broke: another process was lost
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{where}: cannot be written; it is not a checkpoint ({_arguments.first_line(e)})") from e


@contextlib.contextmanager
def _append_to_error(text: str):
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{e}{text}") from None


@contextlib.contextmanager
def _all_or_none():
    """Where one process fails, all of them raise, or the others would wait for it."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None)).any()
        if failed and error is None:
            raise OSError("another process could not do its part")
    if error is not None:
        raise error


def _start(folder: Path, where: Path, unfinished: Path) -> None:
    if where.exists():
        raise FileExistsError("something else of that name is there")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.unfinished"):
        if left.name.removeprefix(".").removesuffix(".unfinished").isdigit() and left.is_dir():
            _rmtree(left)
    unfinished.mkdir(exist_ok=True)


def _hashes(where: Path, *, kept: bool = False) -> dict[str, dict]:
    """The size and SHA-256 of every file of a checkpoint, by its path; `kept`: once they are on the disk."""
    found = {}
    for path in sorted(p for p in (where / ARRAYS).rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            found[path.relative_to(where).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256_of(f)}
            if kept:
                os.fsync(f.fileno())
    return found


def _check_files(where: Path, expected: dict[str, dict]) -> None:
    """Before any of them is read by a library."""
    there = {p.relative_to(where).as_posix() for p in (where / ARRAYS).rglob("*") if p.is_file()}
    for name in sorted(expected.keys() ^ there):
        what = "the file is missing" if name in expected else "the file was not saved with it"
        raise ValueError(f"{where / name}: damaged; {what}")
    for name, file in expected.items():
        path = where / name
        if path.stat().st_size != file["bytes"]:
            raise ValueError(f"{path}: damaged; {file['bytes']} bytes expected, found {path.stat().st_size}")
        with open(path, "rb") as f:
            if _sha256_of(f) != file["sha256"]:
                raise ValueError(f"{path}: damaged; its bytes are not those that were saved (its SHA-256 differs)")


def _sha256_of(file) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Has the disk keep the names in a folder, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _bytes(manifest: dict) -> bytes:
    body = json.dumps(manifest, sort_keys=True, indent=1).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _manifest(where: Path) -> dict:
    path = where / MANIFEST
    digest, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: damaged; its bytes are not those that were saved (its SHA-256 differs)")
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: damaged; it cannot be read ({_arguments.first_line(e)})") from None
    kinds = {"format": int, "step": int, "devices": int, "keys": dict, "arrays": dict, "files": dict}
    if isinstance(manifest, dict) and type(manifest.get("format")) is int and manifest["format"] > FORMAT:
        raise ValueError(f"{path}: of format {manifest['format']}, which a newer fcfunc reads; this one reads {FORMAT}")
    if (
        not isinstance(manifest, dict)
        or not {"config", "score", *kinds} <= manifest.keys()
        or any(type(manifest[name]) is not kind for name, kind in kinds.items())
        or not all(
            isinstance(a, dict) and {"shape", "dtype", "sha256"} <= a.keys() for a in manifest["arrays"].values()
        )
        or not all(isinstance(f, dict) and {"bytes", "sha256"} <= f.keys() for f in manifest["files"].values())
        or manifest["format"] != FORMAT
        or not isinstance(manifest["score"], float | None)
    ):
        raise ValueError(f"{path}: damaged; it is not a manifest of format {FORMAT}")
    if str(manifest["step"]) != where.name:
        raise ValueError(f"{path}: is of step {manifest['step']}; its folder was renamed")
    return manifest


def _content(manifest: dict) -> str:
    """What makes two checkpoints of one step the same: not where they were saved, nor how good they are."""
    return json.dumps({name: manifest[name] for name in ("keys", "arrays", "config")}, sort_keys=True)


def _check_alike(where: Path, manifest: dict, arrays: dict, keys: dict) -> None:
    saved = manifest["arrays"]
    for name in [*(saved.keys() - arrays.keys()), *(arrays.keys() - saved.keys())]:
        has, lacks = ("the checkpoint", "this run") if name in saved else ("this run", "the checkpoint")
        raise ValueError(f"{where}: of a different network or optimizer: {has} has {name}, {lacks} does not")
    for name, a in arrays.items():
        came, expected = saved[name], {"shape": list(a.shape), "dtype": str(a.dtype)}
        if any(came[what] != expected[what] for what in expected):
            raise ValueError(
                f"{where}: {name} is {came['dtype']} {came['shape']}, "
                f"and this run expects {expected['dtype']} {expected['shape']}"
            )
    if manifest["keys"] != keys:
        raise ValueError(f"{where}: random keys {manifest['keys']}, and this run expects {keys}")


def _prune(folder: Path, keep: int) -> None:
    scores: dict[int, Any] = {}
    for step in steps(folder):
        with contextlib.suppress(ValueError, OSError):  # a damaged one is left for a person to look at
            scores[step] = _manifest(folder / str(step))["score"]
    scored = [step for step in scores if scores[step] is not None]
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    for step in sorted(scores)[:-keep]:
        if step != best and not (folder / str(step)).is_symlink():
            removed = folder / f".{step}.unfinished"
            os.rename(folder / str(step), removed)  # from here on it is not a checkpoint, whatever happens next
            _rmtree(removed)


def _rmtree(folder: Path) -> None:
    """Removes a folder; where somebody has one of its files open, on a network, it stays for the next time."""
    try:
        shutil.rmtree(folder)
    except OSError as e:
        warnings.warn(f"checkpoint.save: {folder} cannot be removed ({e})", stacklevel=4)


def _is_step(d: Path) -> bool:
    return d.name.isascii() and d.name.isdigit() and d.name == str(int(d.name)) and d.is_dir()


def _local(folder) -> Path:
    _arguments.path("checkpoint", folder=folder)
    if "://" in str(folder):
        raise ValueError(f"checkpoint: a folder of a file system expected, got {folder}")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file is in the way")
    return folder


def _step_of(state) -> int:
    step = getattr(state, "step", None)
    if step is None or np.shape(step) != () or not jnp.issubdtype(jnp.asarray(step).dtype, jnp.integer):
        raise TypeError(f"checkpoint.save: a state with a step, one integer, expected, got {type(state).__name__}")
    if int(step) < 0:
        raise ValueError(f"checkpoint.save: a step of at least 0 expected, got {int(step)}")
    return int(step)


def _named(state) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of a state by name, random keys as the numbers they are made of; and the kind of each key."""
    arrays, keys = {}, {}
    for path, leaf in jax.tree.leaves_with_path(state):
        name, given = _name(path), leaf
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            try:
                leaf = jnp.asarray(leaf)
            except (OverflowError, TypeError, ValueError) as e:
                raise TypeError(
                    f"checkpoint: {name} is not an array that JAX can hold ({_arguments.first_line(e)})"
                ) from None
            if np.asarray(given).dtype != leaf.dtype and not isinstance(given, bool | int | float):
                raise TypeError(f"checkpoint: {name} is {np.asarray(given).dtype}, which JAX narrows to {leaf.dtype}")
        if name in arrays:
            raise TypeError(f"checkpoint: two leaves are called {name}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"checkpoint: {name}, a random key, must be given itself, not its shape")
            keys[name], leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        arrays[name] = leaf
    return arrays, keys


def _name(path) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _unnamed(like, arrays: dict) -> Any:
    def take(path, leaf):
        a = arrays[_name(path)]
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(a, impl=jax.random.key_impl(leaf))
        return a

    return jax.tree.map_with_path(take, like)


def _sha256(a: jax.Array) -> str:
    """The SHA-256 of the array's bytes, row by row, on whichever devices they are."""
    host = np.ascontiguousarray(_files.to_host(a))
    return hashlib.sha256(host.reshape(-1).view(np.uint8)).hexdigest()  # type: ignore[arg-type]
