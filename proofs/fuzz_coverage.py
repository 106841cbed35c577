"""Fuzzes every reader with coverage guidance (atheris), and compares what is read with an independent reading.

    python -m proofs.fuzz_coverage --minutes 60
    python -m proofs.fuzz_coverage --minutes 0.2 --only idx,csv

atheris mutates the bytes and keeps those that reach new lines of the reader. Each file must be refused with a
ValueError that names it, or be read as another program reads it: NumPy, pandas, pyarrow, or a few lines that follow the
format's specification. The kinds that begin with "damaged" change a valid file whose format has a checksum: it must be
refused, or read as if it were whole. At the end, the lines of the reader that the corpus covers are counted, and the
others listed.
"""

import argparse
import base64
import gzip
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIMIT = 2**20
"""The largest accepted size of the arrays in a file, in bytes."""

SEED = 1
"""Of libFuzzer, so that a short run on another machine tries the same files."""

INSTRUMENTED = ["fcfunc.data", "fcfunc.params_file", "fcfunc.stream", "fcfunc.checkpoint", "fcfunc._files"]


class Kind(NamedTuple):
    """How a kind of file is made, read, and read independently.

    Attributes:
      seeds: the first files of the corpus.
      file_of: makes a file of the bytes that atheris mutates.
      read: the reader; it returns arrays by name.
      truth: the same, from the content of the file; None if the other program cannot read it.
      lines: the functions whose lines are counted.
    """

    seeds: list[bytes]
    file_of: Callable[[bytes], bytes]
    read: Callable[[Path], dict[str, Any]]
    truth: Callable[[bytes], dict[str, Any] | None]
    lines: tuple[Callable, ...]


def flat(tree: Any, *path: str) -> dict[str, np.ndarray]:
    """The arrays of nested lists and dicts by their path, as in a safetensors file."""
    if not isinstance(tree, list | dict):
        return {".".join(path): np.asarray(tree)}
    nodes = tree if isinstance(tree, dict) else {str(i): node for i, node in enumerate(tree)}
    return {k: a for name, node in nodes.items() for k, a in flat(node, *path, name).items()}


def idx_truth(content: bytes) -> dict[str, Any]:
    """IDX: two zeros, the type, the number of axes, their lengths, and the elements, all big-endian."""
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    kinds = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    dtype = np.dtype(kinds[content[2]])
    assert len(content) == 4 + 4 * axes + math.prod(shape) * dtype.itemsize
    return {"": np.ndarray(shape, dtype, content, 4 + 4 * axes)}


def npz_truth(content: bytes) -> dict[str, Any]:
    """NumPy's own reader."""
    with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def csv_truth(content: bytes) -> dict[str, Any] | None:
    """pandas, with the cells as strings."""
    import pandas

    if b"\0" in content and pandas.__version__.startswith("2."):  # which ends a cell at this byte
        return None
    try:
        cells = pandas.read_csv(
            io.BytesIO(content), header=None, dtype=str, keep_default_na=False, encoding="utf-8", skipinitialspace=True
        ).to_numpy()
    except pandas.errors.ParserError:  # it cannot read a table that begins with empty lines
        return None
    # As objects, because NumPy's strings lose zeros at their end.
    return {"cells": np.array([[cell.strip() for cell in row] for row in cells], object).reshape(cells.shape)}


def csv_read(path: Path) -> dict[str, Any]:
    """The features of a table next to the cells of the file."""
    from fcfunc import data

    table = data.read_csv(path, max_bytes=LIMIT)
    return {"x": table.x, "y": table.y, "classes": table.classes}


def safetensors_truth(content: bytes) -> dict[str, Any]:
    """safetensors: the length of a JSON header, the header with type, shape and place of each array, and the bytes."""
    import ml_dtypes

    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1",
             "U16": "u2", "U32": "u4", "U64": "u8", "BOOL": "?", "BF16": ml_dtypes.bfloat16, "C64": "c8",
             "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}  # fmt: skip
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found[name] = np.frombuffer(body[start:end], np.dtype(kinds[entry["dtype"]])).reshape(entry["shape"])
    return found


