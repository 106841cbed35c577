"""Measures what saving every 100 steps costs; writes docs/background/saving-cost.md.

python -m benchmarks.saving
python -m benchmarks.saving --only small    # only printed
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.peers import Task, classifier_loss
from benchmarks.timing import ratio
from benchmarks.training import digits, fashion, small, versions
from fcfunc import checkpoint, train

PAGE = Path(__file__).parents[1] / "docs" / "background" / "saving-cost.md"
EVERY, TURNS = 100, 5


def wide() -> Task:
    """A network of 5.8 million parameters, for 117 steps."""
    return fashion((784, 2048, 2048, 10), 512)


TASKS: dict[str, tuple[str, Callable[[], Task], int]] = {
    "small": ("4-32-32-2, batch 32, Adam", small, 2000),
    "digits": ("64-128-10, batch 32, SGD", digits, 4000),
    "fashion": ("784-128-10, batch 128, SGD", fashion, 20),
    "wide": ("784-2048-2048-10, batch 512, SGD", wide, 1),
}
"""Title, task, and epochs of a run."""

PAGE_TEXT = """# The cost of saving

How much longer `train.fit` takes with a `checkpoint.Saver` for which a checkpoint is due after every {every} steps and
at the end of each epoch. Written by `python -m benchmarks.saving` on {cores} CPU cores ({machine}), Python {python}:
{versions}.

Each time is relative to the same call with a callback that does nothing in place of the saver: the median over {turns}
alternating runs, with the lowest and the highest. It includes the wait for the last checkpoint at the end of `fit`.
"Due" and "written" are numbers of checkpoints: by default, the thread writes for at most {share:.0%} of the time, and a
newer checkpoint replaces the one that waits.

| network | steps | seconds | time with a saver | due | written |
|---|---|---|---|---|---|
{lines}

A checkpoint takes longer to write the larger it is, about 0.05 s for the smallest here; a run that is much shorter than
these pays for the wait at its end.
"""


def run(task: Task, epochs: int, data, saves: bool) -> tuple[float, int]:
    """The seconds of a run, and the number of checkpoints that were written or, without a saver, were due."""
    due: list[None] = []
    state = train.init_state(task.params, task.optimizer, jax.random.key(1))
    options = {"epochs": epochs, "batch_size": task.batch_size, "every": EVERY}
    with tempfile.TemporaryDirectory() as folder:
        if saves:
            options["saver"] = checkpoint.Saver(folder, keep=10**6)
        else:
            options["on_steps"] = lambda state: due.append(None)
        start = time.perf_counter()
        train.fit(classifier_loss, task.optimizer, state, data, **options)
        return time.perf_counter() - start, len(due) or len(checkpoint.steps(folder))


def row(title: str, make: Callable[[], Task], epochs: int) -> str:
    """The row of one network."""
    task = make()
    data = jnp.asarray(task.x), jnp.asarray(task.y)
    for saves in (False, True):
        run(task, 1, data, saves)
    found: dict[bool, list] = {False: [], True: []}
    for turn in range(TURNS):
        for saves in (turn % 2 == 0, turn % 2 == 1):
            found[saves].append(run(task, epochs, data, saves))
    seconds = {saves: [r[0] for r in runs] for saves, runs in found.items()}
    steps = epochs * -(-len(task.x) // task.batch_size)
    cells = [f"{statistics.median(seconds[False]):.1f}", ratio(seconds[True], seconds[False])]
    cells += [found[False][0][1], statistics.median(r[1] for r in found[True])]
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
            every=EVERY, turns=TURNS, share=checkpoint.Saver.share, cores=os.cpu_count(), machine=platform.machine(),
            python=platform.python_version(), versions=versions(), lines="\n".join(lines),
        )  # fmt: skip
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
