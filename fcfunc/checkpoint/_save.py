"""Writing and reading a checkpoint: orbax's files, and the manifest."""

import contextlib
import logging
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fcfunc import _arguments, _files
from fcfunc.checkpoint._manifest import (
    ARRAYS,
    FORMAT,
    MANIFEST,
    check_files,
    check_matches,
    content,
    encoded,
    hashes_of_files,
    read_manifest,
    sha256,
)


class Checkpoint(NamedTuple):
    """The result of `restore`.

    Attributes:
      state: has the structure and sharding of `like`, and the saved arrays.
      config: the saved configuration.
      step: the saved step.
      devices: the number of devices that the saved arrays were on.
    """

    state: Any
    config: Any
    step: int
    devices: int


def save(folder: Any, state: Any, *, config: Any = None, keep: int = 3, score: float | None = None) -> Path:
    """Saves a state as `folder/<step>` and removes old checkpoints. Every process must call it.

    Args:
      folder: the folder for the checkpoints of one run, on a file system that all processes share; created if it does
        not exist. Only one run at a time may write to it: remains of a killed save (`.<step>.unfinished`) are removed.
      state: a `TrainState`, or any pytree of arrays and random keys with a `step`.
      config: the configuration of the run: dicts with string keys, lists, strings, numbers, booleans and None.
      keep: the number of most recent checkpoints to keep.
      score: if given, the checkpoint with the highest score is kept, too.

    Returns:
      The checkpoint's folder. It is complete, with a manifest, or does not exist.

    Raises:
      TypeError: `config` contains other data; the state has no step; JAX would narrow the dtype of an array.
      ValueError: `keep` is below 1; `score` is not finite; the step is below 0, or not above the steps in the folder
        (saving the same arrays and config again is not an error).
      OSError: the checkpoint, which the message names, cannot be written; earlier checkpoints are unchanged.

    Example:
      >>> import fcfunc, optax, tempfile
      >>> folder, optimizer = tempfile.mkdtemp(), optax.sgd(0.1)
      >>> state = fcfunc.train.init_state(fcfunc.init(jax.random.key(0), [2, 3]), optimizer, jax.random.key(1))
      >>> save(folder, state).name
      '0'
    """
    _arguments.positive("checkpoint.save", keep=keep)
    if score is not None and not np.isfinite(_arguments.number("checkpoint.save", score=score)):
        raise ValueError(f"checkpoint.save: score must be finite, got {score}")
    return write(local(folder), state, _files.plain(config, "checkpoint.save: config"), keep, score)


def write(folder: Path, state: Any, config: Any, keep: int, score: float | None = None) -> Path:
    """`save` with checked arguments."""
    step = _step_of(state)
    arrays, keys = _named(state)
    devices = len(set().union(*(a.sharding.device_set for a in arrays.values())))
    described = {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": sha256(a)} for name, a in arrays.items()
    }
    manifest = {
        "format": FORMAT,
        "step": step,
        "score": None if score is None else float(score),
        "devices": devices,
        "keys": keys,
        "arrays": described,
        "config": config,
    }
    where, unfinished = folder / str(step), folder / f".{step}.unfinished"
    last = max(steps(folder), default=-1)
    if step == last and content(read_manifest(where)) == content(manifest):
        return where
    if step <= last:
        raise ValueError(
            f"checkpoint.save: step must be above {last}, the last step in {folder}, got {step}; use another folder, "
            f"or move the checkpoints from step {step} on out of this one"
        )
    first = jax.process_index() == 0
    with _as_os_error(where, unfinished):
        with _all_or_none():
            if first:
                _start(folder, where, unfinished)
        with _orbax() as (ocp, checkpointer):
            full = {name: a for name, a in arrays.items() if a.size}  # orbax rejects empty arrays
            checkpointer.save(unfinished / ARRAYS, args=ocp.args.StandardSave(full))
        with _all_or_none():
            if first:
                files = hashes_of_files(unfinished, kept=True)
                _files.write_synced(unfinished / MANIFEST, encoded(manifest | {"files": files}))
                for inside in (unfinished, *unfinished.rglob("*")):
                    if inside.is_dir():
                        _sync(inside)
                os.rename(unfinished, where)
                _sync(folder)
    with _all_or_none():
        if first:
            _prune(folder, keep)
    return where