def same(kind: str, read: dict[str, Any], truth: dict[str, Any]) -> bool:
    """Whether the arrays that were read are those of the independent reading."""
    if kind == "csv":
        cells = truth["cells"][-len(read["x"]) :]
        if len(truth["cells"]) - len(read["x"]) not in (0, 1) or cells.shape[1] != read["x"].shape[1] + 1:
            return False
        y = [read["classes"][i] for i in read["y"]] if read["classes"] else read["y"].tolist()
        targets = cells[:, -1] if read["classes"] else cells[:, -1].astype(read["y"].dtype)
        return np.array_equal(cells[:, :-1].astype(np.float32), read["x"]) and targets.tolist() == y
    if kind == "damaged npz":  # a zip file has no checksum of its names
        read, truth = dict(enumerate(read.values())), dict(enumerate(truth.values()))
    return read.keys() == truth.keys() and all(
        np.shape(a) == truth[name].shape and a.tobytes() == truth[name].astype(a.dtype).tobytes()
        for name, a in ((name, np.asarray(a)) for name, a in read.items())
    )


def damage(whole: bytes, places: int = 8) -> Callable[[bytes], bytes]:
    """Changes a file at the places that the bytes name, four for each: two of a place, a new value, and an action."""

    def file_of(changes: bytes) -> bytes:
        found = bytearray(whole)
        for i in range(0, min(len(changes) - 3, 4 * places), 4):
            at = int.from_bytes(changes[i : i + 2], "little") % max(len(found), 1)
            if changes[i + 3] % 8 == 0:
                del found[at:]
            elif changes[i + 3] % 8 == 1:
                found[at:at] = changes[i + 2 : i + 3]
            elif found:
                found[at] = changes[i + 2]
        return bytes(found)

    return file_of


