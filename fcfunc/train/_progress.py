"""The progress of `fcfunc.train.fit`: a bar in a terminal, a line per epoch elsewhere."""

import sys
import time
import weakref

import jax
import jax.numpy as jnp

BAR = "{l_bar}{bar}| {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


class ProgressBar:
    """Epochs done, with fractions: the compiled epoch reports its steps, the host's loop the metrics.

    A bar redraws its line, which only a terminal can show; in a file or a pipe each epoch is a line of its own.
    """

    def __init__(self, epochs: int, steps: int, first_step: int):
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("fit: progress=True needs tqdm, which is not installed; pip install tqdm") from None
        self.redraws = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=epochs, unit="epoch", dynamic_ncols=True, bar_format=BAR, disable=not self.redraws)
        self.steps, self.first_step = steps, first_step
        self.total, self.epochs, self.started, self.drawn = epochs, 0, time.perf_counter(), 0.0
        self.moved = False
        self.number = next(number for number in range(len(OPEN) + 1) if number not in OPEN)
        OPEN[self.number] = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        jax.effects_barrier()
        self.bar.close()

    def address(self) -> dict[str, jax.Array]:
        """What a compiled epoch is given to report by: which bar, and after how many steps.

        That is five times a second, as fast as the last epochs were.
        """
        rate = self.epochs * self.steps / (time.perf_counter() - self.started)
        return {"bar": jnp.int32(self.number), "every": jnp.int32(max(1, min(rate / 5, self.steps)))}

    def move(self, step: int):
        """Moves the bar to a step."""
        now = time.perf_counter()
        if now - self.drawn > 0.1:  # the first epoch reports each step
            self.drawn = now
            self.draw(round((step - self.first_step) / self.steps, 2))

    def draw(self, done: float):
        """Draws the bar at a number of epochs; the clock of its estimate starts with the first of them."""
        if not self.moved:  # what came before was compilation
            self.moved, self.bar.initial = True, done
            self.bar.start_t = self.bar.last_print_t = time.time()
        self.bar.n = done
        self.bar.refresh()

    def show(self, record: dict[str, float]):
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


OPEN: weakref.WeakValueDictionary[int, ProgressBar] = weakref.WeakValueDictionary()
"""The bars that may be reported to, by number: a compiled epoch outlives the bar of its first run."""


def report(address: dict[str, jax.Array], step: jax.Array) -> None:
    """In a compiled epoch: has the host move the bar, where a report is due; nobody waits for it."""
    due = step % address["every"] == 0
    jax.lax.cond(due, lambda *a: jax.debug.callback(_move, *a), lambda *a: None, address["bar"], step)


def _move(number, step):
    bar = OPEN.get(int(number))
    if bar is not None:
        bar.move(int(step))