def restore(folder: Any, like: Any, *, step: int | None = None) -> Checkpoint:
    """Restores a state, by default the last one saved. Every process must call it.

    Args:
      folder: as for `save`.
      like: a state of the same network and optimizer, as from `init_state`. The restored arrays are sharded like its
        arrays, and the number of devices may differ from that of the saved run. Arrays, but not random keys, may be
        `jax.ShapeDtypeStruct`; one without a sharding is restored on the first device.
      step: the step of the checkpoint; None: the last one.

    Returns:
      A `Checkpoint`. The SHA-256 of every array has been verified.

    Raises:
      FileNotFoundError: the folder has no checkpoint, or none of that step.
      ValueError: the checkpoint has a different network, optimizer or dtype, has a newer format, or is damaged. The
        message names the file or array, what is wrong, and the previous checkpoint.

    Example:
      >>> import fcfunc, optax, tempfile
      >>> folder, optimizer = tempfile.mkdtemp(), optax.sgd(0.1)
      >>> state = fcfunc.train.init_state(fcfunc.init(jax.random.key(0), [2, 3]), optimizer, jax.random.key(1))
      >>> saved = save(folder, state, config={"dims": [2, 3]})
      >>> restored = restore(folder, state)
      >>> restored.config, int(restored.state.step)
      ({'dims': [2, 3]}, 0)
    """
    folder = local(folder)
    if step is not None:
        _arguments.integer("checkpoint.restore", step=step)
    found = steps(folder)
    if not found or (step is not None and step not in found):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"{folder}: expected {wanted}, found {', '.join(map(str, found)) or 'none'}")
    step = found[-1] if step is None else step
    where = folder / str(step)
    arrays, keys = _named(like)
    with naming_previous([other for other in found if other < step]):
        manifest = read_manifest(where)
        check_matches(where, manifest, arrays, keys)
        check_files(where, manifest["files"])
        # Without a sharding, orbax would take the devices of the saved run, which may be others.
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or default) for name, a in arrays.items()
        }
        full = {name: a for name, a in placed.items() if a.size}
        restored = {name: jnp.zeros(a.shape, a.dtype, device=a.sharding) for name, a in placed.items() if not a.size}
        with _orbax() as (ocp, checkpointer):
            try:
                restored |= checkpointer.restore(where / ARRAYS, args=ocp.args.StandardRestore(full))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{where}: its arrays cannot be read ({_arguments.first_line(e)})") from None
        for name, a in restored.items():
            if sha256(a) != manifest["arrays"][name]["sha256"]:
                raise ValueError(f"{where}: damaged; {name} differs from the saved array (SHA-256 mismatch)")
    return Checkpoint(_unnamed(like, restored), manifest["config"], step, manifest["devices"])


def steps(folder: Any) -> list[int]:
    """The steps of the complete checkpoints in a folder.

    Args:
      folder: as for `save`.

    Returns:
      The steps in increasing order; an empty list if the folder does not exist. Remains of a killed save and other
      files are ignored.

    Example:
      >>> import tempfile
      >>> steps(tempfile.mkdtemp())
      []
    """
    folder = local(folder)
    if not folder.is_dir():
        return []
    return sorted(int(d.name) for d in folder.iterdir() if _is_step(d) and (d / MANIFEST).is_file())


