"""Gives the readers malformed files: each must come back whole, or as a ValueError that names the file.

python -m proofs.fuzz --files 100000

Files are made by rules that know the format (headers that lie, dimensions that overflow, members that are objects,
cells that are no numbers) and then, most of them, damaged: bits and bytes changed, parts cut out, repeated, exchanged.
Anything else than arrays of at most LIMIT bytes or a ValueError with the file's name is a failure, and so is a reader
that takes more than ten seconds, or more memory than HEADROOM above the idle process. That what is read of a good file
is what was written is for the readers' own tests.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from fcfunc import data, params_file

LIMIT = 2**20
"""What a reader may take for one file's arrays, in bytes; it is given as `max_bytes`."""

HEADROOM = 2**26
"""What the process may take besides eight times LIMIT: what the interpreter and the libraries keep for themselves."""

NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**42, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = ("nan", "inf", "-inf", "1e999", "-0", "1_000", "0x1F", "", " ", '"', '""', "\0", "é", "\ufeff", "1,2", "\r",
         "٣", "ant", "-1", "2147483648", "1e39", "True", "None", "=1+1", "'", "\n", "9" * 400)  # fmt: skip


def idx(rng: random.Random) -> bytes:
    """An IDX file, whose header may lie."""
    code = rng.choice([8, 9, 11, 12, 13, 14, 14, rng.randrange(256)])
    dims = [rng.choice([1, 2, 3, 4, *NUMBERS[:3]]) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.3:
        dims[rng.randrange(len(dims))] = rng.choice(NUMBERS) % 2**32
    size = min(int(np.prod(dims, dtype=object)) * {11: 2, 12: 4, 13: 4, 14: 8}.get(code, 1), 2000)
    shown = rng.choice([len(dims)] * 5 + [rng.randrange(256)])
    return bytes([0, 0, code, shown]) + struct.pack(f">{len(dims)}I", *dims) + rng.randbytes(max(size, 0))


def zipped(rng: random.Random) -> bytes:
    """A gzipped IDX file, or a bomb."""
    if rng.random() < 0.01:
        return gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", rng.choice([2**31, 2**20, 100])) + bytes(2**20), 1)
    content = gzip.compress(idx(rng), 1)
    return content + rng.choice([b""] * 8 + [content, bytes(3)])


def npy(rng: random.Random) -> bytes:
    """One array of an NPZ file, whose header may lie."""
    kind = rng.choice(
        ["<f4", "<f8", "|u1", "<i8", "|b1", "<c8", "|O", "|V2", "<M8[s]", ">f4", "|S3", "<U2", "f", "(2,)f4"]
    )
    shape = tuple(rng.choice([0, 1, 2, 3, -1, *NUMBERS]) if rng.random() < 0.3 else 2 for _ in range(rng.randrange(4)))
    body = rng.randbytes(min(abs(int(np.prod(shape, dtype=object))), 100) * {"<f8": 8, "|u1": 1}.get(kind, 4))
    header = f"{{'descr': {kind!r}, 'fortran_order': {rng.choice([True, False, 2])}, 'shape': {shape}, }}"
    if rng.random() < 0.1:
        header = rng.choice([header[:20], header.replace("descr", "d"), "[" * 300, "{" + header, "9" * 5000, "{}"])
    header += " " * (-(10 + len(header) + 1) % 64) + "\n"
    major = rng.choice([1, 1, 1, 2, 3, 9])
    length = rng.choice([len(header)] * 9 + [rng.choice(NUMBERS)])
    size = struct.pack("<H", length % 2**16) if major == 1 else struct.pack("<I", length % 2**32)
    return b"\x93NUMPY" + bytes([major, 0]) + size + header.encode() + body


def npz(rng: random.Random) -> bytes:
    """A zip of arrays, or of something else; packed by any method that zipfile knows."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice([0, 0, 0, 8, 8, 8, 12, 14])) as archive:
        for i in range(rng.choice([1, 1, 1, 2, 0])):
            content = npy(rng) if rng.random() < 0.95 else rng.randbytes(20)
            if rng.random() < 0.005:
                content = bytes(rng.choice([2**21] * 30 + [2**27]))
            archive.writestr(rng.choice([f"a{i}.npy", f"a{i}", f"../a{i}.npy", f"/{i}.npy"]), content)
    packed = bytearray(file.getvalue())
    if rng.random() < 0.1 and (at := packed.find(b"PK\1\2")) >= 0:  # the directory lies about the unpacked size
        packed[at + 24 : at + 28] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    return bytes(packed)


def table(rng: random.Random) -> bytes:
    """A CSV file with a cell or two that do not belong."""
    width, rows = rng.randrange(1, 5), rng.randrange(0, 6)
    cells = [[f"{rng.gauss(0, 1):.3g}" for _ in range(width)] for _ in range(rows)]
    if rng.random() < 0.5:
        cells.insert(0, [f"c{i}" for i in range(width)])
    for _ in range(rng.choice([0, 0, 1, 2])):
        if cells:
            row = rng.choice(cells)
            row[rng.randrange(len(row)) if row else 0 :] = [rng.choice(WORDS)] * rng.randrange(1, 3)
    text = rng.choice(["\n", "\r\n", "\r", "\n\n"]).join(rng.choice([",", ",", ",", ";"]).join(row) for row in cells)
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), "replace")


def safetensors(rng: random.Random) -> bytes:
    """A safetensors file, whose header may lie."""
    entries, at = {}, 0
    for i in range(rng.randrange(0, 4)):
        kind, wide = rng.choice([("F32", 4), ("F16", 2), ("BF16", 2), ("I32", 4), ("U8", 1), ("BOOL", 1), ("F64", 8)])
        shape = [rng.randrange(0, 4) for _ in range(rng.randrange(3))]
        end = at + int(np.prod(shape, dtype=np.int64)) * wide
        offsets = [at, end]
        if rng.random() < 0.2:
            rng.choice([shape or offsets, offsets])[0] = rng.choice([*NUMBERS, -1, 1.5, None, "3"])
        if rng.random() < 0.05:
            kind = rng.choice(["F8_E4M3", "OBJECT", "", None, 3])
        entries[rng.choice([f"{i}.w", f"{i}", "w", "w.w", "", ".", f"layers.{i}.w"])] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": offsets,
        }
        at = end
    if rng.random() < 0.5:
        config = rng.choice(['{"activation": "relu"}', '"os.system"', "{", "[" * 2000, "NaN", "1" * 5000, "null"])
        entries["__metadata__"] = rng.choice([{"config": config}, {"sha256": "0"}, {"config": 3}, [], None])
    text = json.dumps(entries)
    if rng.random() < 0.05:
        text = rng.choice(["[" * 3000, text[:-1], text + text, text.replace("{", '{"w": 1,', 1)])
    length = rng.choice([len(text)] * 12 + [rng.choice(NUMBERS)])
    return struct.pack("<Q", length % 2**64) + text.encode() + rng.randbytes(max(at + rng.choice([0] * 9 + [-1, 1]), 0))


def damaged(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """The content with some of it changed."""
    found = bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at, until = sorted(rng.randrange(len(found) + 1) for _ in range(2))
        match rng.randrange(8):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1 if found:
                found[at % len(found)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 2:
                del found[at:]
            case 3:
                found += rng.randbytes(rng.randrange(1, 9))
            case 4:
                del found[at : at + rng.randrange(1, 9)]
            case 5:
                found[at:at] = found[at:until][:64]
            case 6:
                number = struct.pack(rng.choice("<>") + rng.choice("IQ"), 0)
                packed = rng.choice(NUMBERS).to_bytes(8, rng.choice(["little", "big"]))
                found[at : at + len(number)] = packed[: len(number)]
            case 7:
                found[at:until] = other[at:until]
    return bytes(found)


READERS: dict[str, tuple[Callable, Callable]] = {
    "idx": (idx, lambda path: data.read_idx(path, max_bytes=LIMIT)),
    "gzip": (zipped, lambda path: data.read_idx(path, max_bytes=LIMIT)),
    "npz": (npz, lambda path: data.read_npz(path, max_bytes=LIMIT)),
    "csv": (table, lambda path: data.read_csv(path, max_bytes=LIMIT)),
    "safetensors": (safetensors, lambda path: params_file.load(path, max_bytes=LIMIT)[0]),
}
"""What makes files of each kind, and what reads them."""


def outcome(read: Callable, path: Path) -> str:
    """What a reader makes of a file: "read", "refused", or what went wrong."""
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        result = read(path)
    except ValueError as e:
        return "refused" if str(path) in str(e) else f"names no file: {e}"
    except (Exception, Hang):
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    size = sum(a.nbytes for a in jax.tree.leaves(result) if isinstance(a, np.ndarray | jax.Array))
    return "read" if size <= LIMIT else f"returned {size} bytes"


class Hang(BaseException):
    """A reader that does not come back; no reader catches it."""


def hang(*_):
    """After ten seconds."""
    raise Hang


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Lets the process take HEADROOM and eight times LIMIT more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM + 8 * LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(kind: str, files: int, seed: int) -> tuple[Counter, list[tuple[bytes, str]]]:
    """How many files were read and how many refused, and the first failures with their content."""
    make, read = READERS[kind]
    rng, counts, failures = random.Random(f"{kind} {seed}"), Counter(), []
    other = make(rng)
    signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "file"
        read_once = outcome(read, path)  # what is imported and started on first use is no file's memory
        assert "no such file" in read_once
        jax.block_until_ready([jax.device_put(np.zeros(3, kind)) for kind in ("f4", "f2", "i4", "u1", "?")])
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
        for _ in range(files):
            content = make(rng)
            content, other = (damaged(rng, content, other) if rng.random() < 0.7 else content), content
            path.write_bytes(content)
            with limited():
                found = outcome(read, path)
            counts[found if found in ("read", "refused") else "failed"] += 1
            if found not in ("read", "refused") and len(failures) < 5:
                failures.append((content, found))
    return counts, failures


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each reader; status 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--files", type=int, default=100_000, help="for each reader")
    parser.add_argument("--only", choices=tuple(READERS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    failed = 0
    for kind in [args.only] if args.only else READERS:
        start = time.perf_counter()
        counts, failures = fuzz(kind, args.files, args.seed)
        print(f"{kind}: {counts['read']} read, {counts['refused']} refused, {counts['failed']} failed, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        for content, found in failures:
            print(f"  {content[:300]!r}\n  {found}")
        failed += counts["failed"]
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