def kinds() -> dict[str, Kind]:
    """All kinds of files."""
    import jax
    import pyarrow as pa
    import pyarrow.parquet

    import fcfunc
    from fcfunc import data, params_file, stream
    from fcfunc.checkpoint import _manifest
    from proofs import fuzz

    def made_by(make, count=200):
        rng = random.Random(0)
        return [make(rng) for _ in range(count)]

    def saved(write: Callable) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            write(path)
            return path.read_bytes()

    x = np.random.default_rng(0).standard_normal((5, 3), np.float32)
    params = fcfunc.init(jax.random.key(0), [2, 3, 2])
    npz = io.BytesIO()
    np.savez(npz, x=x, y=np.arange(4))
    columns = pa.table({"a": [1.0, 2.0, -3.5], "b": [4, 5, 6], "y": [0, 1, 1]})
    arrow = io.BytesIO()
    with pa.ipc.new_file(arrow, columns.schema) as f:
        f.write_table(columns)
    whole = {
        "gzip": gzip.compress(bytes([0, 0, 13, 2, 0, 0, 0, 5, 0, 0, 0, 3]) + x.astype(">f4").tobytes()),
        "npz": npz.getvalue(),
        "params": saved(lambda path: params_file.save(path, params, config={"a": 1})),
        "manifest": _manifest.encoded(
            {"format": 1, "step": 7, "devices": 1, "keys": {}, "config": {"a": [1, None]}, "score": 0.5,
             "arrays": {"w": {"shape": [2], "dtype": "float32", "sha256": "0"}},
             "files": {"arrays/a": {"bytes": 3, "sha256": "1"}}}),
        "parquet": saved(lambda path: pa.parquet.write_table(columns, path)),
        "arrow": arrow.getvalue(),
    }  # fmt: skip

    def read_manifest(path: Path) -> dict[str, Any]:
        folder = path.parent / "7"
        folder.mkdir(exist_ok=True)
        (folder / _manifest.MANIFEST).write_bytes(path.read_bytes())
        try:
            return {"text": np.array(json.dumps(_manifest.read_manifest(folder), sort_keys=True))}
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None  # its own message names the manifest in the folder

    def manifest_truth(content: bytes) -> dict[str, Any]:
        import hashlib

        digest, body = content[:64], content[65:]
        assert hashlib.sha256(body).hexdigest().encode() == digest
        return {"text": np.array(json.dumps(json.loads(body), sort_keys=True))}

    def read_rows(make: Callable) -> Callable:
        def read(path):
            rows = make(path)
            found = rows.read(0, rows.examples)
            return found if isinstance(found, dict) else {"x": found.x, "y": found.y}

        return read

    def table_truth(reader: Callable) -> Callable:
        def truth(content):
            table = reader(content).to_pandas()
            features = [name for name in table.columns if name != "y"]
            x = np.stack([table[name].to_numpy().astype(np.float32) for name in features], axis=1)
            y = table["y"].to_numpy()
            limits = np.iinfo(np.int32)
            return {"x": x, "y": np.clip(y, limits.min, limits.max) if y.dtype.kind in "iu" else y}

        return truth

    def parquet(path):
        target = path.with_suffix(".parquet")
        os.replace(path, target)
        return stream.from_table(target, target="y")

    as_is = lambda content: content  # noqa: E731
    idx_lines = (data.read_idx, data._parse_idx)
    npz_lines = (data.read_npz, data._read_npy)
    params_lines = (params_file.load, params_file._tree)
    read_idx = lambda path: {"": data.read_idx(path, max_bytes=LIMIT)}  # noqa: E731
    read_npz = lambda path: data.read_npz(path, max_bytes=LIMIT)  # noqa: E731
    read_params = lambda path: flat(params_file.load(path, max_bytes=LIMIT)[0])  # noqa: E731
    packed = lambda content: gzip.compress(content, 1)  # noqa: E731
    always = lambda truth: lambda content: truth  # noqa: E731
    return {
        "idx": Kind(made_by(fuzz.idx), as_is, read_idx, idx_truth, idx_lines),
        "gzip": Kind(made_by(fuzz.idx), packed, read_idx, idx_truth, idx_lines),
        "npz": Kind(made_by(fuzz.npz), as_is, read_npz, npz_truth, npz_lines),
        "csv": Kind(made_by(fuzz.table), as_is, csv_read, csv_truth, (data.read_csv, data._rows, data._target)),
        "safetensors": Kind(made_by(fuzz.safetensors), as_is, read_params, safetensors_truth, params_lines),
        "stream of safetensors": Kind(
            made_by(fuzz.safetensors), as_is, read_rows(stream.from_safetensors), safetensors_truth,
            (stream.from_safetensors,)),
        "parquet": Kind(
            [whole["parquet"]], as_is, read_rows(parquet),
            table_truth(lambda content: pa.parquet.read_table(io.BytesIO(content))),
            (stream.from_table, stream._parquet)),
        "arrow": Kind(
            [whole["arrow"]], as_is, read_rows(lambda path: stream.from_table(path, target="y")),
            table_truth(lambda content: pa.ipc.open_file(io.BytesIO(content)).read_all()),
            (stream.from_table, stream._arrow)),
        "manifest": Kind([whole["manifest"]], as_is, read_manifest, manifest_truth, (_manifest.read_manifest,)),
        "damaged gzip": Kind([bytes(4)], damage(whole["gzip"]), read_idx, always(idx_truth(whole["gzip"])), idx_lines),
        "damaged npz": Kind([bytes(4)], damage(whole["npz"]), read_npz, always(npz_truth(whole["npz"])), npz_lines),
        "damaged params": Kind(
            # With both keys of its metadata changed, a file is read like those of other programs, without a checksum.
            [bytes(4)], damage(whole["params"], places=1), read_params, always(safetensors_truth(whole["params"])),
            params_lines),
        "damaged manifest": Kind(
            [bytes(4)], damage(whole["manifest"]), read_manifest, always(manifest_truth(whole["manifest"])),
            (_manifest.read_manifest,)),
    }  # fmt: skip


