"""Measures what saving every 100 steps costs; writes docs/background/saving-cost.md.

python -m benchmarks.saving
python -m benchmarks.saving --only small    # only printed
"""

import argparse
import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.memory import ratio
from benchmarks.peers import Task, classifier_loss
from benchmarks.training import digits, fashion, small, versions
from fcfunc import checkpoint, train

PAGE = Path(__file__).parents[1] / "docs" / "background" / "saving-cost.md"
EVERY, TURNS = 100, 7


def wide() -> Task:
    """A network of 5.8 million parameters, for 117 steps."""
    return fashion((784, 2048, 2048, 10), 512)


TASKS: dict[str, tuple[str, Callable[[], Task], int]] = {
    "small": ("4-32-32-2, batch 32, Adam", small, 400),
    "digits": ("64-128-10, batch 32, SGD", digits, 400),
    "fashion": ("784-128-10, batch 128, SGD", fashion, 12),
    "wide": ("784-2048-2048-10, batch 512, SGD", wide, 2),
}
"""Title, task, and epochs of a run."""

PAGE_TEXT = """# The cost of saving

How much longer `train.fit` takes with a `checkpoint.Saver` for which a checkpoint is due after every {every} steps and
at the end of each epoch. Written by `python -m benchmarks.saving` on {cores} CPU cores ({machine}), Python {python}:
{versions}.

Each time is relative to the same call with a callback that does nothing in place of the saver: the median over {turns}
alternating runs, with the lowest and the highest. It includes the wait for the last checkpoint at the end of `fit`.
"Due" and "written" are numbers of checkpoints: with `share=0.05`, the default, the thread writes for at most a
twentieth of the time, and a newer checkpoint replaces the one that waits. With `share=1` it writes as fast as it can.

| network | steps | time, `share=0.05` | due | written | time, `share=1` | written |
|---|---|---|---|---|---|---|
{lines}
"""


def run(task: Task, epochs: int, data, share: float | None) -> tuple[float, int, int]:
    """The seconds of a run, the number of checkpoints that were due, and of those that were written."""
    written: list[None] = []
    state = train.init_state(task.params, task.optimizer, jax.random.key(1))
    fit = functools.partial(train.fit, classifier_loss, task.optimizer, state, data)
    options = {"epochs": epochs, "batch_size": task.batch_size, "every": EVERY}
    with tempfile.TemporaryDirectory() as folder:
        if share is None:
            options["on_steps"] = lambda state: written.append(None)
        else:
            options["saver"] = checkpoint.Saver(folder, share=share, keep=10**6)
        start = time.perf_counter()
        fit(**options)
        seconds = time.perf_counter() - start
        return seconds, len(written), len(checkpoint.steps(folder))


def row(title: str, make: Callable[[], Task], epochs: int) -> str:
    """The row of one network."""
    task = make()
    data = jnp.asarray(task.x), jnp.asarray(task.y)
    ways: dict[str, float | None] = {"nothing": None, "0.05": 0.05, "1": 1.0}
    for share in ways.values():
        run(task, 1, data, share)
    found: dict[str, list] = {way: [] for way in ways}
    for turn in range(TURNS):
        names = list(ways)
        for way in names[turn % 3 :] + names[: turn % 3]:
            found[way].append(run(task, epochs, data, ways[way]))
    seconds = {way: [r[0] for r in runs] for way, runs in found.items()}
    written = {way: sorted(r[2] for r in runs)[TURNS // 2] for way, runs in found.items()}
    steps = epochs * -(-len(task.x) // task.batch_size)
    cells = [ratio(seconds["0.05"], seconds["nothing"]), found["nothing"][0][1], written["0.05"]]
    cells += [ratio(seconds["1"], seconds["nothing"]), written["1"]]
    return f"| {title} | {steps:,} | {' | '.join(map(str, cells))} |"


def main() -> None:
    """Prints the rows; writes the page if all of them were requested."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help=f"some of {','.join(TASKS)}, without writing the page")
    args = parser.parse_args()
    lines = []
    for name in args.only.split(",") if args.only else TASKS:
        lines.append(row(*TASKS[name]))
        print(lines[-1], flush=True)
    if not args.only:
        page = PAGE_TEXT.format(
            every=EVERY, turns=TURNS, cores=os.cpu_count(), machine=platform.machine(),
            python=platform.python_version(), versions=versions(), lines="\n".join(lines),
        )  # fmt: skip
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
