"""The progress of `fcfunc.train.fit`: a bar in a terminal, a line per epoch elsewhere."""

import sys
import time
import weakref

import jax
import jax.numpy as jnp

from fcfunc import _arguments

BAR = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


class ProgressBar:
    """A bar of completed epochs, with fractions: the compiled epoch reports its steps, and the host loop the metrics.

    Only a terminal can show a line that is redrawn; in a file or a pipe, each epoch prints a line.
    """

    def __init__(self, epochs: int, steps: int, first_step: int, done: int = 0):
        tqdm = _arguments.library("fit: progress=True", "tqdm", "tqdm").tqdm
        self.redraws = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", dynamic_ncols=True, bar_format=BAR, disable=not self.redraws)
        self.steps, self.first_step = steps, first_step
        self.total, self.epochs, self.started, self.drawn = epochs, done, time.perf_counter(), 0.0
        self.done_before, self.moved = done, False
        self.number = next(number for number in range(len(_open_bars) + 1) if number not in _open_bars)
        _open_bars[self.number] = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        jax.effects_barrier()
        self.bar.close()

    def handle(self) -> dict[str, jax.Array]:
        """What a compiled epoch needs to report five times a second: the bar's number and the steps between reports."""
        rate = (self.epochs - self.done_before) * self.steps / (time.perf_counter() - self.started)
        return {"bar": jnp.int32(self.number), "every": jnp.int32(max(1, min(rate / 5, self.steps)))}

    def to_step(self, step: int):
        """Moves the bar to a step."""
        now = time.perf_counter()
        if now - self.drawn > 0.1:  # the first epoch reports every step
            self.drawn = now
            self.draw(round((step - self.first_step) / self.steps, 2))

    def draw(self, done: float):
        """Draws the bar at a number of epochs; the clock for the remaining time starts at the first call."""
        if not self.moved:  # the time before was compilation
            self.moved, self.bar.initial = True, done
            self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.n = done
        self.bar.refresh()

    def end_epoch(self, record: dict[str, float]):
        """Moves the bar to the end of an epoch, with its metrics."""
        jax.effects_barrier()
        self.epochs += 1
        shown = {name: f"{value:.4g}" for name, value in record.items() if name not in ("epoch", "step", "seconds")}
        if self.redraws:
            self.bar.set_postfix(shown, refresh=False)
            self.draw(self.epochs)
        else:
            metrics = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"epoch {self.epochs}/{self.total}: {metrics} ({record['seconds']:.2f} s)", file=sys.stderr)


_open_bars: weakref.WeakValueDictionary[int, ProgressBar] = weakref.WeakValueDictionary()
"""The open bars by number, because a compiled epoch outlives the bar of its first run."""


def report(handle: dict[str, jax.Array], step: jax.Array) -> None:
    """In a compiled epoch: tells the host to move the bar if a report is due, without waiting for it."""
    due = step % handle["every"] == 0
    jax.lax.cond(due, lambda *a: jax.debug.callback(_move, *a), lambda *a: None, handle["bar"], step)


def _move(number, step):
    bar = _open_bars.get(int(number))
    if bar is not None:
        bar.to_step(int(step))
