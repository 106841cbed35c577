"""Measures a training step against width, depth, batch size and examples; writes docs/background/scaling.md.

python -m benchmarks.scaling
python -m benchmarks.scaling --largest 512    # smaller, only printed
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import fcfunc
from benchmarks.peers import Task, classifier_loss
from benchmarks.training import versions, with_matmuls
from fcfunc import train

matplotlib.use("agg")

FOLDER = Path(__file__).parents[1] / "docs" / "background"

INTRODUCTION = """# Scaling

Time and memory of a training step against the width, the depth, the batch size and the number of examples. Written by
`python -m benchmarks.scaling` on {cores} CPU cores ({machine}), Python {python}: {versions}. Nothing here was measured
on a GPU.

Every point is an epoch of `train.make_train_epoch` with SGD on random data, divided by its number of steps: the median
of seven alternating runs. The limit of the time is the matmuls of the steps alone, at the same shapes and in the same
run. Memory is that of the compiled program: the state, the temporaries and, in the last column, the data. Its limit is
the parameters and the activations of a batch, one per layer, in float32.

![Eight panels: time per step and memory against width, depth, batch size and number of examples, each with its
limit](scaling.png)
"""


class Point(NamedTuple):
    """What is measured at one size, with the limits."""

    size: int
    milliseconds: float
    limit_milliseconds: float
    megabytes: float
    limit_megabytes: float
    compilation: float


def random_task(dims: list[int], batch_size: int, examples: int) -> Task:
    """Standard normal inputs and random labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((examples, dims[0]), np.float32)
    y = rng.integers(0, dims[-1], examples, dtype=np.int32)
    return Task(dims, batch_size, False, 0.01, x, y, x[:1], y[:1])


def measure(size: int, task: Task, stacked: bool = False, with_data: bool = False) -> Point:
    """One point, from an epoch of whole batches."""
    params = fcfunc.stack(task.params) if stacked else task.params
    data = jnp.asarray(task.x), jnp.asarray(task.y)
    state = train.init_state(params, task.optimizer, jax.random.key(1))
    epoch = train.make_train_epoch(classifier_loss, task.optimizer, task.batch_size)
    start = time.perf_counter()
    program = epoch.lower(state, data).compile()
    compilation = time.perf_counter() - start
    matmuls, _ = with_matmuls(task)
    steps, box, seconds = len(task.x) // task.batch_size, [state], ([], [])

    def run():
        box[0], metrics = program(box[0], data)
        jax.block_until_ready(metrics)

    for turn in range(8):
        for timed, function in zip(seconds, (run, functools.partial(matmuls, 1)), strict=True):
            start = time.perf_counter()
            function()
            timed += [time.perf_counter() - start] if turn else []
    found = program.memory_analysis()
    in_data = sum(a.nbytes for a in data)
    memory = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    memory += found.temp_size_in_bytes - (0 if with_data else in_data)
    weights = sum(a.size for a in jax.tree.leaves(params))
    least = 4 * (weights + task.batch_size * sum(task.dims)) + (in_data if with_data else 0)
    per_step = [1e3 * statistics.median(s) / steps for s in seconds]
    return Point(size, *per_step, memory / 1e6, least / 1e6, compilation)


def powers(first: int, last: int, factor: int) -> list[int]:
    """`first`, `first * factor`, ... up to `last`."""
    return [n for i in range(30) if (n := first * factor**i) <= last]