def import_orbax() -> Any:
    """The module `orbax.checkpoint`; ImportError says what to install."""
    if sys.modules.get("orbax.checkpoint"):  # filters of warnings belong to all threads: a thread must not set them
        return sys.modules["orbax.checkpoint"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        return _arguments.library("checkpoint", "orbax-checkpoint", "orbax.checkpoint").checkpoint


@contextlib.contextmanager
def _orbax():
    ocp = import_orbax()
    log = logging.getLogger("absl")
    with _LEVEL_LOCK:
        level = log.level
        log.setLevel(logging.CRITICAL)  # each of orbax's threads would log the error that is raised here
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                yield ocp, checkpointer
        finally:
            log.setLevel(level)


_LEVEL_LOCK = threading.Lock()
"""Held while the level of absl's logger, which belongs to all threads, is changed."""


@contextlib.contextmanager
def _as_os_error(where: Path, unfinished: Path):
    """Turns any failure while writing into an OSError that names the checkpoint, and removes the unfinished files."""
    try:
        yield
    except ImportError:
        raise
    except Exception as e:
        if jax.process_count() > 1 and isinstance(e, RuntimeError):
            raise  # a collective failed: another process was lost
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{where}: cannot be written; it is not a checkpoint ({_arguments.first_line(e)})") from e


@contextlib.contextmanager
def naming_previous(earlier: list[int]):
    """Adds the last of the earlier checkpoints to an error."""
    try:
        yield
    except ValueError as e:
        text = f"; the previous checkpoint is step={earlier[-1]}" if earlier else ""
        raise ValueError(f"{e}{text}") from None


@contextlib.contextmanager
def _all_or_none():
    """If one process fails, all raise; otherwise the others would wait for it."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None)).any()
        if failed and error is None:
            raise OSError("another process failed")
    if error is not None:
        raise error


def _start(folder: Path, where: Path, unfinished: Path) -> None:
    if where.exists():
        raise FileExistsError("something else with this name exists")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.unfinished"):
        if left.name.removeprefix(".").removesuffix(".unfinished").isdigit() and left.is_dir():
            _rmtree(left)
    unfinished.mkdir(exist_ok=True)


def _sync(folder: Path) -> None:
    """Flushes the entries of a folder to disk, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    scores: dict[int, Any] = {}
    for step in steps(folder):
        with contextlib.suppress(ValueError, OSError):  # keep a damaged checkpoint for inspection
            scores[step] = read_manifest(folder / str(step))["score"]
    scored = [step for step in scores if scores[step] is not None]
    best = max(scored, key=lambda step: (scores[step], step), default=None)
    for step in sorted(scores)[:-keep]:
        if step != best and not (folder / str(step)).is_symlink():
            removed = folder / f".{step}.unfinished"
            os.rename(folder / str(step), removed)  # from here on it is no longer a checkpoint
            _rmtree(removed)


def _rmtree(folder: Path) -> None:
    """Removes a folder, or warns if it cannot: on a network file system, one of its files may still be open."""
    try:
        shutil.rmtree(folder)
    except OSError as e:
        warnings.warn(f"checkpoint.save: {folder} cannot be removed ({e})", stacklevel=4)


def _is_step(d: Path) -> bool:
    return d.name.isascii() and d.name.isdigit() and d.name == str(int(d.name)) and d.is_dir()


def local(folder: Any) -> Path:
    """The absolute path of a folder, which need not exist."""
    _arguments.path("checkpoint", folder=folder)
    if "://" in str(folder):
        raise ValueError(f"checkpoint: folder must be on a file system, got {folder}")
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file is in the way")
    return folder


def _step_of(state) -> int:
    step = getattr(state, "step", None)
    if step is None or np.shape(step) != () or not jnp.issubdtype(jnp.asarray(step).dtype, jnp.integer):
        raise TypeError(f"checkpoint.save: state must have a step, an integer scalar, got {type(state).__name__}")
    if int(step) < 0:
        raise ValueError(f"checkpoint.save: step must be at least 0, got {int(step)}")
    return int(step)


def _named(state) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of a state by name, with random keys as their data, and the implementation of each key."""
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
            raise TypeError(f"checkpoint: two leaves have the name {name}")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"checkpoint: {name} is a random key and cannot be a ShapeDtypeStruct")
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
