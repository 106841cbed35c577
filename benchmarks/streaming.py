"""Trains on 50 million rows from files, compared with the same rows in memory; writes docs/background/streaming.md.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --rows 1000000    # smaller, only printed

The rows have 32 features; they are generated in a temporary folder. Each run is a process of its own.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fcfunc
from benchmarks.training import versions
from fcfunc import losses, stream, train

FOLDER = Path(__file__).parents[1]
PAGE = FOLDER / "docs" / "background" / "streaming.md"
ROWS, FEATURES, DIMS, BATCH, CHUNK = 50_000_000, 32, [32, 128, 128, 2], 1024, 2**18

PAGE_TEXT = """# Data larger than memory

One epoch over {rows:,} rows of {features} float32 features and a label, {gigabytes:.1f} GB in two `.npy` files, with a
network {dims}, batches of {batch:,} and SGD. Written by `python -m benchmarks.streaming` on {cores} CPU cores
({machine}), Python {python}: {versions}.

`stream.from_arrays` reads chunks of {chunk:,} rows while the previous chunk is trained on. "In memory" is
`train.make_train_epoch` on the same arrays. The runs alternate; each is a process of its own. The time is that of the
epoch, without imports, compilation and, in memory, without reading the files.

| data | seconds | rows per second | relative speed | peak memory, GB |
|---|---|---|---|---|
{lines}

Peak memory is the largest resident set of the process: JAX itself, the chunks, and the program. The files were in the
system's file cache in part, which is not the process's memory; on a slower disk, reading may take longer than training.
"""


def generate(folder: Path, rows: int) -> None:
    """Standard normal features; the label is 1 where their weighted sum is positive."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(FEATURES, np.float32)
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (rows, FEATURES))
    y = np.lib.format.open_memmap(folder / "y.npy", "w+", np.int32, (rows,))
    for start in range(0, rows, CHUNK):
        part = rng.standard_normal((min(CHUNK, rows - start), FEATURES), np.float32)
        x[start : start + CHUNK] = part
        y[start : start + CHUNK] = part @ weights > 0
    x.flush()
    y.flush()


def loss_fn(params, batch, key):
    """The mean cross-entropy."""
    x, y = batch
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(fcfunc.apply(params, x), y))


def once(folder: Path, streamed: bool) -> dict[str, float]:
    """One epoch after a short one that compiles; the seconds, the last loss and the peak memory."""
    arrays = tuple(np.load(folder / f"{name}.npy", mmap_mode="r" if streamed else None) for name in "xy")
    optimizer = optax.sgd(0.1)
    state = train.init_state(fcfunc.init(jax.random.key(0), DIMS), optimizer, jax.random.key(1))
    epoch = train.make_train_epoch(loss_fn, optimizer, BATCH, donate=False)
    if streamed:
        data = stream.from_arrays(arrays, chunk_size=CHUNK)
        warm = stream.Stream(min(CHUNK, data.examples), CHUNK, data.read)
    else:
        data = warm = jax.tree.map(jnp.asarray, arrays)
        del arrays
    jax.block_until_ready(epoch(state, warm))
    start = time.perf_counter()
    _, metrics = epoch(state, data)
    loss = float(metrics["loss"][-1])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": loss, "peak": peak_memory()}


def peak_memory() -> int:
    """The largest resident set of this process, in bytes; that of `resource` includes the parent's before the fork."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_process(folder: Path, streamed: bool) -> dict[str, float]:
    """`once` in a new process."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--once", json.dumps([str(folder), streamed])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=FOLDER).stdout)


def main() -> None:
    """Prints the table; writes the page if all rows were used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        folder, streamed = json.loads(args.once)
        return print(json.dumps(once(Path(folder), streamed)))
    with tempfile.TemporaryDirectory() as name:
        generate(Path(name), args.rows)
        found = [(in_process(Path(name), True), in_process(Path(name), False)) for _ in range(args.turns)]
    lines = []
    for title, runs in zip(("a stream", "in memory"), zip(*found, strict=True), strict=True):
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = [memory["seconds"] / run["seconds"] for run, (_, memory) in zip(runs, found, strict=True)]
        speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        peak = max(run["peak"] for run in runs) / 1e9
        lines.append(f"| {title} | {seconds:.1f} | {args.rows / seconds:,.0f} | {speed} | {peak:.2f} |")
    page = PAGE_TEXT.format(
        rows=args.rows, features=FEATURES, gigabytes=args.rows * (4 * FEATURES + 4) / 1e9,
        dims="-".join(map(str, DIMS)),
        batch=BATCH, chunk=CHUNK, cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(),
        versions=versions(), lines="\n".join(lines),
    )  # fmt: skip
    print(page)
    if args.rows == ROWS:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
