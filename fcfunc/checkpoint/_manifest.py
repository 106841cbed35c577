"""The manifest of a checkpoint: what each array and file of it must be.

It holds the name, shape, dtype and SHA-256 of every array, the size and SHA-256 of every file, the configuration, and
a SHA-256 of itself. It is written last: a folder without it is not a checkpoint.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcfunc import _arguments, _files

FORMAT = 1
"""The format of the manifest; a higher number was written by a newer release."""

ARRAYS, MANIFEST = "arrays", "manifest.json"
"""The contents of a checkpoint's folder: orbax's files, and the manifest."""


def encoded(manifest: dict) -> bytes:
    """The content of a manifest's file: the SHA-256 of the rest, and the rest, as JSON."""
    body = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_manifest(where: Path) -> dict:
    """The manifest of the checkpoint in a folder; raises ValueError if it is damaged or not of this format."""
    path = where / MANIFEST
    digest, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{path}: damaged; its contents differ from the saved ones (SHA-256 mismatch)")
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: damaged; it cannot be read ({_arguments.first_line(e)})") from None
    kinds = {"format": int, "step": int, "devices": int, "keys": dict, "arrays": dict, "files": dict}
    if isinstance(manifest, dict) and type(manifest.get("format")) is int and manifest["format"] > FORMAT:
        raise ValueError(f"{path}: format {manifest['format']} needs a newer fcfunc; this one reads format {FORMAT}")
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
        raise ValueError(f"{path}: the manifest is for step {manifest['step']}; the folder was renamed")
    return manifest


def content(manifest: dict) -> str:
    """The content that makes two checkpoints of a step equal, without score, devices and files."""
    return json.dumps({name: manifest[name] for name in ("keys", "arrays", "config")}, sort_keys=True)


def is_of_saver(config: Any) -> bool:
    """Whether a checkpoint's configuration is one that a `Saver` writes."""
    return isinstance(config, dict) and config.keys() == {"config", "options", "notes"}


def check_matches(where: Path, manifest: dict, arrays: dict, keys: dict) -> None:
    """Raises ValueError unless the saved arrays and random keys are those that a run expects."""
    saved = manifest["arrays"]
    if is_of_saver(manifest["config"]) and "best.epoch" not in arrays:
        raise ValueError(f"{where}: saved by a Saver: call fit with the same saver, which returns the state")
    for name in [*(saved.keys() - arrays.keys()), *(arrays.keys() - saved.keys())]:
        has, lacks = ("the checkpoint", "this run") if name in saved else ("this run", "the checkpoint")
        raise ValueError(f"{where}: saved from a different network or optimizer: {has} has {name}, {lacks} does not")
    for name, a in arrays.items():
        came, expected = saved[name], {"shape": list(a.shape), "dtype": str(a.dtype)}
        if any(came[what] != expected[what] for what in expected):
            raise ValueError(
                f"{where}: {name} is {came['dtype']} {came['shape']}, "
                f"but this run expects {expected['dtype']} {expected['shape']}"
            )
    if manifest["keys"] != keys:
        raise ValueError(f"{where}: the random keys are {manifest['keys']}, but this run expects {keys}")


def hashes_of_files(where: Path, *, kept: bool = False) -> dict[str, dict]:
    """The size and SHA-256 of every file of a checkpoint, by path; with `kept`, also flushes the files to disk."""
    found = {}
    for path in sorted(p for p in (where / ARRAYS).rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            found[path.relative_to(where).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256_of(f)}
            if kept:
                os.fsync(f.fileno())
    return found


def check_files(where: Path, expected: dict[str, dict]) -> None:
    """Verifies the files before a library reads any of them."""
    there = {p.relative_to(where).as_posix() for p in (where / ARRAYS).rglob("*") if p.is_file()}
    for name in sorted(expected.keys() ^ there):
        what = "the file is missing" if name in expected else "the file is not part of the checkpoint"
        raise ValueError(f"{where / name}: damaged; {what}")
    for name, file in expected.items():
        path = where / name
        if path.stat().st_size != file["bytes"]:
            raise ValueError(f"{path}: damaged; expected {file['bytes']} bytes, found {path.stat().st_size}")
        with open(path, "rb") as f:
            if _sha256_of(f) != file["sha256"]:
                raise ValueError(f"{path}: damaged; its contents differ from the saved ones (SHA-256 mismatch)")


def _sha256_of(file) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(a: jax.Array) -> str:
    """The SHA-256 of the array's bytes in row-major order, independent of the sharding."""
    host = np.ascontiguousarray(_files.to_host(a))
    return hashlib.sha256(host.reshape(-1).view(np.uint8)).hexdigest()  # type: ignore[arg-type]