def widths(largest: int) -> dict[str, list[Point]]:
    """Three layers of equal width and ten classes; batches of 128."""
    sizes = powers(32, min(largest, 4096), 2)
    return {"": [measure(n, random_task([n, n, n, 10], 128, 128 * max(4, 2048 // n))) for n in sizes]}


def depths(largest: int) -> dict[str, list[Point]]:
    """Layers of width 256, one after the other or stacked under a scan; batches of 128."""
    sizes = powers(2, min(largest, 64), 2)
    of = lambda n, stacked: measure(n, random_task([256] * (n + 1) + [10], 128, 128 * 16), stacked)  # noqa: E731
    return {name: [of(n, name == "stacked") for n in sizes] for name in ("", "stacked")}


def batch_sizes(largest: int) -> dict[str, list[Point]]:
    """A network 256-256-256-10."""
    sizes = powers(1, min(largest, 8192), 4)
    return {"": [measure(n, random_task([256, 256, 256, 10], n, n * max(4, 1024 // n))) for n in sizes]}


def numbers_of_examples(largest: int) -> dict[str, list[Point]]:
    """A network 64-64-10; batches of 128."""
    sizes = powers(1024, 2**20 if largest >= 4096 else 4096, 4)
    return {"": [measure(n, random_task([64, 64, 10], 128, n), with_data=True) for n in sizes]}


AXES: dict[str, tuple[Callable, str]] = {
    "width": (widths, "w-w-w-10, batches of 128"),
    "depth": (depths, "width 256, batches of 128"),
    "batch size": (batch_sizes, "256-256-256-10"),
    "examples": (numbers_of_examples, "64-64-10, batches of 128"),
}


def draw(found: dict[str, dict[str, list[Point]]], path: Path) -> None:
    """Time above, memory below, one column per axis."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(found), figsize=(13, 6), layout="constrained", sharex="col")
    for (axis, lines), column in zip(found.items(), panels.T, strict=True):
        for panel, value, limit in zip(column, (1, 3), (2, 4), strict=True):
            for (name, points), marker in zip(lines.items(), "os", strict=False):
                label = f"fcfunc, {name}" if name else "fcfunc"
                panel.plot([p.size for p in points], [p[value] for p in points], marker=marker, ms=4, label=label)
            points = lines[""]
            panel.plot([p.size for p in points], [p[limit] for p in points], "k--", lw=1, label="limit")
            panel.set_xscale("log", base=2 if points[-1].size < 100 else 10)
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.yaxis.set_major_formatter("{x:g}")
            for line in (panel.xaxis, panel.yaxis):
                line.set_minor_formatter("")
            panel.grid(alpha=0.3)
        low, high = column[0].get_ylim()
        column[0].set_ylim(min(low, high / 30), high)  # a constant time looks constant
        column[0].set_title(AXES[axis][1], fontsize=10)
        column[1].set_xlabel(axis)
        column[0].legend(fontsize=8)
    panels[0, 0].set_ylabel("time per step, ms")
    panels[1, 0].set_ylabel("memory, MB")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def table(axis: str, lines: dict[str, list[Point]]) -> list[str]:
    """All points of one axis."""
    header = [axis, "ms per step", "limit", "share", "MB", "limit", "seconds to trace and compile"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, points in lines.items():
        for p in points:
            share = p.limit_milliseconds / p.milliseconds
            title = f"{p.size:,}{f', {name}' if name else ''}"
            rows.append(
                f"| {title} | {p.milliseconds:.3f} | {p.limit_milliseconds:.3f} | {share:.2f} "
                f"| {p.megabytes:.1f} | {p.limit_megabytes:.1f} | {p.compilation:.2f} |"
            )
    return rows


NOTES = """
## Reading the curves

- **Width.** From width 512 on, a step takes little more than its matmuls. Below, the calls of the kernels count.
- **Depth.** Time and memory are proportional to the depth. Stacked layers (`fcfunc.stack`) compile in the same time at
  any depth, but their steps take 1.4 times as long on a CPU, where the loop copies each layer's weights. Without
  stacking, 64 layers compile in twice the time of 2.
- **Batch size.** Small batches are limited by the calls of the kernels and by reading the weights, large ones by
  arithmetic.
- **Examples.** The time per step does not depend on the number of examples, nor does the memory besides the data.
"""


def main() -> None:
    """Prints the tables; writes the page and its picture if nothing was restricted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--largest", type=int, default=8192, help="largest width, depth and batch size")
    args = parser.parse_args()
    page = INTRODUCTION.format(
        cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(), versions=versions()
    )
    found = {}
    for axis, (make, network) in AXES.items():
        found[axis] = make(args.largest)
        rows = table(axis, found[axis])
        print("\n".join(rows), flush=True)
        page += "\n".join(["", f"## {axis.capitalize()}: {network}", "", *rows, ""])
    if args.largest >= 8192:
        draw(found, FOLDER / "scaling.png")
        (FOLDER / "scaling.md").write_text(page + NOTES)


if __name__ == "__main__":
    main()