def outcome(name: str, kind: Kind, content: bytes, path: Path) -> str:
    """Reads a file: "read" or "refused"; raises AssertionError if neither is right."""
    file = kind.file_of(content)
    path.write_bytes(file)
    try:
        found = kind.read(path)
    except ValueError as e:
        if path.stem not in str(e):
            raise AssertionError(f"names no file: {e}") from e
        return "refused"
    size = sum(np.asarray(a).nbytes for a in found.values() if a is not None)
    assert size <= 2 * LIMIT, f"returned {size} bytes"
    truth = kind.truth(file)
    assert truth is None or same(name, found, truth), f"read {found} instead of {truth}"
    return "read"


def child(name: str, corpus: str, seconds: int) -> None:
    """Fuzzes one kind in this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import fcfunc.checkpoint
        import fcfunc.data
        import fcfunc.params_file
        import fcfunc.stream  # noqa: F401
    kind = kinds()[name]
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    path = Path(folder) / "fuzzed-7f3a"
    limits = [f"-max_total_time={seconds}", f"-seed={SEED}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
    atheris.Setup(
        [sys.argv[0], corpus, *limits, f"-artifact_prefix={corpus}/../{name}-", "-print_final_stats=1"],
        lambda content: outcome(name, kind, content, path) and None,
    )
    atheris.Fuzz()


def covered(kind: Kind, name: str, corpus: Path) -> tuple[int, int, list[str], dict[str, int]]:
    """How many lines of the reader the corpus reaches, of how many, the others, and how often each outcome came."""
    codes = {f.__code__ for f in kind.lines}
    for code in list(codes):
        codes |= {c for c in code.co_consts if isinstance(c, type(code))}
    lines = {(c.co_filename, line) for c in codes for _, _, line in c.co_lines() if line and line > c.co_firstlineno}
    reached, counts = set(), {"read": 0, "refused": 0}

    def trace(frame, event, _):
        if frame.f_code not in codes:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(corpus.iterdir()):
            sys.settrace(trace)
            try:
                counts[outcome(name, kind, file.read_bytes(), Path(folder) / "fuzzed-7f3a")] += 1
            finally:
                sys.settrace(None)
    missed = sorted(f"{Path(file).name}:{line}" for file, line in lines - reached)
    return len(lines & reached), len(lines), missed, counts


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each kind of file; returns 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for each kind of file")
    parser.add_argument("--only", help="kinds of files, with commas")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        name, corpus, seconds = args.child
        child(name, corpus, int(seconds))
    failed, made = 0, kinds()
    for name in args.only.split(",") if args.only else made:
        with tempfile.TemporaryDirectory() as root:
            corpus = Path(root) / "corpus"
            corpus.mkdir()
            for i, seed in enumerate(made[name].seeds):
                (corpus / str(i)).write_bytes(seed)
            seconds = str(max(1, round(args.minutes * 60)))
            command = [sys.executable, "-m", "proofs.fuzz_coverage", "--child", name, str(corpus), seconds]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            stats = dict(line.split()[:2] for line in result.stderr.splitlines() if line.startswith("stat::"))
            runs = stats.get("stat::number_of_executed_units:", "0")
            if result.returncode:
                failed += 1
                found = [base64.b64encode(p.read_bytes()).decode() for p in Path(root).glob(f"{name}-*")]
                print(f"{name}: FAILED after {runs} files\n{result.stdout[-2000:]}\nin base64: {found}", flush=True)
                continue
            reached, total, missed, counts = covered(made[name], name, corpus)
            print(f"{name}: {runs} files, none misread; {sum(counts.values())} in the corpus ({counts['read']} read, "
                  f"{counts['refused']} refused) cover {reached} of {total} lines; "
                  f"not {', '.join(missed) or 'any'}", flush=True)  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
